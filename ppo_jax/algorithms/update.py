"""The update of PPO: optimizer steps of policy and critic on one experience.

Dimension key: B responses, T response tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ppo_jax.algorithms.critics import critic_loss
from ppo_jax.algorithms.minibatches import (
    accumulate_groups,
    accumulate_packed,
    grouped_samples,
    whole_batch,
)
from ppo_jax.algorithms.options import PPONetworks, PPOOptions
from ppo_jax.algorithms.passes import (
    FirstPass,
    Outputs,
    forward,
    gradients_in_turn,
    passes_in_common,
    without_outputs,
)
from ppo_jax.algorithms.stopping import until_far
from ppo_jax.algorithms.supervised import accumulate
from ppo_jax.algorithms.token_choice import make_choice, split_keys
from ppo_jax.core.checks import assert_divides, assert_numbers
from ppo_jax.core.kl import kl_loss
from ppo_jax.core.losses import ppo_loss
from ppo_jax.core.named import fields_of
from ppo_jax.core.optimizer import apply_gradients, init_optimizer, schedule
from ppo_jax.core.policy_losses import clipped_policy_loss
from ppo_jax.core.renamed import renamed
from ppo_jax.core.router import router_metrics
from ppo_jax.core.sequence_losses import aggregation_weights
from ppo_jax.core.types import (
    Experience,
    FrozenParams,
    Hyperparameters,
    Optimizer,
    Params,
    PPOState,
    Rollout,
)


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
    samples_per_prompt: int = 1,
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
        samples_per_prompt: so many responses after another have one prompt; see `response_outputs`.

    Returns:
        (loss, metrics); among them "router", `RouterStatistics`, where the experience has experts.
    """
    parts = dict(frozen=frozen, networks=networks, samples_per_prompt=samples_per_prompt)
    outputs = forward(params, experience, hyperparameters, **parts)
    counts = dict(normalizer=normalizer, num_sequences=num_sequences)
    return loss_of_outputs(outputs, experience, hyperparameters, options=options, **counts)


