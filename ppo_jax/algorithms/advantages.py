"""Advantages by any estimator, and what they are against.

Dimension key: B responses, T response tokens.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ppo_jax.algorithms.options import PPOOptions
from ppo_jax.algorithms.scores import shape_scores
from ppo_jax.core.advantages import gae, length_adaptive_lambda, whiten
from ppo_jax.core.critic_free import running_baseline
from ppo_jax.core.named import call_named, fields_of, function_name
from ppo_jax.core.rewards import whole_scores
from ppo_jax.core.types import Hyperparameters, PPOState, Rollout


def estimate_advantages(
    rewards: jax.Array,
    values: jax.Array | None,
    mask: jax.Array,
    hyperparameters: Hyperparameters,
    options: PPOOptions,
    kept: jax.Array | None = None,
    **more: jax.Array,
) -> tuple[jax.Array, jax.Array | None]:
    """Advantages by `options.advantage`, and what the critic learns.

    The estimator is given what it has parameters for: `rewards` [B, T]; `values` [B, T], 0 where
    masked; `mask` [B, T]; `scores` [B], the sum of the rewards of a response; `group_size`, the
    responses to a prompt, which follow each other; each number of `Hyperparameters` by its name;
    and what is in `more`: `baseline`, with `Hyperparameters.baseline_decay`, or `greedy_scores`
    [B], see `greedy_baseline`. It returns the advantages, [B], one a response, or [B, T]; or
    (advantages, returns).

    `kept` [B] bool is True on the responses whose tokens are whitened, None on all.

    Returns:
        (advantages [B, T] float32, 0 where masked, whitened if they are a critic's and the options
        say so; returns [B, T], None without a critic: the estimator's own, or those of `gae` where
        it has none or `value_gae_lambda` is a number).
    """
    numbers = hyperparameters
    offered = fields_of(numbers) | dict(
        rewards=rewards,
        mask=mask,
        scores=jnp.where(mask, rewards, 0.0).sum(axis=1),
        group_size=options.sampling.samples_per_prompt,
        **more,
    )
    if numbers.gae_lambda_alpha is not None:
        offered["gae_lambda"] = length_adaptive_lambda(mask, alpha=numbers.gae_lambda_alpha)
    if values is not None:
        offered["values"] = values
    estimated = call_named(options.advantage, offered)
    advantages, returns = check_estimated(options.advantage, estimated, mask)
    if advantages.ndim == 1:
        advantages = advantages[:, None]
    advantages = jnp.where(mask, advantages.astype(jnp.float32), 0.0)
    if values is None:
        return advantages, None
    if numbers.value_gae_lambda is not None or returns is None:
        own = numbers.value_gae_lambda
        trace = offered["gae_lambda"] if own is None else own
        _, returns = gae(rewards, values, mask, gamma=numbers.gamma, gae_lambda=trace)
    if not options.whiten_advantages:
        return advantages, returns
    return whiten(advantages, mask if kept is None else mask & kept[:, None]), returns


def check_estimated(
    advantage: Callable, estimated: Any, mask: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """(advantages, returns or None): what an estimator has given, if it is that.

    Raises:
        ValueError: it is something else.
    """
    name = function_name(advantage)
    both = estimated if isinstance(estimated, tuple) else (estimated, None)
    if len(both) != 2:
        got = f"{len(both)} values"
        raise ValueError(f"{name} must return advantages, or (advantages, returns), got {got}")
    for what, x, shapes in zip(
        ("advantages", "returns"), both, ((mask.shape[:1], mask.shape), (mask.shape,)), strict=True
    ):
        if x is None and what == "returns":
            continue
        allowed = " or ".join(str(list(shape)) for shape in shapes)
        got = f"{list(x.shape)} in {x.dtype}" if hasattr(x, "dtype") else f"a {type(x).__name__}"
        is_float = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
        if not is_float or x.shape not in shapes:
            raise ValueError(f"{name} must return {what} {allowed} in floats, got {got}")
    return both


def baselines(
    rewards: jax.Array,
    greedy: tuple[Rollout, jax.Array] | None,
    state: PPOState,
    hyperparameters: Hyperparameters,
    options: PPOOptions,
    reference_scores: jax.Array | None = None,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """({name: what an estimator may take off}, metrics): the running mean of responses' rewards
    where the state has it, the scores of greedy responses where there are some."""
    given, metrics = {}, {}
    if (baseline := state.adaptive.get("baseline")) is not None:
        totals, given["baseline"] = rewards.sum(axis=1), baseline
        metrics["reward/total_mean"] = totals.mean()
        metrics["reward/baseline"] = running_baseline(baseline, totals, decay=1.0)
    if greedy is not None:
        numbers = (state, hyperparameters, options, reference_scores)
        scores, greedy_metrics = greedy_baseline(*greedy, *numbers)
        given["greedy_scores"], metrics = scores, metrics | greedy_metrics
    return given, metrics


def greedy_baseline(
    responses: Rollout,
    scores: jax.Array,
    state: PPOState,
    hyperparameters: Hyperparameters,
    options: PPOOptions,
    reference_scores: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """([B] float32, the score of the greedy response to the prompt of each response; metrics).

    They are shaped as scores are, and without the KL penalty, which is of sampled tokens.
    """
    mask = responses.response_mask
    how = dict(missing_eos=options.missing_eos, reference_scores=reference_scores)
    scores = whole_scores(scores, mask)
    shaped = shape_scores(scores, mask, responses.has_eos, state, hyperparameters, **how)
    metrics = {
        "reward/greedy_score_mean": scores.mean(),
        "response/greedy_length": mask.sum(axis=1).astype(jnp.float32).mean(),
    }
    return jnp.repeat(shaped, options.sampling.samples_per_prompt), metrics
