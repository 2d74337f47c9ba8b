"""Trip counts of the while loops of a compiled program.

XLA writes the count beside a loop on CPUs and GPUs. On TPUs it does not, so it is found as XLA
finds it: an induction variable starts at a constant, grows by a constant and is compared to a
constant.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

from ppo_jax.planner.hlo.text import Computation, Instruction, Module

IDENTITIES = {"copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "opt-barrier"}
MIRRORED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE"}


@dataclasses.dataclass(frozen=True)
class Scope:
    """A computation at a call site."""

    module: Module
    computation: Computation
    caller: "tuple[Scope, Instruction] | None" = None

    def enter(self, instruction: Instruction, name: str) -> "Scope":
        """The scope of a computation that one of its instructions calls."""
        return Scope(self.module, self.module.computations[name], (self, instruction))


Value = tuple[Scope, Instruction]
# For loops whose end depends on data: one count for all, or one for each name scope around them
# (the innermost counts, "" is of all others); the average where it varies. Of scopes with a number,
# blocks_12, the count of the name, "blocks", is times the number.
TripCounts = float | Mapping[str, float] | None


def carry_output(computation: Computation, index: int) -> Instruction | None:
    """The new value of carry element `index` that a loop's body returns."""
    root = computation.root
    return computation.instructions[root.operands[index]] if root.opcode == "tuple" else None


def is_loop_invariant(loop: Value, index: int) -> bool:
    """Whether a loop returns a carry element unchanged."""
    scope, instruction = loop
    body = scope.module.called(instruction, "body")
    element = carry_output(body, index)
    while element is not None and element.opcode in IDENTITIES:
        element = body.inputs(element)[0]
    if element is None or element.opcode != "get-tuple-element":
        return False
    return body.inputs(element) == body.parameters and element.numbers("index") == (index,)


def find_definition(scope: Scope, instruction: Instruction) -> Value:
    """What computes a value: looks through copies, tuples, fusions and loops that do not change
    it."""
    opcode = instruction.opcode
    if opcode in IDENTITIES:
        return find_definition(scope, scope.computation.inputs(instruction)[0])
    if opcode in ("fusion", "call"):
        name = instruction.called("calls" if opcode == "fusion" else "to_apply")[0]
        inside = scope.enter(instruction, name)
        return find_definition(inside, inside.computation.root)
    if opcode == "parameter" and scope.caller and scope.caller[1].opcode in ("fusion", "call"):
        outside, call = scope.caller
        argument = outside.computation.inputs(call)[int(instruction.literal)]
        return find_definition(outside, argument)
    if opcode == "get-tuple-element":
        return find_element_definition(scope, instruction)
    return scope, instruction


def find_element_definition(scope: Scope, instruction: Instruction) -> Value:
    """`find_definition` of a tuple element."""
    index = instruction.numbers("index")[0]
    inside, source = find_definition(scope, scope.computation.inputs(instruction)[0])
    if source.opcode == "tuple":
        return find_definition(inside, inside.computation.inputs(source)[index])
    loop = inside.caller if source.opcode == "parameter" else (inside, source)
    if loop and loop[1].opcode == "while" and is_loop_invariant(loop, index):
        return initial_value(loop, index) or (scope, instruction)
    return scope, instruction


def initial_value(loop: Value, index: int) -> Value | None:
    """A carry element before the first iteration."""
    scope, instruction = loop
    inside, init = find_definition(scope, scope.computation.inputs(instruction)[0])
    if init.opcode != "tuple":
        return None
    return find_definition(inside, inside.computation.inputs(init)[index])


def integer_constant(value: Value | None) -> int | None:
    """The integer that a value is known to be."""
    if value is None or value[1].opcode != "constant":
        return None
    literal = value[1].literal
    return int(literal) if re.fullmatch(r"-?\d+", literal) else None


def carry_index(value: Value, loop: Value) -> int | None:
    """Which element of a loop's own carry a value is."""
    scope, instruction = value
    own = scope.caller is not None and scope.caller[1] is loop[1]
    if not own or instruction.opcode != "get-tuple-element":
        return None
    return instruction.numbers("index")[0]


def step_size(loop: Value, index: int) -> int | None:
    """By how much a carry element grows in each iteration."""
    scope, instruction = loop
    body = scope.enter(instruction, instruction.called("body")[0])
    element = carry_output(body.computation, index)
    if element is None:
        return None
    inside, update = find_definition(body, element)
    if update.opcode not in ("add", "subtract"):
        return None
    sides = [find_definition(inside, operand) for operand in inside.computation.inputs(update)]
    if update.opcode == "add" and carry_index(sides[0], loop) is None:
        sides.reverse()
    step = integer_constant(sides[1])
    if step is None or carry_index(sides[0], loop) != index:
        return None
    return step if update.opcode == "add" else -step


def induction_trip_count(loop: Value) -> int | None:
    """The trip count of a loop over a counter; None where its condition tests anything else."""
    scope, instruction = loop
    condition = scope.enter(instruction, instruction.called("condition")[0])
    inside, test = find_definition(condition, condition.computation.root)
    if test.opcode != "compare":
        return None
    direction = test.attribute("direction")
    sides = [find_definition(inside, operand) for operand in inside.computation.inputs(test)]
    if integer_constant(sides[0]) is not None:
        sides.reverse()
        direction = MIRRORED.get(direction)
    index, end = carry_index(sides[0], loop), integer_constant(sides[1])
    if index is None or end is None or direction not in MIRRORED:
        return None
    start, step = integer_constant(initial_value(loop, index)), step_size(loop, index)
    if start is None or not step or (step > 0) != (direction in ("LT", "LE", "NE")):
        return None
    span = end - start + (step // abs(step) if direction in ("LE", "GE") else 0)
    return max(math.ceil(span / step), 0)


def trip_count(scope: Scope, loop: Instruction, max_trip_counts: TripCounts) -> float:
    """How often the body of a `while` runs.

    Raises:
        ValueError: the end depends on data, and `max_trip_counts` has no count for it.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    count = induction_trip_count((scope, loop))
    if count is None:
        by_scope = isinstance(max_trip_counts, Mapping)
        count = innermost(loop.op_name, max_trip_counts) if by_scope else max_trip_counts
    if count is None:
        raise ValueError(
            f"the trip count of the loop {loop.op_name!r} depends on data: give max_trip_counts, "
            "the count for it or for its name scope"
        )
    return count


def innermost(op_name: str, counts: Mapping[str, float]) -> float | None:
    """The count of the innermost name scope of an operation that has one.

    >>> innermost("jit(f)/outer/while/body/inner/while", {"outer": 2, "inner": 5})
    5
    >>> innermost("jit(f)/blocks_12/while", {"": 3, "blocks": 0.5})
    6.0
    """
    for scope in reversed(op_name.split("/")):
        name, _, number = scope.rpartition("_")
        if scope in counts:
            return counts[scope]
        if name in counts and number.isdecimal():
            return counts[name] * int(number)
    return counts.get("")


def share_of(op_name: str, counts: TripCounts) -> float:
    """The count of the innermost name scope with a number, without it; 1 where there is none.

    >>> share_of("jit(f)/blocks_12/ragged_dot", {"": 3, "blocks": 0.5}), share_of("f", 3)
    (0.5, 1)
    """
    if not isinstance(counts, Mapping):
        return 1
    names = (scope.rpartition("_")[0] for scope in reversed(op_name.split("/")))
    return next((counts[name] for name in names if name and name in counts), 1)
