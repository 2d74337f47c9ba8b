"""Where the time of a compiled program goes: its operations, by a trace of one call."""

import collections
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

from ppo_jax.planner.hlo.text import Instruction, parse_module

AROUND = ("while", "conditional", "call")  # what they spend is their bodies'
MOST = 12  # lines


class Spent(NamedTuple):
    """What an operation took in one call of a program."""

    seconds: float
    count: int
    instruction: Instruction

    @property
    def is_product(self) -> bool:
        """Of matrices, alone or with what is fused to it."""
        return "dot_general" in self.instruction.op_name.rpartition("/")[2]


def profile(program: jax.stages.Compiled, call: Callable) -> list[Spent]:
    """The operations of one call, the costliest first.

    Args:
        program: what is called.
        call: calls it; the result is waited for.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    seconds, counts = collections.Counter(), collections.Counter()
    for event in (e for plane in data.planes for line in plane.lines for e in line.events):
        seconds[event.name] += event.duration_ns / 1e9
        counts[event.name] += 1
    computations = parse_module(program.as_text()).computations.values()
    found = (i for computation in computations for i in computation if i.name in counts)
    spent = [Spent(seconds[i.name], counts[i.name], i) for i in found if i.opcode not in AROUND]
    return sorted(spent, key=lambda s: -s.seconds)


def print_profile(program: jax.stages.Compiled, call: Callable):
    """The costliest kinds of operation; those of all layers are one."""
    seconds, counts, products = collections.Counter(), collections.Counter(), 0.0
    for spent in profile(program, call):
        of = spent.instruction
        shape = " ".join(f"{x.dtype}{list(x.dims)}" for x in of.outputs[:1])
        where = re.sub(r"/\d+/", "/*/", "/".join(of.op_name.split("/")[-5:]))
        seconds[shape, where] += spent.seconds
        counts[shape, where] += spent.count
        products += spent.seconds * spent.is_product
    total = seconds.total()
    name = program.as_text().partition("\n")[0].split()[1].rstrip(",")
    print(f"\n{name}: {total:.3g} s in operations, {products / total:.2f} in products of matrices")
    for kind, spent in seconds.most_common(MOST):
        print(f"{1e3 * spent:9.1f} ms {counts[kind]:6d} x  {kind[0]:22} {kind[1]}")
