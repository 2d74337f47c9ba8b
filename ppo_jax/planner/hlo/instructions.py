"""What one instruction of a compiled program computes, and what it sends to other chips."""

import functools
import math
import re

import numpy as np

from ppo_jax.planner.hlo.text import Array, Computation, Instruction, Module

# Matrix products by a library: oneDNN on CPUs, cuBLAS on GPUs.
MATMUL_CALLS = ("__onednn$matmul", "__cublas$gemm", "__cublas$lt$matmul")
# Fused attention, by the name of the call: products of the size of the scores Q K' in each.
CUDNN_PRODUCTS = {"__cudnn$fmhaSoftmax": 2, "__cudnn$fmhaSoftmaxBackward": 5}
SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}  # the backward kernels make the scores again
# Of the bytes that a chip hands in, the share that it sends; n chips are in a group.
SHARE_SENT = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: n - 1,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
    "collective-broadcast": lambda n: 1,
}


def matmul_flops(computation: Computation, instruction: Instruction) -> float:
    """Floating-point operations of a matrix product or a convolution, 0 for all else.

    2 M N K for a product of [M, K] and [K, N], times what is batched. Elementwise operations and
    reductions are not counted: they are bound by memory, not by the matrix units.
    """
    inputs = computation.inputs(instruction)
    if instruction.opcode == "dot":
        dims = inputs[0].outputs[0].dims
        depth = math.prod(dims[i] for i in instruction.numbers("lhs_contracting_dims"))
        return 2.0 * instruction.outputs[0].size * depth
    if instruction.opcode == "convolution":
        return convolution_flops(instruction, inputs[0].outputs[0].dims, inputs[1].outputs[0].dims)
    if instruction.opcode == "custom-call" and instruction.target in MATMUL_CALLS:
        left, right, product = (x.outputs[0] for x in (inputs[0], inputs[1], instruction))
        batch = math.prod(product.dims[:-2]) if len(right.dims) > 2 else 1
        # |left| |right| / |product| = batch K^2, whichever operand is transposed.
        return 2.0 * product.size * math.sqrt(left.size * right.size / product.size / batch)
    return 0.0


def attention_flops(computation: Computation, instruction: Instruction) -> float:
    """Floating-point operations of a call of fused causal attention, 0 for all else.

    2 H K x products x pairs of a query and a key. The TPU kernel computes whole blocks, those on
    and below the diagonal. What the blocks of cuDNN are it does not say: of these half of all pairs
    count.
    """
    if products := CUDNN_PRODUCTS.get(instruction.target):
        queries = computation.inputs(instruction)[0].outputs[0]  # [B, L, H, K]
        return products * queries.size * queries.dims[-3]
    kernel = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", instruction.op_name)
    if instruction.target != "tpu_custom_call" or not kernel:
        return 0.0
    arrays = [array for x in computation.inputs(instruction) for array in x.outputs]
    queries = next(x for x in arrays if x.dtype in ("bf16", "f32"))  # [..., H, L, K]
    length = queries.dims[-2]
    block = int(re.search(r"block_q(?:_dq|_dkv)?\W+(\d+)", instruction.attributes)[1])
    pairs = length * (length + block) / 2
    return 2.0 * SPLASH_PRODUCTS[kernel[1]] * queries.size / length * pairs


def convolution_flops(instruction: Instruction, left: tuple, right: tuple) -> float:
    """2 x (batch / batch groups) x out features x in features a group x hits.

    TPUs write matrix products, too, as convolutions: batch axes and heads become spatial ones
    whose padding and dilation leave one hit a row. A hit is an output position and a place in the
    window that meet a number of the input, and neither padding nor a hole.

    Args:
        instruction: with `dim_labels`, where b, f are batch and features of the input and the
            output, i, o the features of the kernel, digits the spatial axes.
        left: the input's shape.
        right: the kernel's shape.
    """
    labels = re.split(r"_|->", instruction.attribute("dim_labels"))
    sizes = (left, right, instruction.outputs[0].dims)
    of_left, of_right, of_out = (
        dict(zip(names, dims, strict=True)) for names, dims in zip(labels, sizes, strict=True)
    )
    batch_groups = (instruction.numbers("batch_group_count") or (1,))[0]
    hits = 1
    window = window_axes(instruction.attribute("window") or "")
    for axis, (stride, low, input_gap, kernel_gap) in enumerate(window):
        key = str(axis)
        hits *= count_hits(
            of_left[key], of_right[key], of_out[key], stride, low, input_gap, kernel_gap
        )
    return 2.0 * of_left["b"] / batch_groups * of_right["o"] * of_right["i"] * hits


