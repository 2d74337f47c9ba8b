"""One PPO iteration as a composition of pure functions: roll out, score, estimate, update.

Dimension key: B responses, T response tokens.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ppo_jax.algorithms.experience import (
    PPONetworks,
    PPOOptions,
    make_experience,
    response_scores,
    sample_responses,
)
from ppo_jax.algorithms.supervised import accumulate, accumulate_while
from ppo_jax.core.checks import assert_divides, assert_numbers
from ppo_jax.core.kl import adaptive_kl_coef
from ppo_jax.core.lanes import any_lane, max_lane
from ppo_jax.core.losses import ppo_loss
from ppo_jax.core.network import merge_params
from ppo_jax.core.optimizer import apply_gradients, init_optimizer, schedule
from ppo_jax.core.renamed import renamed
from ppo_jax.core.types import (
    Experience,
    FrozenParams,
    Hyperparameters,
    Params,
    PPOState,
    Prompts,
    Rollout,
)
from ppo_jax.rollout.decode import response_outputs, response_statistics
from ppo_jax.rollout.packing import pack_rows, packed_experience


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
        opt_state=init_optimizer(hyperparameters.optimizer, trained),
        kl_coef=jnp.array(hyperparameters.kl_coef, jnp.float32),  # a copy: donated as well
    )


def trained_params(policy_params: Params, value_params: Params | None) -> dict[str, Params]:
    """What the optimizer updates: {"policy": ...}, and "value" where there is a critic."""
    if value_params is None:
        return {"policy": policy_params}
    return {"policy": policy_params, "value": value_params}


def experience_loss(
    params: Params,
    experience: Experience,
    hyperparameters: Hyperparameters,
    *,
    frozen: FrozenParams,
    networks: PPONetworks,
    normalizer: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The PPO loss of some experience.

    Args:
        params: the trained leaves, see `trained_params`.
        experience: B responses, or rows of responses.
        hyperparameters: clip ranges and coefficients; a temperature of 0 counts as 1.
        frozen: the untrained leaves of policy and critic.
        networks: policy and critic are called.
        normalizer: [] float, the token count to divide by; by default this experience's own.

    Returns:
        (loss, metrics).
    """
    e, mask = experience, experience.response_mask
    packed = dict(segment_ids=e.segment_ids, output_positions=e.output_positions)
    logprobs, entropies = response_statistics(
        networks.policy,
        merge_params(frozen.policy, params["policy"]),
        e.policy_inputs,
        e.mask,
        e.response_tokens,
        temperature=hyperparameters.temperature,
        **packed,
    )
    values = None
    if networks.value is not None:
        values = response_outputs(
            networks.value,
            merge_params(frozen.value, params["value"]),
            e.value_inputs,
            e.mask,
            response_length=mask.shape[1],
            **packed,
        )
    return ppo_loss(
        logprobs,
        values,
        entropies,
        mask,
        old_logprobs=e.logprobs,
        old_values=e.values,
        advantages=e.advantages,
        returns=e.returns,
        clip_range=hyperparameters.clip_range,
        clip_range_high=hyperparameters.clip_range_high,
        value_clip_range=hyperparameters.value_clip_range,
        vf_coef=hyperparameters.vf_coef,
        entropy_coef=hyperparameters.entropy_coef,
        normalizer=normalizer,
    )


@renamed(recipe="options")
def ppo_update(
    state: PPOState,
    experience: Experience,
    hyperparameters: Hyperparameters,
    key: jax.Array,
    *,
    frozen: FrozenParams,
    networks: PPONetworks,
    options: PPOOptions,
) -> tuple[PPOState, dict[str, jax.Array]]:
    """num_epochs x num_minibatches optimizer steps on one experience, reshuffled each epoch.

    With `hyperparameters.stop_kl` they end early: the first minibatch at which
    mean (logprobs - old_logprobs)² / 2 > stop_kl, `policy/approx_kl`, takes no step, and those
    after it are skipped.

    Args:
        state: parameters and optimizer state are updated, step and episode counts are not.
        experience: B responses; num_minibatches x num_micro_batches divides B.
        hyperparameters: the numbers of optimizer and loss.
        key: consumed; seeds the shuffles.
        frozen: the untrained leaves of policy and critic.
        networks: policy and critic are called.
        options: epochs, minibatches, micro-batches and packing are read.

    Returns:
        (state, metrics of each optimizer step [num_epochs * num_minibatches], in their order). With
        stop_kl `ppo/computed` is 1 where a minibatch was computed, `ppo/taken` where its step was
        taken; the metrics of the others are 0.

    Raises:
        ValueError: packing, with a network that does not support it; a batch that the minibatches
            and micro-batches do not divide.
    """
    trained = {"policy": networks.policy, "value": networks.value}
    packs = {k: network.supports_packing for k, network in trained.items() if network is not None}
    if options.packing and not all(packs.values()):
        raise ValueError(
            "packing needs networks that take `segment_ids` and `output_positions` and say so "
            "(Network.supports_packing), got "
            + ", ".join(f"{name} {value}" for name, value in packs.items())
        )
    batch_size = experience.mask.shape[0]
    counts = dict(
        num_minibatches=options.num_minibatches, num_micro_batches=options.num_micro_batches
    )
    assert_divides(batch_size, "responses", **counts)
    assert_numbers(at_least=0, value_learning_rate=hyperparameters.value_learning_rate)
    factor = schedule(hyperparameters.optimizer, state.step)
    rates = {
        "policy": hyperparameters.optimizer.learning_rate * factor,
        "value": hyperparameters.value_learning_rate * factor,
    }
    rates = {name: rate for name, rate in rates.items() if name in packs}
    orders = jax.vmap(lambda k: jax.random.permutation(k, batch_size))(
        jax.random.split(key, options.num_epochs)
    )

    def step(carry, rows):
        params, opt_state = carry
        minibatch = jax.tree.map(lambda x: x[rows], experience)
        normalizer = minibatch.response_mask.sum().astype(jnp.float32)

        def loss(params, micro_batch):
            return experience_loss(
                params,
                micro_batch,
                hyperparameters,
                frozen=frozen,
                networks=networks,
                normalizer=normalizer,
            )

        sums = accumulate_packed if options.packing else accumulate
        gradients, metrics = sums(loss, params, minibatch, options.num_micro_batches)
        params, opt_state, norm = apply_gradients(
            hyperparameters.optimizer, gradients, opt_state, params, rates
        )
        return (params, opt_state), metrics | {"policy/grad_norm": norm}

    carry = (trained_params(state.policy_params, state.value_params), state.opt_state)
    rows = orders.reshape(options.num_epochs * options.num_minibatches, -1)
    if hyperparameters.stop_kl is None:
        (params, opt_state), metrics = jax.lax.scan(step, carry, rows)
    else:
        near = until_far(step, hyperparameters.stop_kl)
        ((params, opt_state), _), metrics = jax.lax.scan(near, (carry, jnp.bool_(True)), rows)
    state = dataclasses.replace(
        state, policy_params=params["policy"], value_params=params.get("value"), opt_state=opt_state
    )
    rates = {f"{name}/learning_rate": jnp.full(len(rows), x) for name, x in rates.items()}
    return state, metrics | rates


