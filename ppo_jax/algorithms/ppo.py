"""One PPO iteration as a composition of pure functions: roll out, score, estimate, update.

Dimension key: B responses, T response tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ppo_jax.algorithms.adaptation import (
    COEFFICIENTS,
    adapted_numbers,
    init_adaptive,
    init_reference,
    moved_reference,
    next_adaptive,
    next_reference,
)
from ppo_jax.algorithms.dynamic_sampling import gather, gathering_metrics
from ppo_jax.algorithms.experience import (
    check_critic,
    make_experience,
    sample_responses,
    scores_and_metrics,
)
from ppo_jax.algorithms.greedy import greedy_rollout
from ppo_jax.algorithms.options import PPONetworks, PPOOptions
from ppo_jax.algorithms.passes import forward
from ppo_jax.algorithms.references import reference_rollout
from ppo_jax.algorithms.scores import count_scores
from ppo_jax.algorithms.stopping import average_updates
from ppo_jax.algorithms.update import (
    first_passes,
    has_own_optimizer,
    init_optimizers,
    ppo_update,
    trained_params,
)
from ppo_jax.core.kl import adaptive_kl_coef, kl_estimate
from ppo_jax.core.masking import masked_mean
from ppo_jax.core.renamed import renamed
from ppo_jax.core.shaping import Moments
from ppo_jax.core.types import (
    Experience,
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
        adaptive=init_adaptive(hyperparameters),
        ref_params=init_reference(policy_params, hyperparameters),
        score_moments=Moments(**zeros) if score_normalization else None,
    )


@renamed(recipe="options")
def update_from_rollout(
    state: PPOState,
    hyperparameters: Hyperparameters,
    rollout: Rollout,
    scores: jax.Array,
    key: jax.Array,
    greedy: tuple[Rollout, jax.Array] | None = None,
    references: tuple[Rollout, jax.Array] | None = None,
    *,
    num_rollouts: jax.Array | int = 1,
    ref_logprobs: jax.Array | None = None,
    frozen: FrozenParams,
    networks: PPONetworks,
    options: PPOOptions,
) -> tuple[PPOState, dict[str, jax.Array]]:
    """What follows the scores in an iteration: experience, update, KL control. Key consumed.

    `greedy`, `references`: greedy responses, those of the reference, and their scores, see
    `make_experience`; `num_rollouts`: how many there were to choose these responses from;
    `ref_logprobs`: [B, T] float, of the reference, where they are there already.

    The forward passes that experience and update have in common are made once: the values, with
    recomputed log-probs the old ones, too, are those of the only step's own, see `first_passes`.
    """
    state = count_scores(state, scores, rollout.response_mask)
    parts = dict(frozen=moved_reference(frozen, state), networks=networks, options=options)
    numbers = adapted_numbers(hyperparameters, state)
    check_critic(options, networks, state, numbers)
    first = first_passes(state, rollout, numbers, **parts)
    others = dict(greedy=greedy, references=references, ref_logprobs=ref_logprobs, first=first)
    experience, metrics = make_experience(rollout, scores, state, numbers, **others, **parts)
    state, updates = ppo_update(state, experience, numbers, key, first=first, **parts)
    trained = trained_params(state.policy_params, state.value_params)
    metrics |= average_updates(updates, has_own_optimizer(trained, hyperparameters))
    if numbers.penalty_target_kl is not None:
        metrics["policy/old_kl"] = kl_of_update(state, experience, numbers, **parts)
    metrics |= {COEFFICIENTS[k]: x for k, x in state.adaptive.items() if k in COEFFICIENTS}
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
    step = state.step + 1
    state = dataclasses.replace(
        state,
        step=step,
        episodes=state.episodes + batch_size * num_rollouts,
        kl_coef=kl_coef,
        adaptive=next_adaptive(state.adaptive, metrics, step, hyperparameters),
        ref_params=next_reference(state.ref_params, state.policy_params, step, hyperparameters),
    )
    metrics |= {"reward/episodes": state.episodes}
    if greedy is not None:
        metrics["reward/greedy_episodes"] = state.episodes // options.sampling.samples_per_prompt
    if references is not None:
        prompts = state.episodes // options.sampling.samples_per_prompt
        metrics["reward/reference_episodes"] = prompts * options.reference_responses
    return state, metrics


def kl_of_update(
    state: PPOState,
    experience: Experience,
    hyperparameters: Hyperparameters,
    *,
    frozen: FrozenParams,
    networks: PPONetworks,
    options: PPOOptions,
) -> jax.Array:
    """KL(old || new) in nats a token, [] float32: of the policy before an update, which gave the
    experience, from that after it, by k3 on the sampled tokens. It is one more forward pass."""
    e = experience
    parts = dict(frozen=frozen, networks=networks, samples_per_prompt=options.learned_samples)
    new = forward({"policy": state.policy_params}, e, hyperparameters, **parts).logprobs
    return masked_mean(kl_estimate(e.logprobs, new, estimator="k3"), e.response_mask)


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
        state: all that an iteration changes.
        hyperparameters: every number.
        prompts: one for each samples_per_prompt of the B responses; with `options.max_rollouts` a
            tuple of so many.
        key: consumed; `jax.random.fold_in(root_key, state.step)` makes a resumed run the same run.
        frozen: reference, reward model, trunk.
        networks: `networks.reward` is not None.
        options: what shapes the program.

    Returns:
        (state, metrics).

    Raises:
        ValueError: there are not `options.max_rollouts` batches of prompts; and as
            `make_experience`.
    """
    parts = dict(frozen=frozen, networks=networks, options=options)
    rollout_key, shuffle_key = jax.random.split(key)

    def sample(prompts, key):
        responses = sample_responses(state, hyperparameters, prompts, key, **parts)
        how = dict(frozen=frozen, networks=networks, eos_id=options.score_eos)
        how |= dict(samples_per_prompt=options.sampling.samples_per_prompt)
        return responses, *scores_and_metrics(responses, **how)

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
    responses, scores, of_models = sample(prompts, rollout_key)
    inputs = (state, hyperparameters, prompts, rollout_key)
    others = greedy_rollout(*inputs, **parts), reference_rollout(*inputs, **parts)
    state, metrics = update_from_rollout(
        state, hyperparameters, responses, scores, shuffle_key, *others, **parts
    )
    return state, metrics | {name: x.mean() for name, x in of_models.items()}
