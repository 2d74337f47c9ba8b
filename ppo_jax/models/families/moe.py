"""Mixtures of experts: Qwen3-MoE (Qwen3, some of whose layers may be dense), Mixtral (Mistral) and
OLMoE (norms of queries and keys as a whole)."""

import dataclasses

from ppo_jax.models.config import Experts, LayerKind, ModelConfig
from ppo_jax.models.families.base import Family, Json, Tensor, need
from ppo_jax.models.families.llama import (
    LLAMA,
    MLP,
    ROPE,
    SILU,
    TENSORS,
    read_attention_bias,
    read_shape,
    read_window,
    same_window,
    window_of,
    write_shape,
)


def expert_tensors(block: str, gate: str, up: str, down: str) -> dict[str, Tensor]:
    names = dict(gate=gate, up=up, down=down)
    return {"layers.experts.router.kernel": Tensor(f"{block}.gate.weight", transposed=True)} | {
        f"layers.experts.{part}.kernel": Tensor(f"{block}.experts.{{}}.{name}.weight", True)
        for part, name in names.items()
    }


def read_experts(raw: Json, width: str, *, num: int, chosen: int, **more: bool | float) -> Experts:
    """The experts of a config.json, whose width is the option `width`; `num` and `chosen` are those
    of one that has none."""
    names = ("num_experts", "num_local_experts")  # of the hub's files, of those saved since
    given = {raw[name] for name in names if name in raw} or {num}
    if len(given) > 1:
        raise ValueError(f"num_experts and num_local_experts must be equal, got {sorted(given)}")
    return Experts(
        num_experts=given.pop(),
        num_chosen=raw.get("num_experts_per_tok", chosen),
        dim=need(raw, width),
        **more,
    )


def read_qwen3_moe(raw: Json) -> Json:
    fields = read_shape({"num_key_value_heads": 4, **raw}) | read_attention_bias(raw)
    count, step = fields["num_layers"], raw.get("decoder_sparse_step", 1)
    window = read_window({"sliding_window": 4096} | raw) if raw.get("use_sliding_window") else 0
    dense = [i in raw.get("mlp_only_layers", ()) or (i + 1) % step > 0 for i in range(count)]
    kinds = tuple(LayerKind(window=window, dense=x) for x in dense)
    fields |= {"qk_norm": "head", "layer_kinds": kinds}
    if all(dense) or raw.get("num_experts") == 0:
        return fields | {"layer_kinds": (LayerKind(window=window),) * count}
    experts = read_experts(
        {"moe_intermediate_size": 768} | raw,
        "moe_intermediate_size",
        num=128,
        chosen=8,
        normalized=raw.get("norm_topk_prob", False),
        aux_coef=float(raw.get("router_aux_loss_coef", 0.001)),
    )
    return fields | {"experts": experts}


def read_mixtral(raw: Json) -> Json:
    raw = {"rms_norm_eps": 1e-5, "num_key_value_heads": 8, **raw}
    fields, coef = read_shape(raw, theta=1e6), float(raw.get("router_aux_loss_coef", 0.001))
    how = dict(num=8, chosen=2, normalized=True, aux_coef=coef)
    experts = read_experts(raw, "intermediate_size", **how)
    return fields | same_window(raw, fields["num_layers"]) | {"experts": experts}


def read_olmoe(raw: Json) -> Json:
    fields = read_shape({"rms_norm_eps": 1e-5, **raw}) | read_attention_bias(raw)
    normalized, coef = raw.get("norm_topk_prob", False), raw.get("router_aux_loss_coef", 0.01)
    how = dict(num=64, chosen=8, normalized=normalized, aux_coef=float(coef))
    return fields | {"qk_norm": "whole", "experts": read_experts(raw, "intermediate_size", **how)}


def write_moe(config: ModelConfig, num_experts: str) -> Json:
    """What these families share, with their name of the number of experts."""
    if (experts := config.experts) is None:  # then it is the model of another family
        return write_shape(config)
    return write_shape(config) | {
        num_experts: experts.num_experts,
        "num_experts_per_tok": experts.num_chosen,
        "norm_topk_prob": experts.normalized,
        "router_aux_loss_coef": experts.aux_coef,
    }


def write_qwen3_moe(config: ModelConfig) -> Json:
    kinds = [config.kind_of(i) for i in range(config.num_layers)]
    windows = {"use_sliding_window": True, "sliding_window": window_of(config)}
    return write_moe(config, "num_experts") | {
        "attention_bias": config.attention_output_bias,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, kind in enumerate(kinds) if kind.dense],
        "moe_intermediate_size": config.experts.dim if config.experts else None,
        **(windows if window_of(config) else {}),
    }


def write_mixtral(config: ModelConfig) -> Json:
    raw = write_moe(config, "num_local_experts") | {"sliding_window": window_of(config)}
    raw.pop("norm_topk_prob", None)  # it always does
    return raw


def write_olmoe(config: ModelConfig) -> Json:
    return write_moe(config, "num_experts") | {"attention_bias": config.attention_output_bias}


OPTIONS = ROPE | {"num_experts", "num_local_experts", "num_experts_per_tok"}

QWEN3_MOE = Family(
    name="qwen3_moe",
    hf_class="Qwen3Moe",
    tensors=TENSORS | expert_tensors(MLP, "gate_proj", "up_proj", "down_proj"),
    prefix="model.",
    read=read_qwen3_moe,
    write=write_qwen3_moe,
    required={"hidden_act": SILU},
    understood=OPTIONS
    | {"moe_intermediate_size", "use_sliding_window", "sliding_window", "max_window_layers"},
)
MIXTRAL = dataclasses.replace(
    LLAMA,
    name="mixtral",
    hf_class="Mixtral",
    tensors=TENSORS | expert_tensors("model.layers.{}.block_sparse_moe", "w1", "w3", "w2"),
    read=read_mixtral,
    write=write_mixtral,
    required={"hidden_act": SILU, "router_jitter_noise": (0.0,)},
    understood=OPTIONS | {"sliding_window"},
)
OLMOE = dataclasses.replace(
    QWEN3_MOE,
    name="olmoe",
    hf_class="Olmoe",
    read=read_olmoe,
    write=write_olmoe,
    required={"hidden_act": SILU, "clip_qkv": (None,)},
    understood=OPTIONS,
)
