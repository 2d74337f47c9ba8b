"""How good a critic is, on whole batches, and what several critics agree on.

Dimensions: B sequences, T response tokens, K critics, N bins. V are values, R returns. Shares of a
batch do not add up over parts: give these functions the whole batch. None has a gradient.
"""

import chex
import jax
import jax.numpy as jnp

from ppo_jax.core.checks import Number, assert_counts, assert_numbers
from ppo_jax.core.masking import masked_mean, masked_moments, zero_padding


def explained_variance(values: jax.Array, returns: jax.Array, mask: jax.Array) -> jax.Array:
    """Share of the variance of the returns that the values explain.

    1 - mean (R - V)² / var(R): 1 is a perfect critic, 0 is one that knows the mean alone.

    A ratio of two means, so it does not add up over parts: give it the whole batch.

    Args:
        values: [B, T] float.
        returns: [B, T] float.
        mask: [B, T] bool, True counts; what the others hold elsewhere has no effect.

    Returns:
        A float32 scalar without gradient, at most 1; 0 if the returns do not vary, see
        `masked_moments`.

    >>> values, mask = jnp.array([[1.0, 2.0]]), jnp.array([[True, True]])
    >>> explained_variance(values, jnp.array([[1.0, 3.0]]), mask).item()
    0.5
    """
    chex.assert_equal_shape([values, returns, mask])
    chex.assert_type([values, returns, mask], [float, float, bool])

    values, returns = zero_padding(mask, *jax.lax.stop_gradient((values, returns)))
    error = masked_mean(jnp.square(returns - values), mask)
    _, variance = masked_moments(returns, mask)
    varies = variance > 0
    return jnp.where(varies, 1.0 - error / jnp.where(varies, variance, 1.0), 0.0)


def explained_variance_by_position(
    values: jax.Array, returns: jax.Array, mask: jax.Array, *, num_bins: int
) -> jax.Array:
    """`explained_variance` apart for the first, second, ... part of each response.

    Token i of the n of a response (those of its mask) is in part floor(i N / n). A critic of a
    late reward knows the last parts long before the first.

    Args:
        values: [B, T] float.
        returns: [B, T] float.
        mask: [B, T] bool, True counts; what the others hold elsewhere has no effect.
        num_bins: N, the number of parts; 4 are quarters.

    Returns:
        [N] float32, 0 for a part without tokens.

    Raises:
        ValueError: num_bins is not whole and at least 1.

    >>> values, mask = jnp.array([[1.0, 0.0], [3.0, 0.0]]), jnp.ones((2, 2), bool)
    >>> returns = jnp.array([[1.0, 1.0], [3.0, 3.0]])
    >>> explained_variance_by_position(values, returns, mask, num_bins=2).tolist()
    [1.0, -4.0]
    """
    chex.assert_rank(mask, 2)
    assert_counts(num_bins=num_bins)
    index = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
    length = jnp.sum(mask, axis=1, keepdims=True, dtype=jnp.int32)
    part = index * num_bins // jnp.maximum(length, 1)
    of_part = jax.vmap(lambda n: explained_variance(values, returns, mask & (part == n)))
    return of_part(jnp.arange(num_bins, dtype=jnp.int32))


def value_bias(values: jax.Array, returns: jax.Array, mask: jax.Array) -> jax.Array:
    """mean (V - R): above 0 for a critic that hopes for too much.

    Args:
        values: [B, T] float.
        returns: [B, T] float.
        mask: [B, T] bool, True counts; what the others hold elsewhere has no effect.

    Returns:
        A float32 scalar; 0 for an empty mask.

    >>> mask = jnp.array([[True, False]])
    >>> value_bias(jnp.array([[3.0, 9.0]]), jnp.array([[1.0, 0.0]]), mask).item()
    2.0
    """
    chex.assert_equal_shape([values, returns, mask])
    chex.assert_type([values, returns, mask], [float, float, bool])
    values, returns = zero_padding(mask, *jax.lax.stop_gradient((values, returns)))
    return masked_mean(values - returns, mask)


def value_calibration(
    values: jax.Array, returns: jax.Array, mask: jax.Array, *, num_bins: int
) -> tuple[jax.Array, jax.Array]:
    """Mean value and mean return of the tokens with the lowest values, the next, ..., the highest.

    The n tokens in the order of their values are cut into N bins of (nearly) equal count: that of
    rank i is in bin floor(i N / n). A calibrated critic has both means equal in every bin.

    Args:
        values: [B, T] float.
        returns: [B, T] float.
        mask: [B, T] bool, True counts; what the others hold elsewhere has no effect.
        num_bins: N; a bin is empty if there are fewer tokens.

    Returns:
        (mean_values, mean_returns): [N] float32 each, NaN for an empty bin.

    Raises:
        ValueError: num_bins is not whole and at least 1.

    >>> values, mask = jnp.array([[4.0, 1.0, 3.0, 2.0]]), jnp.ones((1, 4), bool)
    >>> value_calibration(values, values + 1, mask, num_bins=2)[1].tolist()
    [2.5, 4.5]
    """
    chex.assert_equal_shape([values, returns, mask])
    chex.assert_type([values, returns, mask], [float, float, bool])
    assert_counts(num_bins=num_bins)

    values, returns = zero_padding(mask, *jax.lax.stop_gradient((values, returns)))
    order = jnp.argsort(jnp.where(mask, values, jnp.inf), axis=None)  # padding comes last
    count = jnp.sum(mask, dtype=jnp.int32)
    rank = jnp.arange(mask.size, dtype=jnp.int32)[None]
    bin_of_rank = rank * num_bins // jnp.maximum(count, 1)
    is_in = (bin_of_rank == jnp.arange(num_bins, dtype=jnp.int32)[:, None]) & (rank < count)
    size = jnp.sum(is_in, axis=1, dtype=jnp.int32).astype(jnp.float32)

    def means(x: jax.Array) -> jax.Array:
        total = jnp.sum(jnp.where(is_in, x.ravel()[order][None], 0.0), axis=1)
        return jnp.where(size > 0, total, jnp.nan) / jnp.maximum(size, 1.0)

    return means(values), means(returns)


