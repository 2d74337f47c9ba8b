"""One PPO iteration as a composition of pure functions: roll out, score, estimate, update.

Dimension key: B responses, P prompt tokens, T response tokens, L = P + T.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppo_jax.advantages import gae, whiten
from ppo_jax.distributions import entropy, token_logprobs
from ppo_jax.kl import adaptive_kl_coef, kl_estimate
from ppo_jax.losses import explained_variance, ppo_loss
from ppo_jax.masking import last_token_index
from ppo_jax.networks import Network
from ppo_jax.optimizer import apply_gradients, init_optimizer, schedule
from ppo_jax.partition import merge_params
from ppo_jax.rewards import missing_eos_scores, token_rewards
from ppo_jax.rollout import Sampling, response_outputs, rollout
from ppo_jax.steps import accumulate
from ppo_jax.structs import (
    Experience,
    Frozen,
    Hyperparameters,
    Params,
    PPOState,
    Prompts,
    Rollout,
)


class PPONetworks(NamedTuple):
    """The networks of one run.

    A network "on the trunk" reads the hidden states that the trunk gave during the rollout; any
    other reads tokens. The policy is on the trunk whenever there is one.
    """

    policy: Network
    value: Network
    reward: Network | None = None  # None: scores come from outside
    trunk: Network | None = None
    value_on_trunk: bool = False
    reward_on_trunk: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What shapes the program of an iteration; the numbers are in `Hyperparameters`."""

    sampling: Sampling
    num_epochs: int  # passes over a rollout
    num_minibatches: int  # optimizer steps a pass
    num_micro_batches: int = 1  # pieces of a minibatch held in memory one after the other
    kl_estimator: str = "k1"  # of the penalty in the rewards
    kl_control: str = "fixed"  # or "adaptive"
    missing_eos: str = "keep"  # the score of a response without a stop token, or "replace", or
    # "penalty": see `missing_eos_scores`


def init_ppo(
    policy_params: Params, value_params: Params, hyperparameters: Hyperparameters
) -> PPOState:
    """The state before the first iteration. The parameters are copied: the state is donated by
    the loops, and shares no buffer with the reference or the reward model."""
    trained = jax.tree.map(jnp.copy, {"policy": policy_params, "value": value_params})
    return PPOState(
        step=jnp.int32(0),
        episodes=jnp.int32(0),
        policy_params=trained["policy"],
        value_params=trained["value"],
        opt_state=init_optimizer(hyperparameters.optimizer, trained),
        kl_coef=jnp.array(hyperparameters.kl_coef, jnp.float32),  # a copy: donated as well
    )


def sample_responses(
    state: PPOState,
    hyperparameters: Hyperparameters,
    prompts: Prompts,
    key: jax.Array,
    *,
    frozen: Frozen,
    networks: PPONetworks,
    recipe: Recipe,
) -> Rollout:
    """The rollout of one iteration with the current policy. The key is consumed."""
    return rollout(
        networks.policy,
        merge_params(frozen.policy, state.policy_params),
        prompts,
        key,
        sampling=recipe.sampling,
        temperature=hyperparameters.temperature,
        trunk=networks.trunk,
        trunk_params=frozen.trunk,
    )


def response_scores(rollout: Rollout, *, frozen: Frozen, networks: PPONetworks) -> jax.Array:
    """The reward model's score of each response, [B] float32, read at its last token."""
    inputs = rollout.hidden if networks.reward_on_trunk else rollout.tokens
    start = rollout.prompt_mask.shape[1]
    values = networks.reward.apply(frozen.reward, inputs, rollout.mask, start=start)
    last = last_token_index(rollout.response_mask)
    return jnp.take_along_axis(values, last[:, None], axis=1)[:, 0]


