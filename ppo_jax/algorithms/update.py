"""The update of PPO: optimizer steps of policy and critic on one experience.

Dimension key: B responses, T response tokens.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ppo_jax.algorithms.critics import critic_loss, outputs_of, statistics_of, take_critic
from ppo_jax.algorithms.options import PPONetworks, PPOOptions
from ppo_jax.algorithms.stopping import until_far
from ppo_jax.algorithms.supervised import accumulate, accumulate_while
from ppo_jax.algorithms.token_choice import make_choice, split_keys
from ppo_jax.core import cpu
from ppo_jax.core.checks import assert_divides, assert_numbers
from ppo_jax.core.kl import kl_loss
from ppo_jax.core.lanes import max_lane
from ppo_jax.core.losses import ppo_loss
from ppo_jax.core.named import fields_of
from ppo_jax.core.network import merge_params
from ppo_jax.core.optimizer import apply_gradients, init_optimizer, schedule
from ppo_jax.core.policy_losses import clipped_policy_loss
from ppo_jax.core.renamed import renamed
from ppo_jax.core.sequence_losses import aggregation_weights
from ppo_jax.core.types import (
    Experience,
    FrozenParams,
    Hyperparameters,
    Optimizer,
    Params,
    PPOState,
)
from ppo_jax.rollout.decode import response_statistics
from ppo_jax.rollout.packing import pack_rows, packed_experience


def init_optimizers(trained: dict[str, Params], hyperparameters: Hyperparameters) -> Any:
    """The optimizer state of what is trained: one, or one of each, see `value_optimizer`."""
    if not has_own_optimizer(trained, hyperparameters):
        return init_optimizer(hyperparameters.optimizer, trained)
    return {
        "policy": init_optimizer(hyperparameters.optimizer, {"policy": trained["policy"]}),
        "value": init_optimizer(hyperparameters.value_optimizer, {"value": trained["value"]}),
    }


def has_own_optimizer(trained: dict[str, Params], hyperparameters: Hyperparameters) -> bool:
    """Whether there is a critic that takes optimizer steps of its own."""
    return "value" in trained and hyperparameters.value_optimizer is not None


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
    options: PPOOptions | None = None,
    normalizer: jax.Array | None = None,
    num_sequences: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The PPO loss of some experience: that of the policy, and of the critic where it is trained.

    The loss of the policy, `options.loss`, is given what it has parameters for: `logprobs`,
    `old_logprobs`, `advantages`, `mask`, [B, T] each; `weights` and `segment_ids`, [B, T] or None;
    `behavior_logprobs`, [B, T], those of the sampling, where the old ones are recomputed; the
    tokens [B, T] of `TOKEN_CHOICES`;
    `normalizer`; and each number of `Hyperparameters` by its name.

    Args:
        params: the trained leaves, see `trained_params`.
        experience: B responses, or rows of responses.
        hyperparameters: clip ranges and coefficients; a temperature of 0 counts as 1.
        frozen: the untrained leaves of policy and critic.
        networks: policy and critic are called.
        options: the losses of policy and KL; None is the clipped one, without a KL.
        normalizer: [] float, the token count to divide by; by default this experience's own.
        num_sequences: [] float, that of responses, for a loss of whole responses.

    Returns:
        (loss, metrics).
    """
    outputs = forward(params, experience, hyperparameters, frozen=frozen, networks=networks)
    counts = dict(normalizer=normalizer, num_sequences=num_sequences)
    return loss_of_outputs(*outputs, experience, hyperparameters, options, **counts)


def experience_gradients(
    params: Params,
    experience: Experience,
    hyperparameters: Hyperparameters,
    *,
    frozen: FrozenParams,
    networks: PPONetworks,
    options: PPOOptions,
    **counts: jax.Array,
) -> tuple[Params, dict[str, jax.Array]]:
    """(gradients, metrics) of `experience_loss`, whose arguments these are.

    A critic of its own is run when the gradients of the policy are there, which do not depend on
    it: only one of the two has its activations in memory.
    """
    parts = dict(frozen=frozen, networks=networks)
    if "value" not in params or networks.value_on_policy:
        gradient = jax.grad(experience_loss, has_aux=True)
        return gradient(params, experience, hyperparameters, options=options, **parts, **counts)

    def of_policy(policy):
        return forward({"policy": policy}, experience, hyperparameters, **parts)[:2]

    def of_value(value):
        return critic_outputs({"value": value}, later, **parts)

    def loss(*outputs):
        return loss_of_outputs(*outputs, experience, hyperparameters, options, **counts)

    statistics, backward = jax.vjp(of_policy, params["policy"])
    of_statistics = jax.grad(lambda both: loss(*both, None)[0])(statistics)
    gradients = {"policy": backward(of_statistics)[0]}
    mask = cpu.after(experience.mask, gradients)
    later = dataclasses.replace(experience, mask=mask)
    outputs, backward = jax.vjp(of_value, params["value"])
    of_outputs, metrics = jax.grad(lambda x: loss(*statistics, x), has_aux=True)(outputs)
    return gradients | {"value": backward(of_outputs)[0]}, metrics


