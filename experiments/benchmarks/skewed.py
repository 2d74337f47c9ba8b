"""Continuous batching compared with static batches, on responses of very different lengths."""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import FLAGS, rates, time_calls
from benchmarks.report import print_json
from benchmarks.workload import Workload, arguments, random_prompts
from ppo_jax.rollout.rollout import rollout


def stop_tokens() -> tuple[int, ...]:
    """Those that make the lengths geometric: one in MEAN of all, as a random model is about
    uniform."""
    kind, _, mean = FLAGS.lengths.partition(":")
    if kind != "geometric" or not mean.isdecimal() or not 1 < int(mean) < FLAGS.vocab:
        raise ValueError(
            "--lengths must be fixed or geometric:MEAN with a whole MEAN above 1 and below --vocab "
            f"({FLAGS.vocab}), got {FLAGS.lengths!r}"
        )
    return tuple(range(FLAGS.vocab // int(mean)))


def skewed_rollout():
    """Slots that are refilled, and batches that wait for their longest response."""
    if FLAGS.num_prompts % FLAGS.batch:
        raise ValueError(
            f"--num-prompts must be a multiple of --batch ({FLAGS.batch}), got {FLAGS.num_prompts}"
        )
    for name, fits in (("lora", 0), ("samples_per_prompt", 1)):
        if (got := getattr(FLAGS, name)) != fits:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must be {fits} with --lengths={FLAGS.lengths}, got {got}")
    stops, work = stop_tokens(), Workload()
    sampling = dataclasses.replace(work.options.sampling, eos_ids=stops)
    prompts, rows = random_prompts(FLAGS.num_prompts), jnp.arange(FLAGS.num_prompts)

    def respond(params, prompts, rows, sampling):
        options = dict(sampling=sampling, temperature=work.hyperparameters.temperature, rows=rows)
        return rollout(work.networks.policy, params, prompts, work.key, **options)

    def time_rollouts(sampling, batch_size):
        """(timing of all prompts, lengths of their responses)"""
        num_batches = FLAGS.num_prompts // batch_size
        leaves, structure = jax.tree.flatten((prompts, rows))
        split = zip(*(jnp.split(leaf, num_batches) for leaf in leaves), strict=True)
        batches = [structure.unflatten(batch) for batch in split]
        params, start = work.state.policy_params, time.perf_counter()
        function = jax.jit(functools.partial(respond, sampling=sampling))
        compiled = function.lower(params, *batches[0]).compile()
        compile_seconds = time.perf_counter() - start
        timing, responses = time_calls(
            compiled, lambda: [compiled(params, *batch) for batch in batches], compile_seconds
        )
        return timing, np.concatenate([x.response_mask.sum(axis=1) for x in responses])

    static, lengths = time_rollouts(sampling, FLAGS.batch)
    slots = dataclasses.replace(
        sampling, max_concurrent=FLAGS.batch, min_free_slots=FLAGS.min_free_slots
    )
    continuous, same_lengths = time_rollouts(slots, FLAGS.num_prompts)
    assert (lengths == same_lengths).all(), "slots change no response"
    useful_tokens = float(lengths.sum())
    # The last token of a response needs no step.
    static_steps = (lengths.reshape(-1, FLAGS.batch).max(axis=1) - 1).sum()
    speedup = static.seconds / continuous.seconds
    print_json(
        {
            "benchmark": "rollout",
            "arguments": arguments("lengths", "num_prompts"),
            "useful_tokens": useful_tokens,
            "mean_length": useful_tokens / FLAGS.num_prompts,
            "decode_steps_of_static_batches": int(static_steps),
            **static.figures("static_"),
            **continuous.figures(),
            **rates("useful_tokens", useful_tokens, continuous),
            "times_the_useful_tokens_of_static_batches": speedup,
            "compile_seconds": continuous.compile_seconds,
        }
    )