def make_experience(
    rollout: Rollout,
    scores: jax.Array,
    state: PPOState,
    hyperparameters: Hyperparameters,
    *,
    frozen: Frozen,
    networks: PPONetworks,
    recipe: Recipe,
) -> tuple[Experience, dict[str, jax.Array]]:
    """Rewards, advantages and returns of a rollout.

    Args:
        rollout: B responses.
        scores: [B] float, one a response.
        state: holds the critic.
        hyperparameters: the numbers.
        frozen: holds the reference.
        networks: the networks.
        recipe: the choices.

    Returns:
        (experience, metrics).
    """
    mask, length = rollout.response_mask, rollout.response_mask.shape[1]
    policy_inputs = rollout.tokens if networks.trunk is None else rollout.hidden
    value_inputs = rollout.hidden if networks.value_on_trunk else rollout.tokens
    ref_params = merge_params(frozen.policy, frozen.ref_policy)
    ref_logits = response_outputs(
        networks.policy, ref_params, policy_inputs, rollout.mask, response_length=length
    )
    ref_logprobs = token_logprobs(
        ref_logits, rollout.response_tokens, temperature=hyperparameters.temperature
    )
    value_params = merge_params(frozen.value, state.value_params)
    values = response_outputs(
        networks.value, value_params, value_inputs, rollout.mask, response_length=length
    )
    values = jnp.where(mask, values, 0.0)

    adjusted = adjust_scores(scores, rollout.has_eos, hyperparameters, recipe)
    kl_coef = hyperparameters.kl_coef if recipe.kl_control == "fixed" else state.kl_coef
    rewards = token_rewards(
        adjusted,
        rollout.logprobs,
        ref_logprobs,
        mask,
        kl_coef=kl_coef,
        kl_kind=recipe.kl_estimator,
    )
    advantages, returns = gae(
        rewards,
        values,
        mask,
        gamma=hyperparameters.gamma,
        gae_lambda=hyperparameters.gae_lambda,
    )
    kl = jnp.where(mask, kl_estimate(rollout.logprobs, ref_logprobs, kind="k1"), 0.0)
    metrics = {
        "reward/score_mean": scores.mean(),
        "reward/score_std": scores.std(),
        "reward/adjusted_score_mean": adjusted.mean(),
        "reward/kl_penalty": adjusted.mean() - rewards.sum(axis=1).mean(),
        "kl/ref": kl.sum(axis=1).mean(),
        "kl/coef": jnp.asarray(kl_coef, jnp.float32),
        "response/length": mask.sum(axis=1).astype(jnp.float32).mean(),
        "response/eos_fraction": rollout.has_eos.astype(jnp.float32).mean(),
        "value/explained_variance": explained_variance(values, returns, mask),
    }
    experience = Experience(
        policy_inputs=policy_inputs,
        value_inputs=value_inputs,
        mask=rollout.mask,
        response_tokens=rollout.response_tokens,
        response_mask=mask,
        logprobs=rollout.logprobs,
        values=values,
        advantages=whiten(advantages, mask),
        returns=returns,
    )
    return experience, metrics


def adjust_scores(scores, has_eos, hyperparameters: Hyperparameters, recipe: Recipe):
    """The rule for responses that were cut off, as the recipe chooses it."""
    number = hyperparameters.missing_eos_score
    match recipe.missing_eos:
        case "keep":
            return scores
        case "replace":
            return missing_eos_scores(scores, has_eos, replace=number)
        case "penalty":
            return missing_eos_scores(scores, has_eos, penalty=number)
        case unknown:
            raise ValueError(
                f"unknown missing_eos {unknown!r}; choose from ['keep', 'penalty', 'replace']"
            )