def until_far(step: Callable[..., tuple[Any, dict]], stop_kl: jax.Array | float):
    """A step of `ppo_update` with its brake: the carry is (that of `step`, whether to go on)."""

    def step_if_near(carry, rows):
        before, goes_on = carry
        _, shapes = jax.eval_shape(step, before, rows)

        def compute():
            after, metrics = step(before, rows)
            near = goes_on & (metrics["policy/approx_kl"] <= stop_kl)
            after = jax.tree.map(lambda new, old: jnp.where(near, new, old), after, before)
            metrics = {name: jnp.where(goes_on, x, 0.0) for name, x in metrics.items()}
            flags = {"ppo/computed": goes_on, "ppo/taken": near}
            return (after, near), metrics | {k: x.astype(jnp.float32) for k, x in flags.items()}

        def skip():
            zeros = {name: jnp.zeros(x.shape, x.dtype) for name, x in shapes.items()}
            flags = {"ppo/computed": jnp.float32(0.0), "ppo/taken": jnp.float32(0.0)}
            return (before, jnp.bool_(False)), zeros | flags

        return jax.lax.cond(any_lane(goes_on), compute, skip)

    return step_if_near


def average_updates(updates: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The metrics of `ppo_update` over its steps: means, and maxima of those named `*_max`.

    With stop_kl they are of the minibatches that were computed; `ppo/updates` is the number of
    steps that were taken.
    """
    updates = dict(updates)
    computed, taken = (updates.pop(f"ppo/{name}", None) for name in ("computed", "taken"))

    def average(name, x):
        if name.endswith("_max"):
            return x.max()
        return x.mean() if computed is None else (x * computed).sum() / computed.sum()

    averages = {name: average(name, x) for name, x in updates.items()}
    return averages if taken is None else averages | {"ppo/updates": taken.sum()}


def accumulate_packed(
    loss: Callable[..., tuple[jax.Array, dict]],
    params: Params,
    minibatch: Experience,
    num_micro_batches: int,
) -> tuple[Params, dict[str, jax.Array]]:
    """`accumulate` with the responses packed into as few rows as possible.

    Micro-batches have as many rows as without packing; those without a packed row are skipped.
    """
    rows, num_rows = pack_rows(minibatch.mask, minibatch.response_mask)
    size = rows.mask.shape[0] // num_micro_batches
    count = (num_rows + size - 1) // size
    trips = max_lane(count)  # those beyond its own add 0 to a lane

    def micro_batch(i):
        some = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i * size, size), rows)
        return packed_experience(minibatch, some)

    gradients, metrics = accumulate_while(loss, params, micro_batch, trips)
    real, total = (rows.segment_ids > 0).sum(), count * size * rows.segment_ids.shape[1]
    return gradients, metrics | {"ppo/packing_efficiency": real / total}


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
    parts = dict(frozen=frozen, networks=networks, options=options)
    experience, metrics = make_experience(rollout, scores, state, hyperparameters, **parts)
    state, updates = ppo_update(state, experience, hyperparameters, key, **parts)
    metrics |= average_updates(updates)
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
    scores = response_scores(responses, frozen=frozen, networks=networks, eos_id=options.score_eos)
    state, metrics = update_from_rollout(
        state, hyperparameters, responses, scores, shuffle_key, **parts
    )
    return state, metrics
