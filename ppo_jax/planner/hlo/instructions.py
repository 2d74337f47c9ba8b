"""Cost of one instruction: flops, bytes sent to other chips, bytes of main memory."""

import functools
import math
import re

import numpy as np

from ppo_jax.planner.hlo.text import Array, Computation, Instruction, Module

# Matrix products of a library: oneDNN on CPUs, cuBLAS on GPUs.
MATMUL_CALLS = ("__onednn$matmul", "__cublas$gemm", "__cublas$lt$matmul")
# Products of the size of the scores Q K' in a call of fused attention.
CUDNN_PRODUCTS = {"__cudnn$fmhaSoftmax": 2, "__cudnn$fmhaSoftmaxBackward": 5}
SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}  # the backward kernels recompute the scores
# Bytes that a chip sends over bytes of its input, in a group of n chips.
SENT_RATIO = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: n - 1,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
    "collective-broadcast": lambda n: 1,
}


def matmul_flops(computation: Computation, instruction: Instruction) -> float:
    """Flops of a matrix product or a convolution, 0 for all else.

    2 B M N K for B products of [M, K] and [K, N]. Elementwise operations and reductions are not
    counted: they are bound by memory, not by the matrix units.
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
    """Flops of a call of fused causal attention, 0 for all else.

    2 H K x products x pairs of a query and a key. The TPU kernel computes whole blocks, those on
    the diagonal and below it within a window. The blocks of cuDNN are not documented: half of all
    pairs count, or those of the window where they are fewer.
    """
    if products := CUDNN_PRODUCTS.get(instruction.target):
        queries = computation.inputs(instruction)[0].outputs[0]  # [B, L, H, K]
        length = queries.dims[-3]
        found = re.search(r"sliding_window_length\W+(\d+)", instruction.attributes)
        window = int(found[1]) if found else 0
        return 2 * products * queries.size * min(length / 2, window or length)
    kernel = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", instruction.op_name)
    if instruction.target != "tpu_custom_call" or not kernel:
        return 0.0
    arrays = [array for x in computation.inputs(instruction) for array in x.outputs]
    queries = next(x for x in arrays if x.dtype in ("bf16", "f32"))  # [..., H, L, K]
    length = queries.dims[-2]
    block = int(re.search(r"block_q(?:_dq|_dkv)?\W+(\d+)", instruction.attributes)[1])
    # The first operand has a number for each block of queries and those of keys that it reads.
    count = length // block
    diagonals = min(count, *arrays[0].dims[-2:])
    pairs = block**2 * (count * diagonals - diagonals * (diagonals - 1) / 2)
    return 2.0 * SPLASH_PRODUCTS[kernel[1]] * queries.size / length * pairs


def grouped_flops(computation: Computation, instruction: Instruction) -> float:
    """Flops of a product of rows with the matrix of their group, 0 for all else: those of all rows,
    each with one matrix.

    `ragged-dot`, or the kernel that TPUs have for it; of the gradient of the matrices, which has a
    dimension of groups, as well.
    """
    inputs = [x.outputs[0] for x in computation.inputs(instruction)]
    if instruction.opcode == "ragged-dot":
        left, right = inputs[:2]
    elif instruction.target == "tpu_custom_call" and "ragged-dot-none" in instruction.op_name:
        left, right = inputs[-2:]
    else:
        return 0.0
    return 2.0 * left.size * right.dims[-1]


def convolution_flops(instruction: Instruction, left: tuple, right: tuple) -> float:
    """2 x (batch / batch groups) x output features x input features per group x hits.

    TPUs write matrix products, too, as convolutions: batch axes and heads become spatial axes
    whose padding and dilation leave one hit a row. A hit is an output position and a window
    position that meet an element of the input, and neither padding nor a hole.

    Args:
        instruction: with `dim_labels`, where b, f are batch and features of the input and the
            output, i, o the features of the kernel, digits the spatial axes.
        left: the input's shape.
        right: the kernel's shape.
    """
    labels = re.split(r"_|->", instruction.attribute("dim_labels"))
    shapes = (left, right, instruction.outputs[0].dims)
    left, right, out = (
        dict(zip(names, dims, strict=True)) for names, dims in zip(labels, shapes, strict=True)
    )
    batch_groups = (instruction.numbers("batch_group_count") or (1,))[0]
    window = window_axes(instruction.attribute("window") or "")
    hits = math.prod(
        count_hits(left[axis], right[axis], out[axis], *sizes)
        for axis, sizes in zip(map(str, range(len(window))), window, strict=True)
    )
    return 2.0 * left["b"] / batch_groups * right["o"] * right["i"] * hits


def window_axes(text: str) -> list[tuple[int, int, int, int]]:
    """(stride, low padding, input dilation, kernel dilation) of each spatial axis.

    >>> window_axes("size=8x2 stride=7x1 pad=0_0x1_1 lhs_dilate=8x1")
    [(7, 0, 8, 1), (1, 1, 1, 1)]
    """
    fields = {key: value.split("x") for key, _, value in (x.partition("=") for x in text.split())}
    rank = len(fields.get("size", ()))
    defaults = {"stride": "1", "pad": "0_0", "lhs_dilate": "1", "rhs_dilate": "1"}
    values = [fields.get(key, [default] * rank) for key, default in defaults.items()]
    return [tuple(int(x.split("_")[0]) for x in axis) for axis in zip(*values, strict=True)]


@functools.cache
def count_hits(num_in, size, num_out, stride, low, lhs_dilate, rhs_dilate) -> int:
    """How many (output position, window position) pairs meet an element of the input."""
    starts = np.arange(num_out) * stride - low
    hits = 0
    for i in range(size):
        x = starts + i * rhs_dilate
        hits += np.count_nonzero((x >= 0) & (x % lhs_dilate == 0) & (x // lhs_dilate < num_in))
    return int(hits)


def collective(
    module: Module, computation: Computation, instruction: Instruction
) -> tuple[str, float] | None:
    """(kind, bytes that a chip sends over the interconnect) of a collective; None for all else.

    With n chips in a group and an input of I bytes on each, in rings:

    - all-reduce sends 2 (n - 1) / n I: a reduce-scatter, then an all-gather;
    - all-gather (n - 1) I: each shard goes round;
    - reduce-scatter and all-to-all (n - 1) / n I (an all-to-all that goes the direct way);
    - collective-permute I, and nothing where every chip keeps its own.

    An asynchronous one counts where it starts. TPUs fuse it with the computation that it overlaps,
    in several stages that repeat it, and write a reduce-scatter as a fusion of an all-reduce and a
    slice.
    """
    kind = instruction.opcode.removesuffix("-start")
    if kind not in SENT_RATIO or is_later_stage(computation):
        return None
    if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    size = sum(array.bytes for x in computation.inputs(instruction) for array in x.outputs)
    group = group_size(instruction, module.num_devices)
    return kind, SENT_RATIO[kind](group) * size if group > 1 else 0.0


def is_later_stage(computation: Computation) -> bool:
    """Whether a fused computation continues or ends a collective that another has started."""
    targets = {i.target for i in computation if i.opcode == "custom-call"}
    if "AsyncCollectiveStart" in targets:
        return False
    staged = computation.name.startswith("async_collective_fusion")
    return staged or "AsyncCollectiveDone" in targets


def group_size(instruction: Instruction, num_devices: int) -> int:
    """The number of chips in the largest group of a collective.

    Read from `{{0,1},{2,3}}`, from `[2,4]<=[8]` (2 groups of 4), from
    `mesh['a'=2,'b'=4] {'b'}` (along b, 4; `'b':(1)2` is a part of 2 of it); all chips where no
    group is named.
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


