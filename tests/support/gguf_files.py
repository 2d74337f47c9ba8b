"""GGUF files of models of transformers, written by the `gguf` package as llama.cpp converts."""

import json
import math

import gguf
import numpy as np
import pytest
import transformers
from film_reviews.data import film_ratings

from ppo_jax.io import hub
from ppo_jax.io import huggingface as hf
from ppo_jax.io.tokenizers import train_tokenizer
from tests.support.tiny_hf import LLAMA3_ROPE, torch

VOCAB = 300
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}
GPT2_SIZES = {
    "vocab_size": VOCAB,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 96,
    "n_positions": 128,
    "layer_norm_epsilon": 1e-3,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
ROPE = {"rope_type": "default", "rope_theta": 100.0}
YARN = ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.3,
    "attention_multiplier": 0.2,
    "logits_scaling": 4.0,
}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
NEOX = {"num_key_value_heads": None, "rms_norm_eps": None, "layer_norm_eps": 1e-3}
MOE = {"num_experts": 4, "num_experts_per_tok": 2}
LLAMA3 = {"rope_parameters": LLAMA3_ROPE, "head_dim": 24}
MODELS = {  # name -> (model_type, what differs from the sizes)
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-3": ("llama", LLAMA3),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gpt2": ("gpt2", {}),
    "llama-linear": ("llama", {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 3.0}}),
    "llama-yarn": ("llama", {"rope_parameters": YARN | {"attention_factor": 1.3}}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "seed_oss": ("seed_oss", {"head_dim": 24}),
    "seed_oss-plain": ("seed_oss", {"head_dim": 16, "attention_bias": False}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "pad_token_id": 0}),
    "granite": ("granite", MULTIPLIERS),
    "gemma": ("gemma", {"head_dim": 24}),
    "gemma2": (
        "gemma2",
        {"head_dim": 24, "sliding_window": 9, "query_pre_attn_scalar": 24, **CAPS},
    ),
    "gemma3": (
        "gemma3_text",
        {
            "num_hidden_layers": 6,
            "head_dim": 24,
            "sliding_window": 9,
            "query_pre_attn_scalar": 24,
            "final_logit_softcapping": 3.0,
            "rope_parameters": {
                "full_attention": ROPE | {"rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": ("phi3", {"pad_token_id": 0, "sliding_window": 9}),
    "phi3-long": (
        "phi3",
        {
            "pad_token_id": 0,
            "original_max_position_embeddings": 64,
            "rope_parameters": ROPE
            | {"rope_type": "longrope", "partial_rotary_factor": 0.75}
            | {"short_factor": [1.0, 1.1, 1.5, 2.0, 2.5, 3.0], "long_factor": [4.0] * 6},
        },
    ),
    "pythia": ("gpt_neox", NEOX | {"rope_parameters": ROPE | {"partial_rotary_factor": 0.25}}),
    "neox-sequential": (
        "gpt_neox",
        NEOX
        | {"rope_parameters": ROPE | {"partial_rotary_factor": 1.0}}
        | {"use_parallel_residual": False, "attention_bias": False},
    ),
    "olmo2": ("olmo2", {}),
    "olmo3": (
        "olmo3",
        {
            "num_hidden_layers": 4,
            "sliding_window": 9,
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        MOE | {"head_dim": 32, "moe_intermediate_size": 32, "norm_topk_prob": True},
    ),
    "mixtral": ("mixtral", MOE | {"num_local_experts": 4, "sliding_window": None}),
    "olmoe": ("olmoe", MOE | {"norm_topk_prob": False}),
}
# Of those whose model is called something else there.
ARCHITECTURES = {
    **dict.fromkeys(("mistral", "mixtral"), "llama"),
    "gemma3_text": "gemma3",
    "gpt_neox": "gptneox",
    "olmo3": "olmo2",
    "qwen3_moe": "qwen3moe",
}
INTERLEAVED = ("llama", "granite", "smollm3")


def random_model(name, **changes):
    """A model of transformers in which no bias is zero and no norm is one."""
    pytest.importorskip("torch")
    family, options = MODELS[name]
    sizes = GPT2_SIZES if family == "gpt2" else SIZES
    config = transformers.AutoConfig.for_model(family, **{**sizes, **options, **changes})
    torch.manual_seed(0)
    eager = dict(attn_implementation="eager", experts_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config, **eager)
    with torch.no_grad():
        for parameter in model.parameters():
            around = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_(around + 0.2 * torch.randn_like(parameter))
    return model.eval()


def small_tokenizer():
    tokenizer = train_tokenizer([r.text for r in film_ratings()[:200]], VOCAB)
    assert len(tokenizer) == VOCAB
    return tokenizer


def bpe_metadata(tokenizer, pre="gpt-2"):
    """What a file says of a byte-level BPE tokenizer, keys without `tokenizer.ggml`."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(spec["vocab"], key=spec["vocab"].get)
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [3 if token == "<|endoftext|>" else 1 for token in tokens],
        "merges": [" ".join(merge) for merge in spec["merges"]],
        "eos_token_id": 0,
    }


def write_gguf(path, model, tokenizer, *, quantise=None, tokens=None, extra=(), changed=()):
    """A GGUF file of a model.

    `tokens` replaces the metadata of the tokenizer, `extra` are (key, value, GGUFValueType),
    `changed` the shapes of tensors, which are ones then; None is without it.
    """
    config = model.config
    gpt2 = config.model_type == "gpt2"
    arch = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.n_inner if gpt2 else config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if gpt2:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        add_keys(writer, config)
    for key, value in (tokens or bpe_metadata(tokenizer)).items():
        writer.add_key_value(f"tokenizer.ggml.{key}", value, *value_types(key, value))
    for key, value, kind in extra:
        writer.add_key_value(key, value, kind)
    ones = {name: shape and np.ones(shape, np.float32) for name, shape in dict(changed).items()}
    for name, tensor in (dict(gguf_tensors(model, arch)) | ones).items():
        if tensor is None:
            continue
        kind = quantise if quantise is not None and tensor.ndim == 2 else None
        if kind is not None:
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_keys(writer, config):
    """As llama.cpp's script for converting writes them, the keys of each family."""
    family, size = config.model_type, head_size(config)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    rotated = int(size * rope.get("partial_rotary_factor", 1.0))
    if family == "gpt_neox":
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_parallel_residual(config.use_parallel_residual)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if family in ("gpt_neox", "phi3", *INTERLEAVED):
        writer.add_rope_dimension_count(rotated)
    else:
        writer.add_key_length(size)
        writer.add_value_length(size)
    if family in ("llama", "mixtral", "smollm3", "granite"):
        writer.add_vocab_size(config.vocab_size)
        if size * config.num_attention_heads != config.hidden_size:
            writer.add_key_length(size)
    writer.add_rope_freq_base(rope["rope_theta"])
    add_scaling(writer, config, rope)
    if family in ("gemma2", "gemma3_text", "phi3", "olmo3"):
        writer.add_sliding_window(config.sliding_window or 0)
    if family == "olmo3":
        writer.add_sliding_window_pattern([x == "sliding_attention" for x in config.layer_types])
    if family == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if family in ("gemma2", "gemma3_text") and config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if family == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if family in ("qwen3_moe", "mixtral", "olmoe"):
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if family == "qwen3_moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def add_scaling(writer, config, rope):
    if config.model_type == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        if rope["rope_type"] == "longrope":
            length = config.original_max_position_embeddings
            longer = config.max_position_embeddings / length
            writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(longer, length)))
    elif rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if "attention_factor" in rope:
            writer.add_rope_scaling_yarn_attn_factor(rope["attention_factor"])


def value_types(key, value):
    kind = gguf.GGUFValueType
    if isinstance(value, list):
        numbers = kind.FLOAT32 if key == "scores" else kind.INT32
        return kind.ARRAY, kind.STRING if isinstance(value[0], str) else numbers
    if isinstance(value, bool):
        return (kind.BOOL,)
    return (kind.STRING if isinstance(value, str) else kind.UINT32,)


def head_size(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def gguf_tensors(model, arch):
    """(name, array) of every tensor, under the names that the `gguf` package has for them."""
    config = model.config
    number = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[arch]
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    skipped = {"lm_head.weight"} if config.tie_word_embeddings else set()
    for name, parameter in model.state_dict().items():
        if name in skipped:
            continue
        array = parameter.numpy()
        if arch == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            array = array.T  # transformers has them as [in, out]
        if arch in INTERLEAVED and ".self_attn." in name:
            array = interleave(array, name, head_size(config))
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        if "query_key_value" in name:
            array = queries_first(array, config.num_attention_heads)
        if ".experts." in name:
            yield from expert_tensors(array, name, names)
            continue
        yield names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(array)
    rope = getattr(config, "rope_parameters", {})
    if rope.get("rope_type") == "longrope":
        for kind in ("long", "short"):
            yield f"rope_factors_{kind}.weight", np.float32(rope[f"{kind}_factor"])
    if rope.get("rope_type") == "llama3":
        rotary, size = model.model.rotary_emb, head_size(config)
        plain = config.rope_parameters["rope_theta"] ** -(np.arange(0, size, 2) / size)
        yield "rope_freqs.weight", (plain / rotary.inv_freq.numpy()).astype(np.float32)


def queries_first(array, num_heads):
    """Of [query; key; value] head by head all queries, then all keys, then all values."""
    parts = np.split(array, 3 * num_heads)
    return np.concatenate([*parts[0::3], *parts[1::3], *parts[2::3]])


def expert_tensors(array, name, names):
    """Those of all experts of a layer; transformers has gate and up as one."""
    kind, block = name.split(".")[-1], name.rpartition(".")[0]
    parts = {"down_proj": array}
    if kind == "gate_up_proj":
        gate, up = np.split(array, 2, axis=1)
        parts = {"gate_proj": gate, "up_proj": up}
    for part, own in parts.items():
        yield names.get_name(f"{block}.{part}") + ".weight", np.ascontiguousarray(own)


def interleave(array, name, size):
    """Row j of the first half of each head, then row j of its second half, for all j."""
    if not name.endswith(("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")):
        return array
    order = [
        head + j + half
        for head in range(0, len(array), size)
        for j in range(size // 2)
        for half in (0, size // 2)
    ]
    return array[order]


def refused(path):
    """What a file is refused with: one line, and nothing is left in the cache."""
    with pytest.raises(ValueError) as error:
        hf.load_policy(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and len(message.splitlines()) == 1, message
    assert not any(hub.cache_dir().iterdir())
    return message.removeprefix(f"{path}: ")
