"""The PPO loop: builds the networks, jits the iteration, restores, logs, samples, saves."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np

from ppo_jax.algorithms.experience import response_scores, sample_responses
from ppo_jax.algorithms.greedy import greedy_responses
from ppo_jax.algorithms.options import PPOOptions
from ppo_jax.algorithms.ppo import ppo_iteration, update_from_rollout
from ppo_jax.algorithms.references import reference_responses
from ppo_jax.config.parsing import FunctionFailed
from ppo_jax.config.ppo import PPOSettings, names_critic
from ppo_jax.config.run import Config
from ppo_jax.core.shaping import THRESHOLD
from ppo_jax.core.types import PPOState, Prompts, Rollout
from ppo_jax.data.encode import take_prompts
from ppo_jax.data.prompts import PromptBuckets, PromptData, prompt_data, with_safety
from ppo_jax.distributed.layout import Layout, fetch, gather_rows, local_rows, make_layouts
from ppo_jax.inference.generate import decode_rows
from ppo_jax.io.critics import keep_critic
from ppo_jax.io.model_spec import ModelSpec
from ppo_jax.io.run_folder import append_rows
from ppo_jax.io.stage_folder import Model, other_field
from ppo_jax.training.common import compile_step
from ppo_jax.training.dynamic_sampling import inputs_of, make_sampled
from ppo_jax.training.greedy import make_greedy
from ppo_jax.training.ppo_evaluation import (
    Evaluation,
    Judging,
    compile_sampler,
    is_due,
    make_sample_and_measure,
)
from ppo_jax.training.ppo_models import find_models
from ppo_jax.training.ppo_setup import Setup, make_setup, state_maker
from ppo_jax.training.references import make_references
from ppo_jax.training.resume import fingerprint
from ppo_jax.training.reward_functions import (
    RewardFunction,
    load_reward_functions,
    metric_names,
)
from ppo_jax.training.stage import Stage, StageRun, open_stage, stage_run
from ppo_jax.training.text_rewards import text_scorer

# (the prompts chosen [B], their rollout) -> (scores on the mesh, [B] float32, or [B, T] of each
# token; {metric: its number of each response [B], of which the mean is logged})
Scorer: TypeAlias = Callable[[np.ndarray, Rollout], tuple[jax.Array, dict[str, np.ndarray]]]


def read_ppo(config: Config, start: ModelSpec) -> PromptData:
    settings = config.ppo
    data = prompt_data(settings.prompts, start.tokenizer, max_length=settings.max_prompt_length)
    if settings.reward_rule == THRESHOLD:
        data = with_safety(data, settings.prompts)
    return used_columns(data, load_reward_functions(settings), settings.prompts)


def used_columns(data: PromptData, functions: Sequence[RewardFunction], path: str) -> PromptData:
    """The prompts with those columns alone that a reward function is given.

    Raises:
        ValueError: a function asks for what there is not.
    """
    chosen = [function.columns(data.columns, data.gaps, path) for function in functions]
    columns = {name: x for name, x in data.columns.items() if name in set().union(*chosen)}
    return dataclasses.replace(data, columns=columns, gaps={})


def train_ppo(
    config: Config, workdir: Path, base: str, data: PromptData, *, judging: Judging | None = None
):
    """Align a policy; the result is the stage folder `workdir/ppo`. `judging` is for
    `ppo.evaluate_every`."""
    settings, layouts = config.ppo, make_layouts(config.mesh)
    layout = layouts[0]
    policy, reward, critic = models = find_models(config, workdir, base, layout)
    rows, num_steps = data.prompts, settings.num_iterations
    buckets = make_buckets(settings, rows, config.ppo_seed)
    open_ppo(config, workdir, *models, data)
    tell_settings(settings, buckets)
    setup, *start = make_setup(settings, *models, layouts, config.model.frozen_dtype)
    if critic is not None:
        kept = (critic.config, setup.frozen.value, setup.value_start)
        keep_critic(workdir / "ppo", *kept, shared=settings.shared_critic)
    tokenizer = policy.tokenizer
    scorer = functools.partial(make_scorer, settings, setup, reward, tokenizer, layout)
    score, sampler = scorer(data), compile_sampler(setup, layout)
    evaluation = None
    if settings.evaluate_every and judging is not None:
        prompts, rate = judging(config, workdir, tokenizer)
        sample = make_sample_and_measure(
            setup, tokenizer, prompts, scorer(prompts), layout, sampler, config
        )
        evaluation = Evaluation(sample, rate)
    del policy, reward, critic, models, scorer  # the setup has what is used of them
    samples = make_sampler(setup, tokenizer, data, settings, score, layout, sampler)
    with ppo_run(config, workdir) as run:
        state = run.restore(layout, state_maker(settings), *start, setup.hyperparameters)
        if evaluation is not None and run.start < num_steps:
            run.expect(evaluation.begin(dataclasses.replace(state, policy_params=start[0])))
        del start
        iterate = make_iteration(setup, state, score, layout)
        tell_what_comes(run.start, settings, workdir / "samples.jsonl")
        if run.start == 0:
            append_rows(workdir / "samples.jsonl", samples(state, 0))
        widths: set[int] = set()
        for i in run.steps():
            chosen, prompts, width = inputs_of(settings, buckets, rows, layout, i)
            if widths and width not in widths:
                run.tell(f"compiling an iteration with prompts of {width} tokens")
            widths.add(width)
            state, metrics = iterate(state, chosen, prompts, layout.key(config.ppo_seed, i))
            if settings.prompt_buckets > 1:
                metrics |= {"ppo/prompt_width": width}
            if (i + 1) % settings.sample_every == 0 or i + 1 == num_steps:
                run.finish_step()
                append_rows(workdir / "samples.jsonl", samples(state, i + 1))
            if evaluation is not None and is_due(settings, i + 1):
                run.finish_step()
                metrics |= evaluation(state)
            run.end_step(i + 1, state, metrics)


def open_ppo(
    config: Config,
    workdir: Path,
    policy: Model,
    reward: Model | None,
    critic: Model | None,
    data: PromptData,
):
    """Begin the stage of a run, or make sure that it can go on."""
    named = critic if names_critic(config.ppo) else None
    others = {other_field(i): x for i, x in enumerate(reward.others if reward else ())}
    open_stage(
        PPO,
        config,
        workdir,
        policy,
        num_steps=config.ppo.num_iterations,
        data=fingerprint(data),
        sources={"init_from": policy, "reward_model": reward, "critic_init_from": named} | others,
    )


def tell_settings(settings: PPOSettings, buckets: PromptBuckets):
    """Lines for settings that do something that a user may not expect."""
    if settings.top_k or settings.top_p < 1 or settings.min_p:
        print("ppo: top_k, top_p and min_p shape what is sampled, not the log-probs of the update")
    if settings.prompt_buckets > 1:
        print(f"ppo: {buckets}")
    if (alpha := settings.gae_lambda_alpha) and settings.response_length < 2 / alpha:
        print(
            f"ppo: gae_lambda_alpha={alpha:g} makes lambda less than 0.5 up to {2 / alpha:g} "
            f"tokens, and response_length is {settings.response_length}: advantages look a few "
            "tokens ahead"
        )


def ppo_run(config: Config, workdir: Path, num_lanes: int | None = None) -> StageRun:
    """The stage of a run; one of several lanes, where `num_lanes` says so."""
    settings = config.ppo
    return stage_run(
        dataclasses.replace(PPO, progress=progress_of(settings)),
        config,
        workdir,
        settings.num_iterations,
        tokens=("response/length", settings.rollout_batch_size),
        limits={"kl/ref": (settings.max_ref_kl, "ppo.max_ref_kl")},
        num_lanes=num_lanes,
    )


def progress_of(settings: PPOSettings) -> dict[str, str]:
    """{metric: label} of the figures in the progress. Where the critic alone learns, it is how much
    of the returns it explains, in place of what the policy's steps do."""
    names = dict(PPO.progress)
    if not settings.critic_warmup:
        return names
    if settings.critic_warmup >= settings.num_iterations:
        names = {k: names[k] for k in ("reward/score_mean", "response/length")}
    return names | {"value/explained_variance": "explained variance"}


