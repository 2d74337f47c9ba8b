"""The shape of a Transformer, as frozen settings."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from ppo_jax.models.rope import Scaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKind:
    """What the layers of one model may differ in; by default nothing."""

    window: int = 0  # positions that a query attends to, its own included; 0 is all before it
    rotary: bool = True  # False: without positions, in a model with rotary ones
    rope_theta: float = 0.0  # of these layers, then without scaling; 0 is the model's, with it
    dense: bool = False  # without experts, in a model with some

    def check(self, name: str):
        """Refuse values that are out of range; `name` is what the message calls these layers."""
        if type(self.window) is not int or self.window < 0:
            raise ValueError(f"{name}.window must be an int >= 0, got {self.window!r}")
        if not 0 <= self.rope_theta < math.inf:
            raise ValueError(f"{name}.rope_theta must be >= 0, got {self.rope_theta!r}")


PLAIN_LAYER = LayerKind()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """Feed-forward layers as mixtures of experts, of which each token has a few, see `moe`."""

    num_experts: int
    num_chosen: int  # experts of a token
    dim: int  # width inside each expert
    normalized: bool = False  # whether the weights of the chosen ones sum to 1
    aux_coef: float = 0.0  # of the loss that balances them, in SFT, see `load_balancing_loss`

    def __post_init__(self):
        for name in ("num_experts", "num_chosen", "dim"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"model.experts.{name} must be a positive integer, got {value!r}")
        if self.num_chosen > self.num_experts:
            raise ValueError(
                f"model.experts.num_chosen must be at most num_experts ({self.num_experts}), got "
                f"{self.num_chosen}"
            )
        if not 0 <= self.aux_coef < math.inf:
            raise ValueError(f"model.experts.aux_coef must be >= 0, got {self.aux_coef!r}")


# Where a layer has norms: (before attention and MLP, after them).
NORMS = {
    "pre": (True, False),
    "post": (False, True),
    "both": (True, True),
    "parallel": (True, False),
}
CHOICES = {
    "positions": ("rotary", "learned"),
    "norm": ("rmsnorm", "rmsnorm_plus_one", "layernorm"),
    "qk_norm": ("none", "head", "whole"),
    "residual": tuple(NORMS),
    "mlp": ("gated_silu", "gated_gelu", "gelu", "gelu_erf"),
    "dtype": ("float32", "bfloat16", "float16"),
    "remat": ("none", "dots", "full"),
    "attention": ("auto", "plain"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What sets the shape of a Transformer: each model family is values of it."""

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
    rope_scaling: Scaling | None = None  # see `rope`
    rotary_dim: int = 0  # numbers of a head that are rotated, its first ones; 0 is all
    norm: str = "rmsnorm"  # or "rmsnorm_plus_one" (scale 1 + w), "layernorm"
    norm_eps: float = 1e-5
    qk_norm: str = "none"  # of queries and keys: or of each "head", or of all heads as one, "whole"
    residual: str = (
        "pre"  # norms before attention and MLP, or "post", "both", "parallel" (x + both)
    )
    mlp: str = "gated_silu"  # or "gated_gelu", "gelu" (tanh form), "gelu_erf"
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = True
    # Factors: of token embeddings, of what attention and MLP add, of scores (0: 1 / √K).
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    score_scale: float = 0.0
    logits_divisor: float = 1.0
    score_cap: float = 0.0  # scores become cap · tanh(score / cap); 0 is without
    logits_cap: float = 0.0  # logits alike
    layer_kinds: tuple[LayerKind, ...] = ()  # of each layer; () is `LayerKind()` for all
    experts: Experts | None = None  # of layers that are not `dense`
    scan_layers: bool = False  # True compiles faster; False runs faster on CPUs
    dtype: str = "float32"  # of activations; parameters are always float32
    remat: str = "none"  # what the backward pass recomputes: or "dots", "full"
    lora_alpha: float = 0.0  # adapters are scaled by lora_alpha / rank, see `lora`; 0 without any
    attention: str = "auto"  # the platform's, see `kernels`; or "plain" everywhere
    # Of `families` that it was read from, by name; "" is not known. It changes nothing but what
    # exports are called, so that models of different ones are equal.
    family: str = dataclasses.field(default="", compare=False)

    def __post_init__(self):
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        for field, allowed in CHOICES.items():
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"model.{field} must be one of {list(allowed)}, got {getattr(self, field)!r}"
                )
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), int(field.name != "rotary_dim")
            if field.type in (int, "int") and (type(value) is not int or value < least):
                raise ValueError(f"model.{field.name} must be a positive integer, got {value!r}")
        for name in ("norm_eps", "rope_theta", "embed_scale", "residual_scale", "logits_divisor"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"model.{name} must be > 0, got {getattr(self, name)!r}")
        for name in ("lora_alpha", "score_scale", "score_cap", "logits_cap"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"model.{name} must be >= 0, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads ({self.num_heads}) must be a multiple of "
                f"model.num_kv_heads ({self.num_kv_heads})"
            )
        self.check_rotary()
        self.check_layers()

    def check_rotary(self):
        if self.positions != "rotary":
            return
        if self.head_dim % 2 and not self.rotary_dim:
            raise ValueError(f"model.head_dim must be even for rotary, got {self.head_dim}")
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ValueError(
                f"model.rotary_dim must be even and at most head_dim ({self.head_dim}), got "
                f"{self.rotary_dim}"
            )
        if self.rotary_dim == self.head_dim:
            object.__setattr__(self, "rotary_dim", 0)
        for name in ("short_factor", "long_factor"):
            factors = getattr(self.rope_scaling, name, None)
            if factors is not None and len(factors) != self.num_rotated // 2:
                raise ValueError(
                    f"model.rope_scaling.{name} must have {self.num_rotated // 2} numbers, one for "
                    f"each rotated pair of a head, got {len(factors)}"
                )

    def check_layers(self):
        for i, kind in enumerate(self.layer_kinds):
            kind.check(f"model.layer_kinds[{i}]")
        kinds = self.layer_kinds[: self.num_layers]  # of a model that was cut down to some layers
        if kinds and len(kinds) != self.num_layers:
            raise ValueError(
                f"model.layer_kinds must have one for each of {self.num_layers} layers, got "
                f"{len(kinds)}"
            )
        if kinds and all(kind.dense for kind in kinds) and self.experts is not None:
            object.__setattr__(self, "experts", None)
            kinds = tuple(dataclasses.replace(kind, dense=False) for kind in kinds)
        object.__setattr__(self, "layer_kinds", () if set(kinds) <= {PLAIN_LAYER} else kinds)
        dense = {kind.dense for kind in self.kinds}
        if self.experts is None and True in dense:
            raise ValueError("model.layer_kinds: dense layers are of a model with experts")
        if self.experts is not None and not self.gated:
            raise ValueError(f"model.mlp must be gated for experts, got {self.mlp!r}")
        if self.experts is not None and self.mlp_bias:
            raise ValueError("model.mlp_bias must be false for experts, which have none")
        if self.scan_layers and len(dense) > 1:
            raise ValueError(
                "model.scan_layers must be false where some layers have experts and some are dense"
            )

    def for_rows(self, length: int) -> "ModelConfig":
        """The model of rows of up to `length` positions. Where scalings of rotary positions are
        different in long rows, each row is turned as one of this length: a response as its prompt
        was, before it was long, and a row whatever it is padded to or packed with."""
        if self.rope_scaling is None:
            return self
        return dataclasses.replace(self, rope_scaling=self.rope_scaling.for_rows(length))

    @property
    def num_rotated(self) -> int:
        """Of the numbers of a head."""
        return self.rotary_dim or self.head_dim

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate."""
        return self.mlp.startswith("gated")

    def kind_of(self, layer: int) -> LayerKind:
        return self.layer_kinds[layer] if self.layer_kinds else PLAIN_LAYER

    def has_experts(self, layer: int) -> bool:
        return self.experts is not None and not self.kind_of(layer).dense

    def cache_slots(self, kind: LayerKind, length: int) -> int:
        """Of the KV cache of a layer, for rows of `length`: no more than its window has places.
        Scanned layers have one array for all, and so each as many as the longest."""
        short = kind.window and not self.scan_layers
        return min(length, kind.window) if short else length

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """Those that differ, in the order of their first layers."""
        return tuple(dict.fromkeys(self.layer_kinds)) or (PLAIN_LAYER,)


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
