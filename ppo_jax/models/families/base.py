"""A model family as a value: the names and meanings of options and tensors in its checkpoints.

An option that would change the outputs and that our Transformer lacks is refused by name.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ppo_jax.models.config import ModelConfig

Json = dict[str, Any]


class Fusion(NamedTuple):
    """Parameters that are one tensor in a checkpoint, side by side along their outputs."""

    paths: tuple[str, ...]  # in this order
    by_head: bool = False  # of each head one after the other, else parameter after parameter


class Tensor(NamedTuple):
    """The name and layout of one parameter in a checkpoint."""

    name: str  # {} stands for the layer, a second one for the expert
    transposed: bool = False  # stored as [out, in]
    fusion: Fusion | None = None  # with other parameters, of which this is one

    @property
    def per_expert(self) -> bool:
        """Whether each expert of a layer has a tensor of its own, of one parameter."""
        return self.name.count("{}") > 1


# Kind of a model -> the end of its class name in transformers.
HEADS = {"policy": "ForCausalLM", "reward": "ForSequenceClassification"}


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
    # Options that are on where a config.json does not have them -> the value that they then have;
    # null is another matter.
    implied: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # The classes that `auto_map` may name, as a pattern: they compute what transformers does.
    own_code: str = ""
    # Kind of a model, "policy" or "reward" -> its class, where `class_name` would not be right.
    hf_classes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def class_name(self, kind: str) -> str:
        """Of transformers, for a model of a kind, "policy" or "reward"."""
        return self.hf_classes.get(kind, self.hf_class + HEADS[kind])

    @property
    def linear_is_transposed(self) -> bool:
        """Whether its matrices are stored as [out, in], as in torch's Linear."""
        return self.tensors["layers.mlp.up.kernel"].transposed


QKV = ("layers.attention.query", "layers.attention.key", "layers.attention.value")


def linear(
    paths: str | tuple[str, ...], name: str, *, transposed: bool = False, by_head: bool = False
) -> dict[str, Tensor]:
    """Kernel and bias of a linear map; the `ModelConfig` says whether it has a bias. Several paths
    are those of maps that are fused into one."""
    fused, tensors = isinstance(paths, tuple), {}
    for leaf, file in (("kernel", "weight"), ("bias", "bias")):
        own = tuple(f"{path}.{leaf}" for path in (paths if fused else (paths,)))
        fusion = Fusion(own, by_head) if fused else None
        row = Tensor(f"{name}.{file}", transposed and leaf == "kernel", fusion)
        tensors |= dict.fromkeys(own, row)
    return tensors


# Causal masks and rotary frequencies in old files; both follow from the config.
DERIVED = re.compile(
    r"(h\.\d+\.attn|layers\.\d+\.attention)\.(masked_)?bias|.*rotary_emb\.inv_freq"
)

# Forks of a family add options: one that sounds like arithmetic and is on is refused, not ignored.
SUSPICIOUS = re.compile(
    r"expert|moe|sliding|window|softcap|multiplier|scal(e|ing|ar)|rotary|rope|alibi|lora|parallel"
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


def is_list_of(kind: Kind) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, list) and all(kind.holds(y) for y in x)


FACTORS = Kind("a list of numbers above 0", is_list_of(NUMBER))
BITS = Kind("a list of 0 and 1", is_list_of(whole(0, 1)))

# Every option that is read anywhere, and those of rotary positions inside of their object.
OPTIONS: dict[str, Kind] = {
    **dict.fromkeys(("model_type", "hidden_act", "activation_function", "rope_type", "type"), TEXT),
    "hidden_activation": TEXT,
    **dict.fromkeys(("vocab_size", "hidden_size", "n_embd", "intermediate_size", "n_inner"), SIZE),
    **dict.fromkeys(("num_hidden_layers", "n_layer"), whole(1, 2**12)),
    **dict.fromkeys(("num_experts", "num_local_experts", "num_experts_per_tok"), whole(0, 2**14)),
    **dict.fromkeys(("moe_intermediate_size", "decoder_sparse_step"), SIZE),
    "mlp_only_layers": Kind("a list of whole numbers", is_list_of(whole(0, 2**12))),
    "router_aux_loss_coef": Kind("a number >= 0", lambda x: x == 0 or NUMBER.holds(x)),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "num_key_value_heads", "head_dim"), whole(1, 2**14)
    ),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "original_max_position_embeddings"),
        whole(1, 2**31 - 1),
    ),
    **dict.fromkeys(
        ("sliding_window", "max_window_layers", "no_rope_layer_interval"), whole(0, 2**31 - 1)
    ),
    **dict.fromkeys(("sliding_window_pattern", "_sliding_window_pattern"), whole(1, 2**31 - 1)),
    **dict.fromkeys(
        ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "partial_rotary_factor"),
        positive(1.0),
    ),
    "rotary_pct": positive(1.0),
    **dict.fromkeys(("rope_theta", "factor", "low_freq_factor", "high_freq_factor"), NUMBER),
    **dict.fromkeys(("attention_factor", "beta_fast", "beta_slow", "rotary_emb_base"), NUMBER),
    **dict.fromkeys(("rope_local_base_freq", "query_pre_attn_scalar"), NUMBER),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), NUMBER),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier"), NUMBER),
    **dict.fromkeys(("attention_multiplier", "logits_scaling"), NUMBER),
    **dict.fromkeys(("short_factor", "long_factor"), FACTORS),
    "no_rope_layers": BITS,
    **dict.fromkeys(
        ("tie_word_embeddings", "attention_bias", "attention_out_bias", "mlp_bias"), FLAG
    ),
    **dict.fromkeys(("use_sliding_window", "use_parallel_residual", "truncate"), FLAG),
    "norm_topk_prob": FLAG,
    **dict.fromkeys(("rope_parameters", "rope_scaling"), OBJECT),
    **dict.fromkeys(("full_attention", "sliding_attention"), OBJECT),  # inside of the former
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
    if raw.get("auto_map") and not is_own_code(raw["auto_map"], family.own_code):
        raise ValueError("auto_map asks for code from the checkpoint, which is never run here")
    for key, allowed in family.required.items():
        if raw.get(key) is not None and raw[key] not in allowed:
            raise ValueError(
                f"{key}={short(raw[key])} is not supported for {family.name}; "
                f"only {allowed[0]!r} is"
            )
    other = [kind for kind in raw.get("layer_types") or [] if kind != "full_attention"]
    if other and "layer_types" not in family.understood:
        raise ValueError(
            f"layer_types has {other[0]!r}; only 'full_attention' is supported for {family.name}"
        )
    for key, value in {**family.implied, **raw}.items():
        neutral = not value or (value is not True and value == 1)
        if key == "sliding_window":  # one that no text of the model's length reaches
            neutral = neutral or value >= (raw.get("max_position_embeddings") or 0)
        known = key in family.understood or key == "layer_types"
        if SUSPICIOUS.search(key) and not known and not neutral:
            implied = "" if key in raw else ", which is what a config.json without it means,"
            raise ValueError(f"{key}={short(value)}{implied} is not supported for {family.name}")


def is_own_code(classes: Any, pattern: str) -> bool:
    """Whether an `auto_map` names models of this pattern alone; tokenizers are read elsewhere."""
    if not isinstance(classes, dict) or not pattern:
        return False
    models = [name for auto, name in classes.items() if auto != "AutoTokenizer"]
    return all(isinstance(name, str) and re.fullmatch(pattern, name) for name in models)


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