def make_buckets(settings: PPOSettings, prompts: Prompts, seed: int) -> PromptBuckets:
    """Which prompts are in which iteration."""
    return PromptBuckets(
        lengths=prompts.mask.sum(axis=1),
        max_length=prompts.mask.shape[1],
        count=settings.prompt_buckets,
        batch_size=settings.rollout_batch_size // settings.samples_per_prompt,
        seed=seed,
    )


def tell_what_comes(start: int, settings: PPOSettings, samples: Path):
    """Whether there is anything to do, and where what comes of it can be read."""
    if start >= settings.num_iterations:
        taken = f"has taken {start} iterations, num_iterations is {settings.num_iterations}"
        print(f"ppo: {taken}: nothing to do", flush=True)
    elif settings.num_samples:
        often = f"every {settings.sample_every} iterations"
        print(f"ppo: samples ({often}) go to {samples}", flush=True)


def make_iteration(
    setup: Setup,
    state: PPOState,
    score: Scorer | None,
    layout: Layout,
):
    """(state, chosen prompts, their tokens, key) -> (state, metrics).

    With a reward model that reads the policy's tokens an iteration is one program. Otherwise it is
    two, and between them `score` reads text; the numbers are those of one program.
    """
    parts = dict(networks=setup.networks, options=setup.options)
    hyperparameters, frozen = setup.hyperparameters, setup.frozen
    how = program_options(setup.options)
    if score is None:
        iteration = compile_step(ppo_iteration, state, layout, compiler_options=how, **parts)
        return lambda state, chosen, prompts, key: iteration(
            state, hyperparameters, prompts, key, frozen=frozen
        )
    compiled = functools.partial(jax.jit, out_shardings=layout.batch_sharding, compiler_options=how)
    sample = compiled(functools.partial(sample_responses, **parts))
    greedy_sample = compiled(functools.partial(greedy_responses, **parts))
    greedy = make_greedy(setup.options, greedy_sample, score)
    reference_sample = compiled(functools.partial(reference_responses, **parts))
    references = make_references(setup.options, reference_sample, score)
    sampled = make_sampled(setup.options, sample, score, layout)
    update = compile_step(update_from_rollout, state, layout, compiler_options=how, **parts)

    def iterate(state: PPOState, chosen: np.ndarray, prompts: Prompts, key: jax.Array):
        rollout_key, shuffle_key = jax.random.split(key)
        inputs = (chosen, prompts, rollout_key, state, hyperparameters)
        rollout, scores, more, how_many = sampled(*inputs, frozen=frozen)
        inputs = (chosen, state, hyperparameters, prompts, rollout_key)
        others = (other(*inputs, frozen=frozen) for other in (greedy, references))
        given = (hyperparameters, rollout, scores, shuffle_key, *others)
        state, metrics = update(state, *given, frozen=frozen, **how_many)
        return state, metrics | {name: x.mean(dtype=np.float64) for name, x in more.items()}

    return iterate


