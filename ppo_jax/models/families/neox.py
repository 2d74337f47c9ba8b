"""GPT-NeoX and Pythia: attention and MLP in parallel, LayerNorm, a part of each head rotated.

Query, key and value are one matrix, head after head.
"""

from ppo_jax.models.config import ModelConfig
from ppo_jax.models.families import rope
from ppo_jax.models.families.base import QKV, Family, Json, Tensor, linear
from ppo_jax.models.families.gpt2 import GELU_TANH
from ppo_jax.models.families.llama import part_of_head, read_shape

LAYER = "gpt_neox.layers.{}"
TENSORS = {
    "embed.tokens": Tensor("gpt_neox.embed_in.weight"),
    "layers.attention_norm.scale": Tensor(f"{LAYER}.input_layernorm.weight"),
    "layers.attention_norm.bias": Tensor(f"{LAYER}.input_layernorm.bias"),
    **linear(QKV, f"{LAYER}.attention.query_key_value", transposed=True, by_head=True),
    **linear("layers.attention.output", f"{LAYER}.attention.dense", transposed=True),
    "layers.mlp_norm.scale": Tensor(f"{LAYER}.post_attention_layernorm.weight"),
    "layers.mlp_norm.bias": Tensor(f"{LAYER}.post_attention_layernorm.bias"),
    **linear("layers.mlp.up", f"{LAYER}.mlp.dense_h_to_4h", transposed=True),
    **linear("layers.mlp.down", f"{LAYER}.mlp.dense_4h_to_h", transposed=True),
    "final_norm.scale": Tensor("gpt_neox.final_layer_norm.weight"),
    "final_norm.bias": Tensor("gpt_neox.final_layer_norm.bias"),
    "head.kernel": Tensor("embed_out.weight", transposed=True),
}


def read_neox(raw: Json) -> Json:
    given = {"rope_theta": raw.get("rotary_emb_base")} | raw
    given |= {"partial_rotary_factor": raw.get("rotary_pct", 0.25)}
    given |= dict.fromkeys(("head_dim", "num_key_value_heads"))  # it has neither
    bias = raw.get("attention_bias", True)
    return read_shape(given, partial=True) | {
        "norm": "layernorm",
        "norm_eps": raw.get("layer_norm_eps", 1e-5),
        "residual": "parallel" if raw.get("use_parallel_residual", True) else "pre",
        "mlp": "gelu_erf" if raw.get("hidden_act", "gelu") == "gelu" else "gelu",
        "qkv_bias": bias,
        "attention_output_bias": bias,
        "mlp_bias": True,
    }


def write_neox(config: ModelConfig) -> Json:
    scaled = rope.write_rope(config.rope_theta, config.rope_scaling)
    return {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.max_length,
        "layer_norm_eps": config.norm_eps,
        "rotary_pct": part_of_head(config.num_rotated, config.head_dim),
        "rotary_emb_base": scaled.pop("rope_theta"),
        "use_parallel_residual": config.residual == "parallel",
        "hidden_act": "gelu" if config.mlp == "gelu_erf" else "gelu_new",
        "attention_bias": config.qkv_bias,
        "tie_word_embeddings": config.tie_embeddings,
        **scaled,
    }


NEOX = Family(
    name="gpt_neox",
    hf_class="GPTNeoX",
    tensors=TENSORS,
    prefix="gpt_neox.",
    read=read_neox,
    write=write_neox,
    required={"hidden_act": ("gelu", *GELU_TANH)},
    understood=frozenset(rope.OPTIONS) | {"rotary_pct", "rotary_emb_base", "use_parallel_residual"},
)
