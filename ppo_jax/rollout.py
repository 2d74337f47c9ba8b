"""Sampling responses with a KV cache, and what is read off them afterwards.

Dimension key: B sequences, P prompt tokens, T response tokens, L = P + T, D model, V vocabulary.
"""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import struct

from ppo_jax.distributions import sample, token_logprobs
from ppo_jax.networks import Network
from ppo_jax.structs import Params, Prompts, Rollout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """What shapes the sampling program; the temperature is a number, passed apart."""

    response_length: int  # T, the most tokens a response may have
    eos_ids: tuple[int, ...]  # a response ends with any of these; () samples T tokens
    top_k: int = 0  # 0 is off
    top_p: float = 1.0  # 1 is off
    min_p: float = 0.0  # 0 is off


@struct.dataclass(kw_only=True)
class Decoding:
    """What the decode loop carries from token to token."""

    t: jax.Array  # [] int32, the response token to choose next
    logits: jax.Array  # [B, V], that predict it
    alive: jax.Array  # [B] bool, no stop token yet
    tokens: jax.Array  # [B, T] int32
    logprobs: jax.Array  # [B, T] float32
    mask: jax.Array  # [B, T] bool
    hidden: jax.Array | None  # [B, L, D], what the trunk gave so far
    caches: Any  # (of the trunk or None, of the policy)


def rollout(
    policy: Network,
    params: Params,
    prompts: Prompts,
    key: jax.Array,
    *,
    sampling: Sampling,
    temperature: jax.Array | float = 1.0,
    rows: jax.Array | None = None,
    trunk: Network | None = None,
    trunk_params: Params | None = None,
) -> Rollout:
    """Sample one response to each prompt, in one `lax.while_loop`.

    Each token has a key of its own, fold_in(fold_in(key, row), t), so a response depends neither
    on the batch it was sampled in nor on how the batch lies on devices. The loop ends when every
    row has stopped.

    Args:
        policy: the network that gives logits; above `trunk` when there is one.
        params: the policy's parameters.
        prompts: B prompts, padded on the left.
        key: consumed.
        sampling: length, stop tokens and filters.
        temperature: of the sampling; 0 is greedy, and then `logprobs` are those at 1.
        rows: [B] int, the numbers that tell the rows apart; 0 .. B - 1 by default.
        trunk: frozen lower layers, run once per token; their hidden states are kept, so that
            other networks on the same trunk need not run it again.
        trunk_params: the trunk's parameters.

    Returns:
        The rollout. `logprobs` are over the full vocabulary, before the filters.
    """
    chex.assert_rank([prompts.tokens, prompts.mask], 2)
    chex.assert_equal_shape([prompts.tokens, prompts.mask])
    chex.assert_type([prompts.tokens, prompts.mask], [int, bool])
    batch_size, prompt_length = prompts.tokens.shape
    length = sampling.response_length
    rows = jnp.arange(batch_size) if rows is None else rows
    row_keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)
    eos_ids = jnp.asarray(sampling.eos_ids, jnp.int32)

    def forward(tokens, mask, caches, start=0):
        """New tokens through trunk and policy: (hidden states or None, logits [B, V], caches)."""
        inputs, trunk_cache = tokens, None
        if trunk is not None:
            inputs, trunk_cache = trunk.decode(trunk_params, tokens, mask, caches[0])
        logits, cache = policy.decode(params, inputs, mask, caches[1], start=start)
        hidden = None if trunk is None else inputs
        return hidden, logits[:, 0], (trunk_cache, cache)

    def advance(s: Decoding) -> Decoding:
        tokens, logprobs = choose(s.logits, row_keys, s.t, sampling, temperature)
        tokens, logprobs = (jnp.where(s.alive, x, 0) for x in (tokens, logprobs))
        hidden, logits, caches = forward(tokens[:, None], s.alive[:, None], s.caches)
        if hidden is not None:
            hidden = jax.lax.dynamic_update_slice_in_dim(
                s.hidden, hidden, prompt_length + s.t, axis=1
            )
        return Decoding(
            t=s.t + 1,
            logits=logits,
            alive=s.alive & ~is_eos(tokens, eos_ids),
            tokens=s.tokens.at[:, s.t].set(tokens),
            logprobs=s.logprobs.at[:, s.t].set(logprobs),
            mask=s.mask.at[:, s.t].set(s.alive),
            hidden=hidden,
            caches=caches,
        )

    capacity = prompt_length + length
    caches = tuple(n and n.init_cache(batch_size, capacity) for n in (trunk, policy))
    prefill = forward(prompts.tokens, prompts.mask, caches, start=prompt_length - 1)
    begin = init_decoding(*prefill, response_length=length)
    end = jax.lax.while_loop(lambda s: (s.t < length) & s.alive.any(), advance, begin)
    return Rollout(
        prompt_tokens=prompts.tokens,
        prompt_mask=prompts.mask,
        response_tokens=end.tokens,
        response_mask=end.mask,
        logprobs=end.logprobs,
        has_eos=~end.alive,
        hidden=end.hidden,
    )


def init_decoding(
    hidden: jax.Array | None, logits: jax.Array, caches: Any, *, response_length: int
) -> Decoding:
    """Before the first response token, from what the prompts gave: hidden [B, P, D] or None,
    logits [B, V] and the caches."""
    shape = (logits.shape[0], response_length)
    if hidden is not None:
        hidden = jnp.pad(hidden, ((0, 0), (0, response_length), (0, 0)))
    return Decoding(
        t=jnp.int32(0),
        logits=logits,
        alive=jnp.ones(shape[0], bool),
        tokens=jnp.zeros(shape, jnp.int32),
        logprobs=jnp.zeros(shape, jnp.float32),
        mask=jnp.zeros(shape, bool),
        hidden=hidden,
        caches=caches,
    )


def is_eos(tokens: jax.Array, eos_ids: jax.Array) -> jax.Array:
    """[B] bool: which tokens are stop tokens."""
    return (tokens[:, None] == eos_ids[None]).any(axis=1)


def choose(logits, row_keys, t, sampling: Sampling, temperature) -> tuple[jax.Array, jax.Array]:
    """One token a row from logits [B, V], and its log-prob over the full vocabulary."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(row_keys, t)

    def one(key, row_logits):
        return sample(
            key,
            row_logits,
            temperature=temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
        )

    tokens = jax.vmap(one)(keys, logits).astype(jnp.int32)
    logprobs = token_logprobs(logits[:, None], tokens[:, None], temperature=temperature)
    return tokens, logprobs[:, 0]


def response_outputs(
    network: Network, params: Params, inputs: jax.Array, mask: jax.Array, *, response_length: int
) -> jax.Array:
    """What a network gives before each response token, and nowhere else.

    Args:
        network: a policy, or a value network.
        params: its parameters.
        inputs: [B, L] int32 tokens or [B, L, D] hidden states, the response in the last T.
        mask: [B, L] bool.
        response_length: T.

    Returns:
        [B, T, V] float32, the logits that predict each token, or [B, T] float32, the value of the
        state before it.
    """
    start = mask.shape[1] - response_length - 1
    return network.apply(params, inputs[:, :-1], mask[:, :-1], start=start)
