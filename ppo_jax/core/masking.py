"""Masks over tokens. Dimensions: B sequences, T response tokens, E stop ids."""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp

from ppo_jax.core.checks import Number, assert_numbers


def masked_mean(x: jax.Array, mask: jax.Array, *, normalizer: Number | None = None) -> jax.Array:
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
    assert_numbers(at_least=0, normalizer=normalizer)

    count = jnp.asarray(jnp.sum(mask) if normalizer is None else normalizer, jnp.float32)
    (x,) = zero_padding(mask, x)
    return jnp.sum(x) / jnp.where(count == 0, 1.0, count)


def masked_moments(x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of the population over the True positions of mask, in float32.

    mean = m + mean (x - m), m = mean x: the second mean takes out the rounding of the first.
    variance = mean (x - mean)², and 0 where √variance ≤ 8 ε max |x|, ε = 2⁻²³: equal numbers differ
    from their mean by rounding, which must not pass for a variance.

    Args:
        x: float of any shape; what it holds where mask is False, NaN included, has no effect.
        mask: bool, the shape of x, True counts.

    Returns:
        (mean, variance), float32 scalars; both 0 for an empty mask.

    >>> mean, variance = masked_moments(jnp.array([1.0, 3.0, 9.0]), jnp.array([True, True, False]))
    >>> mean.item(), variance.item()
    (2.0, 1.0)
    """
    (x,) = zero_padding(mask, x)
    mean = masked_mean(x, mask)
    mean = mean + masked_mean(x - mean, mask)
    variance = masked_mean(jnp.square(x - mean), mask)
    largest = jnp.max(jnp.abs(x), initial=0.0)
    is_rounding = jnp.sqrt(variance) <= 8 * jnp.finfo(jnp.float32).eps * largest
    return mean, jnp.where(is_rounding, 0.0, variance)


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
        eos_ids: [E] int, every id that ends a response; may be empty. One that does not fit the
            dtype of tokens is none of theirs.

    Returns:
        [B, T] bool, all True in a row without a stop token.

    >>> response_mask(jnp.array([[5, 2, 7], [5, 6, 7]]), eos_ids=[2]).tolist()
    [[True, True, False], [True, True, True]]
    """
    eos_ids = jnp.asarray(eos_ids, dtype=None if len(eos_ids) else tokens.dtype)
    chex.assert_rank([tokens, eos_ids], [2, 1])
    chex.assert_type([tokens, eos_ids], int)

    both = jnp.promote_types(tokens.dtype, eos_ids.dtype)  # where no id wraps around
    is_eos = jnp.isin(tokens.astype(both), eos_ids.astype(both))
    stops_before = jnp.cumsum(is_eos, axis=1, dtype=jnp.int32) - is_eos.astype(jnp.int32)
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
