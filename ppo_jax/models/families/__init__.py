"""Model families: what each calls its options and tensors in a checkpoint.

Imports `models` and `core`. Start with `families`; `presets` has published shapes for plans.
"""
