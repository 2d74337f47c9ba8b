"""Llama and the families that are Llama but for some options: Mistral (a window), Qwen2 (biases,
windows in some layers), Qwen3 (norms of queries and keys), Seed-OSS (biases), SmolLM3 (layers
without positions), Granite (scale factors).
"""

import dataclasses

from ppo_jax.models.config import LayerKind, ModelConfig
from ppo_jax.models.families import rope
from ppo_jax.models.families.base import Family, Json, Tensor, linear, need, split_heads

SELF = "model.layers.{}.self_attn"
MLP = "model.layers.{}.mlp"
TENSORS = {
    "embed.tokens": Tensor("model.embed_tokens.weight"),
    "layers.attention_norm.scale": Tensor("model.layers.{}.input_layernorm.weight"),
    **linear("layers.attention.query", f"{SELF}.q_proj", transposed=True),
    **linear("layers.attention.key", f"{SELF}.k_proj", transposed=True),
    **linear("layers.attention.value", f"{SELF}.v_proj", transposed=True),
    **linear("layers.attention.output", f"{SELF}.o_proj", transposed=True),
    "layers.attention.query_norm.scale": Tensor(f"{SELF}.q_norm.weight"),
    "layers.attention.key_norm.scale": Tensor(f"{SELF}.k_norm.weight"),
    "layers.mlp_norm.scale": Tensor("model.layers.{}.post_attention_layernorm.weight"),
    **linear("layers.mlp.gate", f"{MLP}.gate_proj", transposed=True),
    **linear("layers.mlp.up", f"{MLP}.up_proj", transposed=True),
    **linear("layers.mlp.down", f"{MLP}.down_proj", transposed=True),
    "final_norm.scale": Tensor("model.norm.weight"),
    "head.kernel": Tensor("lm_head.weight", transposed=True),
}
FULL, SLIDING = "full_attention", "sliding_attention"


def read_shape(raw: Json, *, theta: float = 10_000.0, partial: bool = False) -> Json:
    """What these families share, without biases; `theta` is the base of rotary positions where the
    config.json has none, `partial` whether the family can rotate a part of a head."""
    heads = need(raw, "num_attention_heads")
    head_dim = raw.get("head_dim") or split_heads(raw, "hidden_size", "num_attention_heads")
    positions = rope.read_rope(raw, theta=theta)
    if positions.partial != 1 and not partial:
        raise ValueError("partial_rotary_factor is not supported: all of a head is rotated")
    return {
        "vocab_size": need(raw, "vocab_size"),
        "num_layers": need(raw, "num_hidden_layers"),
        "embed_dim": need(raw, "hidden_size"),
        "num_heads": heads,
        "num_kv_heads": raw.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "mlp_dim": need(raw, "intermediate_size"),
        "max_length": need(raw, "max_position_embeddings"),
        "positions": "rotary",
        "rope_theta": positions.theta,
        "rope_scaling": positions.scaling,
        "rotary_dim": rope.num_rotated(head_dim, positions.partial),
        "norm": "rmsnorm",
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "mlp": "gated_silu",
        "qkv_bias": False,
        "attention_output_bias": False,
        "mlp_bias": False,
        "qk_norm": "none",
        "tie_embeddings": raw.get("tie_word_embeddings", False),
    }


def read_window(raw: Json) -> int:
    """The window of layers that have one; 0 where no text of the model's length reaches it."""
    window = raw.get("sliding_window") or 0
    return window if window < need(raw, "max_position_embeddings") else 0


def same_window(raw: Json, num_layers: int) -> Json:
    return {"layer_kinds": (LayerKind(window=read_window(raw)),) * num_layers}


def local_layers(raw: Json, types: list[str], **local: float) -> tuple[LayerKind, ...]:
    """The kinds of layers by their types, "sliding_attention" ones with what is `local`."""
    kinds = {FULL: LayerKind(), SLIDING: LayerKind(window=read_window(raw), **local)}
    return tuple(kinds[x] for x in rope.check_layer_types(raw, kinds) or types)


def window_of(config: ModelConfig) -> int | None:
    """Of the layers that have one."""
    return max(kind.window for kind in config.kinds) or None


def write_layer_types(config: ModelConfig) -> Json:
    """Of families in which layers have one of two types.

    transformers has to have a window, even where no layer or no text of the length needs it.
    """
    kinds = map(config.kind_of, range(config.num_layers))
    types = [SLIDING if kind.window or kind.rope_theta else FULL for kind in kinds]
    return {"sliding_window": window_of(config) or config.max_length, "layer_types": types}


def read_attention_bias(raw: Json) -> Json:
    bias = bool(raw.get("attention_bias", False))
    return {"qkv_bias": bias, "attention_output_bias": bias}


def read_llama(raw: Json, theta: float = 10_000.0) -> Json:
    mlp_bias = bool(raw.get("mlp_bias", False))
    return read_shape(raw, theta=theta) | read_attention_bias(raw) | {"mlp_bias": mlp_bias}


def read_mistral(raw: Json) -> Json:
    fields = read_shape(raw)
    return fields | same_window(raw, fields["num_layers"])


def read_qwen_layers(raw: Json) -> Json:
    count, first = need(raw, "num_hidden_layers"), raw.get("max_window_layers", 28)
    if not raw.get("use_sliding_window"):
        rope.check_layer_types(raw, (FULL,))
        return {}
    types = [SLIDING if i >= first else FULL for i in range(count)]
    return {"layer_kinds": local_layers({"sliding_window": 4096} | raw, types)}


def read_qwen2(raw: Json) -> Json:
    return read_shape(raw) | {"qkv_bias": True} | read_qwen_layers(raw)


