"""One PPO iteration as a composition of pure functions: roll out, score, estimate, update.

Dimension key: B responses, T response tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ppo_jax.algorithms.dynamic_sampling import gather, gathering_metrics
from ppo_jax.algorithms.experience import (
    PPONetworks,
    PPOOptions,
    make_experience,
    response_scores,
    sample_responses,
)
from ppo_jax.algorithms.greedy import greedy_rollout
from ppo_jax.algorithms.update import (
    average_updates,
    has_own_optimizer,
    init_optimizers,
    ppo_update,
    trained_params,
)
from ppo_jax.core.kl import adaptive_kl_coef
from ppo_jax.core.renamed import renamed
from ppo_jax.core.types import (
    FrozenParams,
    Hyperparameters,
    Params,
    PPOState,
    Prompts,
    Rollout,
)


def init_ppo(
    policy_params: Params, value_params: Params | None, hyperparameters: Hyperparameters
) -> PPOState:
    """The state before the first iteration; `value_params` is None without a critic.

    The parameters are copied: the loops donate the state, so it shares no buffer with the reference
    or the reward model.
    """
    trained = jax.tree.map(jnp.copy, trained_params(policy_params, value_params))
    return PPOState(
        step=jnp.int32(0),
        episodes=jnp.int32(0),
        policy_params=trained["policy"],
        value_params=trained.get("value"),
        opt_state=init_optimizers(trained, hyperparameters),
        kl_coef=jnp.array(hyperparameters.kl_coef, jnp.float32),  # a copy: donated as well
    )


@renamed(recipe="options")
def update_from_rollout(
    state: PPOState,
    hyperparameters: Hyperparameters,
    rollout: Rollout,
    scores: jax.Array,
    key: jax.Array,
    greedy: tuple[Rollout, jax.Array] | None = None,
    *,
    num_rollouts: jax.Array | int = 1,
    frozen: FrozenParams,
    networks: PPONetworks,
    options: PPOOptions,
) -> tuple[PPOState, dict[str, jax.Array]]:
    """What follows the scores in an iteration: experience, update, KL control. Key consumed.

    `greedy`: greedy responses and their scores, see `make_experience`; `num_rollouts`: how many
    there were to choose these responses from.
    """
    parts = dict(frozen=frozen, networks=networks, options=options)
    experience, metrics = make_experience(
        rollout, scores, state, hyperparameters, greedy=greedy, **parts
    )
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
        state,
        step=state.step + 1,
        episodes=state.episodes + batch_size * num_rollouts,
        kl_coef=kl_coef,
    )
    metrics |= {"reward/episodes": state.episodes}
    if greedy is not None:
        metrics["reward/greedy_episodes"] = state.episodes // options.sampling.samples_per_prompt
    return state, metrics


@renamed(recipe="options")
def ppo_iteration(
    state: PPOState,
    hyperparameters: Hyperparameters,
    prompts: Prompts | tuple[Prompts, ...],
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
        prompts: B prompts; with `options.max_rollouts` so many times B prompts.
        key: consumed; `jax.random.fold_in(root_key, state.step)` makes a resumed run the same run.
        frozen: reference, reward model, trunk.
        networks: `networks.reward` is not None.
        options: what shapes the program.

    Returns:
        (state, metrics).

    Raises:
        ValueError: there are not `options.max_rollouts` batches of prompts.
    """
    parts = dict(frozen=frozen, networks=networks, options=options)
    rollout_key, shuffle_key = jax.random.split(key)

    def sample(prompts, key):
        responses = sample_responses(state, hyperparameters, prompts, key, **parts)
        how = dict(frozen=frozen, networks=networks, eos_id=options.score_eos)
        return responses, response_scores(responses, **how)

    if options.max_rollouts > 1:
        if not isinstance(prompts, tuple) or len(prompts) != options.max_rollouts:
            raise ValueError(
                f"max_rollouts={options.max_rollouts} needs a tuple of so many Prompts"
            )
        group_size = options.sampling.samples_per_prompt
        gathered = gather(sample, prompts, rollout_key, group_size=group_size)
        given = (gathered.rollout, gathered.scores, shuffle_key)
        how = dict(num_rollouts=gathered.num_rollouts, **parts)
        state, metrics = update_from_rollout(state, hyperparameters, *given, **how)
        return state, metrics | gathering_metrics(gathered)
    responses, scores = sample(prompts, rollout_key)
    greedy = greedy_rollout(state, hyperparameters, prompts, rollout_key, **parts)
    state, metrics = update_from_rollout(
        state, hyperparameters, responses, scores, shuffle_key, greedy, **parts
    )
    return state, metrics
