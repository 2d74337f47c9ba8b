"""Responses of the reference policy to the prompts of an iteration: what PAR compares with."""

import dataclasses

import jax

from ppo_jax.algorithms.adaptation import moved_reference
from ppo_jax.algorithms.experience import response_scores, sample_responses
from ppo_jax.algorithms.options import PPONetworks, PPOOptions
from ppo_jax.core.types import FrozenParams, Hyperparameters, PPOState, Prompts, Rollout

# Folded into the key of the sampled responses: the number of none of their rows.
OF_REFERENCE = 2**31 - 1


def reference_options(options: PPOOptions) -> PPOOptions:
    """Those of the rollout of the reference: M responses to each prompt."""
    count = options.reference_responses
    sampling = dataclasses.replace(options.sampling, samples_per_prompt=count)
    return dataclasses.replace(options, sampling=sampling, keep_samples=0)


def reference_responses(
    state: PPOState,
    hyperparameters: Hyperparameters,
    prompts: Prompts,
    key: jax.Array,
    *,
    frozen: FrozenParams,
    networks: PPONetworks,
    options: PPOOptions,
) -> Rollout:
    """G M responses of the reference to G prompts, those to a prompt side by side.

    They are sampled as the policy's are, and by chance of their own: arguments as for
    `sample_responses`, the key that of the policy's.
    """
    reference = moved_reference(frozen, state).ref_policy
    responses = sample_responses(
        dataclasses.replace(state, policy_params=reference),
        hyperparameters,
        prompts,
        jax.random.fold_in(key, OF_REFERENCE),
        frozen=frozen,
        networks=networks,
        options=reference_options(options),
    )
    return dataclasses.replace(responses, experts=None)  # nothing is learned from them


def reference_rollout(
    state: PPOState,
    hyperparameters: Hyperparameters,
    prompts: Prompts,
    key: jax.Array,
    *,
    frozen: FrozenParams,
    networks: PPONetworks,
    options: PPOOptions,
) -> tuple[Rollout, jax.Array] | None:
    """(responses of the reference, the reward model's score of each); None where the options have
    no `reference_responses`."""
    if not options.reference_responses:
        return None
    parts = dict(frozen=frozen, networks=networks)
    responses = reference_responses(state, hyperparameters, prompts, key, options=options, **parts)
    how = dict(eos_id=options.score_eos, samples_per_prompt=options.reference_responses)
    return responses, response_scores(responses, **how, **parts)
