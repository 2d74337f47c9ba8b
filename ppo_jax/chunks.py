"""Statistics of logits that exist for some positions at a time.

Dimension key: B sequences, T positions, C positions of a chunk, D model, V vocabulary.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ppo_jax.distributions import Number, token_statistics


def chunked_token_statistics(
    logits: Callable[[jax.Array, jax.Array], jax.Array],
    weights: jax.Array,
    hidden: jax.Array,
    tokens: jax.Array,
    *,
    temperature: Number = 1.0,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """`token_statistics` of logits that exist for some positions at a time.

    The backward pass computes the logits of a chunk again.

    Args:
        logits: (weights, [B, C, D] hidden states) -> [B, C, V] float.
        weights: all that `logits` depends on besides the hidden states.
        hidden: [B, T, D] float.
        tokens: [B, T] int.
        temperature: see `token_statistics`.
        chunk: the most positions C of each sequence at a time, at least 1.

    Returns:
        (logprobs, entropies in nats), each [B, T] float32.
    """
    batch_size, length = tokens.shape
    count, size = chunk_shape(length, chunk)
    # In float32, so that the gradients of the chunks are added in float32.
    wide = weights.astype(jnp.float32)

    def cut(x):
        """[B, T, ...] to [count, B, size, ...]"""
        x = jnp.pad(x, [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(batch_size, count, size, *x.shape[2:]).swapaxes(0, 1)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def piece(wide, hidden, tokens):
        found = logits(wide.astype(weights.dtype), hidden)
        return token_statistics(found, tokens, temperature=temperature)

    _, found = jax.lax.scan(lambda _, x: (None, piece(wide, *x)), None, (cut(hidden), cut(tokens)))
    logprobs, entropies = (x.swapaxes(0, 1).reshape(batch_size, -1)[:, :length] for x in found)
    return logprobs, entropies


def chunk_shape(length: int, chunk: int) -> tuple[int, int]:
    """(chunks, positions in each): as few as can be of at most `chunk`, all of one size.

    >>> chunk_shape(100, 40), chunk_shape(10, 99)
    ((3, 34), (1, 10))
    """
    count = math.ceil(length / chunk)
    return count, math.ceil(length / count)
