"""Advantages and their whitening. Dimensions: B sequences, T response tokens."""

import chex
import jax
import jax.numpy as jnp

from ppo_jax.core.checks import Number, assert_numbers
from ppo_jax.core.masking import masked_moments, zero_padding


def gae(
    rewards: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    *,
    gamma: Number = 1.0,
    gae_lambda: Number = 0.95,
    bootstrap_values: Number = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimation over the True steps of each row.

    A_t = δ_t + γ_t λ_t A_n  with  δ_t = r_t + γ_t V_n - V_t,  where n is the next True step after
    t, and V_n = bootstrap, A_n = 0 after the last one.

    Steps where mask is False are passed over as if they were cut out, so masks with holes
    (several turns) work. An episode that ends inside a row has a discount of 0 there.

    Args:
        rewards: [B, T] float, for taking step t.
        values: [B, T] float, of the state before step t.
        mask: [B, T] bool, True on the steps that count.
        gamma: discount per step, a number or [B, T].
        gae_lambda: 0 is one-step TD, 1 is Monte Carlo; a number, [B], [B, 1] or [B, T].
        bootstrap_values: value of the state after the last True step, a number or [B]; 0 for
            text, which ends with its last token.

    Returns:
        (advantages, returns), each [B, T] float32, zero where mask is False;
        returns = advantages + values.

    Reference: Schulman et al. 2015, https://arxiv.org/abs/1506.02438, eq. 16.

    >>> advantages, returns = gae(
    ...     rewards=jnp.array([[0.0, 1.0, 9.0]]),
    ...     values=jnp.array([[0.5, 0.5, 9.0]]),
    ...     mask=jnp.array([[True, True, False]]),
    ...     gae_lambda=1.0,
    ... )
    >>> advantages.tolist(), returns.tolist()
    ([[0.5, 0.5, 0.0]], [[1.0, 1.0, 0.0]])
    """
    chex.assert_rank([rewards, gamma, gae_lambda], [2, {0, 2}, {0, 1, 2}])
    chex.assert_rank(bootstrap_values, {0, 1})
    chex.assert_equal_shape([rewards, values, mask])
    chex.assert_type([rewards, values, mask], [float, float, bool])

    if jnp.shape(gae_lambda) == (len(mask), 1):  # as `length_adaptive_lambda` gives it
        gae_lambda = jnp.asarray(gae_lambda)[:, 0]
    discounts, lambdas = (spread(x, mask.shape) for x in (gamma, gae_lambda))
    bootstrap = spread(bootstrap_values, mask.shape[:1])
    rewards, values, discounts, lambdas = zero_padding(mask, rewards, values, discounts, lambdas)

    def step(carry, inputs):
        next_advantage, next_value = carry
        reward, value, discount, trace, is_step = inputs
        delta = reward + discount * next_value - value
        advantage = delta + discount * trace * next_advantage
        carry = (
            jnp.where(is_step, advantage, next_advantage),
            jnp.where(is_step, value, next_value),
        )
        return carry, advantage

    columns = (rewards.T, values.T, discounts.T, lambdas.T, mask.T)
    init = (jnp.zeros_like(bootstrap), bootstrap)
    _, advantages = jax.lax.scan(step, init, columns, reverse=True)
    (advantages,) = zero_padding(mask, advantages.T)
    return advantages, advantages + values


def spread(x: Number, shape: tuple[int, ...]) -> jax.Array:
    """x in float32 and in this shape: a number, or one for each row, or the whole array."""
    x = jnp.asarray(x, jnp.float32)
    chex.assert_shape(x, shape[: x.ndim])  # one row or column would serve for all without a word
    return jnp.broadcast_to(x.reshape(x.shape + (1,) * (len(shape) - x.ndim)), shape)


def length_adaptive_lambda(mask: jax.Array, *, alpha: Number) -> jax.Array:
    """A λ of the policy's advantages for each response, nearer to 1 the longer it is.

    λ = max(0, 1 - 1 / (alpha max(l, 1))), with l the True steps of the row. The weights λ^k of the
    steps ahead then add up to 1 / (1 - λ) = alpha l: they reach as far into any response.

    Args:
        mask: [B, T] bool, True on the steps that count.
        alpha: how far, in lengths of the response; 0.05 in the paper, where λ is 0 up to 20 steps.

    Returns:
        [B, 1] float32, from 0 to below 1, for `gae`.

    Raises:
        ValueError: alpha is known and not above 0.

    Reference: Yue et al. 2025, https://arxiv.org/abs/2504.05118 (VAPO).

    >>> mask = jnp.arange(40)[None] < jnp.array([[40], [10]])
    >>> length_adaptive_lambda(mask, alpha=0.05).tolist()
    [[0.5], [0.0]]
    """
    chex.assert_rank(mask, 2)
    chex.assert_type(mask, bool)
    assert_numbers(above=0, alpha=alpha)
    lengths = jnp.sum(mask, axis=1, keepdims=True, dtype=jnp.int32).astype(jnp.float32)
    return jnp.maximum(
        0.0, 1.0 - 1.0 / (jnp.asarray(alpha, jnp.float32) * jnp.maximum(lengths, 1.0))
    )


def whiten(x: jax.Array, mask: jax.Array, *, shift_mean: bool = True) -> jax.Array:
    """x scaled to unit variance, and shifted to zero mean, over the True positions of mask.

    y = (x - mean) / √(var + 1e-8), plus the mean if it is not to be shifted. The variance is
    that of the population (divided by N); equal numbers have none (see `masked_moments`), and
    x - mean then counts as 0.

    The statistics are those of the whole array: give it the whole batch, not a part of it.

    Args:
        x: float of any shape, mostly [B, T].
        mask: bool, the shape of x, True counts.
        shift_mean: False keeps the mean, as rewards need it.

    Returns:
        float32, the shape of x, zero where mask is False.

    Reference: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, in its published code.

    >>> whiten(jnp.array([[1.0, 3.0, 9.0]]), jnp.array([[True, True, False]])).tolist()
    [[-1.0, 1.0, 0.0]]
    """
    chex.assert_equal_shape([x, mask])
    chex.assert_type([x, mask], [float, bool])

    (x,) = zero_padding(mask, x)
    mean, variance = masked_moments(x, mask)
    centered = jnp.where(variance == 0, 0.0, x - mean)
    whitened = centered * jax.lax.rsqrt(variance + 1e-8)
    (whitened,) = zero_padding(mask, whitened if shift_mean else whitened + mean)
    return whitened
