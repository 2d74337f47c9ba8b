"""What GPT-2, Llama, Qwen2 and Qwen3 checkpoints call things.

For each family: how its config.json gives a `ModelConfig` and the other way round, and under which
name and in which layout each of our parameters lies in its weight files. An option that would
change the outputs and that our Transformer does not have is refused by name.
"""

import dataclasses
import re
from typing import Any, NamedTuple

from ppo_jax.models.config import ModelConfig, RopeScaling, computation

Json = dict[str, Any]


class Tensor(NamedTuple):
    """Where one parameter lies in a checkpoint."""

    name: str  # {} stands for the layer
    transposed: bool = False  # stored as [out, in]
    third: int | None = None  # of a tensor that holds query, key and value side by side


def linear(path: str, name: str, **layout: Any) -> dict[str, Tensor]:
    """Rows of a linear map; whether it has a bias is for the `ModelConfig` to say."""
    bias_layout = {key: value for key, value in layout.items() if key != "transposed"}
    return {
        f"{path}.kernel": Tensor(f"{name}.weight", **layout),
        f"{path}.bias": Tensor(f"{name}.bias", **bias_layout),
    }


GPT2_NAMES = {
    "embed.tokens": Tensor("transformer.wte.weight"),
    "embed.positions": Tensor("transformer.wpe.weight"),
    "layers.attention_norm.scale": Tensor("transformer.h.{}.ln_1.weight"),
    "layers.attention_norm.bias": Tensor("transformer.h.{}.ln_1.bias"),
    **linear("layers.attention.query", "transformer.h.{}.attn.c_attn", third=0),
    **linear("layers.attention.key", "transformer.h.{}.attn.c_attn", third=1),
    **linear("layers.attention.value", "transformer.h.{}.attn.c_attn", third=2),
    **linear("layers.attention.output", "transformer.h.{}.attn.c_proj"),
    "layers.mlp_norm.scale": Tensor("transformer.h.{}.ln_2.weight"),
    "layers.mlp_norm.bias": Tensor("transformer.h.{}.ln_2.bias"),
    **linear("layers.mlp.up", "transformer.h.{}.mlp.c_fc"),
    **linear("layers.mlp.down", "transformer.h.{}.mlp.c_proj"),
    "final_norm.scale": Tensor("transformer.ln_f.weight"),
    "final_norm.bias": Tensor("transformer.ln_f.bias"),
    "head.kernel": Tensor("lm_head.weight", transposed=True),
}

LLAMA_NAMES = {
    "embed.tokens": Tensor("model.embed_tokens.weight"),
    "layers.attention_norm.scale": Tensor("model.layers.{}.input_layernorm.weight"),
    **linear("layers.attention.query", "model.layers.{}.self_attn.q_proj", transposed=True),
    **linear("layers.attention.key", "model.layers.{}.self_attn.k_proj", transposed=True),
    **linear("layers.attention.value", "model.layers.{}.self_attn.v_proj", transposed=True),
    **linear("layers.attention.output", "model.layers.{}.self_attn.o_proj", transposed=True),
    "layers.attention.query_norm.scale": Tensor("model.layers.{}.self_attn.q_norm.weight"),
    "layers.attention.key_norm.scale": Tensor("model.layers.{}.self_attn.k_norm.weight"),
    "layers.mlp_norm.scale": Tensor("model.layers.{}.post_attention_layernorm.weight"),
    **linear("layers.mlp.gate", "model.layers.{}.mlp.gate_proj", transposed=True),
    **linear("layers.mlp.up", "model.layers.{}.mlp.up_proj", transposed=True),
    **linear("layers.mlp.down", "model.layers.{}.mlp.down_proj", transposed=True),
    "final_norm.scale": Tensor("model.norm.weight"),
    "head.kernel": Tensor("lm_head.weight", transposed=True),
}

NAMES = {"gpt2": GPT2_NAMES, "llama": LLAMA_NAMES, "qwen2": LLAMA_NAMES, "qwen3": LLAMA_NAMES}

# Some files leave this out of their names: those saved from the model without its head.
PREFIX = {"gpt2": "transformer.", "llama": "model.", "qwen2": "model.", "qwen3": "model."}

# Causal masks and rotary frequencies that old files hold; both follow from the config.
DERIVED = re.compile(r"h\.\d+\.attn\.(masked_)?bias|.*rotary_emb\.inv_freq")

# Options that change the outputs, with the one value of each that our Transformer computes.
ONLY_VALUE: dict[str, Json] = {
    "gpt2": {
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
    },
    "llama": {"hidden_act": "silu", "pretraining_tp": 1},
    "qwen2": {"hidden_act": "silu", "use_sliding_window": False},
    "qwen3": {"hidden_act": "silu", "use_sliding_window": False},
}

# Keys that match SUSPICIOUS below and are dealt with by name, or mean nothing where they stand.
UNDERSTOOD = {
    "gpt2": {"scale_attn_weights"},
    "llama": {"rope_theta", "rope_scaling", "rope_parameters"},
    "qwen2": {"rope_theta", "rope_scaling", "rope_parameters", "layer_types"}
    | {"sliding_window", "max_window_layers"},  # without use_sliding_window they are not read
}
UNDERSTOOD["qwen3"] = UNDERSTOOD["qwen2"]

# A family's own code reads only the keys above, but forks of it add some: anything that sounds
# like arithmetic and is switched on is refused rather than passed over.
SUSPICIOUS = re.compile(
    r"expert|moe|sliding|window|softcap|multiplier|scal(e|ing)|rotary|rope|alibi|lora"
    r"|cross_attention|encoder_decoder|bidirectional|layer_types|quantization"
)


