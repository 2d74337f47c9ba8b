"""A model family as a value: the names and meanings of options and tensors in its checkpoints.

An option that would change the outputs and that our Transformer lacks is refused by name.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ppo_jax.models.config import ModelConfig, RopeScaling

Json = dict[str, Any]


class Tensor(NamedTuple):
    """The name and layout of one parameter in a checkpoint."""

    name: str  # {} stands for the layer
    transposed: bool = False  # stored as [out, in]
    third: int | None = None  # 0, 1, 2: query, key, value in a fused tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """The checkpoint format of one model family."""

    name: str  # `model_type` of its config.json
    hf_class: str  # the beginning of its class names in transformers, such as "Qwen3"
    tensors: Mapping[str, Tensor]  # path of a parameter, without its layer -> its tensor
    prefix: str  # of tensor names; files saved from the model without its head leave it out
    read: Callable[[Json], Json]  # config.json -> the fields of a `ModelConfig`
    write: Callable[[ModelConfig], Json]  # the inverse, without `model_type`
    required: Mapping[str, Any]  # options that change the outputs -> the one value we compute
    # Options that match `SUSPICIOUS` and that `read` handles, or that have no effect.
    understood: frozenset[str] = frozenset()

    @property
    def linear_is_transposed(self) -> bool:
        """Whether its matrices are stored as [out, in], as in torch's Linear."""
        return self.tensors["layers.mlp.up.kernel"].transposed


def linear(
    path: str, name: str, *, transposed: bool = False, third: int | None = None
) -> dict[str, Tensor]:
    """Kernel and bias of a linear map; the `ModelConfig` says whether it has a bias."""
    return {
        f"{path}.kernel": Tensor(f"{name}.weight", transposed, third),
        f"{path}.bias": Tensor(f"{name}.bias", third=third),
    }


# Causal masks and rotary frequencies in old files; both follow from the config.
DERIVED = re.compile(r"h\.\d+\.attn\.(masked_)?bias|.*rotary_emb\.inv_freq")

# Forks of a family add options: one that sounds like arithmetic and is on is refused, not ignored.
SUSPICIOUS = re.compile(
    r"expert|moe|sliding|window|softcap|multiplier|scal(e|ing)|rotary|rope|alibi|lora"
    r"|cross_attention|encoder_decoder|bidirectional|layer_types|quantization"
)


def refuse_unsupported(raw: Json, family: Family) -> None:
    """Raise a ValueError for every option that our Transformer does not compute."""
    if raw.get("auto_map"):
        raise ValueError("auto_map asks for code from the checkpoint, which is never run here")
    for key, only in family.required.items():
        if raw.get(key) not in (None, only):
            raise ValueError(
                f"{key}={raw[key]!r} is not supported for {family.name}; only {only!r} is"
            )
    other = [kind for kind in raw.get("layer_types") or [] if kind != "full_attention"]
    if other:
        raise ValueError(f"layer_types has {other[0]!r}; only 'full_attention' is supported")
    for key, value in raw.items():
        neutral = not value or (value is not True and value == 1)
        if SUSPICIOUS.search(key) and key not in family.understood and not neutral:
            raise ValueError(f"{key}={value!r} is not supported for {family.name}")


def need(raw: Json, key: str) -> Any:
    if raw.get(key) is None:
        raise ValueError(f"config.json has no {key!r}")
    return raw[key]


def split_heads(raw: Json, width_key: str, heads_key: str) -> int:
    """The head size of a config that has none."""
    width, heads = need(raw, width_key), need(raw, heads_key)
    if width % heads:
        raise ValueError(f"{width_key} ({width}) must be a multiple of {heads_key} ({heads})")
    return width // heads


FACTORS = ("factor", "low_freq_factor", "high_freq_factor")


def read_rope(raw: Json) -> tuple[float, RopeScaling | None]:
    """Base and scaling of rotary positions, in the form of older or newer transformers."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = float(rope.pop("rope_theta", None) or raw.get("rope_theta") or 10_000.0)
    old_kind = rope.pop("type", "default")
    kind = rope.pop("rope_type", old_kind)
    if rope.pop("partial_rotary_factor", None) not in (None, 1):
        raise ValueError("partial_rotary_factor is not supported: all of a head is rotated")
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope_type {kind!r} is not supported; choose from ['default', 'llama3']")
    scaling = None
    if kind == "llama3":
        factors = {key: float(need(rope, key)) for key in FACTORS}
        length = need(rope, "original_max_position_embeddings")
        scaling = RopeScaling(**factors, original_max_length=length)
        rope = rope.keys() - {*FACTORS, "original_max_position_embeddings"}
    if rope:
        raise ValueError(f"{sorted(rope)} are not understood in the settings of rope type {kind!r}")
    return theta, scaling


def write_rope(theta: float, scaling: RopeScaling | None) -> Json:
    """The older form, which all versions of transformers read."""
    if scaling is None:
        return {"rope_theta": theta}
    numbers = dataclasses.asdict(scaling)
    numbers["original_max_position_embeddings"] = numbers.pop("original_max_length")
    return {"rope_theta": theta, "rope_scaling": {"rope_type": "llama3", **numbers}}
