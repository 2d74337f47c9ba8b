"""A run from its data to its report.

`run` goes through the stages, `preflight` refuses mistakes before anything is trained, `preview` is
the dry run, `summary` the table at the start, `export` writes Hugging Face folders.
Imports everything but `planner`. Start with `run`.
"""
