"""One PPO iteration as a composition of pure functions: roll out, score, estimate, update.

Dimension key: B responses, T response tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ppo_jax.algorithms.experience import (
    PPONetworks,
    PPOOptions,
    make_experience,
    sample_responses,
    scores_and_metrics,
)
from ppo_jax.algorithms.scores import count_scores
from ppo_jax.algorithms.update import (
    average_updates,
    has_own_optimizer,
    init_optimizers,
    ppo_update,
    trained_params,
)
from ppo_jax.core.kl import adaptive_kl_coef
from ppo_jax.core.renamed import renamed
from ppo_jax.core.shaping import Moments
from ppo_jax.core.types import (
    FrozenParams,
    Hyperparameters,
    Params,
    PPOState,
    Prompts,
    Rollout,
)


def init_ppo(
    policy_params: Params,
    value_params: Params | None,
    hyperparameters: Hyperparameters,
    *,
    score_normalization: bool = False,
) -> PPOState:
    """The state before the first iteration; `value_params` is None without a critic.

    With `score_normalization` it has the moments by which scores are normalized.

    The parameters are copied: the loops donate the state, so it shares no buffer with the reference
    or the reward model.
    """
    trained = jax.tree.map(jnp.copy, trained_params(policy_params, value_params))
    zeros = dict(count=jnp.int32(0), mean=jnp.float32(0.0), m2=jnp.float32(0.0))
    return PPOState(
        step=jnp.int32(0),
        episodes=jnp.int32(0),
        policy_params=trained["policy"],
        value_params=trained.get("value"),
        opt_state=init_optimizers(trained, hyperparameters),
        kl_coef=jnp.array(hyperparameters.kl_coef, jnp.float32),  # a copy: donated as well
        score_moments=Moments(**zeros) if score_normalization else None,
    )


@renamed(recipe="options")
def update_from_rollout(
    state: PPOState,
    hyperparameters: Hyperparameters,
    rollout: Rollout,
    scores: jax.Array,
    key: jax.Array,
    *,
    frozen: FrozenParams,
    networks: PPONetworks,
    options: PPOOptions,
) -> tuple[PPOState, dict[str, jax.Array]]:
    """What follows the scores in an iteration: experience, update, KL control. Key consumed."""
    state = count_scores(state, scores, rollout.response_mask)
    parts = dict(frozen=frozen, networks=networks, options=options)
    experience, metrics = make_experience(rollout, scores, state, hyperparameters, **parts)
    state, updates = ppo_update(state, experience, hyperparameters, key, **parts)
    trained = trained_params(state.policy_params, state.value_params)
    metrics |= average_updates(updates, has_own_optimizer(trained, hyperparameters))
    batch_size = scores.shape[0]
    kl_coef = state.kl_coef
    if options.kl_control == "adaptive":
        kl_coef = adaptive_kl_coef(
            kl_coef,
            metrics["kl/ref"],
            target_kl=hyperparameters.target_kl,
            horizon=hyperparameters.kl_horizon,
            batch_size=batch_size,
        )
    state = dataclasses.replace(
        state, step=state.step + 1, episodes=state.episodes + batch_size, kl_coef=kl_coef
    )
    return state, metrics | {"reward/episodes": state.episodes}


@renamed(recipe="options")
def ppo_iteration(
    state: PPOState,
    hyperparameters: Hyperparameters,
    prompts: Prompts,
    key: jax.Array,
    *,
    frozen: FrozenParams,
    networks: PPONetworks,
    options: PPOOptions,
) -> tuple[PPOState, dict[str, jax.Array]]:
    """One whole iteration with a learned reward model: a single program.

    Args:
        state: policy, critic and optimizer, updated in the result.
        hyperparameters: every number.
        prompts: B prompts.
        key: consumed; `jax.random.fold_in(root_key, state.step)` makes a resumed run the same run.
        frozen: reference, reward model, trunk.
        networks: `networks.reward` is not None.
        options: what shapes the program.

    Returns:
        (state, metrics).
    """
    parts = dict(frozen=frozen, networks=networks, options=options)
    rollout_key, shuffle_key = jax.random.split(key)
    responses = sample_responses(state, hyperparameters, prompts, rollout_key, **parts)
    read = dict(frozen=frozen, networks=networks, eos_id=options.score_eos)
    scores, of_models = scores_and_metrics(responses, **read)
    state, metrics = update_from_rollout(
        state, hyperparameters, responses, scores, shuffle_key, **parts
    )
    return state, metrics | of_models
