"""A model family as a value: the names and meanings of options and tensors in its checkpoints.

An option that would change the outputs and that our Transformer lacks is refused by name.
"""

import dataclasses
import math
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
    # Options that change the outputs -> the values that mean what we compute.
    required: Mapping[str, tuple]
    # Options that match `SUSPICIOUS` and that `read` handles, or that have no effect.
    understood: frozenset[str] = frozenset()
    # Options that are on where a config.json does not have them -> the value that they then have.
    implied: Mapping[str, Any] = dataclasses.field(default_factory=dict)

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


# --- types and ranges -----------------------------------------------------------------------------


class Kind(NamedTuple):
    """What the value of an option may be."""

    words: str
    holds: Callable[[Any], bool]


def whole(low: int, high: int) -> Kind:
    words = f"a whole number from {low:,} to {high:,}"
    return Kind(words, lambda x: type(x) is int and low <= x <= high)


def positive(high: float) -> Kind:
    return Kind(
        f"a number above 0, at most {high:g}",
        lambda x: type(x) in (int, float) and math.isfinite(x) and 0 < x <= high,
    )


def is_ids(value: Any) -> bool:
    """A token id or several; -1 stands for none in old configs."""
    ids = value if isinstance(value, list) else [value]
    return all(type(x) is int and -1 <= x < 2**31 for x in ids)


SIZE = whole(1, 2**24)
NUMBER, FLAG = positive(1e30), Kind("true or false", lambda x: isinstance(x, bool))
TEXT, OBJECT = (
    Kind("a text", lambda x: isinstance(x, str)),
    Kind("an object {...}", lambda x: isinstance(x, dict)),
)
TEXTS = Kind(
    "a list of texts", lambda x: isinstance(x, list) and all(isinstance(y, str) for y in x)
)
IDS = Kind("a token id or a list of them", is_ids)

# Every option that is read anywhere, and those of rotary positions inside of their object.
OPTIONS: dict[str, Kind] = {
    **dict.fromkeys(("model_type", "hidden_act", "activation_function", "rope_type", "type"), TEXT),
    **dict.fromkeys(("vocab_size", "hidden_size", "n_embd", "intermediate_size", "n_inner"), SIZE),
    **dict.fromkeys(("num_hidden_layers", "n_layer"), whole(1, 2**12)),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "num_key_value_heads", "head_dim"), whole(1, 2**14)
    ),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "original_max_position_embeddings"),
        whole(1, 2**31 - 1),
    ),
    "sliding_window": whole(0, 2**31 - 1),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_epsilon"), positive(1.0)),
    **dict.fromkeys(("rope_theta", "factor", "low_freq_factor", "high_freq_factor"), NUMBER),
    **dict.fromkeys(
        ("tie_word_embeddings", "attention_bias", "attention_out_bias", "mlp_bias"), FLAG
    ),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), OBJECT),
    **dict.fromkeys(("layer_types", "architectures"), TEXTS),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), IDS),
}


def check_options(raw: Json, inside: str = "") -> None:
    """Raise a ValueError for the first option that has another type or range than in `OPTIONS`.

    None is as good as absent. `inside` is the option whose object this is.
    """
    for key, value in raw.items():
        kind = OPTIONS.get(key)
        if kind is None or value is None:
            continue
        if not kind.holds(value):
            raise ValueError(f"{inside}{key} must be {kind.words}, got {short(value)}")
        if kind is OBJECT:
            check_options(value, f"{inside}{key}.")


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def refuse_unsupported(raw: Json, family: Family) -> None:
    """Raise a ValueError for every option that our Transformer does not compute."""
    if raw.get("auto_map"):
        raise ValueError("auto_map asks for code from the checkpoint, which is never run here")
    for key, allowed in family.required.items():
        if raw.get(key) is not None and raw[key] not in allowed:
            raise ValueError(
                f"{key}={short(raw[key])} is not supported for {family.name}; "
                f"only {allowed[0]!r} is"
            )
    other = [kind for kind in raw.get("layer_types") or [] if kind != "full_attention"]
    if other:
        raise ValueError(f"layer_types has {other[0]!r}; only 'full_attention' is supported")
    for key, value in {**family.implied, **raw}.items():
        neutral = not value or (value is not True and value == 1)
        if key == "sliding_window":  # one that no text of the model's length reaches
            neutral = neutral or value >= (raw.get("max_position_embeddings") or 0)
        known = key in family.understood or key == "layer_types"
        if SUSPICIOUS.search(key) and not known and not neutral:
            implied = "" if key in raw else ", which is what a config.json without it means,"
            raise ValueError(f"{key}={short(value)}{implied} is not supported for {family.name}")


