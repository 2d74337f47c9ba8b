"""Random models of real families, as transformers makes and saves them, and damaged copies."""

import json

import jax
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

try:
    import torch
except ModuleNotFoundError:
    torch = None  # the tests that need it are skipped

VOCAB, LENGTH = 61, 24
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,  # far from the defaults, so that reading it matters
}
SMALL_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "layer_norm_epsilon": 1e-3,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
NEOX = {"num_key_value_heads": None, "layer_norm_eps": 1e-3, "rms_norm_eps": None}
MOE = {"num_experts": 5, "num_experts_per_tok": 2}
TINY_MODELS = {
    "gpt2": ("gpt2", {}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False, "n_inner": 48}),
    "gpt2-tanh": ("gpt2", {"activation_function": "gelu_pytorch_tanh"}),
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama-neutral": (
        "llama",
        {
            "hidden_act": "swish",
            "layer_types": ["full_attention"] * 2,
            "rope_parameters": {"rope_type": "linear", "factor": 1.0, "rope_theta": 500.0},
        },
    ),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "llama-3": ("llama", {"rope_parameters": LLAMA3_ROPE, "head_dim": 16}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-untied": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3": ("qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
    "qwen3-biases": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-wide": ("mistral", {"sliding_window": 64, "head_dim": 12}),  # its longest text
    "seed_oss": ("seed_oss", {"head_dim": 12, "residual_dropout": 0.0}),
    "seed_oss-biases": (
        "seed_oss",
        {"head_dim": 8, "attention_bias": False, "attention_out_bias": True, "mlp_bias": True},
    ),
    "mistral-window": ("mistral", {"sliding_window": 5, "head_dim": 12}),
    "qwen2-windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3-windows": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1, "head_dim": 6},
    ),
    "llama-linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}},
    ),
    "llama-dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 500.0}},
    ),
    "llama-yarn": ("llama", {"rope_parameters": YARN_ROPE, "head_dim": 16}),
    "llama-yarn-mscale": (
        "llama",
        {
            "rope_parameters": YARN_ROPE
            | {"mscale": 0.7, "mscale_all_dim": 0.4, "truncate": False, "beta_fast": 16.0}
        },
    ),
    "gemma": ("gemma", {"head_dim": 12}),
    "gemma-untied": ("gemma", {"head_dim": 8, "tie_word_embeddings": False}),
    "gemma2": ("gemma2", {"head_dim": 12, "sliding_window": 6, "query_pre_attn_scalar": 20}),
    "gemma2-caps": (
        "gemma2",
        {"head_dim": 8, "attn_logit_softcapping": 0.7, "final_logit_softcapping": 2.0},
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 12,
            "num_hidden_layers": 3,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 900.0},
            },
            "query_pre_attn_scalar": 10,
        },
    ),
    "phi3": ("phi3", {"pad_token_id": 0}),
    "phi3-long": (
        "phi3",
        {
            "pad_token_id": 0,
            "head_dim": 8,
            "original_max_position_embeddings": 32,
            "sliding_window": 9,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 500.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.1, 1.5],
                "long_factor": [1.0, 2.0, 4.0],
            },
        },
    ),
    "pythia": ("gpt_neox", NEOX),
    "neox-sequential": (
        "gpt_neox",
        NEOX
        | {
            "use_parallel_residual": False,
            "hidden_act": "gelu_new",
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_theta": 300.0, "partial_rotary_factor": 1.0},
        },
    ),
    "olmo2": ("olmo2", {"num_key_value_heads": 1}),
    "olmo3": ("olmo3", {"num_hidden_layers": 4, "sliding_window": 5}),
    "olmo3-yarn": (
        "olmo3",
        {
            "num_hidden_layers": 4,
            "sliding_window": 5,
            "rope_parameters": {
                "full_attention": YARN_ROPE,
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "pad_token_id": 0}),
    "smollm3-own": ("smollm3", {"no_rope_layers": [0, 1], "pad_token_id": 0}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.2,
            "logits_scaling": 4.0,
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        MOE | {"head_dim": 12, "moe_intermediate_size": 14, "norm_topk_prob": True},
    ),
    "qwen3_moe-dense": (
        "qwen3_moe",
        MOE
        | {
            "num_hidden_layers": 3,
            "mlp_only_layers": [1],
            "moe_intermediate_size": 24,
            "num_experts_per_tok": 3,
            "use_sliding_window": True,
            "sliding_window": 6,
            "tie_word_embeddings": True,
        },
    ),
    "mixtral": (
        "mixtral",
        {"num_local_experts": 5, "sliding_window": 5, "head_dim": 6, "intermediate_size": 18},
    ),
    "olmoe": ("olmoe", MOE | {"intermediate_size": 18, "num_key_value_heads": 1}),
    "olmoe-one": ("olmoe", MOE | {"num_experts_per_tok": 1, "norm_topk_prob": True}),
}
MIXED_LAYERS = ("qwen3_moe-dense",)  # have experts in some layers, and cannot be scanned
# Of which transformers has no sequence classification.
UNCLASSIFIED = ("granite", "olmoe", "olmoe-one")


def torch_model(name, task="CausalLM", **changes):
    """A random model in which no bias is zero and no norm is one."""
    pytest.importorskip("torch")
    family, options = TINY_MODELS[name]
    small = SMALL_GPT2 if family == "gpt2" else SMALL
    config = transformers.AutoConfig.for_model(family, **{**small, **options, **changes})
    torch.manual_seed(0)
    auto_class = getattr(transformers, f"AutoModelFor{task}")
    # Its products of groups want widths that are multiples of 4.
    eager = dict(attn_implementation="eager", experts_implementation="eager")
    model = auto_class.from_config(config, **eager)
    with torch.no_grad():
        for parameter in model.parameters():
            around = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_(around + 0.2 * torch.randn_like(parameter))
    return model.eval()


def saver(make_folder):
    """name -> (torch model, the folder it is saved in), each made once."""
    made = {}

    def get(name):
        if name not in made:
            folder = make_folder(name)
            model = torch_model(name)
            model.save_pretrained(folder)
            made[name] = (model, folder)
        return made[name]

    return get


def edit_config(source, folder, **changes):
    """A copy of a saved model with some keys of its config.json changed, or removed by None."""
    raw = json.loads((source / "config.json").read_text()) | changes
    raw = {key: value for key, value in raw.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    return folder


def edit_weights(source, folder, change):
    """A copy of a saved model, with `change(tensors)` applied to its dict of arrays."""
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text((source / "config.json").read_text())
    return folder


def assert_same_tree(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
