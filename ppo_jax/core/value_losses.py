"""Losses of the critic, and how good it is. Dimensions: B sequences, T response tokens.

Losses add up over micro-batches as those of `policy_losses` do.
"""

import chex
import jax
import jax.numpy as jnp

from ppo_jax.core.checks import Number, assert_numbers
from ppo_jax.core.masking import masked_mean, masked_moments, zero_padding
from ppo_jax.core.policy_losses import Metrics


def clipped_value_loss(
    values: jax.Array,
    old_values: jax.Array,
    returns: jax.Array,
    mask: jax.Array,
    *,
    value_clip_range: Number | None = 0.2,
    normalizer: Number | None = None,
) -> tuple[jax.Array, Metrics]:
    """Squared error of the critic, which gains nothing by moving far from its old values.

    L = ½ mean max((V - R)², (clip(V, V_old - ε, V_old + ε) - R)²), in float32.

    Args:
        values: [B, T] float, of the critic that is trained.
        old_values: [B, T] float, when the responses were sampled; a constant.
        returns: [B, T] float; a constant.
        mask: [B, T] bool, True counts; what the others hold elsewhere has no effect.
        value_clip_range: ε, in units of the values; None is no clip, and old_values then do not
            matter.
        normalizer: what the sum is divided by; None is the count of the mask.

    Returns:
        (loss, metrics): value/loss; value/clip_fraction, the share of tokens whose clipped term
        is the larger.

    Reference: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, in its published code.

    >>> loss, _ = clipped_value_loss(
    ...     values=jnp.array([[2.0]]),
    ...     old_values=jnp.array([[0.0]]),
    ...     returns=jnp.array([[2.0]]),
    ...     mask=jnp.array([[True]]),
    ...     value_clip_range=1.0,
    ... )
    >>> loss.item()
    0.5
    """
    chex.assert_equal_shape([values, old_values, returns, mask])
    chex.assert_type([values, old_values, returns, mask], [float, float, float, bool])
    assert_numbers(at_least=0, value_clip_range=value_clip_range)

    old_values, returns = jax.lax.stop_gradient((old_values, returns))
    values, old, returns = zero_padding(mask, values, old_values, returns)
    unclipped = clipped = jnp.square(values - returns)
    if value_clip_range is not None:
        # Not old + clip(values - old): its rounding would count as clipping.
        near = jnp.clip(values, old - value_clip_range, old + value_clip_range)
        clipped = jnp.square(near - returns)

    is_clipped = (clipped > unclipped).astype(jnp.float32)
    loss = 0.5 * masked_mean(jnp.maximum(unclipped, clipped), mask, normalizer=normalizer)
    metrics = {
        "value/loss": loss,
        "value/clip_fraction": masked_mean(is_clipped, mask, normalizer=normalizer),
    }
    return loss, jax.lax.stop_gradient(metrics)


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
