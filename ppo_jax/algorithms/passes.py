"""Forward passes that scoring and update have in common, so that they are made once.

Dimension key: B responses, T response tokens, N bins, K critics.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppo_jax.algorithms.critics import (
    outputs_of,
    share_prompts,
    statistics_of,
    take_critic,
)
from ppo_jax.algorithms.options import PPONetworks, PPOOptions
from ppo_jax.core import cpu
from ppo_jax.core.network import merge_params
from ppo_jax.core.router import RouterStatistics
from ppo_jax.core.types import Experience, FrozenParams, Hyperparameters, Params, Rollout
from ppo_jax.rollout.decode import response_statistics


class Outputs(NamedTuple):
    """What the networks that are trained give of some responses; undefined where masked, None of a
    network that was not called."""

    logprobs: jax.Array | None = None  # [B, T] float32
    entropies: jax.Array | None = None  # [B, T] float32, nats
    values: jax.Array | None = None  # [B, T] float32, [B, T, N] logits; [K, B, T] of K critics
    router: RouterStatistics | None = None  # of the policy, where the experience has its experts

    def of_own_critics(self, critics: jax.Array | None) -> "Outputs":
        """With the values [B, T] of each token's own among several critics, `Experience.critics`;
        None is of one."""
        if self.values is None or critics is None:
            return self
        return self._replace(values=take_critic(self.values, critics))

    def filled_by(self, other: "Outputs") -> "Outputs":
        """With what the other has and this has not."""
        pairs = zip(self, other, strict=True)
        return Outputs(*(b if a is None else a for a, b in pairs))

    def take(self, rows: jax.Array, *, several: bool) -> "Outputs":
        """Those of some responses [R], but the sums over all; `several` critics have values
        [K, B, T]."""
        values, axis = self.values, 1 if several else 0
        if values is not None:
            values = jnp.take(values, rows, axis=axis)
        rest = jax.tree.map(lambda x: x[rows], self._replace(values=None, router=None))
        return rest._replace(values=values, router=self.router)


class FirstPass(NamedTuple):
    """The forward pass of an optimizer step, before what its loss needs besides is known."""

    outputs: Outputs
    pullback: Callable[[Outputs], tuple[Params]]  # gradients to the outputs -> (to the parameters,)

    def take(self, rows: jax.Array, *, several: bool) -> "FirstPass":
        """The pass of responses in another order, see `Outputs.take`."""
        outputs, back = jax.vjp(lambda x: x.take(rows, several=several), self.outputs)
        return FirstPass(outputs, lambda gradients: self.pullback(*back(gradients)))

    def gradients(
        self, loss: Callable[[Outputs], tuple[jax.Array, dict]]
    ) -> tuple[Params, dict[str, jax.Array]]:
        """(gradients, metrics) of a loss of the outputs: outputs -> (loss, metrics)."""
        of_outputs, metrics = jax.grad(loss, has_aux=True)(self.outputs)
        return self.pullback(of_outputs)[0], metrics


def gradients_in_turn(
    params: Params,
    experience: Experience,
    outputs: Callable[[Params, Experience], Outputs],
    loss: Callable[[Outputs, Experience], tuple[jax.Array, dict]],
    *,
    apart: bool,
    first: Mapping[str, FirstPass] | None = None,
) -> tuple[Params, dict[str, jax.Array]]:
    """(gradients, metrics) of loss(outputs(params, experience), experience).

    Where policy and critic are `apart`, the second is run when the gradients of the first are
    there: only one of the two has its activations in memory. They may be taken one by one, as
    neither's gradients depend on the other's outputs. The policy is the first, whose logits take
    the most, but not where the critic's pass is made already: it waits for its gradients alone.

    `first`: passes that are made already, by network; "policy" is of both where they are not apart.
    """
    e, first, gradients, metrics = experience, first or {}, {}, {}
    turns = [{name: x} for name, x in params.items()] if apart else [params]
    if "value" in first:
        turns = turns[::-1]
    known = Outputs(e.logprobs, jnp.zeros_like(e.logprobs))  # of the policy before its turn: any
    for some in turns:
        if (one := first.get(next(iter(some)))) is None:
            mask = cpu.after(e.mask, gradients) if gradients else e.mask
            inputs = dataclasses.replace(e, mask=mask)
            one = FirstPass(*jax.vjp(functools.partial(outputs, experience=inputs), some))
        found, metrics = one.gradients(lambda mine, known=known: loss(mine.filled_by(known), e))
        known = jax.lax.stop_gradient(one.outputs.filled_by(known))
        gradients |= found
    return gradients, metrics


def passes_in_common(
    options: PPOOptions, *, has_critic: bool, own_optimizer: bool
) -> tuple[str, ...]:
    """The networks, of "policy" and "value", whose outputs an experience is made of and that are
    the same in the first forward pass of the update, with no other after it.

    The values are needed with a critic, the log-probs where they are recomputed. One optimizer step
    on all of the responses at once starts at the parameters that these are of. With minibatches or
    micro-batches such a pass would have to be kept in parts, for advantages are whitened over all
    responses; with more steps it would stand besides a loop over the others. Packed rows, and the
    rows of `keep_samples`, are others than those of scoring.

    >>> from ppo_jax.rollout.sampling import Sampling
    >>> sampling = Sampling(response_length=8, eos_ids=(0,))
    >>> options = PPOOptions(sampling=sampling, num_epochs=1, num_minibatches=1)
    >>> passes_in_common(options, has_critic=True, own_optimizer=False)
    ('value',)
    """
    if options.num_micro_batches > 1 or options.packing or options.keep_samples:
        return ()
    steps = of_critic = options.num_epochs * options.num_minibatches
    if own_optimizer:
        minibatches = options.value_num_minibatches or options.num_minibatches
        of_critic = options.num_epochs * options.value_updates * minibatches
    recomputes = options.old_logprobs == "recompute"
    needed = {"policy": recomputes and steps == 1, "value": has_critic and of_critic == 1}
    return tuple(name for name, is_first in needed.items() if is_first)


def without_outputs(rollout: Rollout, networks: PPONetworks, options: PPOOptions) -> Experience:
    """A rollout as the update reads it, before there is anything that networks have given.

    Raises:
        ValueError: experts are to be replayed, and there are none.
    """
    mask, several = rollout.response_mask, options.num_critics > 1
    if options.replay_experts and rollout.experts is None:
        raise ValueError(
            "replay_experts needs the experts of a rollout, got none: no trained layer has any"
        )
    unknown: dict[str, Any] = dict(logprobs=None, values=None, advantages=None, returns=None)
    tokens, value_inputs, critics = rollout.tokens, None, None
    if networks.value is not None:
        value_inputs = rollout.hidden_states if networks.value_on_trunk else tokens
    if several:
        group_size = options.sampling.samples_per_prompt
        critics = share_prompts(mask, group_size=group_size, num_critics=options.num_critics)
    return Experience(
        policy_inputs=tokens if networks.trunk is None else rollout.hidden_states,
        value_inputs=value_inputs,
        mask=rollout.mask,
        response_tokens=rollout.response_tokens,
        response_mask=mask,
        critics=critics,
        experts=rollout.experts,
        replays_experts=options.replay_experts,
        **unknown,
    )


def forward(
    params: Params,
    experience: Experience,
    hyperparameters: Hyperparameters,
    *,
    frozen: FrozenParams,
    networks: PPONetworks,
    samples_per_prompt: int = 1,
) -> Outputs:
    """What the networks with trained leaves among `params` give at the response tokens, see
    `response_statistics` and `critic_outputs`. Of the experience it is read where inputs and
    outputs are, and nothing that comes of an earlier pass. So many responses after another have
    one prompt, see `response_outputs`."""
    e, where = experience, dict(frozen=frozen, networks=networks)
    where |= dict(samples_per_prompt=samples_per_prompt)
    if "policy" not in params:
        return Outputs(values=critic_outputs(params, e, **where))
    policy, inputs = merge_params(frozen.policy, params["policy"]), (e.policy_inputs, e.mask)
    how = dict(temperature=hyperparameters.temperature)
    how |= dict(segment_ids=e.segment_ids, output_positions=e.output_positions)
    how |= dict(samples_per_prompt=samples_per_prompt)
    if routed := e.experts is not None:
        how |= dict(experts=e.experts, replay=e.replays_experts, response_mask=e.response_mask)
    if "value" in params and networks.value_on_policy:
        several = e.critics is not None
        given = (networks.value, policy, params["value"], *inputs, e.response_tokens)
        statistics = statistics_of(*given, several=several, **how)
    else:
        statistics = response_statistics(networks.policy, policy, *inputs, e.response_tokens, **how)
    statistics, router = statistics if routed else (statistics, None)
    outputs = Outputs(*statistics, router=router)
    if outputs.values is not None or "value" not in params:
        return outputs
    return outputs._replace(values=critic_outputs(params, e, **where))


def critic_outputs(
    params: Params,
    experience: Experience,
    *,
    frozen: FrozenParams,
    networks: PPONetworks,
    samples_per_prompt: int = 1,
) -> jax.Array:
    """What the critic gives, see `values_from`; [K, B, T] of several. Undefined where masked. One
    on the policy needs the policy's leaves among `params`, too."""
    e, base = experience, frozen.value
    if networks.value_on_policy:
        base = merge_params(frozen.policy, params["policy"])
    return outputs_of(
        networks.value,
        base,
        params["value"],
        e.value_inputs,
        e.mask,
        several=e.critics is not None,
        response_length=e.response_mask.shape[1],
        segment_ids=e.segment_ids,
        output_positions=e.output_positions,
        samples_per_prompt=samples_per_prompt,
    )
