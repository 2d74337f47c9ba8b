"""Llama, Qwen2 and Qwen3, which differ in biases and in the norm of queries and keys.

Mistral without its window is Llama by another name, Seed-OSS is Qwen2 with options for biases.
"""

import dataclasses

from ppo_jax.models.config import ModelConfig
from ppo_jax.models.families.base import (
    Family,
    Json,
    Tensor,
    linear,
    need,
    read_rope,
    split_heads,
    write_rope,
)

TENSORS = {
    "embed.tokens": Tensor("model.embed_tokens.weight"),
    "layers.attention_norm.scale": Tensor("model.layers.{}.input_layernorm.weight"),
    **linear("layers.attention.query", "model.layers.{}.self_attn.q_proj", transposed=True),
    **linear("layers.attention.key", "model.layers.{}.self_attn.k_proj", transposed=True),
    **linear("layers.attention.value", "model.layers.{}.self_attn.v_proj", transposed=True),
    **linear("layers.attention.output", "model.layers.{}.self_attn.o_proj", transposed=True),
    "layers.attention.query_norm.scale": Tensor("model.layers.{}.self_attn.q_norm.weight"),
    "layers.attention.key_norm.scale": Tensor("model.layers.{}.self_attn.k_norm.weight"),
    "layers.mlp_norm.scale": Tensor("model.layers.{}.post_attention_layernorm.weight"),
    **linear("layers.mlp.gate", "model.layers.{}.mlp.gate_proj", transposed=True),
    **linear("layers.mlp.up", "model.layers.{}.mlp.up_proj", transposed=True),
    **linear("layers.mlp.down", "model.layers.{}.mlp.down_proj", transposed=True),
    "final_norm.scale": Tensor("model.norm.weight"),
    "head.kernel": Tensor("lm_head.weight", transposed=True),
}


def read_shape(raw: Json) -> Json:
    """What these families share, without biases."""
    heads = need(raw, "num_attention_heads")
    rope_theta, rope_scaling = read_rope(raw)
    return {
        "vocab_size": need(raw, "vocab_size"),
        "num_layers": need(raw, "num_hidden_layers"),
        "embed_dim": need(raw, "hidden_size"),
        "num_heads": heads,
        "num_kv_heads": raw.get("num_key_value_heads") or heads,
        "head_dim": raw.get("head_dim") or split_heads(raw, "hidden_size", "num_attention_heads"),
        "mlp_dim": need(raw, "intermediate_size"),
        "max_length": need(raw, "max_position_embeddings"),
        "positions": "rotary",
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "norm": "rmsnorm",
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "mlp": "gated_silu",
        "qkv_bias": False,
        "attention_output_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
        "tie_embeddings": raw.get("tie_word_embeddings", False),
    }


def read_attention_bias(raw: Json) -> Json:
    bias = bool(raw.get("attention_bias", False))
    return {"qkv_bias": bias, "attention_output_bias": bias}


def read_llama(raw: Json) -> Json:
    mlp_bias = bool(raw.get("mlp_bias", False))
    return read_shape(raw) | read_attention_bias(raw) | {"mlp_bias": mlp_bias}


def read_qwen2(raw: Json) -> Json:
    return read_shape(raw) | {"qkv_bias": True}


def read_qwen3(raw: Json) -> Json:
    # Its default head size does not follow from the width.
    raw = raw | {"head_dim": raw.get("head_dim") or 128}
    return read_shape(raw) | read_attention_bias(raw) | {"qk_norm": True}


def read_seed_oss(raw: Json) -> Json:
    raw = {"head_dim": 128, "attention_bias": True} | raw
    return read_llama(raw) | {"attention_output_bias": raw.get("attention_out_bias", False)}


def write_shape(config: ModelConfig) -> Json:
    """What these families share; Qwen2 and Mistral have no other options."""
    return {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_embeddings,
        **write_rope(config.rope_theta, config.rope_scaling),
    }


def write_qwen3(config: ModelConfig) -> Json:
    return write_shape(config) | {"attention_bias": config.attention_output_bias}


def write_llama(config: ModelConfig) -> Json:
    return write_qwen3(config) | {"mlp_bias": config.mlp_bias}


def write_seed_oss(config: ModelConfig) -> Json:
    return write_shape(config) | {
        "attention_bias": config.qkv_bias,
        "attention_out_bias": config.attention_output_bias,
        "mlp_bias": config.mlp_bias,
    }


SILU = ("silu", "swish")
ROPE = frozenset({"rope_theta", "rope_scaling", "rope_parameters"})

LLAMA = Family(
    name="llama",
    hf_class="Llama",
    tensors=TENSORS,
    prefix="model.",
    read=read_llama,
    write=write_llama,
    required={"hidden_act": SILU, "pretraining_tp": (1,)},
    understood=ROPE,
)
QWEN2 = Family(
    name="qwen2",
    hf_class="Qwen2",
    tensors=TENSORS,
    prefix="model.",
    read=read_qwen2,
    write=write_shape,
    required={"hidden_act": SILU, "use_sliding_window": (False,)},
    # Without use_sliding_window the last two have no effect.
    understood=ROPE | {"sliding_window", "max_window_layers"},
)
QWEN3 = dataclasses.replace(
    QWEN2, name="qwen3", hf_class="Qwen3", read=read_qwen3, write=write_qwen3
)
MISTRAL = dataclasses.replace(
    LLAMA,
    name="mistral",
    hf_class="Mistral",
    read=read_shape,
    write=write_shape,
    required={"hidden_act": SILU},
    implied={"sliding_window": 4096},
)
SEED_OSS = dataclasses.replace(
    LLAMA, name="seed_oss", hf_class="SeedOss", read=read_seed_oss, write=write_seed_oss
)
