"""A model family as a value: how its checkpoints name options and tensors, and what they mean.

An option that would change the outputs and that our Transformer does not have is refused by name.
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
    third: int | None = None  # of a tensor that holds query, key and value side by side


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """All that tells the checkpoints of one family from those of another.

    Attributes:
        name: `model_type` of its config.json.
        hf_class: the beginning of its class names in transformers, such as "Qwen3".
        tensors: path of a parameter, without its layer -> its tensor.
        prefix: of the tensors; files saved from the model without its head leave it out.
        read: config.json -> the fields of a `ModelConfig`.
        write: the inverse, without `model_type`.
        required: options that change the outputs -> the one value that we compute.
        understood: options that match `SUSPICIOUS` and that `read` deals with, or that have no
            effect.
    """

    name: str
    hf_class: str
    tensors: Mapping[str, Tensor]
    prefix: str
    read: Callable[[Json], Json]
    write: Callable[[ModelConfig], Json]
    required: Mapping[str, Any]
    understood: frozenset[str] = frozenset()

    @property
    def linear_is_transposed(self) -> bool:
        """Whether its modules hold their matrices as [out, in], as torch's Linear does."""
        return self.tensors["layers.mlp.up.kernel"].transposed


def linear(path: str, name: str, **layout: Any) -> dict[str, Tensor]:
    """Rows of a linear map; whether it has a bias is for the `ModelConfig` to say."""
    bias_layout = {key: value for key, value in layout.items() if key != "transposed"}
    return {
        f"{path}.kernel": Tensor(f"{name}.weight", **layout),
        f"{path}.bias": Tensor(f"{name}.bias", **bias_layout),
    }


# Causal masks and rotary frequencies that old files hold; both follow from the config.
DERIVED = re.compile(r"h\.\d+\.attn\.(masked_)?bias|.*rotary_emb\.inv_freq")

# A family's own code reads only the keys above, but forks of it add some: anything that sounds
# like arithmetic and is switched on is refused rather than passed over.
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
    """Width by head, where the config does not give it."""
    width, heads = need(raw, width_key), need(raw, heads_key)
    if width % heads:
        raise ValueError(f"{width_key} ({width}) must be a multiple of {heads_key} ({heads})")
    return width // heads


def read_rope(raw: Json) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary positions, from either generation of transformers."""
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
        scaling = RopeScaling(
            factor=float(need(rope, "factor")),
            low_freq_factor=float(need(rope, "low_freq_factor")),
            high_freq_factor=float(need(rope, "high_freq_factor")),
            original_max_length=need(rope, "original_max_position_embeddings"),
        )
        for key in ("factor", "low_freq_factor", "high_freq_factor"):
            del rope[key]
        del rope["original_max_position_embeddings"]
    if rope:
        raise ValueError(f"{sorted(rope)} are not understood in the settings of rope type {kind!r}")
    return theta, scaling


def write_rope(theta: float, scaling: RopeScaling | None) -> Json:
    """The older form, which all generations of transformers read."""
    if scaling is None:
        return {"rope_theta": theta}
    numbers = dataclasses.asdict(scaling)
    numbers["original_max_position_embeddings"] = numbers.pop("original_max_length")
    return {"rope_theta": theta, "rope_scaling": {"rope_type": "llama3", **numbers}}
