"""Cost of a compiled program on one chip: flops, bytes, collectives, memory.

`Compiled.cost_analysis()` of XLA counts the body of a loop once. This one multiplies by the trip
counts of all loops around.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax

from ppo_jax.planner.hlo.instructions import (
    attention_flops,
    collective,
    grouped_flops,
    matmul_flops,
    traffic,
)
from ppo_jax.planner.hlo.text import Instruction, parse_module
from ppo_jax.planner.hlo.trip_counts import Scope, TripCounts, share_of, trip_count


class Sent(NamedTuple):
    """Collectives of one kind."""

    count: float
    bytes: float  # that one chip sends in all of them, see `instructions.collective`


class Memory(NamedTuple):
    """Bytes of a chip's main memory."""

    arguments: int
    outputs: int
    aliased: int  # of the outputs, in the place of donated arguments
    temporaries: int
    code: int

    @property
    def peak(self) -> int:
        """What must fit at once. Other programs' arrays that stay alive come on top."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramCost:
    """The cost of one run of a program on one chip."""

    flops: float = 0.0  # of products, convolutions and attention kernels
    attention_kernels: float = 0.0  # calls of one
    bytes_accessed: float = 0.0  # of main memory, read and written, see `instructions.traffic`
    collectives: Mapping[str, Sent] = dataclasses.field(default_factory=dict)
    memory: Memory | None = None  # None for a part of a program

    @property
    def collective_bytes(self) -> float:
        """Bytes that one chip sends, in all kinds of collectives."""
        return sum(sent.bytes for sent in self.collectives.values())

    def plus(self, other: "ProgramCost", times: float = 1) -> "ProgramCost":
        """This and `times` another. Memory does not add up: the sum has none."""
        kinds = dict(self.collectives)
        for kind, (count, sent) in other.collectives.items():
            before = kinds.get(kind, Sent(0, 0.0))
            kinds[kind] = Sent(before.count + times * count, before.bytes + times * sent)
        return ProgramCost(
            flops=self.flops + times * other.flops,
            attention_kernels=self.attention_kernels + times * other.attention_kernels,
            bytes_accessed=self.bytes_accessed + times * other.bytes_accessed,
            collectives=kinds,
        )


def cost_analysis(
    compiled: jax.stages.Compiled, *, max_trip_counts: TripCounts = None
) -> ProgramCost:
    """What one run of a compiled program costs one chip.

    Args:
        compiled: for any platform, also for a described one that is not there.
        max_trip_counts: of loops whose end depends on data, in the worst case: of the decode loop
            the response length. Of several such loops by the name scopes around them. Products by
            group count so many of their rows as the count of their scope says, see `share_of`.

    Raises:
        ValueError: there is such a loop without a count.
    """
    stats = compiled.memory_analysis()
    memory = stats and Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )
    cost = hlo_cost(compiled.as_text(), max_trip_counts=max_trip_counts)
    return dataclasses.replace(cost, memory=memory)


def hlo_cost(text: str, *, max_trip_counts: TripCounts = None) -> ProgramCost:
    """The cost of optimised HLO, the text of `Compiled.as_text()`; without its memory."""
    module = parse_module(text)
    return computation_cost(Scope(module, module.entry), max_trip_counts)


def computation_cost(scope: Scope, max_trip_counts: TripCounts, fused: bool = False) -> ProgramCost:
    """The cost of a computation at a call site; inside a fusion no bytes are moved."""
    total = ProgramCost()
    for instruction in scope.computation:
        costs = []
        for times, name, inside in calls(scope, instruction, max_trip_counts):
            callee = scope.enter(instruction, name)
            costs.append((times, computation_cost(callee, max_trip_counts, fused or inside)))
        if instruction.opcode == "conditional":  # the costliest branch
            costs = [max(costs, key=lambda x: (x[1].flops, x[1].bytes_accessed))]
        for times, cost in costs:
            total = total.plus(cost, times)
        total = total.plus(instruction_cost(scope, instruction, max_trip_counts, fused))
    return total


def instruction_cost(
    scope: Scope, instruction: Instruction, max_trip_counts: TripCounts, fused: bool
) -> ProgramCost:
    """The cost of an instruction without that of the computations it calls."""
    module, computation = scope.module, scope.computation
    sent = collective(module, computation, instruction)
    kernel_flops = attention_flops(computation, instruction)
    grouped = grouped_flops(computation, instruction)
    grouped *= share_of(instruction.op_name, max_trip_counts)
    return ProgramCost(
        flops=matmul_flops(computation, instruction) + kernel_flops + grouped,
        attention_kernels=float(kernel_flops > 0),
        bytes_accessed=0.0 if fused else traffic(module, computation, instruction),
        collectives={sent[0]: Sent(1, sent[1])} if sent else {},
    )


def calls(
    scope: Scope, instruction: Instruction, max_trip_counts: TripCounts
) -> list[tuple[float, str, bool]]:
    """(how often, which computation, is it a fusion) for each that an instruction runs.

    Of a conditional these are all branches. What reductions, sorts and scatters apply to single
    elements is elementwise, and not counted.
    """
    match instruction.opcode:
        case "while":
            trips = trip_count(scope, instruction, max_trip_counts)
            body, condition = instruction.called("body")[0], instruction.called("condition")[0]
            return [(trips, body, False), (trips + 1, condition, False)]
        case "fusion":
            return [(1, instruction.called("calls")[0], True)]
        case "call" | "call-start":
            return [(1, instruction.called("to_apply")[0], False)]
        case "async-start":
            return [(1, name, False) for name in instruction.called("calls")]
        case "conditional":
            keys = ("branch_computations", "true_computation", "false_computation")
            return [(1, name, False) for key in keys for name in instruction.called(key)]
    return []
