"""GPT-2: learned positions, LayerNorm, query, key and value in one matrix."""

from ppo_jax.models.config import ModelConfig
from ppo_jax.models.families.base import (
    QKV,
    Family,
    Json,
    Tensor,
    linear,
    need,
    split_heads,
)

TENSORS = {
    "embed.tokens": Tensor("transformer.wte.weight"),
    "embed.positions": Tensor("transformer.wpe.weight"),
    "layers.attention_norm.scale": Tensor("transformer.h.{}.ln_1.weight"),
    "layers.attention_norm.bias": Tensor("transformer.h.{}.ln_1.bias"),
    **linear(QKV, "transformer.h.{}.attn.c_attn"),
    **linear("layers.attention.output", "transformer.h.{}.attn.c_proj"),
    "layers.mlp_norm.scale": Tensor("transformer.h.{}.ln_2.weight"),
    "layers.mlp_norm.bias": Tensor("transformer.h.{}.ln_2.bias"),
    **linear("layers.mlp.up", "transformer.h.{}.mlp.c_fc"),
    **linear("layers.mlp.down", "transformer.h.{}.mlp.c_proj"),
    "final_norm.scale": Tensor("transformer.ln_f.weight"),
    "final_norm.bias": Tensor("transformer.ln_f.bias"),
    "head.kernel": Tensor("lm_head.weight", transposed=True),
}

# One function under all the names that transformers has for it.
GELU_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate")


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


def write_gpt2(config: ModelConfig) -> Json:
    return {
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


GPT2 = Family(
    name="gpt2",
    hf_class="GPT2",
    hf_classes={"policy": "GPT2LMHeadModel"},
    tensors=TENSORS,
    prefix="transformer.",
    read=read_gpt2,
    write=write_gpt2,
    required={
        "activation_function": GELU_TANH,
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
        "add_cross_attention": (False,),
    },
    understood=frozenset({"scale_attn_weights"}),
)