def local_responses(
    rollout: Rollout, tokenizer: Any, stop_ids: Collection[int]
) -> tuple[np.ndarray, list[str]]:
    """(the indices [n] of this process's rows, their responses as text)."""
    rows, tokens = local_rows(rollout.response_tokens)
    mask, *prompts = (
        local_rows(x)[1]
        for x in (rollout.response_mask, rollout.prompt_tokens, rollout.prompt_mask)
    )
    prompts = Prompts(tokens=prompts[0], mask=prompts[1])
    return rows, decode_rows(tokenizer, tokens, mask, prompts, stop_ids)


def make_scorer(
    settings: PPOSettings,
    setup: Setup,
    reward: Model | None,
    tokenizer: Any,
    layout: Layout,
    data: PromptData,
) -> Scorer | None:
    """What scores responses to some prompts outside of the program of an iteration; None where the
    reward model is in it."""
    if functions := load_reward_functions(settings):
        return function_scorer(functions, data, tokenizer, setup.options.sampling.eos_ids, layout)
    if setup.text_reward is not None:
        return text_scorer(setup, reward, data.texts, tokenizer, layout)
    return None


def function_scorer(
    functions: Sequence[RewardFunction],
    data: PromptData,
    tokenizer: Any,
    stop_ids: Collection[int],
    layout: Layout,
) -> Scorer:
    """The scores of a user's functions."""

    def score(chosen: np.ndarray, rollout: Rollout):
        scores, each = call_functions(functions, data, chosen, rollout, tokenizer, stop_ids)
        return layout.shard_batch(scores), each

    return score


def program_options(options: PPOOptions) -> dict[str, Any]:
    """Compiler options of an iteration.

    Where XLA may keep more bits than bfloat16 has, it does so here and there, and the pass that
    recomputes the old log-probs differs from that of the update: the ratio does not begin at 1.
    """
    if options.old_logprobs == "recompute":
        return {"xla_allow_excess_precision": False}
    return {}