def window_axes(text: str) -> list[tuple[int, int, int, int]]:
    """(stride, padding before, dilation of the input, of the kernel) of each spatial axis.

    >>> window_axes("size=8x2 stride=7x1 pad=0_0x1_1 lhs_dilate=8x1")
    [(7, 0, 8, 1), (1, 1, 1, 1)]
    """
    fields = dict(part.split("=") for part in text.split())
    if not fields:
        return []
    count = len(fields["size"].split("x"))

    def axes(name: str, default: str) -> list[int]:
        values = fields[name].split("x") if name in fields else [default] * count
        return [int(value.split("_")[0]) for value in values]

    return list(
        zip(
            axes("stride", "1"),
            axes("pad", "0_0"),
            axes("lhs_dilate", "1"),
            axes("rhs_dilate", "1"),
            strict=True,
        )
    )


@functools.cache
def count_hits(num_in, size, num_out, stride, low, input_gap, kernel_gap) -> int:
    """How many (output position, place in the window) pairs meet a number of the input."""
    starts = np.arange(num_out) * stride - low
    hits = 0
    for place in range(size):
        at = starts + place * kernel_gap
        hits += np.count_nonzero((at >= 0) & (at % input_gap == 0) & (at // input_gap < num_in))
    return int(hits)


def collective(
    module: Module, computation: Computation, instruction: Instruction
) -> tuple[str, float] | None:
    """(kind, bytes that a chip sends over the interconnect) of a collective; None for all else.

    With n chips in a group and I bytes that each hands in, in rings:

    - all-reduce sends 2 (n - 1) / n I: a reduce-scatter, then an all-gather;
    - all-gather (n - 1) I: each piece goes round;
    - reduce-scatter and all-to-all (n - 1) / n I (an all-to-all that goes the direct way);
    - collective-permute I, and nothing where every chip keeps its own.

    An asynchronous one counts where it starts. TPUs fuse one with the computation that runs beside
    it, in several stages that name it again; and write a reduce-scatter as a fusion of an
    all-reduce and a slice.
    """
    kind = instruction.opcode.removesuffix("-start")
    if kind not in SHARE_SENT or is_later_stage(computation):
        return None
    if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    size = sum(array.bytes for x in computation.inputs(instruction) for array in x.outputs)
    group = group_size(instruction, module.num_devices)
    return (kind, SHARE_SENT[kind](group) * size) if group > 1 else (kind, 0.0)


def is_later_stage(computation: Computation) -> bool:
    """Whether a fused computation carries on, or ends, a collective that another has started."""
    targets = {i.target for i in computation if i.opcode == "custom-call"}
    if "AsyncCollectiveStart" in targets:
        return False
    staged = computation.name.startswith("async_collective_fusion")
    return staged or "AsyncCollectiveDone" in targets


def group_size(instruction: Instruction, num_devices: int) -> int:
    """How many chips a collective joins: the largest of its groups.

    Read from `{{0,1},{2,3}}`, from `[2,4]<=[8]` (2 groups of 4), from
    `mesh['a'=2,'b'=4] {'b'}` (along b, 4; `'b':(1)2` is a part of 2 of it), or all where no group
    is named.
    """
    text = instruction.attributes
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text):
        moved = [a != b for a, b in re.findall(r"(\d+),(\d+)", pairs[1])]
        return 2 if any(moved) else 1
    if lists := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", text):
        return max(len(group.split(",")) for group in re.findall(r"\{([\d,]+)\}", lists[1]))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", text):
        return int(iota[1])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[name]) for name, part in parts)
    if named := re.search(r"replica_groups=(?!\{\})\S+", text):
        raise ValueError(f"{instruction.op_name}: groups in an unknown form, {named[0]!r}")
    return num_devices


# They name what is there, or call others, whose instructions count themselves.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain",
    "partition-id", "replica-id", "while", "conditional", "call", "call-start", "async-start",
    "opt-barrier", "add-dependency",
}  # fmt: skip
FREE_CALLS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound"}
READS_A_PART = {"dynamic-slice", "slice", "gather"}  # of their first operand
IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}  # which operand is written into the first
RESHAPED = {"bitcast", "reshape", "transpose", "copy", "convert"}


def in_memory(arrays: tuple[Array, ...]) -> float:
    return sum(array.bytes for array in arrays if array.space == 0)


def resized(array: Array, size: float) -> float:
    """The bytes of `size` elements of an array, if it is in main memory."""
    return in_memory((array,)) * size / array.size if array.size else 0.0


