r"""PPO on random models: an iteration, its rollout or its update, in seconds of process CPU time.

    python experiments/benchmark.py iteration --family=gpt2 --hidden=256 --layers=4 --heads=4 \
        --vocab=8192 --batch=16 --prompt-len=32 --response-len=64 --num-epochs=4
    python experiments/benchmark.py rollout --lengths=geometric:16 --num-prompts=128

The set-up of InstructGPT: policy, critic, reference and reward model, four of one size with weights
of their own; responses of full length. The last line of the output is one JSON object.
--lora=RANK trains adapters of policy and critic alone; SmolLM2-135M has --family=llama --hidden=576
--mlp=1536 --layers=30 --heads=9 --kv-heads=3 --vocab=49152 --tie-embeddings.
With --lengths=geometric:MEAN, continuous batching of --num-prompts in --batch slots is compared
with static batches of --batch prompts, and an update of packed rows, which needs fewer
micro-batches, with one of a row for each response.
"""

import dataclasses
import statistics
from typing import Any

from absl import flags

from benchmarks.measure import FLAGS, Timing, rates
from benchmarks.report import print_json
from benchmarks.skewed import skewed_rollout, stop_tokens
from benchmarks.workload import Workload, arguments, print_report, response_tokens
from ppo_jax.algorithms.experience import (
    make_experience,
    reference_logprobs,
    response_scores,
    sample_responses,
)
from ppo_jax.algorithms.ppo import ppo_iteration, update_from_rollout
from ppo_jax.algorithms.update import ppo_update

flags.DEFINE_bool("phases", True, "Of an iteration, also time its phases alone.")


def rollout():
    """Responses alone."""
    if FLAGS.lengths != "fixed":
        return skewed_rollout()
    if FLAGS.min_free_slots:
        raise ValueError(
            f"--min-free-slots must be 0 with --lengths=fixed, got {FLAGS.min_free_slots}"
        )
    work = Workload()
    timing, _ = time_rollout(work)
    print_report(work, timing, "rollout", **rates("rollout_tokens", response_tokens(), timing))


def update():
    """All optimizer steps of an iteration."""
    if FLAGS.lengths != "fixed":
        return packed_update()
    work = Workload()
    _, responses = time_rollout(work, repeats=0)
    _, experience = time_score(work, responses, repeats=0)
    timing = time_update(work, experience)
    print_report(work, timing, "update", **rates("tokens", response_tokens(), timing))


def packed_update():
    """Packed rows compared with a row for each response, of very different lengths."""
    stops = stop_tokens()
    if FLAGS.num_micro_batches == 1:
        raise ValueError("--num-micro-batches must be > 1: packing saves whole ones, got 1")
    work = Workload()
    sampling = dataclasses.replace(work.options.sampling, eos_ids=stops)
    work.options = dataclasses.replace(work.options, sampling=sampling)
    _, responses = time_rollout(work, repeats=0)
    useful_tokens = float(responses.response_mask.sum())
    _, experience = time_score(work, responses, repeats=0)
    single = time_update(work, experience)
    work.options = dataclasses.replace(work.options, packing=True)
    packed = time_update(work, experience)
    print_json(
        {
            "benchmark": "update",
            "arguments": arguments("lengths"),
            "useful_tokens": useful_tokens,
            **single.figures("single_"),
            **packed.figures(),
            **rates("useful_tokens", useful_tokens, packed),
            "times_the_cpu_seconds_of_single_rows": packed.cpu_seconds / single.cpu_seconds,
            "compile_seconds": packed.compile_seconds,
        }
    )


def iteration():
    """The whole iteration as one program, and its three phases as programs of their own.

    Of one optimizer step the critic's values are those of the update's own forward pass: it is in
    the phase "update" alone.
    """
    if FLAGS.lengths != "fixed":
        raise ValueError(f"--lengths must be fixed for an iteration, got {FLAGS.lengths!r}")
    work = Workload()
    phases = time_phases(work) if FLAGS.phases else {}
    timing = work.time_steps(ppo_iteration, work.hyperparameters, work.prompts, work.key)
    figures = timing.figures()
    print_report(
        work,
        timing,
        "iteration",
        cpu_seconds_per_iter=figures["cpu_seconds"],
        wall_seconds_per_iter=figures["wall_seconds"],
        **phases,
    )


def time_phases(work: Workload) -> dict[str, float]:
    """The three phases as programs of their own; of one optimizer step what `passes_in_common`
    names is in the update alone."""
    timings = {}
    timings["rollout"], responses = time_rollout(work)
    if work.one_pass:
        timings["score"], given = time_score_alone(work, responses)
        timings["update"] = time_update_from_scores(work, responses, *given)
    else:
        timings["score"], experience = time_score(work, responses)
        timings["update"] = time_update(work, experience)
    flops = work.flops()
    return {
        **{f"{phase}_model_flops": flops[phase] for phase in timings},
        **{f"{phase}_cpu_seconds": t.cpu_seconds for phase, t in timings.items()},
        **{f"{phase}_wall_seconds": statistics.median(t.wall) for phase, t in timings.items()},
        **rates("rollout_tokens", response_tokens(), timings["rollout"]),
        "update_matmul_utilisation": work.utilisation(flops["update"], timings["update"]),
    }


def time_rollout(work: Workload, repeats: int | None = None) -> tuple[Timing, Any]:
    """(timing, responses)"""
    args = work.hyperparameters, work.prompts, work.key
    return work.time(sample_responses, *args, repeats=repeats)


def time_score(work: Workload, responses: Any, repeats: int | None = None) -> tuple[Timing, Any]:
    """(timing, experience)"""

    def score(state, hyperparameters, responses, *, frozen, networks, options):
        parts = dict(frozen=frozen, networks=networks)
        groups = dict(samples_per_prompt=options.sampling.samples_per_prompt)
        scores = response_scores(responses, **groups, **parts)
        return make_experience(responses, scores, state, hyperparameters, options=options, **parts)[
            0
        ]

    return work.time(score, work.hyperparameters, responses, repeats=repeats)


def time_score_alone(work: Workload, responses: Any) -> tuple[Timing, tuple[Any, Any]]:
    """(timing, (scores, log-probs of the reference)): the rest is of the update's own passes."""

    def score(state, hyperparameters, responses, *, frozen, networks, options):
        parts = dict(frozen=frozen, networks=networks)
        parts |= dict(samples_per_prompt=options.sampling.samples_per_prompt)
        reference = reference_logprobs(responses, hyperparameters, **parts)
        return response_scores(responses, **parts), reference

    return work.time(score, work.hyperparameters, responses)


def time_update_from_scores(work: Workload, responses: Any, scores: Any, reference: Any) -> Timing:
    """Of the step with all that comes before it but the scores and the reference."""

    def update(state, hyperparameters, responses, scores, key, reference, **parts):
        given = (state, hyperparameters, responses, scores, key)
        return update_from_rollout(*given, ref_logprobs=reference, **parts)

    given = (work.hyperparameters, responses, scores, work.key, reference)
    return work.time_steps(update, *given)


def time_update(work: Workload, experience: Any) -> Timing:
    return work.time_steps(ppo_update, experience, work.hyperparameters, work.key)
