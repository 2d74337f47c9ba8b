"""Masks over tokens. Dimensions: B sequences, T response tokens, E stop ids."""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp


def masked_mean(
    x: jax.Array, mask: jax.Array, *, normalizer: jax.Array | float | None = None
) -> jax.Array:
    """Mean of x over the True positions of mask, summed in float32.

    mean = Σ_mask x / N, with N the count of the mask unless `normalizer` gives it. Micro-batches
    that all divide by the count of the whole batch add up to the mean of the whole batch.

    Args:
        x: float of any shape; what it holds where mask is False, NaN included, has no effect.
        mask: bool, the shape of x, True counts.
        normalizer: the N to divide by, a number; None is the count of this mask.

    Returns:
        A float32 scalar; 0 for an empty mask (N = 0 divides by 1).

    >>> masked_mean(jnp.array([1.0, 3.0, jnp.nan]), jnp.array([True, True, False])).item()
    2.0
    """
    chex.assert_type([x, mask], [float, bool])
    chex.assert_equal_shape([x, mask])
    count = jnp.sum(mask) if normalizer is None else normalizer
    chex.assert_rank(count, 0)

    count = jnp.asarray(count, jnp.float32)
    (x,) = zero_padding(mask, x)
    return jnp.sum(x) / jnp.where(count == 0, 1.0, count)


def zero_padding(mask: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Each array in float32, with zeros where mask is False.

    Formulas are applied after this, never before it: the gradient of `where(mask, f(x), 0)` is
    NaN where f(x) is, that of `f(where(mask, x, 0))` is not.

    Args:
        mask: bool, True counts.
        *arrays: float, each of the shape of mask.

    >>> zero_padding(jnp.array([True, False]), jnp.array([2.0, jnp.nan]))[0].tolist()
    [2.0, 0.0]
    """
    return tuple(jnp.where(mask, x.astype(jnp.float32), 0.0) for x in arrays)


def response_mask(tokens: jax.Array, eos_ids: Sequence[int] | jax.Array) -> jax.Array:
    """True up to and including the first stop token of each row.

    The stop token is inside the mask: stopping is a decision that is trained like any other.

    Args:
        tokens: [B, T] int, responses padded on the right.
        eos_ids: [E] int, every id that ends a response; may be empty.

    Returns:
        [B, T] bool, all True in a row without a stop token.

    >>> response_mask(jnp.array([[5, 2, 7], [5, 6, 7]]), eos_ids=[2]).tolist()
    [[True, True, False], [True, True, True]]
    """
    eos_ids = jnp.asarray(eos_ids, dtype=None if len(eos_ids) else tokens.dtype)
    chex.assert_rank([tokens, eos_ids], [2, 1])
    chex.assert_type([tokens, eos_ids], int)

    is_eos = jnp.isin(tokens, eos_ids.astype(tokens.dtype))
    stops_before = jnp.cumsum(is_eos, axis=1) - is_eos.astype(jnp.int32)
    return stops_before == 0


def last_token_index(mask: jax.Array) -> jax.Array:
    """Index of the last True of each row.

    Args:
        mask: [B, T] bool, True on response tokens; holes are allowed.

    Returns:
        [B] int32; 0 for a row without any True, so check `mask.any(axis=1)` where that may occur.

    >>> last_token_index(jnp.array([[True, True, False], [False, True, True]])).tolist()
    [1, 2]
    """
    chex.assert_rank(mask, 2)
    chex.assert_type(mask, bool)
    positions = jnp.arange(mask.shape[1], dtype=jnp.int32)[None, :]
    return jnp.max(jnp.where(mask, positions, 0), axis=1, initial=0)