def ensemble_values(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of the values of several critics, of the population, in float32.

    The mean is the value that advantages are made of, the deviation what the critics disagree by.

    Args:
        values: [K, B, T] float, of K critics; constants.

    Returns:
        (mean, std): [B, T] each; std is exactly 0 where all values are equal.

    Reference: Liu et al. 2025 (AsyPPO), https://arxiv.org/abs/2510.01656.

    >>> mean, std = ensemble_values(jnp.array([[[1.0]], [[3.0]]]))
    >>> mean.item(), std.item()
    (2.0, 1.0)
    """
    chex.assert_rank(values, 3)
    chex.assert_type(values, float)
    values = jax.lax.stop_gradient(values)
    critics = jnp.ones(len(values), bool)
    of_state = jax.vmap(jax.vmap(lambda x: masked_moments(x, critics), 1), 1)
    mean, variance = of_state(values)
    return mean, jnp.sqrt(variance)


def mask_agreed_advantages(
    advantages: jax.Array, stds: jax.Array, mask: jax.Array, *, fraction: Number
) -> jax.Array:
    """Advantages, and 0 where several critics disagree least.

    Of the n tokens the round(n fraction) with the smallest deviation teach nothing. One that
    equals the smallest deviation left stays, so critics that are all equal mask nothing.

    Args:
        advantages: [B, T] float.
        stds: [B, T] float, of `ensemble_values`; a constant.
        mask: [B, T] bool, True counts; what the others hold elsewhere has no effect.
        fraction: share of the tokens, from 0 to 1.

    Returns:
        [B, T] float32, 0 outside the mask.

    Raises:
        ValueError: fraction is not from 0 to 1.

    Reference: Liu et al. 2025 (AsyPPO), https://arxiv.org/abs/2510.01656.

    >>> stds, mask = jnp.array([[0.3, 0.1, 0.2, 0.4]]), jnp.ones((1, 4), bool)
    >>> mask_agreed_advantages(jnp.ones((1, 4)), stds, mask, fraction=0.5).tolist()
    [[1.0, 0.0, 0.0, 1.0]]
    """
    chex.assert_equal_shape([advantages, stds, mask])
    chex.assert_type([advantages, stds, mask], [float, float, bool])
    agreed = smallest(stds, mask, fraction)
    return jnp.where(agreed, 0.0, zero_padding(mask, advantages)[0])


def disputed_states(stds: jax.Array, mask: jax.Array, *, fraction: Number) -> jax.Array:
    """Where several critics disagree most: states that are left out of the entropy bonus.

    The round(n fraction) of n tokens with the largest deviation, less those that equal the
    largest one left: exploring where no critic knows the value is noise.

    Args:
        stds: [B, T] float, of `ensemble_values`; a constant.
        mask: [B, T] bool, True counts; what stds hold elsewhere has no effect.
        fraction: share of the tokens, from 0 to 1.

    Returns:
        [B, T] bool, False outside the mask.

    Raises:
        ValueError: fraction is not from 0 to 1.

    Reference: Liu et al. 2025 (AsyPPO), https://arxiv.org/abs/2510.01656.

    >>> stds, mask = jnp.array([[0.3, 0.1, 0.2, 0.4]]), jnp.ones((1, 4), bool)
    >>> disputed_states(stds, mask, fraction=0.25).tolist()
    [[False, False, False, True]]
    """
    chex.assert_equal_shape([stds, mask])
    chex.assert_type([stds, mask], [float, bool])
    return smallest(-stds, mask, fraction)


def smallest(x: jax.Array, mask: jax.Array, fraction: Number) -> jax.Array:
    """Where x is below the number of rank round(n fraction) among the n that the mask counts."""
    assert_numbers(at_least=0, at_most=1, fraction=fraction)
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    x = jnp.where(mask, x, jnp.inf)
    count = jnp.sum(mask, dtype=jnp.int32).astype(jnp.float32)
    rank = jnp.round(jnp.asarray(fraction, jnp.float32) * count).astype(jnp.int32)
    # With the whole share there is no number left to be below.
    ordered = jnp.append(jnp.sort(x, axis=None), jnp.inf)
    return mask & (x < ordered[rank])