def loss_of_outputs(
    outputs: Outputs,
    experience: Experience,
    hyperparameters: Hyperparameters,
    *,
    options: PPOOptions | None = None,
    normalizer: jax.Array | None = None,
    num_sequences: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`experience_loss` from what the networks give, see `forward`; other arguments as there."""
    e, mask = experience, experience.response_mask
    logprobs, entropies, values, router = outputs.of_own_critics(e.critics)
    classifies = hyperparameters.value_range is not None
    loss, metrics = ppo_loss(
        logprobs,
        None if classifies else values,
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
    if values is not None and classifies:
        value, value_metrics = critic_loss(
            values, e.values, e.returns, mask, hyperparameters, normalizer=normalizer
        )
        loss = loss + hyperparameters.vf_coef * value
        metrics = metrics | value_metrics | {"ppo/loss": jax.lax.stop_gradient(loss)}
    if router is not None:
        metrics = metrics | {"router": jax.lax.stop_gradient(router)}
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


def value_loss(
    outputs: Outputs,
    experience: Experience,
    hyperparameters: Hyperparameters,
    *,
    normalizer: jax.Array | None = None,
    num_sequences: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a critic that takes steps of its own; arguments as for `loss_of_outputs`."""
    e = experience
    values = outputs.of_own_critics(e.critics).values
    data = (e.values, e.returns, e.response_mask)
    return critic_loss(values, *data, hyperparameters, normalizer=normalizer)


def response_numbers(experience: Experience) -> jax.Array | None:
    """Which response of its row a response token belongs to, [B, T] int32: 1, 2, .., 0 where
    masked; None where a row holds one."""
    e = experience
    if e.segment_ids is None:
        return None
    numbers = jnp.take_along_axis(e.segment_ids, e.output_positions, axis=1)
    return jnp.where(e.response_mask, numbers, 0)


def first_passes(
    state: PPOState,
    rollout: Rollout,
    hyperparameters: Hyperparameters,
    *,
    frozen: FrozenParams,
    networks: PPONetworks,
    options: PPOOptions,
) -> dict[str, FirstPass]:
    """The forward passes of an update of one step whose outputs its experience is made of, by
    their networks: "value", or "policy", with a critic that is on it. None of them where there is
    nothing in common, see `passes_in_common`."""
    trained = trained_params(state.policy_params, state.value_params)
    own_optimizer = has_own_optimizer(trained, hyperparameters)
    names = passes_in_common(options, has_critic="value" in trained, own_optimizer=own_optimizer)
    groups = {name: {name: trained[name]} for name in names}
    if names and networks.value_on_policy:
        groups = {"policy": trained}
    outputs = functools.partial(
        forward,
        experience=without_outputs(rollout, networks, options),
        hyperparameters=hyperparameters,
        frozen=frozen,
        networks=networks,
        samples_per_prompt=options.sampling.samples_per_prompt,
    )
    return {name: FirstPass(*jax.vjp(outputs, params)) for name, params in groups.items()}


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
    first: Mapping[str, FirstPass] | None = None,
) -> tuple[PPOState, dict[str, jax.Array]]:
    """num_epochs x num_minibatches optimizer steps on one experience, reshuffled each epoch.

    With `hyperparameters.stop_kl` they end early: the first minibatch at which
    mean (logprobs - old_logprobs)² / 2 > stop_kl, `policy/approx_kl`, takes no step, and those
    after it are skipped.

    A critic with `hyperparameters.value_optimizer` takes steps of its own after those of the
    policy: num_epochs x value_updates passes, each of value_num_minibatches steps.

    Args:
        state: parameters and optimizer state are updated, step and episode counts are not.
        experience: B responses; num_minibatches x num_micro_batches divides B. Those to one prompt
            follow each other, see `grouped_samples`.
        hyperparameters: the numbers of optimizer and loss.
        key: consumed; seeds the shuffles.
        frozen: the untrained leaves of policy and critic.
        networks: policy and critic are called.
        options: losses, epochs, minibatches, micro-batches and packing are read.
        first: forward passes that are made already, see `first_passes`.

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
    how = dict(hyperparameters=numbers, frozen=frozen, networks=networks)
    outputs = functools.partial(forward, **how)
    data = dict(experience=experience, outputs=outputs, first=first or {})
    steps = functools.partial(take_steps, **data, networks=networks, options=options)
    policy_steps = functools.partial(
        steps,
        loss=functools.partial(loss_of_outputs, hyperparameters=numbers, options=options),
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
            loss=functools.partial(value_loss, hyperparameters=numbers),
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
    outputs: Callable[[Params, Experience], Outputs],
    loss: Callable[..., tuple[jax.Array, dict]],
    optimizer: Optimizer,
    num_minibatches: int,
    networks: PPONetworks,
    options: PPOOptions,
    first: Mapping[str, FirstPass],
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
        outputs: what the networks give.
        loss: (outputs, experience, normalizer=, num_sequences=) -> (loss, metrics).
        optimizer: its numbers.
        num_minibatches: of an epoch.
        networks: those of the params say whether they share prompts.
        options: micro-batches, packing, samples and aggregation are read.
        first: passes of the only step, of all responses in their own order, that are made.
        stop_kl: see `ppo_update`.
        choose: (minibatch, key) -> minibatch with the tokens that the loss treats apart.

    Returns:
        (params, opt_state, metrics of each step).
    """
    batch_size, name = experience.mask.shape[0], next(iter(params))
    assert_divides(
        batch_size,
        "responses",
        num_minibatches=num_minibatches,
        num_micro_batches=options.num_micro_batches,
    )
    key_of_choice, several = None, experience.critics is not None
    if choose is not None:
        keys, key_of_choice = split_keys(keys, num_minibatches)
    orders = jax.vmap(lambda k: jax.random.permutation(k, batch_size))(keys)
    rates = {name: rates[name] for name in params}
    trained = [getattr(networks, part) for part in params]
    samples = grouped_samples(trained, options, batch_size, num_minibatches)
    sums = accumulate_packed if options.packing else accumulate
    if samples > 1:
        outputs = functools.partial(outputs, samples_per_prompt=samples)
        sums = functools.partial(accumulate_groups, samples=samples)

    def step(carry, inputs):
        (params, opt_state), (rows, key) = carry, inputs
        if samples > 1:
            minibatch = whole_batch(experience, rows, key, choose)
        else:
            minibatch = jax.tree.map(lambda x: x[rows], experience)
            if choose is not None:
                minibatch = choose(minibatch, key)
        minibatch = with_weights(minibatch, options.aggregation)
        mask = minibatch.response_mask
        counts = dict(
            normalizer=mask.sum().astype(jnp.float32),
            num_sequences=mask.any(axis=1).sum().astype(jnp.float32),
        )
        passes = {k: x for k, x in first.items() if k in params}
        if samples == 1:
            passes = {k: x.take(rows, several=several) for k, x in passes.items()}

        def gradient(params, some):
            given = (params, some, outputs, functools.partial(loss, **counts))
            apart = not networks.value_on_policy
            return gradients_in_turn(*given, apart=apart, first=passes)

        gradients, metrics = sums(gradient, params, minibatch, options.num_micro_batches)
        if "router" in metrics:  # of all micro-batches together
            metrics |= router_metrics(metrics.pop("router"))
        params, opt_state, norm = apply_gradients(optimizer, gradients, opt_state, params, rates)
        return (params, opt_state), metrics | {f"{name}/grad_norm": norm}

    rows = orders.reshape(len(keys) * num_minibatches, -1)
    inputs = (rows, key_of_choice)
    if stop_kl is None:
        (params, opt_state), metrics = jax.lax.scan(step, (params, opt_state), inputs)
    else:
        carry = ((params, opt_state), jnp.bool_(True))
        ((params, opt_state), _), metrics = jax.lax.scan(until_far(step, stop_kl), carry, inputs)
    rates = {f"{name}/learning_rate": jnp.full(len(rows), x) for name, x in rates.items()}
    return params, opt_state, metrics | rates


def with_weights(minibatch: Experience, aggregation: str) -> Experience:
    """With the weights of its tokens, where their mean is another than that of all."""
    if aggregation == "token_mean":
        return minibatch
    mask = minibatch.response_mask
    length = mask.shape[1] if aggregation == "constant" else None
    weights = aggregation_weights(mask, how=aggregation, length=length)
    return dataclasses.replace(minibatch, weights=weights)
