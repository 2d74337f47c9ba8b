"""The architectures of GGUF that hold models of our families: keys of metadata, names of tensors.

A key is an option of config.json under another name. What llama.cpp holds in no key, but computes
by a rule of the architecture, is said here as well.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ppo_jax.io.gguf.header import Metadata
from ppo_jax.models.families import family_of
from ppo_jax.models.families.base import OPTIONS, Family, Json, Tensor, short
from ppo_jax.models.families.llama import FULL, SLIDING, part_of_head

# What GGUF calls the parts of all families -> our parameters, without kernel, scale and bias.
PARTS = {
    "token_embd": "embed.tokens",
    "position_embd": "embed.positions",
    "output_norm": "final_norm",
    "output": "head",
    "attn_norm": "layers.attention_norm",
    "attn_qkv": "layers.attention.query",  # fused with key and value
    "attn_q": "layers.attention.query",
    "attn_k": "layers.attention.key",
    "attn_v": "layers.attention.value",
    "attn_output": "layers.attention.output",
    "attn_q_norm": "layers.attention.query_norm",
    "attn_k_norm": "layers.attention.key_norm",
    "post_attention_norm": "layers.attention_post_norm",
    "ffn_norm": "layers.mlp_norm",
    "ffn_gate": "layers.mlp.gate",
    "ffn_up": "layers.mlp.up",  # or fused with the gate
    "ffn_down": "layers.mlp.down",
    "post_ffw_norm": "layers.mlp_post_norm",
    "ffn_gate_inp": "layers.experts.router",
    "ffn_gate_exps": "layers.experts.gate",
    "ffn_up_exps": "layers.experts.up",
    "ffn_down_exps": "layers.experts.down",
}

# Keys of a file, after the name of its architecture -> options of config.json.
SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
LLAMA_KEYS = SIZES | {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
LLAMA_OPTIONAL = {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
WINDOW = {"attention.sliding_window": "sliding_window"}
PATTERN = "attention.sliding_window_pattern"
EXPERTS = {"expert_used_count": "num_experts_per_tok"}
GPT2_KEYS = {
    "block_count": "n_layer",
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
# Keys of the sizes of a head, all of which must be one.
HEAD_SIZES = ("attention.key_length", "attention.value_length", "rope.dimension_count")
# Tensors that scale rotary positions.
ROPE_FREQS = "rope_freqs.weight"  # the divisor of each frequency, where Llama 3 scales them
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"  # of longrope
# Values with which a key says nothing.
NEUTRAL: dict[str, tuple] = {
    **dict.fromkeys(("expert_count", "expert_used_count", "attention.sliding_window"), (0,)),
    **dict.fromkeys(("attention.scale", "embedding_scale", "residual_scale"), (0,)),
    "expert_weights_scale": (0, 1),
    "expert_gating_func": (0, 1),  # by softmax
    "rope.scaling.finetuned": (True,),
    "rope.scaling.yarn_ext_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a file of a model family holds, and how."""

    family: str  # the `model_type` of its config.json
    required: Mapping[str, str] = dataclasses.field(default_factory=lambda: LLAMA_KEYS)
    optional: Mapping[str, str] = dataclasses.field(default_factory=lambda: LLAMA_OPTIONAL)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"hidden_act": "silu"})
    # Tensors that a model may have or not -> the option that says so.
    biases: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {"attn_q.bias": "attention_bias", "ffn_up.bias": "mlp_bias"}
    )
    parts: Mapping[str, str] = dataclasses.field(default_factory=dict)  # other than `PARTS`
    neutral: Mapping[str, tuple] = dataclasses.field(default_factory=dict)  # beside `NEUTRAL`
    interleaved: bool = False  # the two rows of each rotated pair of query and key side by side
    partial: str = ""  # the option of how much of a head is rotated; "" is all of it
    scaling_tensors: tuple[str, ...] = (ROPE_FREQS,)
    own_keys: tuple[str, ...] = ()  # that `more` reads
    # (keys, options so far) -> options that follow from several of them.
    more: Callable[[Metadata, Json], Json] = lambda own, raw: {}

    @property
    def names(self) -> Family:
        return family_of(self.family)


