r"""Plain attention of long rows, in blocks beside products with all pairs of positions.

    python experiments/benchmark.py attention
    python experiments/benchmark.py attention --case=16,128,12,4,64

Forward and backward pass in float32 without padding, the two called in turn. Prints a row of a
table for each shape: the CPU seconds of both, their ratio, and the megabytes of temporaries that
the compiler counts. The last line of the output is one JSON object.
"""

import functools
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks.measure import FLAGS, pin_threads
from benchmarks.report import print_json
from ppo_jax.models.attention import AttentionFn, attend, causal_mask
from ppo_jax.models.long_rows import CausalRows, attend_in_blocks

CASES = ("16,80,6,6,20", "16,96,4,4,64", "12,200,9,9,24", "30,208,5,1,24", "26,360,4,1,48")
CASES += ("4,1023,9,3,64",)
flags.DEFINE_multi_string(
    "case", list(CASES), "Rows, length, heads, key/value heads, head size; may be given repeatedly."
)


def main():
    pin_threads()
    heads = ("rows, length, heads, key/value heads, size", "blocks, ms", "all pairs, ms", "times")
    print("| " + " | ".join((*heads, "temporaries, MB")) + " |\n" + "| --- " * 5 + "|")
    print_json({"benchmark": "attention", "cases": [measure(text) for text in FLAGS.case]})


def measure(text: str) -> dict[str, float | str]:
    """Print and return a row of the table.

    Raises:
        ValueError: `text` is not five positive integers.
    """
    try:
        num_rows, length, heads, kv_heads, size = map(int, text.split(","))
    except ValueError:
        raise ValueError(f"--case must be five integers, as in {CASES[0]}, got {text!r}") from None
    if min(num_rows, length, heads, kv_heads, size) < 1 or heads % kv_heads:
        raise ValueError(f"--case must be positive, heads a multiple of kv heads, got {text!r}")
    shapes = [(num_rows, length, heads, size), *[(num_rows, kv_heads, length, size)] * 2]
    keys = jax.random.split(jax.random.key(0), 4)
    args = [jax.random.normal(k, s) for k, s in zip(keys, (*shapes, shapes[0]), strict=True)]
    mask = jnp.ones((num_rows, length), bool)
    blocks, pairs = (
        jax.jit(functools.partial(gradient, fn)).lower(mask, *args).compile()
        for fn in (in_blocks, all_pairs)
    )
    fast, slow = seconds_in_turn((blocks, pairs), mask, *args)
    temporaries = [p.memory_analysis().temp_size_in_bytes / 1e6 for p in (blocks, pairs)]
    cells = [f"{1e3 * fast:.3g}", f"{1e3 * slow:.3g}", f"{slow / fast:.2f}"]
    cells.append(" / ".join(f"{x:.3g}" for x in temporaries))
    print("| " + " | ".join([text, *cells]) + " |", flush=True)
    names = ("blocks_seconds", "pairs_seconds", "blocks_mb", "pairs_mb")
    return {"case": text, **dict(zip(names, (fast, slow, *temporaries), strict=True))}


def in_blocks(mask):
    return AttentionFn(CausalRows(mask), attend_in_blocks)


def all_pairs(mask):
    return AttentionFn(causal_mask(mask, None), attend)


def gradient(attention: Callable, mask, q, k, v, g):
    output, backward = jax.vjp(attention(mask), q, k, v)
    return output, backward(g)


def seconds_in_turn(programs: Sequence[Callable], *args) -> list[float]:
    """CPU seconds of each program, the least of some calls after one that is not timed."""
    seconds = [[] for _ in programs]
    for _ in range(1 + 3 * FLAGS.repeats):
        for program, times in zip(programs, seconds, strict=True):
            start = time.process_time()
            jax.block_until_ready(program(*args))
            times.append(time.process_time() - start)
    return [min(times[1:]) for times in seconds]
