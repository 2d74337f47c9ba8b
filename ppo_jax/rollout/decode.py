"""Sampling responses with a KV cache, and the outputs at their tokens afterwards.

`decode_all` is the loop: prefill, then one token at a time until every response has ended.

Dimension key: N responses, S of them decoded at a time, B sequences, P prompt tokens, T response
tokens, L = P + T, D model, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from ppo_jax.core.distributions import token_statistics
from ppo_jax.core.lanes import any_lane
from ppo_jax.core.network import Network, shared_prompt
from ppo_jax.core.renamed import renamed
from ppo_jax.core.types import Params, Prompts
from ppo_jax.rollout.sampling import Sampling, choose, find_stops, init_matched


class Kept(NamedTuple):
    """What is kept of each position besides its token."""

    hidden_states: jax.Array | None = None  # [B, L, D], the trunk's; None without one
    experts: jax.Array | None = None  # [B, L, M, k] int, see `Network.routed`; None without any


class Policy(NamedTuple):
    """The policy with its parameters, above a trunk if there is one."""

    network: Network
    params: Params
    trunk: Network | None = None
    trunk_params: Params | None = None

    def init_caches(self, batch_size: int, length: int) -> tuple[Any, Any]:
        """Empty caches of (trunk or None, policy)."""
        trunk = None if self.trunk is None else self.trunk.init_cache(batch_size, length)
        return trunk, self.network.init_cache(batch_size, length)

    def refill_caches(self, caches: tuple, fresh: tuple, source: jax.Array) -> tuple[Any, Any]:
        """Row b starts over with prompt source[b] of the fresh caches, where that is not -1."""
        trunk = None if self.trunk is None else self.trunk.refill(caches[0], fresh[0], source)
        return trunk, self.network.refill(caches[1], fresh[1], source)

    @property
    def moves_rows(self) -> bool:
        """Whether the caches of some rows can be kept alone."""
        return all(n is None or n.map_rows is not None for n in (self.trunk, self.network))

    def num_shards(self, num_rows: int) -> int:
        """How many parts a mesh cuts so many rows into."""
        return self.network.num_shards(num_rows)

    def map_rows(self, function: Callable, caches: tuple) -> tuple[Any, Any]:
        """The caches with function(x) for each array x that has a row for each sequence."""
        trunk = None if self.trunk is None else self.trunk.map_rows(function, caches[0])
        return trunk, self.network.map_rows(function, caches[1])

    def empty_kept(self, prompts: Prompts) -> Kept:
        """Zeros in the place of what is kept of prompts."""
        if self.trunk is None and self.network.routed is None:
            return Kept()

        def kept():
            return self.prefill(prompts, self.init_caches(*prompts.tokens.shape))[0]

        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(kept))

    def forward(self, tokens, mask, caches, first_output=0):
        """New tokens through trunk and policy: (what is kept, logits [B, V], caches)."""
        inputs, hidden_states, trunk_cache, experts = tokens, None, None, None
        if self.trunk is not None:
            hidden_states, trunk_cache = self.trunk.decode(
                self.trunk_params, tokens, mask, caches[0]
            )
            inputs = hidden_states
        given = (self.params, inputs, mask, caches[1])
        if self.network.routed is None:
            logits, cache = self.network.decode(*given, first_output=first_output)
        else:
            decode = self.network.routed.decode
            logits, cache, experts = decode(*given, first_output=first_output)
        return Kept(hidden_states, experts), logits[:, 0], (trunk_cache, cache)

    def prefill(self, prompts: Prompts, caches: tuple):
        """`forward` of prompts [B, P], with the logits that predict the first response token."""
        length = prompts.tokens.shape[1]
        return self.forward(prompts.tokens, prompts.mask, caches, first_output=length - 1)


@struct.dataclass(kw_only=True)
class DecodeState:
    """What the decode loop carries from step to step.

    A step is one token in each row through the network, and the choice of the next. Token t of
    response s is in column (first_step[s] + t) mod T of the [S, T] arrays, so the last one that was
    chosen is in column step mod T of every row.
    """

    step: jax.Array  # [] int32, steps so far
    first_step: jax.Array  # [S] int32, 0 unless the response replaced a finished one
    keys: jax.Array  # [S] random key of the response
    active: jax.Array  # [S] bool, the last token is still to go through the network
    stopped: jax.Array  # [S] bool, by a stop token or a stop string
    matched: jax.Array | None  # [S] int32, state of the stop strings, see `find_stops`
    tokens: jax.Array  # [S, T] int32
    logprobs: jax.Array  # [S, T] float32
    mask: jax.Array  # [S, T] bool
    kept: Kept  # [S, T, ...]
    caches: Any  # (of the trunk or None, of the policy)


def max_steps(response_length: int, trunk: bool) -> int:
    """Of a response: its last token goes through the network only for a trunk's hidden states.

    >>> max_steps(64, trunk=False), max_steps(64, trunk=True)
    (63, 64)
    """
    return response_length if trunk else response_length - 1


def init_decode(
    policy: Policy,
    prompts: Prompts,
    keys: jax.Array,
    sampling: Sampling,
    temperature: jax.Array | float,
) -> tuple[DecodeState, Kept]:
    """(state after the first token, what is kept of the prompts).

    Each of the S / samples_per_prompt prompts is computed once, and its cache copied; `keys` [S],
    what is kept [S / samples, P, ...].
    """
    (count, prompt_length), num_rows = prompts.tokens.shape, len(keys)
    samples, capacity = sampling.samples_per_prompt, prompt_length + sampling.response_length
    caches = policy.init_caches(count, capacity if samples == 1 else prompt_length)
    of_prompts, logits, caches = policy.prefill(prompts, caches)
    if samples > 1:
        source = jnp.arange(num_rows, dtype=jnp.int32) // samples
        caches = policy.refill_caches(policy.init_caches(num_rows, capacity), caches, source)
        logits = logits[source]
    state = empty_rows(keys, caches, of_prompts, sampling)
    chosen = choose(logits, keys, jnp.int32(0), sampling, temperature)
    return add_tokens(state, *chosen, jnp.ones(num_rows, bool), sampling), of_prompts


def empty_rows(keys: jax.Array, caches: Any, of_prompts: Kept, sampling: Sampling) -> DecodeState:
    """Rows without a token, none of which is active; what is kept is as that of prompts."""
    shape = (len(keys), sampling.response_length)
    return DecodeState(
        step=jnp.int32(0),
        first_step=jnp.zeros(len(keys), jnp.int32),
        keys=keys,
        active=jnp.zeros(len(keys), bool),
        stopped=jnp.zeros(len(keys), bool),
        matched=init_matched(len(keys), sampling),
        tokens=jnp.zeros(shape, jnp.int32),
        logprobs=jnp.zeros(shape, jnp.float32),
        mask=jnp.zeros(shape, bool),
        kept=jax.tree.map(lambda x: jnp.zeros((*shape, *x.shape[2:]), x.dtype), of_prompts),
        caches=caches,
    )


def decode_step(
    policy: Policy, state: DecodeState, sampling: Sampling, temperature: jax.Array | float
) -> DecodeState:
    """The last token of each active row through the network, and the next one of those that go on.

    A row is active after its end for the hidden states of its last token alone.
    """
    s, column = state, state.step % sampling.response_length
    last = jax.lax.dynamic_slice_in_dim(s.tokens, column, 1, axis=1)
    last = jnp.where(s.active[:, None], last, 0)
    kept, logits, caches = policy.forward(last, s.active[:, None], s.caches)
    t = s.step + 1 - s.first_step  # number of the next token
    chosen = choose(logits, s.keys, t, sampling, temperature)
    goes_on = s.active & ~s.stopped & (t < sampling.response_length)
    kept = jax.tree.map(lambda x, new: write_column(x, new, column, s.active), s.kept, kept)
    s = dataclasses.replace(
        s,
        step=s.step + 1,
        active=jnp.zeros_like(s.active),
        kept=kept,
        caches=caches,
    )
    return add_tokens(s, *chosen, goes_on, sampling)


def add_tokens(
    state: DecodeState, tokens: jax.Array, logprobs: jax.Array, rows: jax.Array, sampling: Sampling
) -> DecodeState:
    """One more token, of [S], in the rows where `rows` [S] is True; the others stay as they are."""
    s, length = state, sampling.response_length
    column, t = s.step % length, s.step - s.first_step
    tokens = jnp.where(rows, tokens, 0)
    stops, matched = find_stops(tokens, s.matched, sampling)
    needs_states = s.kept.hidden_states is not None  # also of the last token
    active = jnp.bool_(True) if needs_states else ~stops & (t + 1 < length)
    return dataclasses.replace(
        s,
        active=jnp.where(rows, active, s.active),
        stopped=s.stopped | (rows & stops),
        matched=None if matched is None else jnp.where(rows, matched, s.matched),
        tokens=write_column(s.tokens, tokens[:, None], column, rows),
        logprobs=write_column(s.logprobs, logprobs[:, None], column, rows),
        mask=write_column(s.mask, rows[:, None], column, rows),
    )


def write_column(array: jax.Array, new: jax.Array, column: jax.Array, rows: jax.Array) -> jax.Array:
    """`new` [S, 1, ...] in a column of [S, T, ...], in the rows where `rows` is True.

    A finished response stays as it is, also where its row is kept for a while.
    """
    old = jax.lax.dynamic_slice_in_dim(array, column, 1, axis=1)
    new = jnp.where(rows.reshape(-1, *(1,) * (array.ndim - 1)), new, old)
    return jax.lax.dynamic_update_slice_in_dim(array, new, column, axis=1)


def decode_all(
    policy: Policy,
    prompts: Prompts,
    keys: jax.Array,
    sampling: Sampling,
    temperature: jax.Array | float,
) -> tuple[DecodeState, Kept]:
    """The plain loop: (state in which every response has ended, what is kept of the prompts)."""
    state, of_prompts = init_decode(policy, prompts, keys, sampling, temperature)
    state = jax.lax.while_loop(
        lambda s: any_lane(s.active.any()),
        lambda s: decode_step(policy, s, sampling, temperature),
        state,
    )
    return state, of_prompts


@renamed(segments="segment_ids", at="output_positions")
def response_outputs(
    network: Network,
    params: Params,
    inputs: jax.Array,
    mask: jax.Array,
    *,
    response_length: int,
    segment_ids: jax.Array | None = None,
    output_positions: jax.Array | None = None,
    samples_per_prompt: int = 1,
) -> jax.Array:
    """The network's outputs at the positions that predict response tokens, and nowhere else.

    Args:
        network: a policy, or a value network.
        params: its parameters.
        inputs: [B, L] int32 tokens or [B, L, D] hidden states, the response in the last T.
        mask: [B, L] bool.
        response_length: T.
        segment_ids: of packed rows, see `Experience`; inputs and mask then have L - 1 positions.
        output_positions: of packed rows.
        samples_per_prompt: so many rows after another have one prompt, which is computed once for
            all of them where the network supports it.

    Returns:
        [B, T, V] float32, the logits that predict each token, or [B, T] float32, the value of the
        state before it.
    """
    packed = segment_ids, output_positions
    inputs, mask, where = predictors(
        network, inputs, mask, response_length, *packed, samples_per_prompt
    )
    return network.apply(params, inputs, mask, **where)


def predictors(
    network, inputs, mask, response_length, segment_ids, output_positions, samples_per_prompt
):
    """(inputs, mask, where to read the outputs) of the positions that predict something, in joined
    rows where several have a prompt that the network can share.

    Raises:
        ValueError: a response of no token, or one before which there is nothing to predict it from.
    """
    if output_positions is None and not 0 < response_length < mask.shape[1]:
        raise ValueError(
            f"a response must have from 1 to {mask.shape[1] - 1} of the {mask.shape[1]} positions, "
            f"got {response_length}"
        )
    if output_positions is not None:
        return inputs, mask, {"segment_ids": segment_ids, "output_positions": output_positions}
    prompt_length = mask.shape[1] - response_length
    inputs, mask, where = inputs[:, :-1], mask[:, :-1], {"first_output": prompt_length - 1}
    groups = dict(prompt_length=prompt_length, samples=samples_per_prompt)
    if (shared := shared_prompt(network, len(mask), **groups)) is None:
        return inputs, mask, where
    return shared.join(inputs), shared.join(mask), where | {"shared_prompt": shared}


@renamed(segments="segment_ids", at="output_positions")
def response_statistics(
    network: Network,
    params: Params,
    inputs: jax.Array,
    mask: jax.Array,
    tokens: jax.Array,
    *,
    temperature: jax.Array | float = 1.0,
    segment_ids: jax.Array | None = None,
    output_positions: jax.Array | None = None,
    samples_per_prompt: int = 1,
    experts: jax.Array | None = None,
    response_mask: jax.Array | None = None,
    replay: bool = False,
) -> tuple[Any, ...]:
    """Log-probability of each response token, and the entropy of the distribution it is from.

    By the network's own `token_statistics` where it has them, else from all logits at once.

    Args:
        network: a policy.
        params: its parameters.
        inputs: [B, L] int32 tokens or [B, L, D] hidden states, the response in the last T.
        mask: [B, L] bool.
        tokens: [B, T] int32, the response.
        temperature: divides the logits; 0 counts as 1.
        segment_ids: see `response_outputs`.
        output_positions: see `response_outputs`.
        samples_per_prompt: see `response_outputs`.
        experts: [B, L, M, k] int, those of a rollout, see `Network.routed`, which is called.
        response_mask: [B, T] bool, the response tokens, where there are experts: other outputs
            have none.
        replay: these are the experts of each position here as well.

    Returns:
        (logprobs, entropies in nats), each [B, T] float32, undefined where mask is False; with
        experts (these two, `RouterStatistics`).
    """
    packed = segment_ids, output_positions
    inputs, mask, where = predictors(
        network, inputs, mask, tokens.shape[1], *packed, samples_per_prompt
    )
    if experts is not None:
        if output_positions is None:
            experts = experts[:, :-1]
        if "shared_prompt" in where:
            experts = where["shared_prompt"].join(experts)
        network = network.routed
        where |= dict(chosen=experts, replay=replay, output_mask=response_mask)
    if network.token_statistics is not None:
        return network.token_statistics(params, inputs, mask, tokens, temperature, **where)
    logits = network.apply(params, inputs, mask, **where)
    return token_statistics(logits, tokens, temperature=temperature)