def read_qwen3(raw: Json) -> Json:
    # Its default head size does not follow from the width.
    raw = raw | {"head_dim": raw.get("head_dim") or 128}
    shape = read_shape(raw) | read_attention_bias(raw) | {"qk_norm": "head"}
    return shape | read_qwen_layers(raw)


def read_seed_oss(raw: Json) -> Json:
    raw = {"head_dim": 128, "attention_bias": True} | raw
    return read_llama(raw) | {"attention_output_bias": raw.get("attention_out_bias", False)}


def read_smollm3(raw: Json) -> Json:
    count, every = need(raw, "num_hidden_layers"), raw.get("no_rope_layer_interval", 4)
    rotary = raw.get("no_rope_layers")
    if rotary is None:
        rotary = [int(every == 0 or (i + 1) % every != 0) for i in range(count)]
    if len(rotary) != count:
        raise ValueError(f"no_rope_layers must have one for each of {count} layers, got {rotary}")
    kinds = tuple(LayerKind(rotary=bool(x)) for x in rotary)
    raw = {"tie_word_embeddings": True, **raw}
    return read_llama(raw, theta=2e6) | {"layer_kinds": kinds}


def read_granite(raw: Json) -> Json:
    return read_llama(raw) | {
        "embed_scale": float(raw.get("embedding_multiplier", 1.0)),
        "residual_scale": float(raw.get("residual_multiplier", 1.0)),
        "score_scale": float(raw.get("attention_multiplier", 1.0)),
        "logits_divisor": float(raw.get("logits_scaling", 1.0)),
    }


def write_shape(config: ModelConfig) -> Json:
    """What these families share."""
    part = part_of_head(config.num_rotated, config.head_dim)
    return {
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
        **rope.write_rope(config.rope_theta, config.rope_scaling, part),
    }


def part_of_head(rotated: int, head_dim: int) -> float:
    """The part of a head that is rotated: `int(head_dim * part)` is `rotated`."""
    part = rotated / head_dim
    return part if int(head_dim * part) == rotated else (rotated + 0.5) / head_dim


def write_mistral(config: ModelConfig) -> Json:
    return write_shape(config) | {"sliding_window": window_of(config)}


def write_qwen2(config: ModelConfig) -> Json:
    if window_of(config) is None:
        return write_shape(config)
    first = next(i for i in range(config.num_layers) if config.kind_of(i).window)
    windows = {"use_sliding_window": True, "max_window_layers": first}
    return write_shape(config) | windows | write_layer_types(config)


def write_qwen3(config: ModelConfig) -> Json:
    return write_qwen2(config) | {"attention_bias": config.attention_output_bias}


def write_llama(config: ModelConfig) -> Json:
    biases = {"attention_bias": config.attention_output_bias, "mlp_bias": config.mlp_bias}
    return write_shape(config) | biases


def write_seed_oss(config: ModelConfig) -> Json:
    return write_shape(config) | {
        "attention_bias": config.qkv_bias,
        "attention_out_bias": config.attention_output_bias,
        "mlp_bias": config.mlp_bias,
    }


def write_smollm3(config: ModelConfig) -> Json:
    rotary = [int(config.kind_of(i).rotary) for i in range(config.num_layers)]
    return write_llama(config) | {"no_rope_layers": rotary}


def write_granite(config: ModelConfig) -> Json:
    return write_llama(config) | {
        "embedding_multiplier": config.embed_scale,
        "residual_multiplier": config.residual_scale,
        "attention_multiplier": config.score_scale,
        "logits_scaling": config.logits_divisor,
    }


SILU = ("silu", "swish")
ROPE = frozenset(rope.OPTIONS)

LLAMA = Family(
    name="llama",
    hf_class="Llama",
    tensors=TENSORS,
    prefix="model.",
    read=read_llama,
    write=write_llama,
    required={"hidden_act": SILU, "pretraining_tp": (1,)},
    understood=ROPE,
)
QWEN2 = Family(
    name="qwen2",
    hf_class="Qwen2",
    tensors=TENSORS,
    prefix="model.",
    read=read_qwen2,
    write=write_qwen2,
    required={"hidden_act": SILU},
    understood=ROPE | {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"},
    implied={"num_key_value_heads": 32},
)
QWEN3 = dataclasses.replace(
    QWEN2, name="qwen3", hf_class="Qwen3", read=read_qwen3, write=write_qwen3
)
MISTRAL = dataclasses.replace(
    LLAMA,
    name="mistral",
    hf_class="Mistral",
    read=read_mistral,
    write=write_mistral,
    required={"hidden_act": SILU},
    understood=ROPE | {"sliding_window"},
    implied={"sliding_window": 4096, "num_key_value_heads": 8},
)
SEED_OSS = dataclasses.replace(
    LLAMA,
    name="seed_oss",
    hf_class="SeedOss",
    read=read_seed_oss,
    write=write_seed_oss,
    implied={"num_key_value_heads": 8},
)
SMOLLM3 = dataclasses.replace(
    LLAMA,
    name="smollm3",
    hf_class="SmolLM3",
    read=read_smollm3,
    write=write_smollm3,
    required={"hidden_act": SILU, "use_sliding_window": (False,)},
    understood=ROPE
    | {"no_rope_layers", "no_rope_layer_interval", "sliding_window", "max_window_layers"},
    implied={"num_key_value_heads": 4},
)
GRANITE = dataclasses.replace(
    LLAMA,
    name="granite",
    hf_class="Granite",
    read=read_granite,
    write=write_granite,
    required={"hidden_act": SILU},
    understood=ROPE
    | {"embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"},
)
