"""Attention in joined rows, see `core.shared_prompts`: no product is of a response with another.

Dimension key: as there, and H heads, J key/value heads, K head size.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from ppo_jax.core.shared_prompts import SharedPrompt
from ppo_jax.models.attention import AttentionFn, Outputs, plain_attention


def share_prompts(
    apart: AttentionFn, mask_GW: jax.Array, shared: SharedPrompt, window: int = 0
) -> "AttentionFn | SharedPromptAttention":
    """The attention of joined rows by that of the rows apart.

    A fused kernel has the rows apart, prompt by prompt: it is what lies around it, the products
    with parameters, that is computed once.
    """
    if not apart.takes_some_queries:
        return apart.replace(fn=functools.partial(attend_apart, fn=apart.fn, shared=shared))
    of_prompts = plain_attention(mask_GW[:, : shared.length], None, window, apart.score_cap)
    return SharedPromptAttention(of_prompts, apart, shared)


class SharedPromptAttention(struct.PyTreeNode):
    """`AttentionFn` of joined rows by plain attention."""

    of_prompts: AttentionFn
    apart: AttentionFn  # of the rows apart
    shared: SharedPrompt = struct.field(pytree_node=False)

    takes_some_queries = True

    def __call__(self, q_GWHK, k_GJWK, v_GJWK) -> jax.Array:
        """[G, W, H, K]: prompts attend to prompts, and responses to their own rows."""
        length = self.shared.length
        keys_of_prompts = k_GJWK[:, :, :length], v_GJWK[:, :, :length]
        prompts = self.of_prompts(q_GWHK[:, :length], *keys_of_prompts)
        queries = Outputs(first=length, shared=self.shared)
        responses = self.of(queries)(queries.take(q_GWHK), k_GJWK, v_GJWK)
        responses = responses.reshape(len(prompts), -1, *prompts.shape[2:])
        return jnp.concatenate([prompts, responses], axis=1)

    def of(self, queries: Outputs) -> "AttentionFn | SharedPromptAttention":
        """The attention of some queries of rows apart; that of joined rows where they are all."""
        if queries.are_all:
            return self
        apart = self.apart.of(queries.replace(shared=None))
        return apart.replace(fn=functools.partial(attend_rows, fn=apart.fn, shared=self.shared))


def attend_rows(
    q_NTHK, k_GJWK, v_GJWK, mask: Any, *cap, fn: Callable[..., jax.Array], shared: SharedPrompt
) -> jax.Array:
    """[N, T, H, K], queries of rows apart over the keys of joined rows: one softmax over those of
    the prompt, of which each has a copy, and its own."""
    keys = (split_keys(x, shared) for x in (k_GJWK, v_GJWK))
    return fn(q_NTHK, *keys, mask, *cap)


def attend_apart(
    q_GWHK, k_GJWK, v_GJWK, mask: Any, *cap, fn: Callable[..., jax.Array], shared: SharedPrompt
) -> jax.Array:
    """[G, W, H, K] by a function of rows apart."""
    keys = (split_keys(x, shared) for x in (k_GJWK, v_GJWK))
    return shared.join(fn(shared.split(q_GWHK), *keys, mask, *cap))


def split_keys(x_GJWK: jax.Array, shared: SharedPrompt) -> jax.Array:
    """[N, J, L, K]"""
    return shared.split(x_GJWK.swapaxes(1, 2)).swapaxes(1, 2)
