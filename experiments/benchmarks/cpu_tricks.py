r"""What each form of `ppo_jax.core.cpu` saves over the plain expression, as ratios of CPU times.

    python experiments/benchmark.py cpu_tricks --hidden=256 --layers=4 --heads=4 --vocab=8192

Both programs are compiled first and then called in turn, so that both see the same machine. A form
that saves less than a tenth is not worth its lines. The last line of the output is a JSON object.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks.measure import FLAGS
from benchmarks.ppo import time_rollout, time_score
from benchmarks.report import print_json
from benchmarks.workload import Workload, arguments
from ppo_jax.algorithms.experience import sample_responses
from ppo_jax.algorithms.update import ppo_update
from ppo_jax.core import cpu


def plain_matmul(x, kernel, dtype=None):
    return jnp.matmul(x, kernel, preferred_element_type=dtype)


def plain_argmax(x):
    return jnp.argmax(x, axis=-1).astype(jnp.int32)


def plain_nucleus(logits, top_p):
    """The sort: tokens from the likeliest on, until they reach top_p together."""
    order = jnp.argsort(-logits, axis=-1)
    probs = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    inside = jnp.zeros(logits.shape, bool)
    inside = jnp.put_along_axis(inside, order, before < top_p, axis=-1, inplace=False)
    return inside | (top_p >= 1)


def main():
    work = Workload()
    _, responses = time_rollout(work, repeats=0)
    _, experience = time_score(work, responses, repeats=0)
    numbers, key = work.hyperparameters, work.key
    update = (ppo_update, experience, numbers, key)
    rollout = (sample_responses, numbers, work.prompts, key)
    ratios = {
        "matmul": ratio(work, "matmul", plain_matmul, *update),
        "argmax": ratio(work, "argmax", plain_argmax, *rollout),
    }
    sampling = dataclasses.replace(work.options.sampling, top_p=0.9)
    work.options = dataclasses.replace(work.options, sampling=sampling)
    ratios["nucleus"] = ratio(work, "nucleus", plain_nucleus, *rollout)
    print_json({"benchmark": "cpu_tricks", "arguments": arguments(), **ratios})


def ratio(work: Workload, name: str, plain: Callable, program: Callable, *args) -> float:
    """CPU seconds of a program with the form of `cpu`, over those with the plain expression."""
    ours, _ = work.compile(program, *args)
    jax.clear_caches()  # else the plain one is traced from what was traced before
    with mock.patch.object(cpu, name, plain):
        theirs, _ = work.compile(program, *args)
    seconds = {ours: [], theirs: []}
    for repeat in range(1 + FLAGS.repeats):
        for compiled, times in seconds.items():
            start = time.process_time()
            jax.block_until_ready(compiled(work.state, *args, frozen=work.frozen))
            if repeat:
                times.append(time.process_time() - start)
    fast, slow = map(statistics.median, seconds.values())
    print(f"{name}: {fast:.3f} s, plain {slow:.3f} s in {program.__name__}", flush=True)
    return fast / slow
