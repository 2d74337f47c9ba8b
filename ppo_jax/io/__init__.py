"""Checkpoints, model formats and folders on disk.

One file a third party: `checkpoints` (Orbax), `huggingface` and `safetensors`, `gguf`, `peft`,
`hub`, `tokenizers`; `run_folder` and `stage_folder` are the layout of a run on disk.
Imports `data` and below. Start with `stage_folder`.
"""