# They only rename values, or call computations, which are counted on their own.
NO_TRAFFIC = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain",
    "partition-id", "replica-id", "while", "conditional", "call", "call-start", "async-start",
    "opt-barrier", "add-dependency",
}  # fmt: skip
NO_TRAFFIC_CALLS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound"}
SLICES = {"dynamic-slice", "slice", "gather"}  # of their first operand
IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}  # the operand written into the first
LAYOUT_CHANGES = {"bitcast", "reshape", "transpose", "copy", "convert"}


def hbm_bytes(arrays: tuple[Array, ...]) -> float:
    return sum(array.bytes for array in arrays if array.memory_space == 0)


def partial_bytes(array: Array, size: float) -> float:
    """The bytes of `size` elements of an array, if it is in main memory."""
    return hbm_bytes((array,)) * size / array.size if array.size else 0.0


def traffic(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Bytes of main memory that an instruction outside of fusions reads and writes.

    Operands and results once each; of a fusion only its own, not its intermediate values. Where a
    slice is read, or written in place (a layer of a stack, a position of a cache), the slice.
    """
    opcode = instruction.opcode.removesuffix("-start")
    if instruction.opcode in NO_TRAFFIC or instruction.target in NO_TRAFFIC_CALLS:
        return 0.0
    if instruction.opcode.endswith(("-done", "async-update")):
        return 0.0
    if opcode == "fusion":
        return fusion_traffic(module, computation, instruction)
    inputs = computation.inputs(instruction)
    results = own_results(instruction, sum(len(x.outputs) for x in inputs))
    others = sum(hbm_bytes(x.outputs) for x in inputs[1:])
    if opcode in SLICES:
        return partial_bytes(inputs[0].outputs[0], results[0].size) + others + hbm_bytes(results)
    if opcode in IN_PLACE:
        return others + partial_bytes(results[0], inputs[IN_PLACE[opcode]].outputs[0].size)
    distinct = {x.name: x.outputs for x in inputs}
    return sum(map(hbm_bytes, distinct.values())) + hbm_bytes(results)


def own_results(instruction: Instruction, num_inputs: int) -> tuple[Array, ...]:
    """The results of an instruction; asynchronous starts return their operands as well."""
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
        results = [i for i in body if i.opcode in SENT_RATIO]
        written = sum(partial_bytes(fusion.outputs[1], i.outputs[0].size) for i in results)
        return sum(hbm_bytes(x.outputs) for x in operands) + written
    arrays = [operand.outputs[0] for operand in operands]
    read = sum(
        partial_bytes(array, min(elements_read(module, body, parameter), array.size))
        for parameter, array in zip(body.parameters, arrays, strict=True)
    )
    elements = body.inputs(body.root) if body.root.opcode == "tuple" else [body.root]
    if len(elements) != len(fusion.outputs):
        return read + hbm_bytes(fusion.outputs)
    return read + sum(
        partial_bytes(array, min(elements_written(module, body, element), array.size))
        for element, array in zip(elements, fusion.outputs, strict=True)
    )


def elements_read(module: Module, body: Computation, value: Instruction) -> float:
    """How many elements of a value its users inside a fusion read, at most."""
    size = value.outputs[0].size
    if value is body.root:
        return size
    total = 0
    for user in body.users[value.name]:
        first = user.operands[0] == value.name and user.operands.count(value.name) == 1
        if user.opcode in SLICES and first:
            total += user.outputs[0].size
        elif user.opcode in LAYOUT_CHANGES:
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
            or (user.opcode in SENT_RATIO and is_later_stage(body))
        ):
            return size
    return total


def elements_written(module: Module, body: Computation, value: Instruction) -> float:
    """How many elements of a fusion's result it writes; those kept in place do not count."""
    source = skip_reshapes(body, value)
    if source.opcode == "parameter" and value is not body.root:
        return 0
    if source.opcode in SENT_RATIO and is_later_stage(body):
        return 0
    if source.opcode == "fusion" and len(source.outputs) == 1:
        inside = module.called(source, "calls")
        return elements_written(module, inside, inside.root)
    if source.opcode in IN_PLACE:
        inputs = body.inputs(source)
        if skip_reshapes(body, inputs[0]).opcode == "parameter":
            return inputs[IN_PLACE[source.opcode]].outputs[0].size
    return value.outputs[0].size


def skip_reshapes(body: Computation, value: Instruction) -> Instruction:
    """What a bitcast or reshape is of."""
    while value.opcode in ("bitcast", "reshape"):
        value = body.inputs(value)[0]
    return value