class Place(NamedTuple):
    """What a tensor of a file is in a Hugging Face folder."""

    path: str  # our parameter, without its layer; of fused ones the first
    tensor: Tensor


def places_of(architecture: Architecture) -> dict[str, Place]:
    """A tensor's name without its block, such as "attn_q.weight" -> what it is in a folder.

    Parameters that are fused go by one name, so that none is there twice.
    """
    tensors, places = architecture.names.tensors, {}
    for part, path in {**PARTS, **architecture.parts}.items():
        for leaf, ends in (("weight", ("", ".kernel", ".scale")), ("bias", (".bias",))):
            for found in (path + end for end in ends if path + end in tensors):
                fused = tensors[found].fusion is not None
                if fused if part == "attn_qkv" else not fused or part == "ffn_up":
                    places[f"{part}.{leaf}"] = Place(found, tensors[found])
    return places


# --- what follows from several keys ---------------------------------------------------------------


def layer_types(own: Metadata, raw: Json, period: int) -> Json:
    """Which layers have a window: all but each `period`-th, or as the file has it."""
    count, pattern = raw["num_hidden_layers"], own.get(PATTERN, period)
    if type(pattern) is int and pattern >= 1:
        pattern = [(i + 1) % pattern > 0 for i in range(count)]
    is_list = isinstance(pattern, list) and all(isinstance(x, bool) for x in pattern)
    if not is_list or len(pattern) != count:
        raise ValueError(
            f"GGUF option {PATTERN} must be a period or {count} booleans, got {short(pattern)}"
        )
    windows = [x and "sliding_window" in raw for x in pattern]
    return {"layer_types": [SLIDING if x else FULL for x in windows]}


def query_scalar(raw: Json, deepest: int) -> Json:
    """No key has it: it is the head size, but in the deepest model of a family."""
    of_width = raw["num_hidden_layers"] == deepest
    width = raw["hidden_size"] // raw["num_attention_heads"]
    return {"query_pre_attn_scalar": width if of_width else raw["head_dim"]}


def more_of_gemma2(own: Metadata, raw: Json) -> Json:
    raw = {"sliding_window": 4096} | raw  # its window and caps are there without keys
    return layer_types(own, raw, 2) | query_scalar(raw, 46)


def more_of_gemma3(own: Metadata, raw: Json) -> Json:
    return layer_types(own, raw, 6) | query_scalar(raw, 62)


def more_of_olmo3(own: Metadata, raw: Json) -> Json:
    """Layers with a window have positions of their own, which are not scaled."""
    local = own.get("rope.freq_base_swa", raw["rope_theta"])
    check_option("rope.freq_base_swa", "rope_theta", local)
    scaling = raw.get("rope_scaling", {"rope_type": "default"})
    return layer_types(own, raw, 4) | {
        "rope_parameters": {
            FULL: {"rope_theta": raw["rope_theta"], **scaling},
            SLIDING: {"rope_theta": local, "rope_type": "default"},
        }
    }


def more_of_granite(own: Metadata, raw: Json) -> Json:
    """Without a scale of scores they are divided by the root of the head size, as elsewhere."""
    return {"attention_multiplier": raw.get("attention_multiplier", raw["head_dim"] ** -0.5)}


# --- the architectures ----------------------------------------------------------------------------

