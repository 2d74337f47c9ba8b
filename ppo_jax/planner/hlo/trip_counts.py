"""How often the loops of a compiled program turn.

XLA writes the count beside a loop on CPUs and GPUs. On TPUs it does not, so it is found as XLA
finds it: a number that starts at a constant, grows by a constant and is compared to a constant.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

from ppo_jax.planner.hlo.text import Computation, Instruction, Module

SAME = {"copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "opt-barrier"}
MIRRORED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE"}


@dataclasses.dataclass(frozen=True)
class Scope:
    """A computation where it is called."""

    module: Module
    computation: Computation
    caller: "tuple[Scope, Instruction] | None" = None

    def enter(self, instruction: Instruction, name: str) -> "Scope":
        """The scope of a computation that one of its instructions calls."""
        return Scope(self.module, self.module.computations[name], (self, instruction))


Place = tuple[Scope, Instruction]
# Turns of loops whose end depends on data: of all, or by a name scope around them (the innermost
# of several); on average, where a loop does not always turn as often.
Trips = float | Mapping[str, float] | None


def carried(computation: Computation, index: int) -> Instruction | None:
    """What a loop's body hands on as the element `index` of its tuple."""
    root = computation.root
    return computation.table[root.operands[index]] if root.opcode == "tuple" else None


def stays(loop: Place, index: int) -> bool:
    """Whether a loop leaves an element of its tuple as it was."""
    scope, instruction = loop
    body = scope.module.computations[instruction.called("body")[0]]
    element = carried(body, index)
    while element is not None and element.opcode in SAME:
        element = body.inputs(element)[0]
    if element is None or element.opcode != "get-tuple-element":
        return False
    return body.inputs(element) == body.parameters and element.numbers("index") == (index,)


def follow(scope: Scope, instruction: Instruction) -> Place:
    """Where a value was made: through copies, tuples, fusions, and loops that leave it alone."""
    opcode = instruction.opcode
    if opcode in SAME:
        return follow(scope, scope.computation.inputs(instruction)[0])
    if opcode in ("fusion", "call"):
        name = instruction.called("calls" if opcode == "fusion" else "to_apply")[0]
        inside = scope.enter(instruction, name)
        return follow(inside, inside.computation.root)
    if opcode == "parameter" and scope.caller and scope.caller[1].opcode in ("fusion", "call"):
        outside, call = scope.caller
        return follow(outside, outside.computation.inputs(call)[int(instruction.literal)])
    if opcode == "get-tuple-element":
        return follow_element(scope, instruction)
    return scope, instruction


def follow_element(scope: Scope, instruction: Instruction) -> Place:
    """`follow` for an element of a tuple."""
    index = instruction.numbers("index")[0]
    inside, whole = follow(scope, scope.computation.inputs(instruction)[0])
    if whole.opcode == "tuple":
        return follow(inside, inside.computation.inputs(whole)[index])
    loop = (inside, whole) if whole.opcode == "while" else None
    if whole.opcode == "parameter" and inside.caller:
        loop = inside.caller
    if loop and loop[1].opcode == "while" and stays(loop, index):
        return first_value(loop, index) or (scope, instruction)
    return scope, instruction


def first_value(loop: Place, index: int) -> Place | None:
    """What an element of a loop's tuple is before the first turn."""
    scope, instruction = loop
    inside, start = follow(scope, scope.computation.inputs(instruction)[0])
    if start.opcode != "tuple":
        return None
    return follow(inside, inside.computation.inputs(start)[index])


def constant(place: Place | None) -> int | None:
    """The whole number that a value is known to be."""
    if place is None or place[1].opcode != "constant":
        return None
    literal = place[1].literal
    return int(literal) if re.fullmatch(r"-?\d+", literal) else None


def induction_index(place: Place, loop: Place) -> int | None:
    """Which element of a loop's own tuple a value is."""
    scope, instruction = place
    own = scope.caller is not None and scope.caller[1] is loop[1]
    if not own or instruction.opcode != "get-tuple-element":
        return None
    return instruction.numbers("index")[0]


def step_size(loop: Place, index: int) -> int | None:
    """By how much an element of a loop's tuple grows each turn."""
    scope, instruction = loop
    body = scope.enter(instruction, instruction.called("body")[0])
    element = carried(body.computation, index)
    if element is None:
        return None
    inside, made = follow(body, element)
    if made.opcode not in ("add", "subtract"):
        return None
    sides = [follow(inside, operand) for operand in inside.computation.inputs(made)]
    if made.opcode == "add" and induction_index(sides[0], loop) is None:
        sides.reverse()
    step = constant(sides[1])
    if step is None or induction_index(sides[0], loop) != index:
        return None
    return step if made.opcode == "add" else -step


def counted_trips(loop: Place) -> int | None:
    """The turns of a loop over a counter; None where the condition asks for more than that."""
    scope, instruction = loop
    condition = scope.enter(instruction, instruction.called("condition")[0])
    inside, test = follow(condition, condition.computation.root)
    if test.opcode != "compare":
        return None
    direction = test.attribute("direction")
    sides = [follow(inside, operand) for operand in inside.computation.inputs(test)]
    if constant(sides[0]) is not None:
        sides.reverse()
        direction = MIRRORED.get(direction)
    index, end = induction_index(sides[0], loop), constant(sides[1])
    if index is None or end is None or direction not in MIRRORED:
        return None
    start, step = constant(first_value(loop, index)), step_size(loop, index)
    if start is None or not step or (step > 0) != (direction in ("LT", "LE", "NE")):
        return None
    span = end - start + (step // abs(step) if direction in ("LE", "GE") else 0)
    return max(math.ceil(span / step), 0)


def trips(scope: Scope, loop: Instruction, default_trips: Trips) -> float:
    """How often a loop turns.

    Args:
        scope: where it stands.
        loop: a `while`.
        default_trips: for loops whose end depends on data, for all or by the name scope that they
            are in; None allows none.

    Raises:
        ValueError: the end depends on data, and no `default_trips` is given.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    counted = counted_trips((scope, loop))
    if counted is None and isinstance(default_trips, Mapping):
        default_trips = innermost(loop.op_name, default_trips)
    if counted is None and default_trips is None:
        raise ValueError(
            f"the loop {loop.op_name!r} ends when its data say so: give default_trips, "
            "the turns to count for it or for its name scope"
        )
    return default_trips if counted is None else counted


def innermost(op_name: str, turns: Mapping[str, float]) -> float | None:
    """The turns of the last name scope of an operation that has some.

    >>> innermost("jit(f)/outer/while/body/inner/while", {"outer": 2, "inner": 5})
    5
    """
    return next((turns[part] for part in reversed(op_name.split("/")) if part in turns), None)
