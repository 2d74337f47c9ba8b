"""The settings of rotary positions in a config.json, of older and newer transformers, and back."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from ppo_jax.models.families.base import Json, need
from ppo_jax.models.rope import (
    DynamicScaling,
    LinearScaling,
    LongRopeScaling,
    RopeScaling,
    Scaling,
    YarnScaling,
)

OPTIONS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
ORIGINAL = "original_max_position_embeddings"
# Under these names, too: how Phi-3 called its scaling before others used it.
RENAMED = {"su": "longrope"}
YARN_ONLY = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
# What each kind reads besides `factor` and `attention_factor`.
NUMBERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": (),
    "dynamic": (ORIGINAL,),  # which transformers does not read there either
    "yarn": (ORIGINAL, *YARN_ONLY),
    "longrope": (ORIGINAL, "short_factor", "long_factor"),
    "llama3": (ORIGINAL, "low_freq_factor", "high_freq_factor"),
}


class Rope(NamedTuple):
    """Rotary positions of all layers, or of those of one type."""

    theta: float
    scaling: Scaling | None
    partial: float  # of a head, how much is rotated


def read_rope(raw: Json, layer_type: str = "full_attention", theta: float = 10_000.0) -> Rope:
    """The rotary positions of a config.json; `theta` is the base where it has none.

    `rope_parameters` may hold an object for each type of layers.

    Raises:
        ValueError: a kind of scaling that is not supported, or an option that it does not have.
    """
    rope, beside = dict(raw.get("rope_parameters") or {}), raw
    if isinstance(rope.get(layer_type), dict):
        rope = dict(rope[layer_type]) | (raw.get("rope_scaling") or {})
        beside = {**raw, ORIGINAL: None}  # is not looked for outside of the object
    else:
        rope = dict(raw.get("rope_scaling") or rope)
    theta = float(rope.pop("rope_theta", None) or raw.get("rope_theta") or theta)
    partial = rope.pop("partial_rotary_factor", None) or raw.get("partial_rotary_factor") or 1.0
    old_kind = rope.pop("type", "default")
    kind = rope.pop("rope_type", None) or old_kind
    kind = RENAMED.get(kind, kind)
    if kind not in NUMBERS:
        raise ValueError(f"rope_type {kind!r} is not supported; choose from {sorted(NUMBERS)}")
    known = {"factor", "attention_factor", *NUMBERS[kind]} if kind != "default" else {"factor"}
    if unknown := sorted(rope.keys() - known):
        raise ValueError(f"{unknown} are not understood in the settings of rope type {kind!r}")
    if kind == "default" and rope.get("factor") not in (None, 1):
        raise ValueError(f"a factor of {rope['factor']} is not understood without a rope_type")
    rope = {key: value for key, value in rope.items() if value is not None}
    return Rope(theta, READERS[kind](rope, beside), partial)


def num_rotated(head_dim: int, partial: float) -> int:
    """Of the numbers of a head, as `ModelConfig.rotary_dim`: 0 is all."""
    if partial == 1:
        return 0
    if not int(head_dim * partial):
        raise ValueError(f"a part of {partial} rotates no number of a head of {head_dim}")
    return int(head_dim * partial)


def read_local_theta(raw: Json, layer_type: str, theta: float) -> float:
    """The base of rotary positions in the layers of a type, which may not scale them; `theta` where
    it has none of its own."""
    own = (raw.get("rope_parameters") or {}).get(layer_type)
    if own is None:
        return theta
    positions = read_rope({"rope_parameters": own}, theta=theta)
    if positions.scaling is not None or positions.partial != 1:
        raise ValueError(f"rope_parameters.{layer_type} may have a rope_theta alone, got {own}")
    return positions.theta


def read_llama3(rope: Json, raw: Json) -> Scaling:
    return RopeScaling(
        factor=float(need(rope, "factor")),
        low_freq_factor=float(need(rope, "low_freq_factor")),
        high_freq_factor=float(need(rope, "high_freq_factor")),
        original_max_length=original_length(rope, raw),
    )


def read_linear(rope: Json, raw: Json) -> Scaling | None:
    factor = float(need(rope, "factor"))
    return LinearScaling(factor=factor) if factor != 1 else None


def read_dynamic(rope: Json, raw: Json) -> Scaling | None:
    factor, length = float(need(rope, "factor")), need(raw, "max_position_embeddings")
    return DynamicScaling(factor=factor, original_max_length=length) if factor != 1 else None


def read_yarn(rope: Json, raw: Json) -> Scaling | None:
    length, factor = original_length(rope, raw), stretch(rope, raw)
    scale, of_all = rope.get("mscale"), rope.get("mscale_all_dim")
    attention = rope.get("attention_factor")
    if attention is None and scale and of_all:
        attention = yarn_factor(factor, scale) / yarn_factor(factor, of_all)
    elif attention is None:
        attention = yarn_factor(factor)
    if factor == 1 and attention == 1:
        return None
    return YarnScaling(
        factor=factor,
        original_max_length=length,
        beta_fast=float(rope.get("beta_fast") or 32.0),
        beta_slow=float(rope.get("beta_slow") or 1.0),
        truncate=rope.get("truncate", True),
        attention_factor=float(attention),
    )


def yarn_factor(factor: float, scale: float = 1.0) -> float:
    """Peng et al. 2023, equation 22."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def read_longrope(rope: Json, raw: Json) -> Scaling:
    length, factor = original_length(rope, raw), stretch(rope, raw)
    attention = rope.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0
    return LongRopeScaling(
        short_factor=tuple(map(float, need(rope, "short_factor"))),
        long_factor=tuple(map(float, need(rope, "long_factor"))),
        original_max_length=length,
        attention_factor=float(attention),
    )


