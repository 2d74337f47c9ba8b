"""From a GGUF file to a Hugging Face folder: options and tensors by name, and their layout.

Dimension key: D model, H heads, K head size.
"""

import json
import math
import mmap
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ppo_jax.io.gguf.architectures import (
    HEAD_SIZES,
    LONG,
    ROPE_FREQS,
    SCALING,
    SHORT,
    Architecture,
    Place,
    architecture_of,
    as_printed,
    check_option,
    own_keys,
    places_of,
    read_positions,
    scaling_keys,
)
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
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.families import read_config
from ppo_jax.models.families.base import Json, short
from ppo_jax.models.families.rope import ORIGINAL

MOST_EXPERTS = 2**14
ROTATED = ("layers.attention.query.", "layers.attention.key.")


def read_metadata(metadata: Metadata) -> Json:
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
    prefix, own = metadata["general.architecture"] + ".", own_keys(metadata, architecture)
    options = {**architecture.required, **architecture.optional}
    known = {*options, *architecture.own_keys, "vocab_size", *HEAD_SIZES, *scaling_keys(own)}
    if unknown := sorted(own.keys() - known):
        value = short(own[unknown[0]])
        raise ValueError(f"GGUF option {prefix}{unknown[0]}={value} is not supported")
    refuse_missing(metadata, [prefix + key for key in architecture.required])
    raw: Json = {}
    for key, option in options.items():
        if key not in own:
            continue
        value = as_printed(own[key])
        check_option(prefix + key, option, value)
        if raw.setdefault(option, value) != value:
            raise ValueError(f"GGUF option {prefix}{key}={value} must be {raw[option]}")
    raw |= read_positions(own, raw, architecture, prefix)
    if "num_key_value_heads" in options.values():  # what a file need not tell
        raw.setdefault("num_key_value_heads", raw["num_attention_heads"])
        raw.setdefault("head_dim", raw["hidden_size"] // raw["num_attention_heads"])
        raw.setdefault("rope_theta", 10_000.0)
    raw |= architecture.more(own, raw)
    names = architecture.names
    about = {"model_type": names.name, "architectures": [names.class_name("policy")]}
    return about | architecture.fixed | raw


class Stored(NamedTuple):
    """A tensor of a file."""

    name: str
    layer: str
    place: Place
    shape: tuple[int, ...]

    @property
    def to(self) -> list[str]:
        """Its names in a Hugging Face folder: one for each expert."""
        row = self.place.tensor
        if not row.per_expert:
            return [row.name.format(self.layer)]
        return [row.name.format(self.layer, i) for i in range(self.shape[0])]

    @property
    def is_turned(self) -> bool:
        """Whether it is a matrix that Hugging Face has as [in, out]."""
        return self.place.path.endswith(".kernel") and not self.place.tensor.transposed

    @property
    def shape_there(self) -> tuple[int, ...]:
        if self.place.tensor.per_expert:
            return self.shape[1:]
        return self.shape[::-1] if self.is_turned else self.shape


def find_place(name: str, shape: tuple[int, ...], places: Mapping[str, Place]) -> Stored:
    """What a tensor is, of those of an architecture.

    Raises:
        ValueError: none of them.
    """
    match = re.fullmatch(r"(blk\.(\d{1,9})\.)?([a-z_0-9]+\.(weight|bias))", name, re.ASCII)
    place = places.get(match[3]) if match else None
    if not match or place is None or ("{}" in place.tensor.name) != bool(match[1]):
        raise ValueError(f"GGUF tensor {short(name)} is not supported")
    if place.tensor.per_expert and (len(shape) != 3 or shape[0] > MOST_EXPERTS):
        raise ValueError(f"{name} has shape {shape}, but the file asks for a matrix per expert")
    return Stored(name, match[2] or "", place, shape)


def hf_layout(
    weight: np.ndarray, stored: Stored, architecture: Architecture, config: ModelConfig
) -> np.ndarray:
    """A tensor as Hugging Face has it, [experts, ...] where each of them has one there.

    GGUF has the two rows of each rotated pair of a Llama side by side; Hugging Face has the first
    rows of all pairs of a head, then the second. Their biases alike. Of a matrix that is fused head
    by head GGUF has all queries, then all keys, then all values; and the scale of a norm whole,
    also where Hugging Face has what it is above 1.
    """
    path, fusion, head_dim = stored.place.path, stored.place.tensor.fusion, config.head_dim
    if path.endswith("norm.scale") and config.norm == "rmsnorm_plus_one":
        return weight - 1
    if architecture.interleaved and path.startswith(ROTATED):
        pairs = weight.reshape(-1, head_dim // 2, 2, *weight.shape[1:])
        weight = pairs.swapaxes(1, 2).reshape(weight.shape)
    if fusion is not None and fusion.by_head:
        heads = weight.reshape(len(fusion.paths), -1, head_dim, *weight.shape[1:])
        weight = heads.swapaxes(0, 1).reshape(weight.shape)
    return np.ascontiguousarray(weight.T if stored.is_turned and weight.ndim == 2 else weight)


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
        raw, plan = plan_conversion(metadata, tensors, data)
        tokenizer, ends = build_tokenizer(metadata, raw["vocab_size"]), stop_tokens(metadata)
        weights = {}
        architecture, config = architecture_of(metadata), read_config(raw)
        for stored in plan:
            weight = dequantized(data, tensors[stored.name])
            if not is_finite(weight):
                raise ValueError(f"{stored.name} holds NaN or infinity")
            weight = hf_layout(weight, stored, architecture, config)
            each = weight if stored.place.tensor.per_expert else [weight]
            weights |= dict(zip(stored.to, each, strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    if ends != [raw["eos_token_id"]]:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    tokenizer.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors")


def plan_conversion(
    metadata: Metadata, tensors: Mapping[str, StoredTensor], data: mmap.mmap
) -> tuple[Json, list[Stored]]:
    """(config.json, the tensors that go into the folder), checked by the header alone."""
    raw, architecture = read_metadata(metadata), architecture_of(metadata)
    tokens, places = read_tokens(metadata), places_of(architecture)
    for name, tensor in tensors.items():
        check_storage(name, tensor)
    weights = {name: x for name, x in tensors.items() if name not in (ROPE_FREQS, LONG, SHORT)}
    if same_bytes(data, tensors, "output.weight", "token_embd.weight"):
        del weights["output.weight"]
    plan = [find_place(name, tensor.shape, places) for name, tensor in weights.items()]
    raw |= {
        "vocab_size": len(tokens),
        "tie_word_embeddings": "output.weight" not in weights,
        "bos_token_id": special_id(metadata, "bos"),
        "eos_token_id": special_id(metadata, "eos"),
    }
    for bias, option in architecture.biases.items():
        if f"blk.0.{bias}" in weights:
            raw[option] = True
    raw |= scaling_of_tensors(metadata, tensors, data, raw)
    check_shapes(raw, plan, places)
    return raw, plan


def scaling_of_tensors(
    metadata: Metadata, tensors: Mapping[str, StoredTensor], data: mmap.mmap, raw: Json
) -> Json:
    """The `rope_scaling` whose numbers are tensors of a file, {} where there are none.

    Raises:
        ValueError: the architecture does not have such tensors, or keys and tensors do not fit.
    """
    allowed, prefix = architecture_of(metadata).scaling_tensors, metadata["general.architecture"]
    found = [name for name in (ROPE_FREQS, LONG, SHORT) if name in tensors]
    if other := [name for name in found if name not in allowed]:
        raise ValueError(f"GGUF tensor {other[0]} is not supported for {prefix!r}")
    numbers = {name: dequantized(data, tensors[name]).ravel() for name in found}
    refuse_half_longrope(metadata, found, allowed)
    if LONG in numbers:
        scaling = longrope_scaling(metadata, numbers, raw)
    elif ROPE_FREQS in numbers:
        count, pairs = len(numbers[ROPE_FREQS]), raw["head_dim"] // 2
        if count != pairs:
            raise ValueError(f"{ROPE_FREQS} has {count} numbers, but the file asks for {pairs}")
        scaling = rope_scaling(numbers[ROPE_FREQS], raw["rope_theta"])
    else:
        scaling = None
    if scaling and "rope_scaling" in raw:
        kind = raw["rope_scaling"]["rope_type"]
        raise ValueError(
            f"GGUF option {prefix}.{SCALING}type={kind!r} is not supported with the tensor "
            f"{found[0]}, which scales as well"
        )
    return {"rope_scaling": scaling} if scaling else {}


def refuse_half_longrope(metadata: Metadata, found: list[str], allowed: tuple[str, ...]) -> None:
    """Refuse a tensor of longrope without the other, and its keys without both."""
    if LONG in found and SHORT in found:
        return
    for name, other in ((LONG, SHORT), (SHORT, LONG)):
        if name in found:
            raise ValueError(f"GGUF tensor {name} is not supported without {other}")
    without = f" without {LONG} and {SHORT}" if LONG in allowed else ""
    prefix = f"{metadata['general.architecture']}.{SCALING}"
    is_longrope = metadata.get(f"{prefix}type") == "longrope"
    if is_longrope or metadata.get(f"{prefix}attn_factor", 1) != 1:
        key = prefix + ("type" if is_longrope else "attn_factor")
        value = short(as_printed(metadata[key]))
        raise ValueError(f"GGUF option {key}={value} is not supported{without}")


def longrope_scaling(metadata: Metadata, numbers: Mapping[str, np.ndarray], raw: Json) -> Json:
    """The scaling of Phi-3, of tensors and keys."""
    prefix = f"{metadata['general.architecture']}.{SCALING}"
    if ORIGINAL not in raw:
        key = f"{prefix}original_context_length"
        raise ValueError(f"GGUF option {key}, which {LONG} needs, is missing")
    scaling: Json = {"rope_type": "longrope", ORIGINAL: raw[ORIGINAL]}
    for option, name in (("short_factor", SHORT), ("long_factor", LONG)):
        scaling[option] = [as_printed(float(x)) for x in numbers[name]]
    if (key := f"{prefix}attn_factor") in metadata:
        check_option(key, "attention_factor", metadata[key])
        scaling["attention_factor"] = as_printed(metadata[key])
    return scaling


def check_shapes(raw: Json, plan: list[Stored], places: Mapping[str, Place]) -> None:
    """Refuse tensors that are missing, too many or of another shape, with their names in GGUF."""
    shapes: dict[str, tuple[int, ...]] = {}
    for stored in plan:
        if shapes.keys() & stored.to:
            raise ValueError(f"another tensor and {stored.name} are the same of the model")
        shapes |= dict.fromkeys(stored.to, stored.shape_there)
    unread = Unread(shapes)
    config = read_config(raw)
    try:
        find_parameters(config, raw["model_type"], dict.fromkeys(unread.shapes, unread))
    except ValueError as error:
        message = str(error).replace("config.json", "the file")
        for part, place in places.items():
            name = re.escape(place.tensor.name).replace(re.escape("{}"), r"(\d+)")
            into = rf"blk.\1.{part}" if "{}" in place.tensor.name else part
            message = re.sub(rf"\b{name}", into, message)
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
