"""Profile of a compiled program: the time of its operations, from a trace of one call."""

import collections
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

from ppo_jax.planner.hlo.text import Instruction, parse_module

CONTROL_FLOW = ("while", "conditional", "call")  # their time is that of their bodies
NUM_LINES = 12


class OperationTime(NamedTuple):
    """The time of an operation in one call of a program."""

    seconds: float
    count: int
    instruction: Instruction

    @property
    def is_matmul(self) -> bool:
        """A matrix product, alone or with what is fused to it."""
        return "dot_general" in self.instruction.op_name.rpartition("/")[2]


def profile(program: jax.stages.Compiled, call: Callable) -> list[OperationTime]:
    """The operations of one `call` of a program."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    seconds, counts = collections.Counter(), collections.Counter()
    for event in (e for plane in data.planes for line in plane.lines for e in line.events):
        seconds[event.name] += event.duration_ns / 1e9
        counts[event.name] += 1
    return [
        OperationTime(seconds[i.name], counts[i.name], i)
        for computation in parse_module(program.as_text()).computations.values()
        for i in computation
        if i.name in counts and i.opcode not in CONTROL_FLOW
    ]


def print_profile(program: jax.stages.Compiled, call: Callable):
    """The operations that take the most time, the same one of all layers as one."""
    seconds, counts, products = collections.Counter(), collections.Counter(), 0.0
    for operation in profile(program, call):
        instruction = operation.instruction
        shape = " ".join(f"{x.dtype}{list(x.dims)}" for x in instruction.outputs[:1])
        op_name = re.sub(r"/\d+/", "/*/", "/".join(instruction.op_name.split("/")[-5:]))
        seconds[shape, op_name] += operation.seconds
        counts[shape, op_name] += operation.count
        products += operation.seconds * operation.is_matmul
    total = seconds.total()
    name = program.as_text().partition("\n")[0].split()[1].rstrip(",")
    print(f"\n{name}: {total:.3g} s in operations, {products / total:.2f} in products of matrices")
    for key, time in seconds.most_common(NUM_LINES):
        print(f"{1e3 * time:9.1f} ms {counts[key]:6d} x  {key[0]:22} {key[1]}")
