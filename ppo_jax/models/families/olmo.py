"""OLMo 2 and 3: norms after attention and MLP, and of queries and keys as a whole. OLMo 3 has a
window in three of four layers."""

import dataclasses

from ppo_jax.models.config import ModelConfig
from ppo_jax.models.families import rope
from ppo_jax.models.families.base import Family, Json, Tensor, need
from ppo_jax.models.families.llama import (
    FULL,
    LLAMA,
    SILU,
    SLIDING,
    TENSORS,
    local_layers,
    read_attention_bias,
    read_shape,
    write_layer_types,
    write_shape,
)

NORMS = {
    "layers.attention_post_norm.scale": Tensor("model.layers.{}.post_attention_layernorm.weight"),
    "layers.mlp_post_norm.scale": Tensor("model.layers.{}.post_feedforward_layernorm.weight"),
}


def read_olmo2(raw: Json, theta: float = 10_000.0) -> Json:
    fields = read_shape({"rms_norm_eps": 1e-5, **raw}, theta=theta) | read_attention_bias(raw)
    return fields | {"residual": "post", "qk_norm": "whole"}


def read_olmo3(raw: Json) -> Json:
    count = need(raw, "num_hidden_layers")
    types = [SLIDING if (i + 1) % 4 else FULL for i in range(count)]
    fields = read_olmo2(raw, theta=500_000.0)
    # Scaling is of layers without a window.
    theta = rope.read_local_theta(raw, SLIDING, fields["rope_theta"])
    same = fields["rope_scaling"] is None and theta == fields["rope_theta"]
    return fields | {"layer_kinds": local_layers(raw, types, rope_theta=0.0 if same else theta)}


def write_olmo2(config: ModelConfig) -> Json:
    return write_shape(config) | {"attention_bias": config.attention_output_bias}


def write_olmo3(config: ModelConfig) -> Json:
    # Without these, newer transformers gives layers with a window the base that is the default.
    scaled = rope.write_rope(config.rope_theta, config.rope_scaling)
    scaling = scaled.get("rope_scaling", {"rope_type": "default"})
    local = max(kind.rope_theta for kind in config.kinds) or config.rope_theta
    positions = {
        FULL: {"rope_theta": config.rope_theta, **scaling},
        SLIDING: {"rope_theta": local, "rope_type": "default"},
    }
    return write_olmo2(config) | write_layer_types(config) | {"rope_parameters": positions}


OLMO2 = dataclasses.replace(
    LLAMA,
    name="olmo2",
    hf_class="Olmo2",
    tensors=TENSORS | NORMS,
    read=read_olmo2,
    write=write_olmo2,
    required={"hidden_act": SILU},
)
OLMO3 = Family(
    name="olmo3",
    hf_class="Olmo3",
    tensors=OLMO2.tensors,
    prefix=OLMO2.prefix,
    read=read_olmo3,
    write=write_olmo3,
    required=OLMO2.required,
    understood=OLMO2.understood | {"sliding_window", "layer_types"},
    implied={"sliding_window": 4096},
)
