"""The header of a GGUF file, and its tensors: nothing is read that the file does not hold.

Written for files from elsewhere: the reader of the `gguf` package believes every length.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ppo_jax.models.families.base import short

Metadata = dict[str, Any]

VERSIONS = (2, 3)
NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # type -> struct's letter
STRING, ARRAY = 8, 9
# More than any model has: a damaged length must not cost time or memory either.
MOST_ITEMS, MOST_KEYS, MOST_BYTES = 2**24, 2**16, 2**26
ALIGNMENT = 32  # bytes, unless general.alignment says something else


class StoredTensor(NamedTuple):
    """A tensor as the header describes it."""

    shape: tuple[int, ...]  # the last dimension is contiguous
    kind: int  # a `gguf.GGMLQuantizationType`
    begin: int  # first byte in the file
    size: int  # bytes


class Header:
    """Reads the parts of a header one after another.

    Each length is compared with what is left of the file before anything of it is read.
    """

    def __init__(self, data: mmap.mmap):
        self.data, self.position = data, 0

    def numbers(self, letter: str, count: int = 1) -> list:
        size = count * struct.calcsize(f"<{letter}")
        self.check(size, f"{count} numbers")
        found = struct.unpack_from(f"<{count}{letter}", self.data, self.position)
        self.position += size
        return list(found)

    def number(self, letter: str) -> Any:
        return self.numbers(letter)[0]

    def text(self) -> str:
        size = self.number("Q")
        self.check(size, f"a text of {size} bytes", MOST_BYTES)
        text = self.data[self.position : self.position + size].decode()
        self.position += size
        return text

    def count(self, least_bytes: int, what: str, most: int) -> int:
        """A number of things that take at least `least_bytes` each."""
        count = self.number("Q")
        self.check(count * least_bytes, f"{count} {what}", most * least_bytes)
        return count

    def check(self, size: int, what: str, most: float = math.inf) -> None:
        if size > min(most, len(self.data) - self.position):
            raise ValueError(
                f"the header declares {what} at byte {self.position} of {len(self.data)}"
            )

    def value(self) -> Any:
        kind = self.number("I")
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise ValueError(f"the header has a value of the unknown type {kind}")
        kind = self.number("I")
        if kind in NUMBERS:
            size = struct.calcsize(NUMBERS[kind])
            return self.numbers(NUMBERS[kind], self.count(size, "numbers", MOST_ITEMS))
        if kind != STRING:
            raise ValueError(f"the header has a list of the unknown type {kind}")
        return [self.text() for _ in range(self.count(8, "texts", MOST_ITEMS))]

    def read(self) -> tuple[Metadata, dict[str, StoredTensor]]:
        if self.data[:4] != b"GGUF":
            raise ValueError("it does not begin with 'GGUF'")
        self.position = 4
        if (version := self.number("I")) not in VERSIONS:
            raise ValueError(f"version {version} of the format is none of {list(VERSIONS)}")
        num_tensors = self.count(24, "tensors", MOST_KEYS)
        num_keys = self.count(12, "keys", MOST_KEYS)
        metadata: Metadata = {}
        for _ in range(num_keys):
            key = self.text()
            if key in metadata:
                raise ValueError(f"the header has {short(key)} twice")
            metadata[key] = self.value()
        places: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(num_tensors):
            name = self.text()
            if name in places:
                raise ValueError(f"the header has the tensor {short(name)} twice")
            dims = self.number("I")
            self.check(dims, f"a tensor of {dims} dimensions", 4)
            shape = tuple(reversed(self.numbers("Q", dims)))
            places[name] = (shape, self.number("I"), self.number("Q"))
        return metadata, self.tensors(metadata, places)

    def tensors(self, metadata: Metadata, places: Mapping) -> dict[str, StoredTensor]:
        """The tensors, each of which lies within the file."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        align = metadata.get("general.alignment", ALIGNMENT)
        if type(align) is not int or not 0 < align <= 2**16:
            raise ValueError(f"general.alignment must be a number of bytes, got {short(align)}")
        begin = -(-self.position // align) * align
        tensors = {}
        for name, (shape, number, offset) in places.items():
            if number not in {kind.value for kind in GGMLQuantizationType}:
                raise ValueError(f"the tensor {name} is stored as the unknown type {number}")
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(number)]
            if not shape or shape[-1] % block or math.prod(shape) < 1:
                raise ValueError(f"the tensor {name} has the impossible shape {shape}")
            size = math.prod(shape) // block * block_bytes
            if begin + offset + size > len(self.data):
                raise ValueError(f"the tensor {name} leads beyond the end of the file")
            tensors[name] = StoredTensor(shape, number, begin + offset, size)
        return tensors


def dequantized(data: mmap.mmap, tensor: StoredTensor) -> np.ndarray:
    """A tensor in float32."""
    from gguf import GGMLQuantizationType, quants

    stored = np.frombuffer(data, np.uint8, tensor.size, tensor.begin)
    rows = stored.reshape(*tensor.shape[:-1], -1)
    return quants.dequantize(rows, GGMLQuantizationType(tensor.kind)).astype(np.float32)


def check_storage(name: str, tensor: StoredTensor) -> None:
    """Refuse a kind of quantisation that cannot be undone."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    kind = GGMLQuantizationType(tensor.kind)
    try:
        quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError as error:
        what = f"the tensor {name} is stored as {kind.name}, which is not supported"
        raise ValueError(what) from error
