"""Parts of the report on a GPU that no other benchmark has, each a process of its own."""

import collections
import dataclasses
import itertools
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks.measure import FLAGS, matmul_seconds
from benchmarks.profile import CONTROL_FLOW
from benchmarks.report import print_json
from benchmarks.workload import Workload
from ppo_jax.algorithms.ppo import ppo_iteration
from ppo_jax.core.masking import masked_mean
from ppo_jax.distributed.layout import one_device
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.kernels import kernel_of, make_attention
from ppo_jax.planner.hlo.text import parse_module

flags.DEFINE_enum("part", "devices", ["devices", "kernels", "trace"], "Which part.")
flags.DEFINE_integer("matmul", 8192, "Rows and columns of the large product.", lower_bound=1)
flags.DEFINE_integer("length", 1024, "Positions of a row of the kernels.", lower_bound=8)
NUM_OPERATIONS = 10


def main():
    {"devices": devices, "kernels": kernels, "trace": trace}[FLAGS.part]()


def devices():
    """What there is, and the flops a second of a large product."""
    device, size = jax.devices()[0], FLAGS.matmul
    dtypes = ("bfloat16", "float32")
    print_json(
        {
            "platform": device.platform,
            "device": device.device_kind,
            "num_devices": len(jax.devices()),
            "memory_gb": (device.memory_stats() or {}).get("bytes_limit", 0) / 2**30,
            "runtime": device.client.platform_version.split("\n")[0],
            "jax": jax.__version__,
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            **{f"{d}_flops": 2 * size**3 / matmul_seconds(size, size, size, d) for d in dtypes},
        }
    )


# --- kernels --------------------------------------------------------------------------------------


def kernels():
    """Attention as a run on this platform computes it, against plain products."""
    heads = (FLAGS.heads, FLAGS.kv_heads or FLAGS.heads)
    cases = itertools.product(("bfloat16", "float32"), ("full", "left_padded", "packed"))
    for (dtype, rows), kv_heads in itertools.product(cases, sorted({heads[0], heads[1]})):
        config = ModelConfig(
            vocab_size=8,
            num_layers=1,
            embed_dim=FLAGS.hidden,
            num_heads=heads[0],
            num_kv_heads=kv_heads,
            head_dim=FLAGS.hidden // heads[0],
            mlp_dim=FLAGS.hidden,
            max_length=FLAGS.length,
            dtype=dtype,
        )
        name = f"{dtype}_{rows}_{heads[0]}_{kv_heads}_heads"
        print_json({"case": name, **compare_attention(config, rows)})


def compare_attention(config: ModelConfig, rows: str) -> dict[str, Any]:
    """Which kernel it is, how far from plain products, and milliseconds of both."""
    constrain = one_device().constrain
    mask, segments = text_rows(rows)
    plain = dataclasses.replace(config, attention="plain")
    qkv = random_qkv(config)
    functions = {
        name: attention_pass(c, mask, segments) for name, c in (("fused", config), ("plain", plain))
    }
    outputs = {name: f(*qkv) for name, f in functions.items()}
    largest = [
        float(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)).max())
        for a, b in zip(*(jax.tree.leaves(x) for x in outputs.values()), strict=True)
    ]
    seconds = {name: wall_seconds(lambda f=f: f(*qkv)) for name, f in functions.items()}
    return {
        "kernel": kernel_of(config, constrain.platform, FLAGS.length, segments is not None),
        "largest_difference_forward": largest[0],
        "largest_difference_backward": max(largest[1:]),
        **{f"{name}_ms": 1e3 * s for name, s in seconds.items()},
    }


def attention_pass(config: ModelConfig, mask, segments) -> Callable:
    """A program of q, k and v: (outputs at real positions, their gradients)."""
    constrain = one_device().constrain

    def forward(q, k, v):
        out = make_attention(config, constrain, mask, segments)(q, k, v)
        return jnp.where(mask[:, :, None, None], out, 0)

    def loss(q, k, v):
        return masked_mean(jnp.square(forward(q, k, v).astype(jnp.float32)).mean((2, 3)), mask)

    def both(q, k, v):
        return forward(q, k, v), jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    return jax.jit(both)


def text_rows(rows: str) -> tuple[jax.Array, jax.Array | None]:
    """(mask [B, L], segments [B, L] or None)"""
    position = jnp.broadcast_to(jnp.arange(FLAGS.length)[None], (FLAGS.batch, FLAGS.length))
    if rows == "full":
        return jnp.ones_like(position, bool), None
    if rows == "left_padded":  # by other numbers in each row, half of it at most
        padding = jnp.arange(FLAGS.batch)[:, None] * FLAGS.length // (2 * FLAGS.batch)
        return position >= padding, None
    return jnp.ones_like(position, bool), 1 + 4 * position // FLAGS.length


def random_qkv(config: ModelConfig) -> tuple[jax.Array, ...]:
    c = config
    keys = (FLAGS.batch, c.num_kv_heads, FLAGS.length, c.head_dim)
    shapes = ((FLAGS.batch, FLAGS.length, c.num_heads, c.head_dim), keys, keys)
    return tuple(
        jax.random.normal(jax.random.key(i), shape, c.dtype) for i, shape in enumerate(shapes)
    )


def wall_seconds(call: Callable) -> float:
    """The minimum of some runs, each of several calls."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready([call() for _ in range(4)])
        times.append((time.perf_counter() - start) / 4)
    return min(times)


# --- trace ----------------------------------------------------------------------------------------


def trace():
    """The operations of an iteration that take the most time."""
    work = Workload()
    args = work.hyperparameters, work.prompts, work.key
    compiled, _ = work.compile(ppo_iteration, *args)

    def call():
        return compiled(work.state, *args, frozen=work.frozen)

    jax.block_until_ready(call())
    seconds = operation_seconds(call, compiled.as_text())
    total = sum(map(sum, seconds.values()))
    longest = sorted(seconds.items(), key=lambda item: -sum(item[1]))[:NUM_OPERATIONS]
    for name, times in longest:
        ms = 1e3 * sum(times)
        print_json({"operation": name, "ms": ms, "times": len(times), "share": ms / 1e3 / total})


def operation_seconds(call: Callable, text: str) -> dict[str, list[float]]:
    """{operation: seconds of each of its events} in one call: of a GPU its kernels, of a CPU the
    instructions of the program."""
    instructions = (i for c in parse_module(text).computations.values() for i in c)
    known = {i.name for i in instructions if i.opcode not in CONTROL_FLOW}
    found = collections.defaultdict(list)
    for plane, line, event in traced(call):
        on_gpu = plane.startswith("/device:GPU")
        if line.startswith("Stream") if on_gpu else event.name in known:
            found[event.name].append(event.duration_ns / 1e9)
    return found


def traced(call: Callable) -> Iterator[tuple[str, str, Any]]:
    """(plane, line, event) of one call."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    for plane in data.planes:
        for line in plane.lines:
            yield from ((plane.name, line.name, event) for event in line.events)
