"""Parser of optimised HLO text: computations, instructions, array shapes.

XLA prints the program of one device. Operands are names, so a computation is a table from names to
instructions.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16}  # other dtypes have theirs in the name
ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
LINE = re.compile(r"(ROOT )?%?([\w.\-]+) = (.*)")
NAME = re.compile(r"%([\w.\-]+)")
CONTINUATION = re.compile(r'\n(?="|\}\})')  # the metadata of a Pallas kernel spans lines
COMMENT = re.compile(r"/\*.*?\*/")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array, or one leaf of a tuple."""

    dtype: str
    dims: tuple[int, ...]
    memory_space: int = 0  # 0 is main memory (HBM); TPUs number the faster ones near the core

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Without the padding of tiled layouts."""
        return self.size * dtype_bits(self.dtype) / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: `name = type opcode(literal), attributes`."""

    name: str
    opcode: str
    outputs: tuple[Array, ...]  # the leaves of a tuple
    operands: tuple[str, ...]
    literal: str  # between the parentheses: operands, a constant, a parameter's number
    attributes: str

    @property
    def op_name(self) -> str:
        """Its JAX name, `jit(f)/while/body/dot_general`, or else its HLO name."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else self.name

    def attribute(self, key: str) -> str | None:
        """The text of `key={...}` without its braces, or of `key=...` up to the next comma."""
        match = re.search(rf"\b{key}=(?:\{{([^{{}}]*)\}}|([^,{{}}\s]+))", self.attributes)
        return match and (match[2] if match[1] is None else match[1])

    def numbers(self, key: str) -> tuple[int, ...]:
        """The numbers of an attribute; () where it is not given."""
        return tuple(int(x) for x in re.findall(r"-?\d+", self.attribute(key) or ""))

    def called(self, key: str) -> tuple[str, ...]:
        """The computations that an attribute names."""
        return tuple(name.lstrip("%") for name in (self.attribute(key) or "").split(", ") if name)

    @property
    def target(self) -> str:
        """The target of a custom call."""
        return (self.attribute("custom_call_target") or "").strip('"')


@dataclasses.dataclass(frozen=True)
class Computation:
    """A named list of instructions; the root is its result."""

    name: str
    instructions: dict[str, Instruction]
    root: Instruction

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    def inputs(self, instruction: Instruction) -> list[Instruction]:
        """The instructions that its operands name."""
        return [self.instructions[name] for name in instruction.operands]

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """In the order of their numbers."""
        return sorted((i for i in self if i.opcode == "parameter"), key=lambda i: int(i.literal))

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that have one as an operand, by its name."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self:
            for name in dict.fromkeys(instruction.operands):
                users[name].append(instruction)
        return users


@dataclasses.dataclass(frozen=True)
class Module:
    """A program."""

    computations: dict[str, Computation]
    entry: Computation
    num_devices: int

    def called(self, instruction: Instruction, key: str) -> Computation:
        """The computation that an attribute of an instruction names."""
        return self.computations[instruction.called(key)[0]]


def dtype_bits(dtype: str) -> int:
    """Bits per element.

    >>> [dtype_bits(dtype) for dtype in ("pred", "bf16", "f32", "s4", "f8e4m3fn", "c64")]
    [8, 16, 32, 4, 8, 64]
    """
    return BITS[dtype] if dtype in BITS else int(re.search(r"\d+", dtype)[0])


def parse_arrays(text: str) -> tuple[Array, ...]:
    """The leaves of a printed type.

    >>> parse_arrays("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, (s32[]))")
    (Array(dtype='bf16', dims=(2, 3), memory_space=1), Array(dtype='s32', dims=(), memory_space=0))
    """
    arrays = []
    for dtype, dims, layout in ARRAY.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(x.lstrip("<=")) for x in dims.split(",") if x)
        arrays.append(Array(dtype, sizes, int(space[1]) if space else 0))
    return tuple(arrays)


def parse_instruction(line: str) -> tuple[Instruction, bool] | None:
    """(instruction, whether it is the root) of a line; None where it is no instruction."""
    match = LINE.fullmatch(COMMENT.sub("", line).strip())
    if not match:
        return None
    root, name, rest = match.groups()
    end = parenthesis_end(rest, 0) if rest.startswith("(") else rest.index(" ")
    outputs, rest = parse_arrays(rest[:end]), rest[end:].lstrip()
    start = rest.index("(")
    end = parenthesis_end(rest, start)
    opcode, literal = rest[:start], rest[start + 1 : end - 1]
    operands = tuple(NAME.findall(literal)) if opcode != "constant" else ()
    return Instruction(name, opcode, outputs, operands, literal, rest[end:]), root is not None


def parenthesis_end(text: str, start: int) -> int:
    """The index after the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i + 1
    raise ValueError(f"no closing parenthesis in {text[start : start + 80]!r}")


def parse_module(text: str) -> Module:
    """A program from the text of `jax.stages.Compiled.as_text()`.

    Raises:
        ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry = name = root = None
    instructions: dict[str, Instruction] = {}
    for line in CONTINUATION.sub(" ", text).splitlines():
        if header := HEADER.fullmatch(line):
            name, instructions, root = header[2], {}, None
            entry = name if header[1] else entry
        elif line.startswith("}") and name is not None:
            computations[name] = Computation(name, instructions, root)
            name = None
        elif name is not None and (parsed := parse_instruction(line)):
            instruction, is_root = parsed
            instructions[instruction.name] = instruction
            root = instruction if is_root else root
    if entry is None:
        raise ValueError("the text has no ENTRY computation: it is no optimised HLO")
    first_line = text.partition("\n")[0]
    counts = re.findall(r"\b(?:replica_count|num_partitions)=(\d+)", first_line)
    return Module(computations, computations[entry], math.prod(map(int, counts)))
