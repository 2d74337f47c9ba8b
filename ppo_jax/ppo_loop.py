"""The PPO loop: builds the networks, jits the iteration, restores, logs, samples, saves."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.batches import Prompts as PromptRows
from ppo_jax.batches import batch_indices, encode_prompts
from ppo_jax.config import Config, PPOSettings
from ppo_jax.data import load_prompts
from ppo_jax.generation import decode_responses, stop_ids
from ppo_jax.inputs import on_device
from ppo_jax.loops import describe, make_optimizer
from ppo_jax.metrics import append_rows
from ppo_jax.models import Model, load_model, resolve
from ppo_jax.networks import policy_network, reward_network, trunk_network, value_network
from ppo_jax.partition import layer_range, merge_params, split_params, start_layer
from ppo_jax.plugins import load_function
from ppo_jax.ppo import (
    PPONetworks,
    Recipe,
    init_ppo,
    learn,
    ppo_iteration,
    response_scores,
    sample_responses,
)
from ppo_jax.rollout import Sampling
from ppo_jax.runs import StageRun, is_complete, open_stage
from ppo_jax.structs import Frozen, Hyperparameters, Params, PPOState, Prompts, Rollout

RewardFunction = Callable[[list[str], list[str]], Sequence[float]]
SHOW = {
    "reward/score_mean": "score",
    "kl/ref": "kl",
    "policy/clip_fraction": "clip",
    "response/length": "length",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """All that an iteration needs besides its state."""

    networks: PPONetworks
    recipe: Recipe
    hyperparameters: Hyperparameters
    frozen: Frozen
    policy_params: Params  # the trained leaves, as they start
    value_params: Params


def make_hyperparameters(settings: PPOSettings) -> Hyperparameters:
    """The numbers of the settings, as float32 on the device."""
    names = {field.name for field in dataclasses.fields(Hyperparameters)} - {"optimizer"}
    numbers = {name: jnp.float32(getattr(settings, name)) for name in names}
    optimizer = make_optimizer(settings.optimizer, settings.num_iterations)
    return Hyperparameters(optimizer=optimizer, **numbers)


def make_recipe(settings: PPOSettings, tokenizer: Any) -> Recipe:
    """The choices of the settings; what shapes the program."""
    names = {field.name for field in dataclasses.fields(Recipe)} - {"sampling"}
    sampling = Sampling(
        response_length=settings.response_length,
        eos_ids=stop_ids(tokenizer, settings.stop_tokens),
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
    )
    return Recipe(sampling=sampling, **{name: getattr(settings, name) for name in names})


def same(a: Params, b: Params) -> bool:
    """Whether two parameter trees hold the same numbers."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x is y or np.array_equal(x, y) for x, y in pairs)


def shared_layers(policy: Model, other: Model) -> int | None:
    """How many of the lowest layers two models have in common, weights and all; None if even the
    token tables differ."""
    depth = min(policy.config.num_layers, other.config.num_layers)
    if dataclasses.replace(policy.config, num_layers=1) != dataclasses.replace(
        other.config, num_layers=1
    ) or not same(policy.params["embed"], other.params["embed"]):
        return None
    for layer in range(depth):
        mine, theirs = (
            layer_range(m.config, m.params["layers"], layer, layer + 1) for m in (policy, other)
        )
        if not same(mine, theirs):
            return layer
    return depth


def find_trunk(settings: PPOSettings, policy: Model, scorers: list[tuple[Model, str | int]]):
    """Where the networks part: (layer at which the trunk ends or None, who is on it).

    The trunk ends at the lowest layer from which on something is trained or differs. A scorer that
    has no frozen layers in common with the policy reads tokens and does not count.

    Args:
        settings: the ppo section.
        policy: the policy at the start.
        scorers: reward model and critic, each with what is trained of it.
    """
    start = start_layer(policy.config, settings.trainable)
    if start is None:
        return None, [False] * len(scorers)
    ends = []
    for model, trainable in scorers:
        first, common = start_layer(model.config, trainable), shared_layers(policy, model)
        ends.append(0 if first is None or common is None else min(first, common))
    on_trunk = [end > 0 for end in ends]
    return min([start] + [end for end in ends if end > 0]), on_trunk


def make_setup(settings: PPOSettings, policy: Model, reward: Model | None, critic: Model) -> Setup:
    """Networks and parameters of a run, with all that can be shared shared.

    Args:
        settings: the ppo section.
        policy: where the policy starts, and the reference.
        reward: the reward model, or None with a reward function.
        critic: where the critic starts.
    """
    scorers = [(critic, settings.value_trainable)] + ([(reward, "head")] if reward else [])
    start, on_trunk = find_trunk(settings, policy, scorers)
    value_shares, reward_shares = (on_trunk + [False])[:2]
    parts = split_params(policy.config, policy.params, settings.trainable, start)
    value_start, reward_start = (start if on else None for on in (value_shares, reward_shares))
    value_parts = split_params(critic.config, critic.params, settings.value_trainable, value_start)
    networks = PPONetworks(
        policy=policy_network(policy.config, start_layer=start),
        value=value_network(critic.config, start_layer=value_start),
        reward=reward and reward_network(reward.config, start_layer=reward_start),
        trunk=None if start is None else trunk_network(policy.config, end_layer=start),
        value_on_trunk=value_shares,
        reward_on_trunk=reward_shares,
    )
    reward_params = None
    if reward is not None:
        reward_parts = split_params(reward.config, reward.params, "head", reward_start)
        reward_params = on_device(merge_params(reward_parts.frozen, reward_parts.trained))
    frozen = Frozen(
        ref_policy=on_device(parts.trained),
        reward=reward_params,
        trunk=None if start is None else on_device(parts.trunk),
        policy=on_device(parts.frozen),
        value=on_device(value_parts.frozen),
    )
    return Setup(
        networks=networks,
        recipe=make_recipe(settings, policy.tokenizer),
        hyperparameters=make_hyperparameters(settings),
        frozen=frozen,
        policy_params=parts.trained,
        value_params=value_parts.trained,
    )


