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
from ppo_jax.io.safetensors import join_fused
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.families import family_of
from ppo_jax.models.families.base import Fusion

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

    Some families have projections side by side in one matrix, as GPT-2 has query, key and value.
    With adapters of n of them that has one of rank n r, which is exact; of query and value,

        A = [A_q; A_v],  B = [[B_q, 0], [0, 0], [0, B_v]].
    """
    rows = family_of(family).tensors
    modules: dict[str, tuple[Fusion | None, dict]] = {}
    for path, layer, leaf in leaves_by_layer(config, adapters):
        projection, _, name = path.rpartition(".")
        row = rows[f"{projection}.kernel"]
        rank = leaf.shape[-1 if name == "lora_a" else 0]
        matrix = np.asarray(leaf).reshape((-1, rank) if name == "lora_a" else (rank, -1)).T
        module = row.name.format(layer).removesuffix(".weight")
        fusion, pairs = modules.setdefault(module, (row.fusion, {}))
        pairs.setdefault(f"{projection}.kernel", {})[name] = matrix
    tensors = {}
    for module, (fusion, pairs) in modules.items():
        if fusion is None:
            ((a, b),) = ((pair["lora_a"], pair["lora_b"]) for pair in pairs.values())
        else:
            a, b = join_adapters(config, fusion, pairs)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(a)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(b)
    return tensors


def join_adapters(
    config: ModelConfig, fusion: Fusion, pairs: Mapping[str, Mapping[str, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """One pair for a fused matrix, some of whose parameters have pairs of their own."""
    adapted = [path for path in fusion.paths if path in pairs]
    a = np.concatenate([pairs[path]["lora_a"] for path in adapted])
    columns = []
    for path in adapted:
        own = pairs[path]["lora_b"].T  # [r, O]
        zeros = (np.zeros((len(own), num_outputs(config, x)), own.dtype) for x in fusion.paths)
        parts = [own if x == path else zero for x, zero in zip(fusion.paths, zeros, strict=True)]
        columns.append(join_fused(fusion, parts, config.head_dim).T)
    return a, np.concatenate(columns, axis=1)


def num_outputs(config: ModelConfig, path: str) -> int:
    """Of a projection that may be part of a fused matrix."""
    heads = {"query": config.num_heads, "key": config.num_kv_heads, "value": config.num_kv_heads}
    name = path.split(".")[-2]
    return heads[name] * config.head_dim if name in heads else config.mlp_dim


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
