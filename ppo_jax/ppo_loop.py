"""The PPO loop: builds the networks, jits the iteration, restores, logs, samples, saves."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ppo_jax.batches import batch_indices, take_prompts
from ppo_jax.config import Config, PPOSettings
from ppo_jax.experience import response_scores, sample_responses
from ppo_jax.generation import decode_responses
from ppo_jax.models import load_source, source_steps
from ppo_jax.plugins import load_function
from ppo_jax.ppo import init_ppo, learn, ppo_iteration
from ppo_jax.ppo_setup import Setup, make_critic, make_setup
from ppo_jax.prompt_data import prompt_data
from ppo_jax.runs import StageRun, open_stage
from ppo_jax.structs import PPOState, Prompts, Rollout
from ppo_jax.training import compile_step
from ppo_jax.workdir import append_rows

RewardFunction = Callable[[list[str], list[str]], Sequence[float]]
SHOW = {
    "reward/score_mean": "score",
    "kl/ref": "kl",
    "policy/clip_fraction": "clip",
    "response/length": "length",
}


def train_ppo(config: Config, workdir: Path, base: str):
    """Align a policy; the result is the stage folder `workdir/ppo`.

    Args:
        config: of the run; its ppo section.
        workdir: the run's folder.
        base: path of the base model.
    """
    settings = config.ppo
    pins, reward, function = source_steps(workdir / "ppo"), None, None
    load = functools.partial(load_source, workdir=workdir, base=base, settings=config.model)
    policy = load(settings.init_from, step=pins.get("init_from"))
    if settings.reward_model:
        reward = load(settings.reward_model, step=pins.get("reward_model"))
    else:
        function = load_function(settings.reward_function, "ppo.reward_function")
    length = settings.max_prompt_length
    data = prompt_data(settings.prompts, policy.tokenizer, max_length=length)
    texts, rows = data.texts, data.prompts
    num_steps, size = settings.num_iterations, settings.rollout_batch_size
    sources = {"init_from": policy, "reward_model": reward}
    open_stage("ppo", config, workdir, policy, num_steps=num_steps, sources=sources)
    if settings.top_k or settings.top_p < 1 or settings.min_p:
        print("ppo: top_k, top_p and min_p shape what is sampled, not the log-probs of the update")

    setup = make_setup(settings, policy, reward, make_critic(settings, policy, reward))
    iterate = make_iteration(setup, policy.tokenizer, texts, function)
    samples = make_sampler(setup, policy.tokenizer, texts, rows, settings, function)
    root_key = jax.random.key(config.seed)
    with StageRun(
        workdir,
        "ppo",
        num_steps=num_steps,
        save_every=settings.save_every,
        show=SHOW,
        tokens=("response/length", size),
    ) as run:
        state = run.restore(
            init_ppo(setup.policy_params, setup.value_params, setup.hyperparameters)
        )
        if run.start == 0:
            append_rows(workdir / "samples.jsonl", samples(state, 0))
        for i in run.steps():
            chosen = batch_indices(config.seed, i, num_examples=len(texts), batch_size=size)
            key = jax.random.fold_in(root_key, i)
            state, metrics = iterate(state, chosen, take_prompts(rows, chosen), key)
            if (i + 1) % settings.sample_every == 0 or i + 1 == num_steps:
                run.settle()
                append_rows(workdir / "samples.jsonl", samples(state, i + 1))
            run.end_step(i + 1, state, metrics)


def make_iteration(setup: Setup, tokenizer: Any, texts: list[str], function: RewardFunction | None):
    """(state, chosen prompts, their tokens, key) -> (state, metrics).

    With a reward model an iteration is one program. With a function it is two, and the function
    between them sees text; the numbers are those of the same pieces.
    """
    parts = dict(networks=setup.networks, recipe=setup.recipe)
    hyperparameters, frozen = setup.hyperparameters, setup.frozen
    if function is None:
        whole = compile_step(ppo_iteration, **parts)
        return lambda state, chosen, prompts, key: whole(
            state, hyperparameters, prompts, key, frozen=frozen
        )
    sample = jax.jit(functools.partial(sample_responses, **parts))
    update = compile_step(learn, **parts)

    def iterate(state: PPOState, chosen: np.ndarray, prompts: Prompts, key: jax.Array):
        rollout_key, shuffle_key = jax.random.split(key)
        rollout = sample(state, hyperparameters, prompts, rollout_key, frozen=frozen)
        scores = call_function(function, [texts[i] for i in chosen], rollout, tokenizer)
        scores = jax.device_put(scores)
        return update(state, hyperparameters, rollout, scores, shuffle_key, frozen=frozen)

    return iterate


def call_function(
    function: RewardFunction, prompts: list[str], rollout: Rollout, tokenizer: Any
) -> np.ndarray:
    """The function's scores of responses, checked.

    Raises:
        ValueError: it did not give one finite number a response.
    """
    responses = decode_responses(tokenizer, rollout)
    scores = np.asarray(function(prompts, responses), np.float32)
    if scores.shape != (len(responses),) or not np.isfinite(scores).all():
        raise ValueError(
            f"ppo.reward_function must give {len(responses)} finite numbers, got {scores!r}"
        )
    return scores


def make_sampler(
    setup: Setup,
    tokenizer: Any,
    texts: list[str],
    rows: Prompts,
    settings: PPOSettings,
    function: RewardFunction | None,
):
    """(state, step) -> rows of samples.jsonl: the same prompts and the same key every time."""
    count = min(settings.num_samples, len(texts))
    sample = jax.jit(
        functools.partial(sample_responses, networks=setup.networks, recipe=setup.recipe)
    )
    score = jax.jit(functools.partial(response_scores, networks=setup.networks))

    def samples(state: PPOState, step: int) -> list[dict]:
        if not count:
            return []
        prompts = take_prompts(rows, np.arange(count))
        key = jax.random.key(0)
        rollout = sample(state, setup.hyperparameters, prompts, key, frozen=setup.frozen)
        if function is None:
            scores = np.asarray(score(rollout, frozen=setup.frozen))
        else:
            scores = call_function(function, texts[:count], rollout, tokenizer)
        responses = decode_responses(tokenizer, rollout)
        return [
            {"stage": "ppo", "step": step, "prompt": p, "response": r, "score": float(s)}
            for p, r, s in zip(texts[:count], responses, scores, strict=True)
        ]

    return samples
