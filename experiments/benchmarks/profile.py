"""Profile of a compiled program: the time of its operations, from a trace of one call."""

import collections
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax

from ppo_jax.planner.hlo.text import parse_module

CONTROL_FLOW = ("while", "conditional", "call")  # their time is that of their bodies
NUM_LINES = 12


def trace_events(call: Callable) -> dict[str, list[float]]:
    """{operation: seconds of each of its events} in one call."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    events = collections.defaultdict(list)
    for event in (e for plane in data.planes for line in plane.lines for e in line.events):
        events[event.name].append(event.duration_ns / 1e9)
    return events


def print_profile(program: jax.stages.Compiled, call: Callable):
    """The operations of a call that take the most time, the same one of all layers as one."""
    events, text = trace_events(call), program.as_text()
    seconds, products = collections.defaultdict(list), 0.0
    for i in (i for computation in parse_module(text).computations.values() for i in computation):
        if i.opcode in CONTROL_FLOW or i.name not in events:
            continue
        shape = " ".join(f"{x.dtype}{list(x.dims)}" for x in i.outputs[:1])
        op_name = re.sub(r"/\d+/", "/*/", "/".join(i.op_name.split("/")[-5:]))
        seconds[shape, op_name] += events[i.name]
        if "dot_general" in i.op_name.rpartition("/")[2]:  # alone or fused
            products += sum(events[i.name])
    total = sum(map(sum, seconds.values()))
    name = text.partition("\n")[0].split()[1].rstrip(",")
    print(f"\n{name}: {total:.3g} s in operations, {products / total:.2f} in products of matrices")
    longest = sorted(seconds.items(), key=lambda item: -sum(item[1]))[:NUM_LINES]
    for (shape, op_name), times in longest:
        print(f"{1e3 * sum(times):9.1f} ms {len(times):6d} x  {shape:22} {op_name}")
