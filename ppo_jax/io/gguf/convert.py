"""From a GGUF file to a Hugging Face folder: options and tensors by name, and their layout.

Dimension key: D model, H heads, K head size.
"""

import dataclasses
import json
import math
import mmap
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ppo_jax.io.gguf.header import (
    Header,
    Metadata,
    StoredTensor,
    check_storage,
    dequantized,
)
from ppo_jax.io.gguf.tokenizer import (
    build_tokenizer,
    read_tokens,
    refuse_missing,
    special_id,
    stop_tokens,
)
from ppo_jax.io.integrity import reading_file
from ppo_jax.io.safetensors import find_parameters, is_finite
from ppo_jax.models.families import read_config
from ppo_jax.models.families.base import OPTIONS, short

LLAMA_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "model.layers.{}.input_layernorm",
    "attn_q": "model.layers.{}.self_attn.q_proj",
    "attn_k": "model.layers.{}.self_attn.k_proj",
    "attn_v": "model.layers.{}.self_attn.v_proj",
    "attn_output": "model.layers.{}.self_attn.o_proj",
    "attn_q_norm": "model.layers.{}.self_attn.q_norm",
    "attn_k_norm": "model.layers.{}.self_attn.k_norm",
    "ffn_norm": "model.layers.{}.post_attention_layernorm",
    "ffn_gate": "model.layers.{}.mlp.gate_proj",
    "ffn_up": "model.layers.{}.mlp.up_proj",
    "ffn_down": "model.layers.{}.mlp.down_proj",
}
GPT2_TENSORS = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "attn_norm": "transformer.h.{}.ln_1",
    "attn_qkv": "transformer.h.{}.attn.c_attn",
    "attn_output": "transformer.h.{}.attn.c_proj",
    "ffn_norm": "transformer.h.{}.ln_2",
    "ffn_up": "transformer.h.{}.mlp.c_fc",
    "ffn_down": "transformer.h.{}.mlp.c_proj",
}
ROPE_FREQS = "rope_freqs.weight"  # the divisor of each frequency, where Llama 3 scales them

