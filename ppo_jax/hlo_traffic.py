"""The bytes that one instruction of a compiled program moves to and from a chip's main memory.

Only what lies in main memory counts: TPUs keep much in a faster memory near the core, which the
program names beside each array.
"""

from ppo_jax.hlo import Array, Computation, Instruction, Module
from ppo_jax.hlo_work import SHARE_SENT, is_later_stage

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