LLAMA = Architecture(family="llama", interleaved=True)
MIXTRAL = Architecture(
    family="mixtral",
    required=LLAMA_KEYS | EXPERTS | {"expert_count": "num_local_experts"},
    biases={},
    interleaved=True,
)
GEMMA = Architecture(
    family="gemma",
    fixed=dict.fromkeys(("hidden_act", "hidden_activation"), "gelu_pytorch_tanh"),
    biases={"attn_q.bias": "attention_bias"},
)
GEMMA2 = dataclasses.replace(
    GEMMA,
    family="gemma2",
    optional=LLAMA_OPTIONAL
    | WINDOW
    | {name: name for name in ("attn_logit_softcapping", "final_logit_softcapping")},
    neutral={"attention.sliding_window": ()},
    own_keys=(PATTERN,),
    more=more_of_gemma2,
)
GEMMA3 = dataclasses.replace(
    GEMMA,
    family="gemma3_text",
    optional=LLAMA_OPTIONAL
    | WINDOW
    | {"final_logit_softcapping": "final_logit_softcapping"}
    | {"rope.freq_base_swa": "rope_local_base_freq"},
    neutral={"final_logit_softcapping": (0,)},
    own_keys=(PATTERN,),
    more=more_of_gemma3,
)
OLMO2 = Architecture(family="olmo2", biases={"attn_q.bias": "attention_bias"})
OLMO3 = dataclasses.replace(
    OLMO2,
    family="olmo3",
    optional=LLAMA_OPTIONAL | WINDOW,
    own_keys=(PATTERN, "rope.freq_base_swa"),
    more=more_of_olmo3,
)
ARCHITECTURES = {
    "llama": LLAMA,
    "qwen2": Architecture(family="qwen2", biases={}),
    "qwen3": Architecture(family="qwen3", biases={"attn_q.bias": "attention_bias"}),
    "gpt2": Architecture(
        family="gpt2",
        required=GPT2_KEYS,
        optional={"attention.head_count_kv": "n_head"},
        fixed={"activation_function": "gelu_new"},
        biases={},
        scaling_tensors=(),
    ),
    "seed_oss": Architecture(
        family="seed_oss",
        fixed={"hidden_act": "silu", "attention_bias": False},
        biases=LLAMA.biases | {"attn_output.bias": "attention_out_bias"},
        parts={"post_attention_norm": "layers.mlp_norm"},
    ),
    # Each fourth layer is without positions, as it is where a config.json does not say.
    "smollm3": Architecture(family="smollm3", interleaved=True),
    "granite": Architecture(
        family="granite",
        required=LLAMA_KEYS | {"logit_scale": "logits_scaling"},
        optional=LLAMA_OPTIONAL
        | {"attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier"}
        | {"residual_scale": "residual_multiplier"},
        interleaved=True,
        more=more_of_granite,
    ),
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "phi3": Architecture(
        family="phi3",
        optional=LLAMA_OPTIONAL
        | WINDOW
        | {"rope.scaling.original_context_length": "original_max_position_embeddings"},
        biases={},
        partial="partial_rotary_factor",
        scaling_tensors=(LONG, SHORT),
    ),
    # llama.cpp computes the tanh form; the models have the other, which differs by 5e-4 at most.
    "gptneox": Architecture(
        family="gpt_neox",
        required=SIZES | {"attention.layer_norm_epsilon": "layer_norm_eps"},
        optional={
            "attention.head_count_kv": "num_attention_heads",
            "rope.freq_base": "rotary_emb_base",
            "use_parallel_residual": "use_parallel_residual",
        },
        fixed={"hidden_act": "gelu", "attention_bias": False},
        biases={"attn_qkv.bias": "attention_bias"},
        partial="rotary_pct",
        scaling_tensors=(),
    ),
    "olmo2": OLMO2,
    "qwen3moe": Architecture(
        family="qwen3_moe",
        required=LLAMA_KEYS
        | EXPERTS
        | {"expert_count": "num_experts", "expert_feed_forward_length": "moe_intermediate_size"},
        fixed={"hidden_act": "silu", "norm_topk_prob": True},
        biases={"attn_q.bias": "attention_bias"},
        neutral={"expert_weights_norm": (True,)},
    ),
    "olmoe": Architecture(
        family="olmoe",
        required=LLAMA_KEYS | EXPERTS | {"expert_count": "num_experts"},
        fixed={"hidden_act": "silu", "norm_topk_prob": False},
        biases={"attn_q.bias": "attention_bias"},
        neutral={"expert_weights_norm": (False,)},
    ),
}
# Of two families that share an architecture, the one whose files have a key.
VARIANTS = {"llama": ("expert_count", MIXTRAL), "olmo2": ("attention.sliding_window", OLMO3)}