def loss_of_outputs(
    logprobs: jax.Array,
    entropies: jax.Array,
    outputs: jax.Array | None,
    experience: Experience,
    hyperparameters: Hyperparameters,
    options: PPOOptions | None,
    *,
    normalizer: jax.Array | None,
    num_sequences: jax.Array | None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`experience_loss` of what `forward` gives; without `outputs` that of the policy alone."""
    e, mask = experience, experience.response_mask
    classifies = hyperparameters.value_range is not None
    loss, metrics = ppo_loss(
        logprobs,
        None if classifies else outputs,
        entropies,
        mask,
        old_logprobs=e.logprobs,
        old_values=e.values,
        advantages=e.advantages,
        returns=e.returns,
        policy_loss=clipped_policy_loss if options is None else options.loss,
        behavior_logprobs=e.behavior_logprobs,
        dropped_mask=e.dropped_mask,
        penalty_mask=e.penalty_mask,
        disputed_mask=e.disputed_mask,
        weights=e.weights,
        segment_ids=response_numbers(e),
        normalizer=normalizer,
        num_sequences=num_sequences,
        **fields_of(hyperparameters),
    )
    if outputs is not None and classifies:
        value, value_metrics = critic_loss(
            outputs, e.values, e.returns, mask, hyperparameters, normalizer=normalizer
        )
        loss = loss + hyperparameters.vf_coef * value
        metrics = metrics | value_metrics | {"ppo/loss": jax.lax.stop_gradient(loss)}
    if options is None or hyperparameters.kl_loss_coef is None:
        return loss, metrics
    kl, kl_metrics = kl_loss(
        logprobs,
        e.ref_logprobs,
        mask,
        estimator="k3",  # k2 has the same gradient, and is no estimate of the KL as a value
        old_logprobs=e.logprobs,
        weights=e.weights,
        normalizer=normalizer,
    )
    loss = loss + hyperparameters.kl_loss_coef * kl
    return loss, metrics | kl_metrics | {"ppo/loss": jax.lax.stop_gradient(loss)}


def forward(
    params: Params,
    experience: Experience,
    hyperparameters: Hyperparameters,
    *,
    frozen: FrozenParams,
    networks: PPONetworks,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(log-probs, entropies, see `response_statistics`; what the critic gives, see
    `critic_outputs`, None where it is not trained), by the trained leaves."""
    e, policy = experience, merge_params(frozen.policy, params["policy"])
    inputs = (e.policy_inputs, e.mask, e.response_tokens)
    packed = dict(segment_ids=e.segment_ids, output_positions=e.output_positions)
    where = dict(temperature=hyperparameters.temperature, **packed)
    if "value" not in params:
        return *response_statistics(networks.policy, policy, *inputs, **where), None
    if not networks.value_on_policy:
        logprobs, entropies = response_statistics(networks.policy, policy, *inputs, **where)
        outputs = critic_outputs(params, e, frozen=frozen, networks=networks)
        return logprobs, entropies, outputs
    several = e.critics is not None
    logprobs, entropies, outputs = statistics_of(
        networks.value, policy, params["value"], *inputs, several=several, **where
    )
    return logprobs, entropies, take_critic(outputs, e.critics) if several else outputs


def critic_outputs(
    params: Params, experience: Experience, *, frozen: FrozenParams, networks: PPONetworks
) -> jax.Array:
    """What the critic that is trained gives, see `values_from`; of several each token's own.
    Undefined where masked."""
    e = experience
    outputs = outputs_of(
        networks.value,
        frozen.value,
        params["value"],
        e.value_inputs,
        e.mask,
        several=e.critics is not None,
        response_length=e.response_mask.shape[1],
        segment_ids=e.segment_ids,
        output_positions=e.output_positions,
    )
    return outputs if e.critics is None else take_critic(outputs, e.critics)


def value_loss(
    params: Params,
    experience: Experience,
    hyperparameters: Hyperparameters,
    *,
    frozen: FrozenParams,
    networks: PPONetworks,
    normalizer: jax.Array | None = None,
    num_sequences: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a critic that takes steps of its own; arguments as for `experience_loss`."""
    e = experience
    outputs = critic_outputs(params, e, frozen=frozen, networks=networks)
    data = (e.values, e.returns, e.response_mask)
    return critic_loss(outputs, *data, hyperparameters, normalizer=normalizer)


def response_numbers(experience: Experience) -> jax.Array | None:
    """Which response of its row a response token belongs to, [B, T] int32: 1, 2, .., 0 where
    masked; None where a row holds one."""
    e = experience
    if e.segment_ids is None:
        return None
    numbers = jnp.take_along_axis(e.segment_ids, e.output_positions, axis=1)
    return jnp.where(e.response_mask, numbers, 0)


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

    A critic with `hyperparameters.value_optimizer` takes steps of its own after those of the
    policy: num_epochs x value_updates passes, each of value_num_minibatches steps.

    Args:
        state: parameters and optimizer state are updated, step and episode counts are not.
        experience: B responses; num_minibatches x num_micro_batches divides B.
        hyperparameters: the numbers of optimizer and loss.
        key: consumed; seeds the shuffles.
        frozen: the untrained leaves of policy and critic.
        networks: policy and critic are called.
        options: losses, epochs, minibatches, micro-batches and packing are read.

    Returns:
        (state, metrics of each optimizer step [num_epochs * num_minibatches], in their order, and
        of each of the critic's own). With stop_kl `ppo/computed` is 1 where a minibatch was
        computed, `ppo/taken` where its step was taken; the metrics of the others are 0.

    Raises:
        ValueError: packing, with a network that does not support it; a batch that the minibatches
            and micro-batches do not divide; several updates of a critic without an optimizer of its
            own, or such an optimizer for a critic on the policy.
    """
    check_networks(networks, hyperparameters, options)
    trained, opt_state = trained_params(state.policy_params, state.value_params), state.opt_state
    numbers, rates = hyperparameters, learning_rates(state, hyperparameters)
    parts = dict(frozen=frozen, networks=networks)
    how = dict(hyperparameters=numbers, **parts)
    gradient = functools.partial(experience_gradients, options=options, **how)
    steps = functools.partial(take_steps, experience=experience, options=options)
    policy_steps = functools.partial(
        steps,
        gradient=gradient,
        optimizer=numbers.optimizer,
        num_minibatches=options.num_minibatches,
        stop_kl=numbers.stop_kl,
        choose=make_choice(options.loss, numbers),
    )
    if not has_own_optimizer(trained, numbers):
        if options.value_updates > 1 or options.value_num_minibatches:
            raise ValueError("value_updates and value_num_minibatches need a value_optimizer")
        keys = jax.random.split(key, options.num_epochs)
        trained, opt_state, metrics = policy_steps(trained, opt_state, rates, keys)
    else:
        keys = jax.random.split(key, options.num_epochs * (1 + options.value_updates))
        policy, value = {"policy": trained["policy"]}, {"value": trained["value"]}
        policy, opt_policy, metrics = policy_steps(
            policy, opt_state["policy"], rates, keys[: options.num_epochs]
        )
        value, opt_value, value_metrics = steps(
            value,
            opt_state["value"],
            rates,
            keys[options.num_epochs :],
            gradient=functools.partial(jax.grad(value_loss, has_aux=True), **how),
            optimizer=numbers.value_optimizer,
            num_minibatches=options.value_num_minibatches or options.num_minibatches,
        )
        trained, opt_state = policy | value, {"policy": opt_policy, "value": opt_value}
        metrics |= value_metrics
    state = dataclasses.replace(
        state,
        policy_params=trained["policy"],
        value_params=trained.get("value"),
        opt_state=opt_state,
    )
    return state, metrics


def check_networks(
    networks: PPONetworks, hyperparameters: Hyperparameters, options: PPOOptions
) -> None:
    """The networks that are trained support packing, where it is asked for, and a critic on the
    policy takes its steps."""
    if networks.value_on_policy and hyperparameters.value_optimizer is not None:
        raise ValueError("a critic on the policy takes its steps: value_optimizer must be None")
    if networks.value_on_policy and networks.value.token_statistics is None:
        raise ValueError("a critic on the policy needs token_statistics, see policy_value_network")
    trained = {"policy": networks.policy, "value": networks.value}
    packs = {k: network.supports_packing for k, network in trained.items() if network is not None}
    if options.packing and not all(packs.values()):
        raise ValueError(
            "packing needs networks that take `segment_ids` and `output_positions` and say so "
            "(Network.supports_packing), got "
            + ", ".join(f"{name} {value}" for name, value in packs.items())
        )


def learning_rates(state: PPOState, hyperparameters: Hyperparameters) -> dict[str, jax.Array]:
    """The rates of policy and critic in an iteration."""
    numbers = hyperparameters
    assert_numbers(
        at_least=0,
        value_learning_rate=numbers.value_learning_rate,
        critic_warmup=numbers.critic_warmup,
    )
    factor = schedule(numbers.optimizer, state.step)
    value = numbers.value_learning_rate * factor
    if numbers.value_optimizer is not None:
        own = numbers.value_optimizer
        value = own.learning_rate * schedule(own, state.step)
    moves = (state.step >= numbers.critic_warmup).astype(jnp.float32)
    moves = jnp.maximum(moves, state.adaptive.get("has_settled", 0.0))
    return {"policy": numbers.optimizer.learning_rate * factor * moves, "value": value}


def take_steps(
    params: dict[str, Params],
    opt_state: Any,
    rates: dict[str, jax.Array],
    keys: jax.Array,
    *,
    experience: Experience,
    gradient: Callable[..., tuple[Params, dict]],
    optimizer: Optimizer,
    num_minibatches: int,
    options: PPOOptions,
    stop_kl: jax.Array | float | None = None,
    choose: Callable[[Experience, jax.Array], Experience] | None = None,
) -> tuple[dict[str, Params], Any, dict[str, jax.Array]]:
    """num_minibatches optimizer steps for each key, which shuffles the responses.

    Args:
        params: what is trained, of `trained_params`.
        opt_state: of `optimizer` for these.
        rates: of policy and critic.
        keys: [E], consumed.
        experience: B responses.
        gradient: (params, experience, normalizer=, num_sequences=) -> (gradients, metrics).
        optimizer: its numbers.
        num_minibatches: of an epoch.
        options: micro-batches, packing and aggregation are read.
        stop_kl: see `ppo_update`.
        choose: (minibatch, key) -> minibatch with the tokens that the loss treats apart.

    Returns:
        (params, opt_state, metrics of each step).
    """
    batch_size, first = experience.mask.shape[0], next(iter(params))
    assert_divides(
        batch_size,
        "responses",
        num_minibatches=num_minibatches,
        num_micro_batches=options.num_micro_batches,
    )
    key_of_choice = None
    if choose is not None:
        keys, key_of_choice = split_keys(keys, num_minibatches)
    orders = jax.vmap(lambda k: jax.random.permutation(k, batch_size))(keys)
    rates = {name: rates[name] for name in params}

    def step(carry, inputs):
        (params, opt_state), (rows, key) = carry, inputs
        minibatch = jax.tree.map(lambda x: x[rows], experience)
        if choose is not None:
            minibatch = choose(minibatch, key)
        mask = minibatch.response_mask
        if options.aggregation != "token_mean":
            length = mask.shape[1] if options.aggregation == "constant" else None
            weights = aggregation_weights(mask, how=options.aggregation, length=length)
            minibatch = dataclasses.replace(minibatch, weights=weights)
        counts = dict(
            normalizer=mask.sum().astype(jnp.float32),
            num_sequences=mask.any(axis=1).sum().astype(jnp.float32),
        )
        sums = accumulate_packed if options.packing else accumulate
        gradients, metrics = sums(
            lambda params, rows: gradient(params, rows, **counts),
            params,
            minibatch,
            options.num_micro_batches,
        )
        params, opt_state, norm = apply_gradients(optimizer, gradients, opt_state, params, rates)
        return (params, opt_state), metrics | {f"{first}/grad_norm": norm}

    rows = orders.reshape(len(keys) * num_minibatches, -1)
    inputs = (rows, key_of_choice)
    if stop_kl is None:
        (params, opt_state), metrics = jax.lax.scan(step, (params, opt_state), inputs)
    else:
        carry = ((params, opt_state), jnp.bool_(True))
        ((params, opt_state), _), metrics = jax.lax.scan(until_far(step, stop_kl), carry, inputs)
    rates = {f"{name}/learning_rate": jnp.full(len(rows), x) for name, x in rates.items()}
    return params, opt_state, metrics | rates


def accumulate_packed(
    gradient: Callable[..., tuple[Params, dict]],
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

    gradients, metrics = accumulate_while(gradient, params, micro_batch, trips)
    real, total = (rows.segment_ids > 0).sum(), count * size * rows.segment_ids.shape[1]
    return gradients, metrics | {"ppo/packing_efficiency": real / total}
