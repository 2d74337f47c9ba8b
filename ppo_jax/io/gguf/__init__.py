"""A GGUF file as a Hugging Face folder: config.json, model.safetensors, tokenizer.

GGUF is the format of llama.cpp: weights, mostly quantised, and tokenizer in one file. Converted
once, by `convert.convert_gguf`, it is read by the same code as everything else.
"""