def traffic(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Bytes read and written by an instruction outside of fusions.

    Operands and results once each; of a fusion only its own, not what passes inside. Where a slice
    is read, or written in place (a layer of a stack, a position of a cache), the slice.
    """
    opcode = instruction.opcode.removesuffix("-start")
    if instruction.opcode in FREE or instruction.opcode.endswith(("-done", "async-update")):
        return 0.0
    if instruction.target in FREE_CALLS:
        return 0.0
    if opcode == "fusion":
        return fusion_traffic(module, computation, instruction)
    inputs = computation.inputs(instruction)
    results = own_results(instruction, sum(len(x.outputs) for x in inputs))
    if opcode in READS_A_PART:
        part = resized(inputs[0].outputs[0], results[0].size)
        return part + sum(in_memory(x.outputs) for x in inputs[1:]) + in_memory(results)
    if opcode in IN_PLACE:
        update = inputs[IN_PLACE[opcode]].outputs[0]
        read = sum(in_memory(x.outputs) for x in inputs[1:])
        return read + resized(results[0], update.size)
    read = sum(in_memory(computation.table[name].outputs) for name in set(instruction.operands))
    return read + in_memory(results)


def own_results(instruction: Instruction, num_inputs: int) -> tuple[Array, ...]:
    """What an instruction makes: those that start something hand on their operands as well."""
    if instruction.opcode == "copy-start":
        return instruction.outputs[:1]
    if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
        return instruction.outputs[num_inputs:]
    return instruction.outputs


def fusion_traffic(module: Module, computation: Computation, fusion: Instruction) -> float:
    """Bytes that a fusion reads and writes."""
    body = module.called(fusion, "calls")
    operands = computation.inputs(fusion)
    if any(i.target.startswith("AsyncCollective") for i in body):
        if is_later_stage(body):
            return 0.0
        results = [i for i in body if i.opcode in SHARE_SENT]
        written = sum(resized(fusion.outputs[1], i.outputs[0].size) for i in results)
        return sum(in_memory(x.outputs) for x in operands) + written
    read = 0.0
    for operand, parameter in zip(operands, body.parameters, strict=True):
        array = operand.outputs[0]
        read += resized(array, min(elements_read(module, body, parameter), array.size))
    elements = [body.root]
    if body.root.opcode == "tuple":
        elements = body.inputs(body.root)
    if len(elements) != len(fusion.outputs):
        return read + in_memory(fusion.outputs)
    return read + sum(
        resized(array, min(elements_written(module, body, element), array.size))
        for element, array in zip(elements, fusion.outputs, strict=True)
    )


def elements_read(module: Module, body: Computation, value: Instruction) -> float:
    """How many elements of a value its users inside a fusion ask for, at most."""
    whole = value.outputs[0].size
    if value is body.root:
        return whole
    total = 0
    for user in body.users[value.name]:
        first = user.operands[0] == value.name and user.operands.count(value.name) == 1
        if user.opcode in READS_A_PART and first:
            total += user.outputs[0].size
        elif user.opcode in RESHAPED:
            total += elements_read(module, body, user)
        elif user.opcode == "fusion":
            inside = module.called(user, "calls")
            total += sum(
                elements_read(module, inside, parameter)
                for name, parameter in zip(user.operands, inside.parameters, strict=True)
                if name == value.name
            )
        elif not (
            (user.opcode in IN_PLACE and first)
            or (user.opcode == "tuple" and user is body.root)
            or (user.opcode in SHARE_SENT and is_later_stage(body))
        ):
            return whole
    return total


def elements_written(module: Module, body: Computation, value: Instruction) -> float:
    """How many elements of a fusion's result are new, and not handed on in place."""
    made = unshaped(body, value)
    if made.opcode == "parameter":
        return 0 if value is not body.root else value.outputs[0].size
    if made.opcode in SHARE_SENT and is_later_stage(body):
        return 0
    if made.opcode == "fusion" and len(made.outputs) == 1:
        inside = module.called(made, "calls")
        return elements_written(module, inside, inside.root)
    if made.opcode in IN_PLACE:
        inputs = body.inputs(made)
        if unshaped(body, inputs[0]).opcode == "parameter":
            return inputs[IN_PLACE[made.opcode]].outputs[0].size
    return value.outputs[0].size


def unshaped(body: Computation, value: Instruction) -> Instruction:
    """What a value is in another shape of the same bytes."""
    while value.opcode in ("bitcast", "reshape"):
        value = body.inputs(value)[0]
    return value
