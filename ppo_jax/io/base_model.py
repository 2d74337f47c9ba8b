"""The base model of a run where the run makes it: with a trimmed vocabulary, or from scratch."""

import dataclasses
import itertools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from ppo_jax.config.run import ModelSettings, ScratchSettings
from ppo_jax.core.types import Params
from ppo_jax.data.atomic import atomic_folder
from ppo_jax.data.records import load_texts
from ppo_jax.io import huggingface as hf
from ppo_jax.io import tokenizers as vocabulary
from ppo_jax.io.hub import model_folder
from ppo_jax.io.tokenizers import trim_params, trim_vocabulary
from ppo_jax.models.build import policy_network
from ppo_jax.models.config import ModelConfig


def base_path(settings: ModelSettings, folder: Path) -> str:
    """The path of the base model: `model.path`, or the folder that `prepare_base` writes."""
    return str(folder) if settings.vocabulary_data else settings.path


def prepare_base(settings: ModelSettings, folder: Path, seed: int):
    """Write a base model with a trimmed vocabulary, or from scratch, as a Hugging Face folder.

    It is written once; without `model.vocabulary_data` nothing is written, and `model.path` is
    read where it is.

    Args:
        settings: the model section.
        folder: to write to.
        seed: of the weights from scratch.
    """
    if settings.vocabulary_data and not folder.is_dir():
        tokenizer = None if settings.scratch else base_tokenizer(settings)
        records = load_texts(settings.vocabulary_data, tokenizer, left_out=[])
        rows = [[text for text, _ in row] for record in records for row in record.rows]
        texts, make = [text for row in rows for text in row], scratch_model
        if settings.scratch is None:
            # A row is tokenised up to each border as a whole, and what follows perhaps for itself.
            texts += [text for row in rows if len(row) > 1 for text in itertools.accumulate(row)]
            make = trimmed_model
        with atomic_folder(folder) as new:
            make(settings, new, texts, seed)


def base_tokenizer(settings: ModelSettings) -> Any:
    return vocabulary.with_chat(vocabulary.load_tokenizer(settings.path), settings)


def trimmed_model(settings: ModelSettings, folder: Path, texts: list[str], seed: int):
    """A pretrained model with the tokens that the texts use, and those that any text needs."""
    del seed  # nothing is drawn
    config, params = hf.load_policy(settings.path)
    tokenizer = base_tokenizer(settings)
    try:
        tokenizer, kept = trim_vocabulary(tokenizer, texts)
    except ValueError as error:
        what = f"model.vocabulary_data must be '' for {settings.path}"
        raise ValueError(f"{what}: {error}") from error
    raw = hf.read_config_json(model_folder(settings.path))
    new_id = {old: new for new, old in enumerate(kept.tolist())}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if isinstance(raw.get(name), int):
            raw[name] = new_id.get(raw[name])
        elif isinstance(raw.get(name), list):
            raw[name] = [new_id[i] for i in raw[name] if i in new_id]
    config = dataclasses.replace(config, vocab_size=len(kept))
    raw["vocab_size"] = len(kept)
    write_folder(folder, raw, config, trim_params(params, kept), tokenizer)


def scratch_model(settings: ModelSettings, folder: Path, texts: list[str], seed: int):
    """A small Llama with random weights and a tokenizer of its own."""
    tokenizer = vocabulary.train_tokenizer(texts, settings.scratch.vocab_size)
    raw = llama_config(settings.scratch, len(tokenizer), tokenizer.eos_token_id)
    config = hf.read_config(raw)
    params = policy_network(config).init(jax.random.key(seed))
    write_folder(folder, raw, config, jax.tree.map(np.asarray, params), tokenizer)


def llama_config(scratch: ScratchSettings, vocab_size: int, eos_token_id: int) -> dict:
    """The config.json of a model from scratch."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": scratch.embed_dim,
        "intermediate_size": scratch.mlp_dim,
        "num_hidden_layers": scratch.num_layers,
        "num_attention_heads": scratch.num_heads,
        "num_key_value_heads": scratch.num_heads,
        "max_position_embeddings": scratch.max_length,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "eos_token_id": eos_token_id,
        "torch_dtype": "float32",
    }


def save_tensors(tensors: Mapping[str, np.ndarray], path: Path):
    """Write a safetensors file that others may read as any new file: its own mode is 0600."""
    save_file(dict(tensors), path, metadata={"format": "pt"})
    like = path.with_name(path.name + ".tmp")
    like.touch()
    shutil.copymode(like, path)
    like.unlink()


def write_folder(folder: Path, raw: dict, config: ModelConfig, params: Params, tokenizer: Any):
    """A policy as a Hugging Face folder; `raw` is its config.json."""
    tensors = hf.params_to_hf(config, raw["model_type"], params)
    save_tensors(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    vocabulary.save_tokenizer(tokenizer, folder)
