"""What a compiled program costs one chip: flops, bytes, collectives, memory.

XLA's own account counts the body of a loop once. This one reads the program as XLA left it and
multiplies by the turns of every loop around.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax

from ppo_jax.planner.hlo.instructions import attention_flops, collective, matmul_flops, traffic
from ppo_jax.planner.hlo.text import Instruction, parse_module
from ppo_jax.planner.hlo.trip_counts import Scope, Trips, trips


class Sent(NamedTuple):
    """Collectives of one kind."""

    count: float  # how often
    bytes: float  # that one chip sends, all together; see `hlo_work.collective`


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

    flops: float = 0.0  # of matrix products, convolutions and kernels of attention; elementwise
    # operations are not counted
    attention_kernels: float = 0.0  # how often one is called
    bytes_accessed: float = 0.0  # read from and written to main memory, see `hlo_traffic`
    collectives: Mapping[str, Sent] = dataclasses.field(default_factory=dict)
    memory: Memory | None = None  # None where an account is not of a whole program

    @property
    def collective_bytes(self) -> float:
        """Bytes that one chip sends, in all kinds of collectives."""
        return sum(sent.bytes for sent in self.collectives.values())

    def plus(self, other: "ProgramCost", times: float = 1) -> "ProgramCost":
        """This and `times` another. Memory is not a thing to add: the result has none."""
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


def account(compiled: jax.stages.Compiled, *, default_trips: Trips = None) -> ProgramCost:
    """What one run of a compiled program costs one chip.

    Args:
        compiled: for any platform, also for a described one that is not there.
        default_trips: the turns of a loop whose end depends on data, at worst: of the decode loop
            the response length. Of several such loops by the name scopes around them.

    Raises:
        ValueError: there is such a loop and no `default_trips`.
    """
    stats = compiled.memory_analysis()
    memory = stats and Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )
    whole = account_of_text(compiled.as_text(), default_trips=default_trips)
    return dataclasses.replace(whole, memory=memory)


def account_of_text(text: str, *, default_trips: Trips = None) -> ProgramCost:
    """The account of a program given as text, `Compiled.as_text()`; without its memory."""
    module = parse_module(text)
    return account_of_scope(Scope(module, module.entry), default_trips)


def account_of_scope(scope: Scope, default_trips: Trips, fused: bool = False) -> ProgramCost:
    """The account of a computation where it is called; inside a fusion no bytes are moved."""
    total = ProgramCost()
    for instruction in scope.computation:
        inner = [
            (
                times,
                account_of_scope(scope.enter(instruction, name), default_trips, fused or inside),
            )
            for times, name, inside in calls(scope, instruction, default_trips)
        ]
        if instruction.opcode == "conditional":
            inner = [max(inner, key=lambda x: (x[1].flops, x[1].bytes_accessed))]
        for times, cost in inner:
            total = total.plus(cost, times)
        total = total.plus(account_of_instruction(scope, instruction, fused))
    return total


def account_of_instruction(scope: Scope, instruction: Instruction, fused: bool) -> ProgramCost:
    """The account of an instruction without what it calls."""
    module, computation = scope.module, scope.computation
    sent = collective(module, computation, instruction)
    of_kernel = attention_flops(computation, instruction)
    return ProgramCost(
        flops=matmul_flops(computation, instruction) + of_kernel,
        attention_kernels=float(of_kernel > 0),
        bytes_accessed=0.0 if fused else traffic(module, computation, instruction),
        collectives={sent[0]: Sent(1, sent[1])} if sent else {},
    )


def calls(
    scope: Scope, instruction: Instruction, default_trips: Trips
) -> list[tuple[float, str, bool]]:
    """(how often, which computation, is it a fusion) for each that an instruction runs.

    Of the branches of a conditional the caller takes the costliest. What reductions, sorts and
    scatters apply to single elements is elementwise, and not counted.
    """
    match instruction.opcode:
        case "while":
            turns = trips(scope, instruction, default_trips)
            body, condition = instruction.called("body")[0], instruction.called("condition")[0]
            return [(turns, body, False), (turns + 1, condition, False)]
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
