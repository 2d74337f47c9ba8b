"""The Transformer behind `Network`: GPT-2, Llama and Qwen families.

`build` makes policy, value and reward networks of a `ModelConfig`; `lora` and `partition` say which
parameters are trained; `families` maps checkpoints. Pure: imports `core` alone.
Start with `build`, then `transformer`.
"""