READERS = {
    "default": lambda rope, raw: None,
    "linear": read_linear,
    "dynamic": read_dynamic,
    "yarn": read_yarn,
    "longrope": read_longrope,
    "llama3": read_llama3,
}


def original_length(rope: Json, raw: Json) -> int:
    """Beside the settings, where Phi-3 has it, it counts more than among them."""
    return raw.get(ORIGINAL) or rope.get(ORIGINAL) or need(raw, "max_position_embeddings")


def stretch(rope: Json, raw: Json) -> float:
    """The factor of a scaling, or the ratio of the two lengths."""
    if rope.get("factor"):
        return float(rope["factor"])
    return need(raw, "max_position_embeddings") / original_length(rope, raw)


def write_rope(theta: float, scaling: Scaling | None, partial: float = 1.0) -> Json:
    """The older form, which all versions of transformers read."""
    whole = {"rope_theta": theta} | ({"partial_rotary_factor": partial} if partial != 1 else {})
    if scaling is None:
        return whole
    numbers = {key: value for key, value in vars(scaling).items() if key != "original_max_length"}
    if isinstance(scaling, RopeScaling | LinearScaling | DynamicScaling):
        numbers.pop("attention_factor")
    if hasattr(scaling, "original_max_length") and not isinstance(scaling, DynamicScaling):
        numbers[ORIGINAL] = scaling.original_max_length
    numbers = {key: list(x) if isinstance(x, tuple) else x for key, x in numbers.items()}
    return whole | {"rope_scaling": {"rope_type": scaling.kind, **numbers}}


def check_layer_types(raw: Json, allowed: Iterable[str]) -> list[str] | None:
    """The `layer_types` of a config.json, if it has them.

    Raises:
        ValueError: there is not one for each layer, or one is another.
    """
    types = raw.get("layer_types")
    if types is None:
        return None
    if other := [x for x in types if x not in tuple(allowed)]:
        raise ValueError(f"layer_types has {other[0]!r}; only {sorted(allowed)} are supported")
    if len(types) != need(raw, "num_hidden_layers"):
        count = raw["num_hidden_layers"]
        raise ValueError(f"layer_types must have one for each of {count} layers, got {len(types)}")
    return types
