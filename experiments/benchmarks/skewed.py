"""A rollout of responses of very different lengths: slots beside static batches."""

import dataclasses
import functools
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.work import FLAGS, Work, arguments, random_prompts, rates, rounded, time_calls
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
    """Slots that are filled anew beside batches that wait for their longest response."""
    if FLAGS.num_prompts % FLAGS.batch:
        raise ValueError(
            f"--num-prompts must be a multiple of --batch ({FLAGS.batch}), got {FLAGS.num_prompts}"
        )
    stops, work = stop_tokens(), Work()
    sampling = dataclasses.replace(work.options.sampling, eos_ids=stops)
    prompts, rows = random_prompts(FLAGS.num_prompts), jnp.arange(FLAGS.num_prompts)

    def respond(params, prompts, rows, sampling):
        parts = dict(sampling=sampling, temperature=work.numbers.temperature, rows=rows)
        return rollout(work.networks.policy, params, prompts, work.key, **parts)

    def time_of(sampling, batch_size):
        """(seconds for all prompts, the lengths of their responses)"""
        pieces = FLAGS.num_prompts // batch_size
        leaves, structure = jax.tree.flatten((prompts, rows))
        split = zip(*(jnp.split(leaf, pieces) for leaf in leaves), strict=True)
        batches = [structure.unflatten(piece) for piece in split]
        params, began = work.state.policy_params, time.perf_counter()
        function = jax.jit(functools.partial(respond, sampling=sampling))
        compiled = function.lower(params, *batches[0]).compile()
        compiled_in = time.perf_counter() - began
        timed, found = time_calls(
            compiled, lambda: [compiled(params, *batch) for batch in batches], compiled_in, None
        )
        return timed, np.concatenate([np.asarray(x.response_mask).sum(axis=1) for x in found])

    static, lengths = time_of(sampling, FLAGS.batch)
    slots = dataclasses.replace(sampling, max_concurrent=FLAGS.batch, min_free_slots=FLAGS.refill)
    timed, same = time_of(slots, FLAGS.num_prompts)
    assert (lengths == same).all(), "slots change no response"
    useful = float(lengths.sum())
    ratio = statistics.median(static.cpu) / statistics.median(timed.cpu)
    steps = lengths.reshape(-1, FLAGS.batch).max(axis=1).sum()
    told = {
        "benchmark": "rollout",
        "arguments": arguments() | {k: getattr(FLAGS, k) for k in ("lengths", "num_prompts")},
        "useful_tokens": useful,
        "mean_length": useful / FLAGS.num_prompts,
        "decode_steps_of_static_batches": int(steps),
        **static.figures("static_"),
        **timed.figures(),
        **rates("useful_tokens", useful, timed),
        "times_the_useful_tokens_of_static_batches": ratio,
        "compile_seconds": timed.compile,
    }
    print(json.dumps(rounded(told)))
