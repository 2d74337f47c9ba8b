"""Gemma 1, 2 and 3 (text): norms with a scale of 1 + w, scaled embeddings, a gate through gelu.

Gemma 2 has norms on both sides of attention and MLP, caps of scores and logits and a window in
every other layer; Gemma 3 norms of queries and keys in place of the caps, and in five of six
layers a window with another base of rotary positions.
"""

import dataclasses
import math

from ppo_jax.models.config import ModelConfig
from ppo_jax.models.families import rope
from ppo_jax.models.families.base import Family, Json, Tensor, need
from ppo_jax.models.families.gpt2 import GELU_TANH
from ppo_jax.models.families.llama import (
    FULL,
    SLIDING,
    TENSORS,
    local_layers,
    read_attention_bias,
    read_shape,
    write_layer_types,
    write_shape,
)

SANDWICH = TENSORS | {
    "layers.attention_post_norm.scale": Tensor("model.layers.{}.post_attention_layernorm.weight"),
    "layers.mlp_norm.scale": Tensor("model.layers.{}.pre_feedforward_layernorm.weight"),
    "layers.mlp_post_norm.scale": Tensor("model.layers.{}.post_feedforward_layernorm.weight"),
}
# Every so many layers one has no window: as files and as transformers call it.
PATTERN = ("sliding_window_pattern", "_sliding_window_pattern")
LOCAL_THETA, GLOBAL_THETA = 10_000.0, 1_000_000.0  # of Gemma 3, by layer


def read_gemma(raw: Json, theta: float = 10_000.0) -> Json:
    raw = {"head_dim": 256, "tie_word_embeddings": True, **raw}
    fields = read_shape(raw, theta=theta) | read_attention_bias(raw)
    scale = float(fields["embed_dim"]) ** 0.5
    return fields | {"norm": "rmsnorm_plus_one", "mlp": "gated_gelu", "embed_scale": scale}


def read_gemma2(raw: Json) -> Json:
    count = need(raw, "num_hidden_layers")
    types = [FULL if i % 2 else SLIDING for i in range(count)]
    return read_gemma(raw) | {
        "residual": "both",
        "score_scale": float(need(raw, "query_pre_attn_scalar")) ** -0.5,
        "score_cap": float(raw.get("attn_logit_softcapping", 0.0)),
        "logits_cap": float(raw.get("final_logit_softcapping", 0.0)),
        "layer_kinds": local_layers(raw, types),
    }


def read_gemma3(raw: Json) -> Json:
    count, every = need(raw, "num_hidden_layers"), next(filter(None, map(raw.get, PATTERN)), 6)
    types = [SLIDING if (i + 1) % every else FULL for i in range(count)]
    theta = float(raw.get("rope_local_base_freq") or LOCAL_THETA)
    local = rope.read_local_theta(raw, SLIDING, theta)
    return read_gemma(raw, GLOBAL_THETA) | {
        "residual": "both",
        "qk_norm": "head",
        "score_scale": float(need(raw, "query_pre_attn_scalar")) ** -0.5,
        "logits_cap": float(raw.get("final_logit_softcapping", 0.0)),
        "layer_kinds": local_layers(raw, types, rope_theta=local),
    }


def write_gemma(config: ModelConfig) -> Json:
    return write_shape(config) | {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": config.attention_output_bias,
    }


def write_gemma2(config: ModelConfig) -> Json:
    return (
        write_gemma(config)
        | write_layer_types(config)
        | {
            "query_pre_attn_scalar": query_scalar(config),
            "attn_logit_softcapping": config.score_cap or None,
            "final_logit_softcapping": config.logits_cap or None,
        }
    )


def write_gemma3(config: ModelConfig) -> Json:
    local = max(kind.rope_theta for kind in config.kinds) or LOCAL_THETA
    return write_gemma2(config) | {"rope_local_base_freq": local}


def query_scalar(config: ModelConfig) -> float:
    """The s of scores that are q·k / √s: a whole number where it is one but for the rounding of
    the root."""
    scale = config.score_scale or config.head_dim**-0.5
    number = 1 / scale**2
    return round(number) if math.isclose(number, round(number), rel_tol=1e-6) else number


GEMMA = Family(
    name="gemma",
    hf_class="Gemma",
    tensors=TENSORS,
    prefix="model.",
    read=read_gemma,
    write=write_gemma,
    # What is called gelu in old files was meant to be, and is, the tanh form.
    required={"hidden_act": (*GELU_TANH, "gelu"), "hidden_activation": GELU_TANH},
    understood=frozenset(rope.OPTIONS),
    implied={"num_key_value_heads": 16},
)
GEMMA2 = dataclasses.replace(
    GEMMA,
    name="gemma2",
    hf_class="Gemma2",
    tensors=SANDWICH,
    read=read_gemma2,
    write=write_gemma2,
    required={"hidden_activation": GELU_TANH, "use_bidirectional_attention": (False,)},
    understood=GEMMA.understood
    | {"query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"}
    | {"sliding_window", "sliding_window_size", "layer_types"},  # the second is read by nobody
    implied={
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
)
GEMMA3 = dataclasses.replace(
    GEMMA2,
    name="gemma3_text",
    hf_class="Gemma3",
    # Gemma3ForSequenceClassification reads images, too.
    hf_classes={"reward": "Gemma3TextForSequenceClassification"},
    read=read_gemma3,
    write=write_gemma3,
    required=GEMMA2.required | {"attn_logit_softcapping": (None,)},
    understood=GEMMA2.understood | {"rope_local_base_freq", *PATTERN},
    implied={"num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096},
)