def call_functions(
    functions: Sequence[RewardFunction],
    data: PromptData,
    chosen: np.ndarray,
    rollout: Rollout,
    tokenizer: Any,
    stop_ids: Collection[int],
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What the functions give for B responses; every process asks for its own rows.

    Args:
        functions: one or more.
        data: the prompts, with the columns that the functions ask for.
        chosen: [B], the prompt of each response.
        rollout: B responses of T tokens.
        tokenizer: of the policy.
        stop_ids: tokens that end a response, and are no part of its text.

    Returns:
        (the weighted sum of their scores, [B] float32, or [B, T] float32 of each token if one of
        them scores tokens; {metric: the scores of the responses [B]} of each function, without its
        weight). A function that scores responses then scores their last tokens.
    """
    rows, responses = local_responses(rollout, tokenizer, stop_ids)
    tokens, mask = (local_rows(x)[1] for x in (rollout.response_tokens, rollout.response_mask))
    given = {name: [values[chosen[row]] for row in rows] for name, values in data.columns.items()}
    given["response_tokens"] = [row[kept].tolist() for row, kept in zip(tokens, mask, strict=True)]
    if any("finished" in f.keywords or f.takes_all for f in functions):
        given["finished"] = local_rows(rollout.has_eos)[1].tolist()
    texts = [data.texts[chosen[row]] for row in rows], responses
    scores = []
    for function in functions if len(rows) else ():
        try:
            scores.append(function(*texts, **given))
        except FunctionFailed as error:
            message = f"{error} (rows {rows[0]} to {rows[-1]} of {len(chosen)})"
            raise FunctionFailed(message) from error.__cause__
    return weighted_sum(functions, scores, rows, mask, len(chosen))


def weighted_sum(
    functions: Sequence[RewardFunction],
    scores: Sequence[np.ndarray | list[np.ndarray]],
    rows: np.ndarray,
    mask: np.ndarray,
    count: int,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """`call_functions`, from each function's scores of this process's rows; gathered by all.

    Args:
        functions: F of them.
        scores: of each function, or none where this process has no rows.
        rows: [n], the indices of this process's rows.
        mask: [n, T] bool, of their responses.
        count: B, rows of all processes.
    """
    # [n, 2 F]: of each function its score of a response, and whether it has scored tokens.
    own = np.zeros((len(rows), 2 * len(functions)))
    of_tokens = np.zeros(mask.shape)
    last = mask.sum(axis=1) - 1
    for i, (function, given) in enumerate(zip(functions, scores, strict=False)):
        own[:, 2 * i] = [np.sum(row) for row in given]
        if isinstance(given, list):
            own[:, 2 * i + 1] = True
            of_tokens[mask] += function.weight * np.concatenate(given)
        else:
            of_tokens[np.arange(len(rows)), last] += function.weight * given
    every = gather_rows(rows, own, count)
    names = metric_names([function.name for function in functions])
    each = dict(zip(names, every[:, ::2].T, strict=True))
    if every[:, 1::2].any():
        return gather_rows(rows, of_tokens, count), each
    weights = np.array([function.weight for function in functions])
    return (every[:, ::2] @ weights).astype(np.float32), each


def make_sampler(
    setup: Setup,
    tokenizer: Any,
    data: PromptData,
    settings: PPOSettings,
    score: Scorer | None,
    layout: Layout,
    sample: Callable[..., Rollout],
):
    """(state, step) -> rows of samples.jsonl: the same prompts and the same key every time."""
    chosen = np.arange(min(settings.num_samples, len(data.texts)))
    filled = layout.pad_batch(chosen)
    how = dict(networks=setup.networks, eos_id=setup.options.score_eos)
    score_tokens = jax.jit(functools.partial(response_scores, **how))

    def samples(state: PPOState, step: int) -> list[dict]:
        if not len(chosen):
            return []
        prompts, key = (
            layout.shard_batch(take_prompts(data.prompts, filled)),
            layout.replicate(jax.random.key(0)),
        )
        rollout = sample(state, setup.hyperparameters, prompts, key, frozen=setup.frozen)
        if score is None:
            scores = score_tokens(rollout, frozen=setup.frozen)
        else:
            scores, _ = score(filled, rollout)
        stop_ids = setup.options.sampling.eos_ids
        return sample_rows(data, filled, rollout, scores, tokenizer, stop_ids, step)[: len(chosen)]

    return samples


def sample_rows(
    data: PromptData,
    chosen: np.ndarray,
    rollout: Rollout,
    scores: jax.Array,
    tokenizer: Any,
    stop_ids: Collection[int],
    step: int,
) -> list[dict]:
    """The rows of samples.jsonl of some prompts, `chosen` [B], and their responses."""
    scores, responses = fetch((scores, (rollout.response_tokens, rollout.response_mask)))
    scores = scores.sum(axis=1) if scores.ndim == 2 else scores
    prompts = take_prompts(data.prompts, chosen)
    responses = decode_rows(tokenizer, *responses, prompts, stop_ids)
    return [
        {"stage": "ppo", "step": step, "prompt": p, "response": r, "score": float(s)}
        for p, r, s in zip((data.texts[i] for i in chosen), responses, scores, strict=True)
    ]


PPO = Stage(
    name="ppo",
    title="PPO",
    label="PPO",
    makes="A language model aligned by PPO with a KL penalty",
    data_fields=("prompts",),
    source_fields=("init_from", "reward_model", "other_reward_models", "critic_init_from"),
    trained_field="policy_params",
    step_unit="iteration",
    extendable=True,
    progress={
        "reward/score_mean": "score",
        "eval/gold_score": "gold",
        "kl/ref": "kl",
        "policy/clip_fraction": "clip",
        "response/length": "length",
    },
    outcome={  # z: no sign before a zero; the KL begins at 0 but for rounding
        "reward/score_mean": "mean score {:z.2f} → {:z.2f}",
        "kl/ref": "KL per response {:z.1f} → {:z.1f} nats",
    },
    read=read_ppo,
    train=train_ppo,
)
