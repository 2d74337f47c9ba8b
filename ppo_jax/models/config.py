"""The shape of a Transformer, as frozen settings."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """The frequency scaling of Llama 3: long wavelengths are stretched by `factor`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_length: int

    def __post_init__(self):
        for field, value in vars(self).items():
            if not 0 < value < math.inf:
                raise ValueError(f"model.rope_scaling.{field} must be > 0, got {value!r}")
        if self.low_freq_factor == self.high_freq_factor:
            raise ValueError(
                "model.rope_scaling.high_freq_factor must differ from low_freq_factor, got "
                f"{self.high_freq_factor!r} for both"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What sets the shape of a Transformer: GPT-2, Llama, Qwen2 and Qwen3 are values of it."""

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int  # fewer than num_heads: grouped-query attention
    head_dim: int
    mlp_dim: int
    max_length: int  # positions, prompt and response together
    positions: str = "rotary"  # or "learned"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm: str = "rmsnorm"  # or "layernorm"
    norm_eps: float = 1e-5
    mlp: str = "gated_silu"  # or "gelu" (tanh form)
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = True
    scan_layers: bool = False  # True compiles faster; False runs faster on CPUs
    dtype: str = "float32"  # of activations; parameters are always float32
    remat: str = "none"  # what the backward pass recomputes: or "dots", "full"
    lora_alpha: float = 0.0  # adapters are scaled by lora_alpha / rank, see `lora`; 0 without any
    attention: str = "auto"  # the platform's, see `kernels`; or "plain" everywhere

    def __post_init__(self):
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        choices = {
            "positions": ("rotary", "learned"),
            "norm": ("rmsnorm", "layernorm"),
            "mlp": ("gated_silu", "gelu"),
            "dtype": ("float32", "bfloat16", "float16"),
            "remat": ("none", "dots", "full"),
            "attention": ("auto", "plain"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"model.{field} must be one of {list(allowed)}, got {getattr(self, field)!r}"
                )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in (int, "int") and (type(value) is not int or value < 1):
                raise ValueError(f"model.{field.name} must be a positive integer, got {value!r}")
        for name in ("norm_eps", "rope_theta"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"model.{name} must be > 0, got {getattr(self, name)!r}")
        if not 0 <= self.lora_alpha < math.inf:
            raise ValueError(f"model.lora_alpha must be >= 0, got {self.lora_alpha}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads ({self.num_heads}) must be a multiple of "
                f"model.num_kv_heads ({self.num_kv_heads})"
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"model.head_dim must be even for rotary, got {self.head_dim}")


def dtype_name(dtype: Any) -> Any:
    """The name of a dtype that is written in any way that JAX takes; anything else as it is.

    >>> dtype_name(jnp.bfloat16), dtype_name(jnp.dtype("float16")), dtype_name("float32")
    ('bfloat16', 'float16', 'float32')
    """
    if dtype is None or isinstance(dtype, str):  # None would be float64
        return dtype
    try:
        return jnp.dtype(dtype).name
    except TypeError:
        return dtype


def computation(settings: Any) -> dict[str, Any]:
    """The fields of a `ModelConfig` (or of whatever has them) that say how a model is computed.

    All other fields say what the model is.
    """
    fields = ("dtype", "scan_layers", "remat", "attention")
    return {name: getattr(settings, name) for name in fields}
