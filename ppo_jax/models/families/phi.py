"""Phi-3 and Phi-4-mini: Llama with fused projections, a window, and a part of each head rotated."""

import dataclasses

from ppo_jax.models.config import ModelConfig
from ppo_jax.models.families import rope
from ppo_jax.models.families.base import QKV, Json, linear
from ppo_jax.models.families.llama import (
    LLAMA,
    MLP,
    SELF,
    SILU,
    TENSORS,
    read_shape,
    same_window,
    window_of,
    write_shape,
)
from ppo_jax.models.rope import LongRopeScaling

FUSED = TENSORS | {
    **linear(QKV, f"{SELF}.qkv_proj", transposed=True),
    **linear(("layers.mlp.gate", "layers.mlp.up"), f"{MLP}.gate_up_proj", transposed=True),
}


def read_phi3(raw: Json) -> Json:
    fields = read_shape(with_longrope({"rms_norm_eps": 1e-5, **raw}), partial=True)
    return fields | same_window(raw, fields["num_layers"])


def with_longrope(raw: Json) -> Json:
    """Its first files call their scaling yarn, or su."""
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    settings = dict(raw.get(name) or {})
    kind = settings.get("rope_type") or settings.get("type")
    return raw | {name: settings | {"rope_type": "longrope"}} if kind in ("su", "yarn") else raw


def write_phi3(config: ModelConfig) -> Json:
    raw = write_shape(config) | {"sliding_window": window_of(config)}
    if isinstance(config.rope_scaling, LongRopeScaling):
        raw[rope.ORIGINAL] = config.rope_scaling.original_max_length
    return raw


PHI3 = dataclasses.replace(
    LLAMA,
    name="phi3",
    hf_class="Phi3",
    tensors=FUSED,
    read=read_phi3,
    write=write_phi3,
    required={"hidden_act": SILU},
    understood=LLAMA.understood | {"sliding_window"},
    implied={rope.ORIGINAL: 4096},
    # Its first files bring the code that transformers took over, from their own or another folder.
    own_code=r"([\w./-]+--)?(configuration|modeling)_phi3\.Phi3\w+",
)