def read_config(raw: Json, **choices: Any) -> ModelConfig:
    """The content of a config.json as a `ModelConfig`.

    Args:
        raw: the content.
        choices: how to compute with it, see `shapes.computation`.

    Raises:
        ValueError: the family or one of its options is not supported, or a key is missing.
    """
    family = raw.get("model_type")
    if family not in NAMES:
        raise ValueError(f"model_type {family!r} is not supported; choose from {sorted(NAMES)}")
    refuse_unsupported(raw, family)
    read = read_gpt2 if family == "gpt2" else read_llama
    return ModelConfig(**choices, **read(raw))


def refuse_unsupported(raw: Json, family: str) -> None:
    """Raise a ValueError for every option that our Transformer does not compute."""
    if raw.get("auto_map"):
        raise ValueError("auto_map asks for code from the checkpoint, which is never run here")
    for key, only in ONLY_VALUE[family].items():
        if raw.get(key) not in (None, only):
            raise ValueError(f"{key}={raw[key]!r} is not supported for {family}; only {only!r} is")
    other = [kind for kind in raw.get("layer_types") or [] if kind != "full_attention"]
    if other:
        raise ValueError(f"layer_types has {other[0]!r}; only 'full_attention' is supported")
    for key, value in raw.items():
        neutral = not value or (value is not True and value == 1)
        if SUSPICIOUS.search(key) and key not in UNDERSTOOD[family] and not neutral:
            raise ValueError(f"{key}={value!r} is not supported for {family}")


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


def read_gpt2(raw: Json) -> Json:
    return {
        "vocab_size": need(raw, "vocab_size"),
        "num_layers": need(raw, "n_layer"),
        "embed_dim": need(raw, "n_embd"),
        "num_heads": need(raw, "n_head"),
        "num_kv_heads": need(raw, "n_head"),
        "head_dim": split_heads(raw, "n_embd", "n_head"),
        "mlp_dim": raw.get("n_inner") or 4 * need(raw, "n_embd"),
        "max_length": need(raw, "n_positions"),
        "positions": "learned",
        "norm": "layernorm",
        "norm_eps": raw.get("layer_norm_epsilon", 1e-5),
        "mlp": "gelu",
        "qkv_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
        "tie_embeddings": raw.get("tie_word_embeddings", True),
    }


def read_llama(raw: Json) -> Json:
    """Llama, Qwen2 and Qwen3, which differ in biases and in the norm of queries and keys."""
    family = raw["model_type"]
    bias = family != "qwen2" and bool(raw.get("attention_bias", False))
    head_dim = raw.get("head_dim") or (128 if family == "qwen3" else None)
    rope_theta, rope_scaling = read_rope(raw)
    return {
        "vocab_size": need(raw, "vocab_size"),
        "num_layers": need(raw, "num_hidden_layers"),
        "embed_dim": need(raw, "hidden_size"),
        "num_heads": need(raw, "num_attention_heads"),
        "num_kv_heads": raw.get("num_key_value_heads") or need(raw, "num_attention_heads"),
        "head_dim": head_dim or split_heads(raw, "hidden_size", "num_attention_heads"),
        "mlp_dim": need(raw, "intermediate_size"),
        "max_length": need(raw, "max_position_embeddings"),
        "positions": "rotary",
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "norm": "rmsnorm",
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "mlp": "gated_silu",
        "qkv_bias": family == "qwen2" or bias,
        "attention_output_bias": bias,
        "mlp_bias": family == "llama" and bool(raw.get("mlp_bias", False)),
        "qk_norm": family == "qwen3",
        "tie_embeddings": raw.get("tie_word_embeddings", False),
    }


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


def write_config(config: ModelConfig) -> Json:
    """The inverse of `read_config`: the config.json of a model, without the ids of its tokens.

    The family is the first whose checkpoints can hold such a model; the choices of `computation`
    are not in it.

    Raises:
        ValueError: no family has such a model.
    """
    if config.positions == "learned":
        candidates = [write_gpt2(config)]
    else:
        candidates = [write_llama(config, family) for family in ("llama", "qwen2", "qwen3")]
    for raw in candidates:
        if read_config(raw, **computation(config)) == config:
            return raw
    raise ValueError(f"none of {sorted(NAMES)} has a model of the shape {config}")


def write_gpt2(config: ModelConfig) -> Json:
    return {
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_layer": config.num_layers,
        "n_embd": config.embed_dim,
        "n_head": config.num_heads,
        "n_inner": config.mlp_dim,
        "n_positions": config.max_length,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": "gelu_new",
        "tie_word_embeddings": config.tie_embeddings,
    }


def write_llama(config: ModelConfig, family: str) -> Json:
    """Llama, Qwen2 and Qwen3; an option that the family's own code does not read is left out."""
    raw = {
        "model_type": family,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_embeddings,
        **write_rope(config.rope_theta, config.rope_scaling),
    }
    if family != "qwen2":
        raw["attention_bias"] = config.attention_output_bias
    if family == "llama":
        raw["mlp_bias"] = config.mlp_bias
    return raw


def write_rope(theta: float, scaling: RopeScaling | None) -> Json:
    """The older form, which all generations of transformers read."""
    if scaling is None:
        return {"rope_theta": theta}
    numbers = dataclasses.asdict(scaling)
    numbers["original_max_position_embeddings"] = numbers.pop("original_max_length")
    return {"rope_theta": theta, "rope_scaling": {"rope_type": "llama3", **numbers}}
