r"""PPO on random models: an iteration, its rollout or its update, in seconds of process CPU time.

    python experiments/benchmark.py iteration --family=gpt2 --hidden=256 --layers=4 --heads=4 \
        --vocab=8192 --batch=16 --prompt-len=32 --response-len=64 --num-epochs=4
    python experiments/benchmark.py rollout --lengths=geometric:16 --num-prompts=128

The set-up of InstructGPT: policy, critic, reference and reward model, four of one size with weights
of their own; float32; responses of full length. The last line of the output is one JSON object.
With --lengths=geometric:MEAN, a rollout of --num-prompts in --batch slots stands beside static
batches of --batch prompts, one after the other; an update of packed rows beside one of a row for
each response, in --num-micro-batches pieces or, packed, in as many of them as it takes.
"""

import dataclasses
import functools
import json
import statistics
from typing import Any

from benchmarks.skewed import skewed_rollout, stop_tokens
from benchmarks.work import (
    FLAGS,
    Timed,
    Work,
    arguments,
    rates,
    response_tokens,
    rounded,
    tell,
    time_calls,
    utilisation,
)
from ppo_jax.algorithms.experience import make_experience, response_scores
from ppo_jax.algorithms.experience import sample_responses as sample
from ppo_jax.algorithms.ppo import ppo_iteration, ppo_update


def rollout():
    """Responses alone."""
    if FLAGS.lengths != "fixed":
        return skewed_rollout()
    if FLAGS.refill:
        raise ValueError(f"--refill must be 0 with --lengths=fixed, got {FLAGS.refill}")
    work = Work()
    timed, _ = time_rollout(work)
    tell(work, timed, "rollout", **rates("rollout_tokens", response_tokens(), timed))


def update():
    """All optimizer steps of an iteration."""
    if FLAGS.lengths != "fixed":
        return packed_update()
    work = Work()
    _, responses = time_rollout(work, repeats=0)
    _, experience = time_score(work, responses, repeats=0)
    timed = time_update(work, experience)
    tell(work, timed, "update", **rates("tokens", response_tokens(), timed))


def packed_update():
    """Packed rows beside a row for each response, of very different lengths."""
    stops = stop_tokens()
    if FLAGS.num_micro_batches == 1:
        raise ValueError("--num-micro-batches must be > 1: packed rows save whole pieces, got 1")
    work = Work()
    sampling = dataclasses.replace(work.options.sampling, eos_ids=stops)
    work.options = dataclasses.replace(work.options, sampling=sampling)
    _, responses = time_rollout(work, repeats=0)
    useful = float(responses.response_mask.sum())
    _, experience = time_score(work, responses, repeats=0)
    single = time_update(work, experience)
    work.options = dataclasses.replace(work.options, packing=True)
    timed = time_update(work, experience)
    told = {
        "benchmark": "update",
        "arguments": arguments() | {"lengths": FLAGS.lengths},
        "useful_tokens": useful,
        **single.figures("single_"),
        **timed.figures(),
        **rates("useful_tokens", useful, timed),
        "times_the_cpu_seconds_of_single_rows": statistics.median(timed.cpu)
        / statistics.median(single.cpu),
        "compile_seconds": timed.compile,
    }
    print(json.dumps(rounded(told)))


def iteration():
    """The whole of it as one program, and its three parts as programs of their own."""
    if FLAGS.lengths != "fixed":
        raise ValueError(f"--lengths must be fixed for an iteration, got {FLAGS.lengths!r}")
    work = Work()
    sampled, responses = time_rollout(work)
    scored, experience = time_score(work, responses)
    updated = time_update(work, experience)
    del responses, experience
    whole, compiled_in = work.compile(
        ppo_iteration, work.state, work.numbers, work.prompts, work.key, donate_argnums=0
    )
    timed = time_steps(whole, work, work.numbers, work.prompts, work.key, compiled_in=compiled_in)
    parts = {"rollout": sampled, "score": scored, "update": updated}
    tell(
        work,
        timed,
        "iteration",
        cpu_seconds_per_iter=statistics.median(timed.cpu),
        wall_seconds_per_iter=statistics.median(timed.wall),
        **{f"{k}_cpu_seconds": statistics.median(v.cpu) for k, v in parts.items()},
        **rates("rollout_tokens", response_tokens(), sampled),
        update_matmul_utilisation=utilisation(work, "update", updated),
    )


def time_rollout(work: Work, repeats: int | None = None):
    """(seconds, responses)"""
    args = (work.state, work.numbers, work.prompts, work.key)
    compiled, compiled_in = work.compile(sample, *args)
    return time_calls(compiled.func, lambda: compiled(*args), compiled_in, repeats)


def time_score(work: Work, responses: Any, repeats: int | None = None):
    """(seconds, experience)"""

    def score(state, numbers, responses, **parts):
        reward = dict(frozen=parts["frozen"], networks=parts["networks"])
        scores = response_scores(responses, **reward)
        return make_experience(responses, scores, state, numbers, **parts)[0]

    args = (work.state, work.numbers, responses)
    compiled, compiled_in = work.compile(score, *args)
    return time_calls(compiled.func, lambda: compiled(*args), compiled_in, repeats)


def time_update(work: Work, experience: Any) -> Timed:
    args = (experience, work.numbers, work.key)
    compiled, compiled_in = work.compile(ppo_update, work.state, *args, donate_argnums=0)
    return time_steps(compiled, work, *args, compiled_in=compiled_in)


def time_steps(step: functools.partial, work: Work, *args: Any, compiled_in: float) -> Timed:
    """Of a program that takes the state and gives the next one."""

    def call():
        work.state, metrics = step(work.state, *args)
        return metrics

    return time_calls(step.func, call, compiled_in, None)[0]
