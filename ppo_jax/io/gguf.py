"""A GGUF file as a Hugging Face folder: config.json, model.safetensors, tokenizer.

GGUF is the format of llama.cpp: weights, mostly quantised, and tokenizer in one file. Converted
once, it is read by the same code as everything else.

Dimension key: D model, H heads, K head size.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_TENSORS = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
# The metadata llama.* of a file; any other key is refused.
REQUIRED = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
OPTIONAL = (
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "rope.freq_base",
    "rope.dimension_count",
    "vocab_size",
)
CONTROL, USER_DEFINED = 3, 4  # token types of GGUF


def convert_gguf(path: Path, folder: Path) -> None:
    """Write a GGUF file of a Llama with byte-level BPE as a Hugging Face folder, in float32.

    Raises:
        ValueError: another architecture, tokenizer or option, or a tensor that is not supported.
    """
    import gguf  # with safetensors and transformers, needed for conversions alone
    from safetensors.numpy import save_file

    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path} is not a readable GGUF file: {error}") from error
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    names = {tensor.name for tensor in reader.tensors}
    try:
        config = read_metadata(metadata, tied="output.weight" not in names)
        tokenizer = build_tokenizer(metadata)
        hf_names = {name: hf_name(name) for name in names}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    tensors = {}
    for tensor in reader.tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        tensors[hf_names[tensor.name]] = half_split(weight, tensor.name, config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tokenizer.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors")


def read_metadata(metadata: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"GGUF architecture {architecture!r} is not supported; only 'llama' is")
    llama = {k.removeprefix("llama."): v for k, v in metadata.items() if k.startswith("llama.")}
    if unknown := sorted(llama.keys() - {*REQUIRED, *OPTIONAL}):
        raise ValueError(f"GGUF option llama.{unknown[0]}={llama[unknown[0]]!r} is not supported")
    refuse_missing(metadata, [*(f"llama.{key}" for key in REQUIRED), "tokenizer.ggml.tokens"])
    num_heads = llama["attention.head_count"]
    head_dim = llama.get("attention.key_length", llama["embedding_length"] // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if llama.get(key, head_dim) != head_dim:
            raise ValueError(
                f"GGUF option llama.{key}={llama[key]} must be the head size, {head_dim}"
            )
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": llama["embedding_length"],
        "intermediate_size": llama["feed_forward_length"],
        "num_hidden_layers": llama["block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": llama.get("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": llama["context_length"],
        # As printed in float32: 1e-05, not 9.999999747378752e-06.
        "rms_norm_eps": float(str(np.float32(llama["attention.layer_norm_rms_epsilon"]))),
        "rope_theta": llama.get("rope.freq_base", 10_000.0),
        "tie_word_embeddings": tied,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
    }


def hf_name(name: str) -> str:
    if name in TENSORS:
        return TENSORS[name]
    block, _, part = name.removeprefix("blk.").partition(".")
    if not name.startswith("blk.") or part not in LAYER_TENSORS:
        raise ValueError(f"GGUF tensor {name} is not supported")
    return f"model.layers.{block}.{LAYER_TENSORS[part]}"


def half_split(weight: np.ndarray, name: str, config: dict[str, Any]) -> np.ndarray:
    """Undo the order in which GGUF stores the rows of query and key, [H * K, D].

    GGUF has the two rows of each rotated pair side by side; Hugging Face has the first rows of
    all pairs of a head, then the second.
    """
    if not name.endswith(("attn_q.weight", "attn_k.weight")):
        return weight
    pairs = weight.reshape(-1, config["head_dim"] // 2, 2, weight.shape[-1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def build_tokenizer(metadata: dict[str, Any]):
    """The byte-level BPE tokenizer that a GGUF file describes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ggml = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    splitters = {
        "gpt-2": byte_level,
        "smollm": pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), byte_level]
        ),
    }
    check_tokenizer(ggml, sorted(splitters))
    refuse_missing(metadata, ["tokenizer.ggml.merges", "tokenizer.ggml.token_type"])
    vocab = {token: i for i, token in enumerate(ggml["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in ggml["merges"]]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = splitters[ggml["pre"]]
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(ggml["tokens"], ggml["token_type"], strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {
        f"{role}_token": ggml["tokens"][ggml[f"{key}_token_id"]]
        for role, key in roles.items()
        if f"{key}_token_id" in ggml
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        model_max_length=metadata["llama.context_length"],
        **special,
    )


def check_tokenizer(ggml: dict[str, Any], splitters: list[str]) -> None:
    """Refuse a tokenizer that would not be rebuilt exactly."""
    kind, splitter = ggml.get("model"), ggml.get("pre")
    if kind != "gpt2" or splitter not in splitters:
        raise ValueError(
            f"GGUF tokenizer {kind!r} with pre-tokenizer {splitter!r} is not supported; only "
            f"'gpt2' with one of {splitters} is"
        )
    for option in ("add_bos_token", "add_eos_token", "add_space_prefix"):
        if ggml.get(option):
            raise ValueError(f"GGUF option tokenizer.ggml.{option}=True is not supported")


def refuse_missing(metadata: dict[str, Any], required: list[str]) -> None:
    if missing := [key for key in required if key not in metadata]:
        raise ValueError(f"its metadata lack {missing}")