def experience_loss(
    params: Params,
    experience: Experience,
    hyperparameters: Hyperparameters,
    *,
    frozen: Frozen,
    networks: PPONetworks,
    normalizer: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The PPO loss of a piece of experience.

    Args:
        params: {"policy": trained leaves, "value": trained leaves}.
        experience: B responses.
        hyperparameters: the numbers.
        frozen: the leaves that are not trained.
        networks: the networks.
        normalizer: [] float, the response tokens to divide by; by default those of this piece.

    Returns:
        (loss, metrics).
    """
    e, mask = experience, experience.response_mask
    logits = response_outputs(
        networks.policy,
        merge_params(frozen.policy, params["policy"]),
        e.policy_inputs,
        e.mask,
        response_length=mask.shape[1],
    )
    values = response_outputs(
        networks.value,
        merge_params(frozen.value, params["value"]),
        e.value_inputs,
        e.mask,
        response_length=mask.shape[1],
    )
    return ppo_loss(
        token_logprobs(logits, e.response_tokens, temperature=hyperparameters.temperature),
        values,
        entropy(logits / hyperparameters.temperature),
        mask,
        old_logprobs=e.logprobs,
        old_values=e.values,
        advantages=e.advantages,
        returns=e.returns,
        clip_range=hyperparameters.clip_range,
        value_clip_range=hyperparameters.value_clip_range,
        vf_coef=hyperparameters.vf_coef,
        entropy_coef=hyperparameters.entropy_coef,
        normalizer=normalizer,
    )


def ppo_update(
    state: PPOState,
    experience: Experience,
    hyperparameters: Hyperparameters,
    key: jax.Array,
    *,
    frozen: Frozen,
    networks: PPONetworks,
    recipe: Recipe,
) -> tuple[PPOState, dict[str, jax.Array]]:
    """num_epochs x num_minibatches optimizer steps on one experience, shuffled anew each epoch.

    Args:
        state: what is trained; its step and episode count are not moved here.
        experience: B responses; num_minibatches x num_micro_batches divides B.
        hyperparameters: the numbers.
        key: consumed; orders the shuffles.
        frozen: the leaves that are not trained.
        networks: the networks.
        recipe: the choices.

    Returns:
        (state, metrics of each optimizer step [num_epochs * num_minibatches], in their order).
    """
    batch_size = experience.mask.shape[0]
    factor = schedule(hyperparameters.optimizer, state.step)
    rates = {
        "policy": hyperparameters.optimizer.learning_rate * factor,
        "value": hyperparameters.value_learning_rate * factor,
    }
    orders = jax.vmap(lambda k: jax.random.permutation(k, batch_size))(
        jax.random.split(key, recipe.num_epochs)
    )

    def step(carry, rows):
        params, opt_state = carry
        minibatch = jax.tree.map(lambda x: x[rows], experience)
        normalizer = minibatch.response_mask.sum().astype(jnp.float32)

        def loss(params, piece):
            return experience_loss(
                params,
                piece,
                hyperparameters,
                frozen=frozen,
                networks=networks,
                normalizer=normalizer,
            )

        gradients, metrics = accumulate(loss, params, minibatch, recipe.num_micro_batches)
        params, opt_state, norm = apply_gradients(
            hyperparameters.optimizer, gradients, opt_state, params, rates
        )
        return (params, opt_state), metrics | {"policy/grad_norm": norm}

    carry = ({"policy": state.policy_params, "value": state.value_params}, state.opt_state)
    rows = orders.reshape(recipe.num_epochs * recipe.num_minibatches, -1)
    (params, opt_state), metrics = jax.lax.scan(step, carry, rows)
    state = state.replace(
        policy_params=params["policy"], value_params=params["value"], opt_state=opt_state
    )
    rates = {"policy/learning_rate": rates["policy"], "value/learning_rate": rates["value"]}
    return state, metrics | {k: jnp.full(len(rows), v) for k, v in rates.items()}


def learn(
    state: PPOState,
    hyperparameters: Hyperparameters,
    rollout: Rollout,
    scores: jax.Array,
    key: jax.Array,
    *,
    frozen: Frozen,
    networks: PPONetworks,
    recipe: Recipe,
) -> tuple[PPOState, dict[str, jax.Array]]:
    """What follows the scores in an iteration: experience, update, KL control. Key consumed."""
    parts = dict(frozen=frozen, networks=networks, recipe=recipe)
    experience, metrics = make_experience(rollout, scores, state, hyperparameters, **parts)
    state, updates = ppo_update(state, experience, hyperparameters, key, **parts)
    metrics |= {k: v.max() if k.endswith("_max") else v.mean() for k, v in updates.items()}
    batch_size = scores.shape[0]
    kl_coef = state.kl_coef
    if recipe.kl_control == "adaptive":
        kl_coef = adaptive_kl_coef(
            kl_coef,
            metrics["kl/ref"],
            target_kl=hyperparameters.target_kl,
            horizon=hyperparameters.kl_horizon,
            batch_size=batch_size,
        )
    state = state.replace(
        step=state.step + 1, episodes=state.episodes + batch_size, kl_coef=kl_coef
    )
    return state, metrics | {"reward/episodes": state.episodes}


def ppo_iteration(
    state: PPOState,
    hyperparameters: Hyperparameters,
    prompts: Prompts,
    key: jax.Array,
    *,
    frozen: Frozen,
    networks: PPONetworks,
    recipe: Recipe,
) -> tuple[PPOState, dict[str, jax.Array]]:
    """One whole iteration with a learned reward model: a single program.

    Args:
        state: what is trained.
        hyperparameters: every number.
        prompts: B prompts.
        key: consumed; `jax.random.fold_in(root_key, state.step)` makes a resumed run the same run.
        frozen: reference, reward model, trunk.
        networks: the networks; `networks.reward` is not None.
        recipe: the choices.

    Returns:
        (state, metrics).
    """
    parts = dict(frozen=frozen, networks=networks, recipe=recipe)
    rollout_key, shuffle_key = jax.random.split(key)
    responses = sample_responses(state, hyperparameters, prompts, rollout_key, **parts)
    scores = response_scores(responses, frozen=frozen, networks=networks)
    state, metrics = learn(state, hyperparameters, responses, scores, shuffle_key, **parts)
    return state, metrics
