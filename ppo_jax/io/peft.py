"""A trained adapter as a folder that `peft` loads.

Dimension key: I inputs, O outputs of a module; r rank.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.core.types import Params
from ppo_jax.io.base_model import save_tensors
from ppo_jax.io.huggingface import leaves_by_layer
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.families import family_of

PREFIX = "base_model.model."


def write_adapter(
    folder: Path, config: ModelConfig, family: str, adapters: Params, *, base: str, dtype: str
) -> None:
    """Write adapter_config.json and adapter_model.safetensors.

    `adapters` are `lora_a` and `lora_b` of every layer, and nothing else; `base` is the folder or
    hub id of the model that they adapt; `family` is one of `models.families.FAMILIES`.
    """
    tensors = peft_tensors(config, family, adapters)
    rank = jax.tree.leaves(adapters)[0].shape[-1]  # of a lora_a, which comes before its lora_b
    content = adapter_config(tensors, family, alpha=config.lora_alpha, rank=rank, base=base)
    (folder / "adapter_config.json").write_text(json.dumps(content, indent=2) + "\n")
    cast = {name: tensor.astype(jnp.dtype(dtype)) for name, tensor in tensors.items()}
    save_tensors(cast, folder / "adapter_model.safetensors")


def peft_tensors(config: ModelConfig, family: str, adapters: Params) -> dict[str, np.ndarray]:
    """Adapters under peft's names: lora_A.weight [r, I], lora_B.weight [O, r].

    GPT-2 has query, key and value side by side in one matrix. With adapters of n of them that has
    one of rank n r, which is exact; of query and value,

        A = [A_q; A_v],  B = [[B_q, 0], [0, 0], [0, B_v]].
    """
    rows = family_of(family).tensors
    modules: dict[str, dict] = {}
    for path, layer, leaf in leaves_by_layer(config, adapters):
        projection, _, name = path.rpartition(".")
        row = rows[f"{projection}.kernel"]
        rank = leaf.shape[-1 if name == "lora_a" else 0]
        matrix = np.asarray(leaf).reshape((-1, rank) if name == "lora_a" else (rank, -1)).T
        module = row.name.format(layer).removesuffix(".weight")
        modules.setdefault(module, {}).setdefault(row.third, {})[name] = matrix
    tensors = {}
    for module, thirds in modules.items():
        whole = thirds.get(None)
        a, b = (whole["lora_a"], whole["lora_b"]) if whole else join_thirds(thirds)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(a)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(b)
    return tensors


def join_thirds(thirds: Mapping[int, Mapping[str, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """One pair for a matrix of three parts, some of which have pairs of their own."""
    adapted = sorted(thirds)
    a = np.concatenate([thirds[third]["lora_a"] for third in adapted])
    size, rank = thirds[adapted[0]]["lora_b"].shape
    b = np.zeros((3, size, len(adapted), rank), a.dtype)
    for i, third in enumerate(adapted):
        b[third, :, i] = thirds[third]["lora_b"]
    return a, b.reshape(3 * size, -1)


def adapter_config(
    tensors: Mapping[str, np.ndarray], family: str, *, alpha: float, rank: int, base: str
) -> dict[str, Any]:
    """The content of adapter_config.json; what it does not name has peft's default.

    `alpha` and `rank` are those of the training. Modules of several pairs have a higher rank, and
    an alpha that keeps alpha / r; where only some do, these are in the patterns.
    """
    ranks = {
        short_name(name.removesuffix(".lora_A.weight"), family): tensor.shape[0]
        for name, tensor in tensors.items()
        if name.endswith(".lora_A.weight")
    }
    least = min(ranks.values())
    higher = {name: own for name, own in ranks.items() if own != least}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": least,
        "lora_alpha": alpha * least / rank,
        "rank_pattern": higher,
        "alpha_pattern": {name: alpha * own / rank for name, own in higher.items()},
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": not family_of(family).linear_is_transposed,  # matrices stored as [I, O]
        "inference_mode": True,
    }


def short_name(module: str, family: str) -> str:
    """The end of a module's name that no other kind of module of a layer has."""
    rows = family_of(family).tensors
    kernels = [row.name for path, row in rows.items() if path.endswith(".kernel")]
    ends = Counter(name.split(".")[-2] for name in set(kernels))
    *_, parent, last = module.split(".")
    return last if ends[last] == 1 else f"{parent}.{last}"
