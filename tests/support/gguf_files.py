"""GGUF files of models of transformers, written by the `gguf` package as llama.cpp converts."""

import json

import gguf
import numpy as np
import pytest
import transformers
from film_reviews.data import film_ratings

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
LLAMA3 = {"rope_parameters": LLAMA3_ROPE, "head_dim": 24}
MODELS = {  # name -> (model_type, what differs from the sizes)
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-3": ("llama", LLAMA3),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gpt2": ("gpt2", {}),
}


def random_model(name):
    """A model of transformers in which no bias is zero and no norm is one."""
    pytest.importorskip("torch")
    family, options = MODELS[name]
    sizes = GPT2_SIZES if family == "gpt2" else SIZES
    config = transformers.AutoConfig.for_model(family, **{**sizes, **options})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
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


def write_gguf(path, model, tokenizer, *, quantise=None, tokens=None, extra=()):
    """A GGUF file of a model.

    `tokens` replaces the metadata of the tokenizer, `extra` are (key, value, GGUFValueType).
    """
    config = model.config
    gpt2 = config.model_type == "gpt2"
    arch = {"mistral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.n_inner if gpt2 else config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if gpt2:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_key_length(head_size(config))
        writer.add_value_length(head_size(config))
    for key, value in (tokens or bpe_metadata(tokenizer)).items():
        writer.add_key_value(f"tokenizer.ggml.{key}", value, *value_types(key, value))
    for key, value, kind in extra:
        writer.add_key_value(key, value, kind)
    for name, tensor in gguf_tensors(model, arch):
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
        if arch == "llama" and ".self_attn." in name:
            array = interleave(array, name, head_size(config))
        yield names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(array)
    if config.model_type != "gpt2" and config.rope_parameters["rope_type"] == "llama3":
        rotary, size = model.model.rotary_emb, head_size(config)
        plain = config.rope_parameters["rope_theta"] ** -(np.arange(0, size, 2) / size)
        yield "rope_freqs.weight", (plain / rotary.inv_freq.numpy()).astype(np.float32)


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