def architecture_of(metadata: Metadata) -> Architecture:
    """How a file is read.

    Raises:
        ValueError: its architecture is none of `ARCHITECTURES`.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(
            f"GGUF architecture {short(name)} is not supported; choose from {sorted(ARCHITECTURES)}"
        )
    key, variant = VARIANTS.get(name, ("", None))
    return variant if variant and metadata.get(f"{name}.{key}") else ARCHITECTURES[name]


def own_keys(metadata: Metadata, architecture: Architecture) -> Metadata:
    """The keys of a file's architecture without its name, but for those that say nothing."""
    prefix = metadata["general.architecture"] + "."
    own = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    neutral = {**NEUTRAL, **architecture.neutral}
    return {key: value for key, value in own.items() if value not in neutral.get(key, ())}


def check_option(key: str, option: str, value: Any) -> None:
    """Raise a ValueError where a key has what its option of config.json may not have."""
    if not OPTIONS[option].holds(value):
        raise ValueError(f"GGUF option {key} must be {OPTIONS[option].words}, got {short(value)}")


# --- rotary positions -----------------------------------------------------------------------------

SCALING = "rope.scaling."
YARN = {  # keys after it -> the options of config.json
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
    "yarn_attn_factor": "attention_factor",
}


def scaling_keys(own: Metadata) -> list[str]:
    """Those that are read for the kind of scaling that a file has."""
    names = ["type", "factor", "original_context_length", "attn_factor"]
    names += YARN if own.get(f"{SCALING}type") == "yarn" else ()
    return [SCALING + name for name in names]


def read_positions(own: Metadata, raw: Json, architecture: Architecture, prefix: str) -> Json:
    """The options of rotary positions: how much of a head is rotated, and how they are scaled.

    Raises:
        ValueError: a size of a head is another, or the scaling is not supported.
    """
    heads = raw.get("num_attention_heads") or raw["n_head"]
    width = raw.get("hidden_size") or raw["n_embd"]
    head_dim = raw.get("head_dim", width // heads)
    rotated = own.get("rope.dimension_count", head_dim)
    for key in HEAD_SIZES:
        value = own.get(key, head_dim)
        if value == head_dim or (key.startswith("rope") and architecture.partial):
            continue
        raise ValueError(
            f"GGUF option {prefix}{key}={short(value)} must be the head size, {head_dim}"
        )
    if type(rotated) is not int or not 0 < rotated <= head_dim:
        raise ValueError(
            f"GGUF option {prefix}rope.dimension_count must be at most the head size, {head_dim}, "
            f"got {short(rotated)}"
        )
    part = {architecture.partial: part_of_head(rotated, head_dim)} if architecture.partial else {}
    scaling = read_scaling(own, architecture, prefix)
    return part | ({"rope_scaling": scaling} if scaling else {})


def read_scaling(own: Metadata, architecture: Architecture, prefix: str) -> Json | None:
    """The `rope_scaling` of a config.json that is in keys alone; `longrope` is in tensors."""
    kind, factor = own.get(f"{SCALING}type"), own.get(f"{SCALING}factor")
    stretched = factor not in (None, 1) + (0,) * (kind != "linear")
    has_longrope = LONG in architecture.scaling_tensors  # whose config.json may call it yarn
    if kind == "yarn" and stretched and not has_longrope:
        given = {key: own[SCALING + key] for key in YARN if SCALING + key in own}
        for key, value in given.items():
            check_option(f"{prefix}{SCALING}{key}", YARN[key], value)
        return {"rope_type": "yarn"} | {YARN[key]: as_printed(x) for key, x in given.items()}
    if kind == "linear" and stretched and OPTIONS["factor"].holds(factor):
        return {"rope_type": "linear", "factor": as_printed(factor)}
    if kind not in (None, "none", "linear", "longrope") or stretched:
        raise ValueError(
            f"GGUF option {prefix}{SCALING}type={short(kind)} with a factor of {short(factor)} is "
            "not supported"
        )
    return None


def as_printed(value: Any) -> Any:
    """A float32 as it is printed: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
