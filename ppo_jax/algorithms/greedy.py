"""Greedy responses: what the current policy answers without chance, as a baseline (ReMax)."""

import dataclasses

import jax

from ppo_jax.algorithms.experience import response_scores, sample_responses
from ppo_jax.algorithms.options import PPONetworks, PPOOptions
from ppo_jax.core.named import reads_greedy
from ppo_jax.core.types import FrozenParams, Hyperparameters, PPOState, Prompts, Rollout


def greedy_options(options: PPOOptions) -> PPOOptions:
    """Those of the greedy rollout: one response to each prompt."""
    sampling = dataclasses.replace(options.sampling, samples_per_prompt=1)
    return dataclasses.replace(options, sampling=sampling, keep_samples=0)


def greedy_responses(
    state: PPOState,
    hyperparameters: Hyperparameters,
    prompts: Prompts,
    key: jax.Array,
    *,
    frozen: FrozenParams,
    networks: PPONetworks,
    options: PPOOptions,
) -> Rollout:
    """The likeliest token at each step, one response to each prompt. The key is drawn from by
    nothing: arguments as for `sample_responses`."""
    numbers = dataclasses.replace(hyperparameters, temperature=0.0)
    parts = dict(frozen=frozen, networks=networks, options=greedy_options(options))
    responses = sample_responses(state, numbers, prompts, key, **parts)
    return dataclasses.replace(responses, experts=None)  # nothing is learned from them


def greedy_rollout(
    state: PPOState,
    hyperparameters: Hyperparameters,
    prompts: Prompts,
    key: jax.Array,
    *,
    frozen: FrozenParams,
    networks: PPONetworks,
    options: PPOOptions,
) -> tuple[Rollout, jax.Array] | None:
    """(greedy responses, the reward model's score of each); None where the estimator has no
    parameter `greedy_scores`."""
    if not reads_greedy(options.advantage):
        return None
    parts = dict(frozen=frozen, networks=networks)
    responses = greedy_responses(state, hyperparameters, prompts, key, options=options, **parts)
    return responses, response_scores(responses, eos_id=options.score_eos, **parts)