def need(raw: Json, key: str) -> Any:
    if raw.get(key) is None:
        raise ValueError(f"the option {key!r} is missing")
    return raw[key]


def split_heads(raw: Json, width_key: str, heads_key: str) -> int:
    """The head size of a config that has none."""
    width, heads = need(raw, width_key), need(raw, heads_key)
    if width % heads:
        raise ValueError(f"{width_key} ({width}) must be a multiple of {heads_key} ({heads})")
    return width // heads


ORIGINAL = "original_max_position_embeddings"
FACTORS = ("factor", "low_freq_factor", "high_freq_factor")
# Kinds of rotary positions that a factor of 1 leaves as they are -> what else they may have then,
# which has no effect.
PLAIN_AT_ONE: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset(),
    "dynamic": frozenset(),
    "yarn": frozenset({"beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}),
}


def read_rope(raw: Json) -> tuple[float, RopeScaling | None]:
    """Base and scaling of rotary positions, in the form of older or newer transformers."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = float(rope.pop("rope_theta", None) or raw.get("rope_theta") or 10_000.0)
    old_kind = rope.pop("type", "default")
    kind = rope.pop("rope_type", old_kind)
    if rope.pop("partial_rotary_factor", None) not in (None, 1):
        raise ValueError("partial_rotary_factor is not supported: all of a head is rotated")
    if kind in PLAIN_AT_ONE and is_plain(rope, raw):
        ignored = {"factor", "attention_factor", ORIGINAL} | PLAIN_AT_ONE[kind]
        rope = {key: value for key, value in rope.items() if key not in ignored}
    elif kind not in ("default", "llama3"):
        but = f", or {kind!r} with a factor of 1" if kind in PLAIN_AT_ONE else ""
        raise ValueError(
            f"rope_type {kind!r} is not supported; choose from ['default', 'llama3']{but}"
        )
    scaling = None
    if kind == "llama3":
        factors = {key: float(need(rope, key)) for key in FACTORS}
        length = need(rope, ORIGINAL)
        scaling = RopeScaling(**factors, original_max_length=length)
        rope = rope.keys() - {*FACTORS, ORIGINAL}
    if rope:
        raise ValueError(f"{sorted(rope)} are not understood in the settings of rope type {kind!r}")
    return theta, scaling


def is_plain(rope: Json, raw: Json) -> bool:
    """Whether a scaling is by 1, in the frequencies as in the attention.

    Of another original length the factor would be the ratio of the two.
    """
    length = raw.get("max_position_embeddings")
    same_length = rope.get(ORIGINAL) in (None, length)
    return rope.get("factor") == 1 and rope.get("attention_factor") in (None, 1) and same_length


def write_rope(theta: float, scaling: RopeScaling | None) -> Json:
    """The older form, which all versions of transformers read."""
    if scaling is None:
        return {"rope_theta": theta}
    numbers = dataclasses.asdict(scaling)
    numbers["original_max_position_embeddings"] = numbers.pop("original_max_length")
    return {"rope_theta": theta, "rope_scaling": {"rope_type": "llama3", **numbers}}