def make_critic(policy: Model, reward: Model | None) -> Model:
    """Where the critic starts: the reward model, or the policy's body with a head of zeros."""
    if reward is not None:
        return reward
    width = policy.config.embed_dim
    head = {"kernel": np.zeros((width, 1), np.float32), "bias": np.zeros(1, np.float32)}
    return dataclasses.replace(policy, kind="reward", params={**policy.params, "head": head})


def train_ppo(config: Config, workdir: Path, base: str):
    """Align a policy; the result is the stage folder `workdir/ppo`.

    Args:
        config: of the run; its ppo section.
        workdir: the run's folder.
        base: path of the base model.
    """
    settings = config.ppo
    policy = load_model(resolve(settings.init_from, workdir, base), config.model)
    if policy.kind != "policy":
        raise ValueError(f"ppo.init_from must be a policy, {settings.init_from} scores texts")
    reward, function = None, None
    if settings.reward_model:
        reward = load_model(resolve(settings.reward_model, workdir, base), config.model)
        check_reward_model(policy, reward)
    else:
        function = load_function(settings.reward_function, "ppo.reward_function")
    texts = load_prompts(settings.prompts)
    check_lengths(settings, policy.config.max_length)
    rows = encode_prompts(texts, policy.tokenizer, max_length=settings.max_prompt_length)

    start = start_layer(policy.config, settings.trainable)
    parts = split_params(policy.config, policy.params, settings.trainable, start)
    open_stage(workdir / "ppo", policy, parts, describe("ppo", config, workdir))
    if is_complete(workdir / "ppo", settings.num_iterations):
        return print(f"ppo: complete ({settings.num_iterations} iterations)", flush=True)

    setup = make_setup(settings, policy, reward, make_critic(policy, reward))
    iterate = make_iteration(setup, policy.tokenizer, texts, function)
    samples = make_sampler(setup, policy.tokenizer, texts, rows, settings, function)
    root_key = jax.random.key(config.seed)
    num_steps, size = settings.num_iterations, settings.rollout_batch_size
    with StageRun(
        workdir, "ppo", num_steps=num_steps, save_every=settings.save_every, show=SHOW
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
                append_rows(workdir / "samples.jsonl", samples(state, i + 1))
            seconds = run.seconds()
            rate = metrics["response/length"] * size / seconds
            times = {"time/iteration_s": seconds, "time/tokens_per_s": rate}
            run.end_step(i + 1, state, metrics | times)


def take_prompts(rows: PromptRows, chosen: np.ndarray) -> Prompts:
    """The chosen prompts. All have the width of the longest: one compiled program."""
    return Prompts(tokens=jnp.asarray(rows.tokens[chosen]), mask=jnp.asarray(rows.mask[chosen]))


def check_reward_model(policy: Model, reward: Model):
    """Refuse a model that gives no scores, or that reads other tokens than the policy writes."""
    if reward.kind != "reward":
        raise ValueError("ppo.reward_model must be a reward model, got a policy")
    mine, theirs = policy.tokenizer.get_vocab(), reward.tokenizer.get_vocab()
    if mine != theirs:
        raise ValueError(
            "ppo.reward_model must have the policy's tokenizer, got one with "
            f"{len(theirs)} tokens where the policy has {len(mine)}, or other ids. "
            "Use a reward_function, which gets text."
        )


def check_lengths(settings: PPOSettings, context: int):
    """Refuse prompts and responses that together are longer than the model's context."""
    total = settings.max_prompt_length + settings.response_length
    if total > context:
        raise ValueError(
            f"ppo.max_prompt_length + ppo.response_length must be at most {context} (the model's "
            f"context), got {settings.max_prompt_length} + {settings.response_length}"
        )


def make_iteration(setup: Setup, tokenizer: Any, texts: list[str], function: RewardFunction | None):
    """(state, chosen prompts, their tokens, key) -> (state, metrics).

    With a reward model an iteration is one program. With a function it is two, and the function
    between them sees text; the numbers are those of the same pieces.
    """
    parts = dict(networks=setup.networks, recipe=setup.recipe)
    hyperparameters, frozen = setup.hyperparameters, setup.frozen
    if function is None:
        whole = jax.jit(functools.partial(ppo_iteration, **parts), donate_argnums=0)
        return lambda state, chosen, prompts, key: whole(
            state, hyperparameters, prompts, key, frozen=frozen
        )
    sample = jax.jit(functools.partial(sample_responses, **parts))
    update = jax.jit(functools.partial(learn, **parts), donate_argnums=0)

    def iterate(state: PPOState, chosen: np.ndarray, prompts: Prompts, key: jax.Array):
        rollout_key, shuffle_key = jax.random.split(key)
        rollout = sample(state, hyperparameters, prompts, rollout_key, frozen=frozen)
        scores = call_function(function, [texts[i] for i in chosen], rollout, tokenizer)
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
    rows: PromptRows,
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