# Keys of a file, after the name of its architecture -> options of config.json.
LLAMA_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
LLAMA_OPTIONAL = {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
GPT2_KEYS = {
    "block_count": "n_layer",
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
# Keys that follow from others, and what those are in the options of config.json.
HEAD_SIZES = ("attention.value_length", "rope.dimension_count")
ROPE_SCALING = ("rope.scaling.type", "rope.scaling.factor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """What GGUF calls the parts of a model family, and how it stores them."""

    model_type: str
    hf_class: str
    tensors: Mapping[str, str] = dataclasses.field(default_factory=lambda: LLAMA_TENSORS)
    required: Mapping[str, str] = dataclasses.field(default_factory=lambda: LLAMA_KEYS)
    optional: Mapping[str, str] = dataclasses.field(default_factory=lambda: LLAMA_OPTIONAL)
    interleaved: bool = False  # the two rows of each rotated pair of query and key side by side
    transposed: tuple[str, ...] = ()  # matrices that Hugging Face has as [in, out]


ARCHITECTURES = {
    "llama": Architecture(model_type="llama", hf_class="LlamaForCausalLM", interleaved=True),
    "qwen2": Architecture(model_type="qwen2", hf_class="Qwen2ForCausalLM"),
    "qwen3": Architecture(model_type="qwen3", hf_class="Qwen3ForCausalLM"),
    "gpt2": Architecture(
        model_type="gpt2",
        hf_class="GPT2LMHeadModel",
        tensors=GPT2_TENSORS,
        required=GPT2_KEYS,
        optional={"attention.head_count_kv": "n_head"},
        transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    ),
}


def architecture_of(metadata: Metadata) -> Architecture:
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(
            f"GGUF architecture {short(name)} is not supported; choose from {sorted(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def read_metadata(metadata: Metadata) -> dict[str, Any]:
    """The config.json of a file, but for what its tensors say.

    Raises:
        ValueError: a key is missing, is not understood, or has another type or range.
    """
    if (parts := metadata.get("split.count", 1)) not in (0, 1):
        number = metadata.get("split.no", 0)
        raise ValueError(
            f"it is one of the {short(parts)} parts (split.no={short(number)}) of a split file; "
            "join them: llama-gguf-split --merge FIRST_PART.gguf WHOLE.gguf"
        )
    architecture = architecture_of(metadata)
    prefix = metadata["general.architecture"] + "."
    own = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    options = {**architecture.required, **architecture.optional}
    known = {*options, "vocab_size", *HEAD_SIZES, *ROPE_SCALING}
    if unknown := sorted(own.keys() - known):
        value = short(own[unknown[0]])
        raise ValueError(f"GGUF option {prefix}{unknown[0]}={value} is not supported")
    refuse_missing(metadata, [prefix + key for key in architecture.required])
    raw: dict[str, Any] = {}
    for key, option in options.items():
        if key not in own:
            continue
        # As printed in float32: 1e-05, not 9.999999747378752e-06.
        value = own[key]
        value = float(str(np.float32(value))) if isinstance(value, float) else value
        if not OPTIONS[option].holds(value):
            words = OPTIONS[option].words
            raise ValueError(f"GGUF option {prefix}{key} must be {words}, got {short(value)}")
        if raw.setdefault(option, value) != value:
            raise ValueError(f"GGUF option {prefix}{key}={value} must be {raw[option]}")
    check_rotation(own, raw, prefix)
    if "num_key_value_heads" in options.values():  # as many as heads, where a file does not tell
        raw.setdefault("num_key_value_heads", raw["num_attention_heads"])
    return {
        "model_type": architecture.model_type,
        "architectures": [architecture.hf_class],
        **raw,
    }


def check_rotation(own: Metadata, raw: dict[str, Any], prefix: str) -> None:
    """Refuse rotary positions that are not of a whole head, or that are scaled by a factor."""
    heads = raw.get("num_attention_heads") or raw["n_head"]
    head_dim = raw.get("head_dim", (raw.get("hidden_size") or raw["n_embd"]) // heads)
    for key in HEAD_SIZES:
        if own.get(key, head_dim) != head_dim:
            value = short(own[key])
            raise ValueError(f"GGUF option {prefix}{key}={value} must be the head size, {head_dim}")
    kind, factor = (own.get(key) for key in ROPE_SCALING)
    if kind not in (None, "none", "linear") or factor not in (None, 1) + (0,) * (kind != "linear"):
        raise ValueError(
            f"GGUF option {prefix}rope.scaling.type={short(kind)} with a factor of {short(factor)} "
            "is not supported"
        )


def hf_name(name: str, architecture: Architecture) -> str:
    """The name of a tensor in a Hugging Face folder."""
    match = re.fullmatch(r"(blk\.(\d{1,9})\.)?([a-z_0-9]+)\.(weight|bias)", name, re.ASCII)
    pattern = architecture.tensors.get(match[3]) if match else None
    if not match or pattern is None or ("{}" in pattern) != bool(match[1]):
        raise ValueError(f"GGUF tensor {short(name)} is not supported")
    return f"{pattern.format(match[2])}.{match[4]}"


def hf_layout(
    weight: np.ndarray, name: str, architecture: Architecture, head_dim: int
) -> np.ndarray:
    """A tensor as Hugging Face has it: matrices transposed, rows of query and key in its order.

    GGUF has the two rows of each rotated pair of a Llama side by side; Hugging Face has the first
    rows of all pairs of a head, then the second. Their biases alike.
    """
    part = name.split(".")[-2]
    if part in architecture.transposed and weight.ndim == 2:
        return np.ascontiguousarray(weight.T)
    if not (architecture.interleaved and part in ("attn_q", "attn_k")):
        return weight
    pairs = weight.reshape(-1, head_dim // 2, 2, *weight.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


LENGTHS = (8192, *(2**i for i in range(5, 21)))  # of texts before the scaling; first Llama 3's


def rope_scaling(divisors: np.ndarray, theta: float) -> dict[str, Any] | None:
    """The scaling of Llama 3 that divides the frequencies of a head by `divisors`, [K / 2].

    Only the lengths of texts that separate the bands are searched for: all models have the band
    from 1 to 4.

    Raises:
        ValueError: no length gives these divisors.
    """
    factor = float(divisors.max())
    if factor == 1 and divisors.min() == 1:
        return None
    wavelengths = 2 * math.pi * theta ** (np.arange(len(divisors)) / len(divisors))
    for length in LENGTHS:
        smooth = np.clip((length / wavelengths - 1) / 3, 0, 1)
        if np.allclose(1 / divisors, (1 - smooth) / factor + smooth, rtol=1e-4):
            bands = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            return {
                "rope_type": "llama3",
                **bands,
                "original_max_position_embeddings": length,
            }
    raise ValueError(f"GGUF tensor {ROPE_FREQS} is no scaling of Llama 3")


# --- the conversion -------------------------------------------------------------------------------


class Unread(NamedTuple):
    """The shapes of a file's tensors, for `find_parameters`."""

    shapes: Mapping[str, tuple[int, ...]]
    name: str = ""

    def get_slice(self, name: str) -> "Unread":
        return self._replace(name=name)

    def get_shape(self) -> tuple[int, ...]:
        return self.shapes[self.name]

    def get_dtype(self) -> str:
        return "F32"


def convert_gguf(path: Path, folder: Path) -> None:
    """Write a GGUF file of one of `ARCHITECTURES` as a Hugging Face folder, in float32.

    Raises:
        OSError: the file may not be read.
        ValueError: it is damaged or a part of one, or has another architecture, tokenizer or
            option, or a tensor that is not supported. Nothing of the weights has been read then,
            but for those that are not finite.
    """
    from safetensors.numpy import save_file

    with path.open("rb") as file, reading_file(path):
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            metadata, tensors = Header(data).read()
        except ValueError as error:
            raise ValueError(f"it is not a readable GGUF file: {error}") from error
        raw, names = plan_conversion(metadata, tensors, data)
        tokenizer, ends = build_tokenizer(metadata, raw["vocab_size"]), stop_tokens(metadata)
        weights = {}
        architecture = architecture_of(metadata)
        head_dim = read_config(raw).head_dim
        for name, to in names.items():
            weight = dequantized(data, tensors[name])
            if not is_finite(weight):
                raise ValueError(f"{name} holds NaN or infinity")
            weights[to] = hf_layout(weight, name, architecture, head_dim)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    if ends != [raw["eos_token_id"]]:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    tokenizer.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors")


def plan_conversion(
    metadata: Metadata, tensors: Mapping[str, StoredTensor], data: mmap.mmap
) -> tuple[dict[str, Any], dict[str, str]]:
    """(config.json, {name of a tensor: its name there}), checked by the header alone."""
    raw = read_metadata(metadata)
    architecture, tokens = architecture_of(metadata), read_tokens(metadata)
    for name, tensor in tensors.items():
        check_storage(name, tensor)
    names = {x: hf_name(x, architecture) for x in tensors if x != ROPE_FREQS}
    if same_bytes(data, tensors, "output.weight", "token_embd.weight"):
        del names["output.weight"]
    raw |= {
        "vocab_size": len(tokens),
        "tie_word_embeddings": "output.weight" not in names,
        "bos_token_id": special_id(metadata, "bos"),
        "eos_token_id": special_id(metadata, "eos"),
    }
    if architecture.model_type == "gpt2":
        raw["activation_function"] = "gelu_new"
    else:
        raw["hidden_act"] = "silu"
        raw.setdefault("num_key_value_heads", raw["num_attention_heads"])
        raw.setdefault("head_dim", raw["hidden_size"] // raw["num_attention_heads"])
        raw.setdefault("rope_theta", 10_000.0)
        if architecture.model_type != "qwen2" and any(x.endswith("attn_q.bias") for x in names):
            raw["attention_bias"] = True
    if ROPE_FREQS in tensors:
        scaling = rope_scaling(dequantized(data, tensors[ROPE_FREQS]).ravel(), raw["rope_theta"])
        raw |= {"rope_scaling": scaling} if scaling else {}
    check_shapes(raw, {to: tensors[name].shape for name, to in names.items()}, architecture)
    return raw, names


def check_shapes(
    raw: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], architecture: Architecture
) -> None:
    """Refuse tensors that are missing, too many or of another shape, with their names in GGUF."""
    turned = {architecture.tensors[part].partition("{}")[2] for part in architecture.transposed}
    unread = Unread(
        {
            name: shape[::-1] if any(x and x in name for x in turned) else shape
            for name, shape in shapes.items()
        }
    )
    config = read_config(raw)
    try:
        find_parameters(config, raw["model_type"], dict.fromkeys(unread.shapes, unread))
    except ValueError as error:
        message = str(error).replace("config.json", "the file")
        for part, name in architecture.tensors.items():
            blocks = re.escape(name).replace(re.escape("{}"), r"(\d+)")
            into = rf"blk.\1.{part}" if "{}" in name else part
            message = re.sub(rf"\b{blocks}(?=\.(weight|bias)\b)", into, message)
        raise ValueError(message) from error


def same_bytes(
    data: mmap.mmap, tensors: Mapping[str, StoredTensor], first: str, second: str
) -> bool:
    """Whether two tensors are stored as the same bytes."""
    if first not in tensors or second not in tensors:
        return False
    a, b = tensors[first], tensors[second]
    if (a.shape, a.kind) != (b.shape, b.kind):
        return False
    return np.array_equal(*(np.frombuffer(data, np.uint8, x.size, x.begin) for x in (a, b)))
