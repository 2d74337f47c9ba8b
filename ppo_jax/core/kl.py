"""KL divergence between the policy and its reference. Dimensions: B sequences, T tokens."""

import chex
import jax
import jax.numpy as jnp

from ppo_jax.core.checks import Number, assert_numbers
from ppo_jax.core.renamed import renamed

LOG_RATIO_LIMIT = 20.0  # nats: exp of more says nothing, and above 88 it is infinite in float32


def _k3(d):
    """Through expm1: near d = 0 the terms of the plain form cancel, and it may come out below 0."""
    d = jnp.maximum(d, -LOG_RATIO_LIMIT)
    return jnp.expm1(-d) + d


# The estimators, as functions of d = logprobs - ref_logprobs.
ESTIMATORS = {
    "k1": lambda d: d,
    "k2": lambda d: 0.5 * jnp.square(d),
    "k3": _k3,
}
REWARD_ESTIMATORS = ("k1",)  # those that, as a penalty in the rewards, lead back to the reference
REWARD_RULE = (
    f"one of {list(REWARD_ESTIMATORS)}, or any_kl_estimator True: in the rewards the others push "
    "the policy away from the reference"
)


@renamed(kind="estimator")
def kl_estimate(
    logprobs: jax.Array, ref_logprobs: jax.Array, *, estimator: str = "k1"
) -> jax.Array:
    """Per-token estimates of KL(policy || reference), for tokens sampled from the policy.

    With d = logprobs - ref_logprobs:  k1 = d,  k2 = d² / 2,  k3 = exp(-d) - 1 + d.

    As values, k1 and k3 are unbiased; k2 and k3 are never negative. In k3, d below -20 counts as
    -20.

    In a reward it is the gradient that matters, and there k1 alone is right: the gradient of the
    KL is E[k1 ∇log π]. Since E[∇log π] = 0, and k2 and k3 grow like d² / 2, theirs is zero to first
    order at the reference, and farther out need not lead back to it.

    Args:
        logprobs: float of any shape, mostly [B, T], of the sampled tokens under the policy.
        ref_logprobs: float, the same shape, of the same tokens under the reference.
        estimator: a key of `ESTIMATORS`.

    Returns:
        float32 of that shape, in nats. Elementwise: what padding holds stays in padding.

    Raises:
        ValueError: the estimator is unknown.

    Reference: Schulman 2020, http://joschu.net/blog/kl-approx.html.

    >>> kl_estimate(jnp.array([[-1.0]]), jnp.array([[-3.0]]), estimator="k2").item()
    2.0
    """
    chex.assert_equal_shape([logprobs, ref_logprobs])
    chex.assert_type([logprobs, ref_logprobs], float)

    if estimator not in ESTIMATORS:
        known = sorted(ESTIMATORS)
        raise ValueError(f"estimator must be one of {known}, got {estimator!r}")
    logprobs, ref_logprobs = (jnp.asarray(x, jnp.float32) for x in (logprobs, ref_logprobs))
    return ESTIMATORS[estimator](logprobs - ref_logprobs)


def adaptive_kl_coef(
    kl_coef: Number,
    kl: Number,
    *,
    target_kl: Number,
    horizon: Number,
    batch_size: Number,
) -> jax.Array:
    """Next coefficient of the KL penalty, which rises while the KL is above its target.

    kl_coef' = kl_coef max(0.1, 1 + clip(kl / target_kl - 1, -0.2, 0.2) batch_size / horizon).

    The limit of 0.1 keeps the coefficient above 0; it is reached where the horizon is less than
    0.22 batches.

    Args:
        kl_coef: coefficient of this iteration.
        kl: mean KL of this iteration, in nats per response.
        target_kl: KL to hold, in nats per response; above 0.
        horizon: episodes over which the coefficient adapts; above 0.
        batch_size: episodes of this iteration; above 0.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: a number that is known is not above 0.

    Reference: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, section 2.2.

    >>> round(adaptive_kl_coef(0.1, 12.0, target_kl=6.0, horizon=100, batch_size=10).item(), 6)
    0.102
    """
    chex.assert_rank([kl_coef, kl], 0)
    assert_numbers(above=0, target_kl=target_kl, horizon=horizon, batch_size=batch_size)
    kl = jnp.asarray(kl, jnp.float32)
    target_kl, horizon = jnp.asarray(target_kl, jnp.float32), jnp.asarray(horizon, jnp.float32)
    error = jnp.clip(kl / target_kl - 1.0, -0.2, 0.2)
    step = error * jnp.asarray(batch_size, jnp.float32) / horizon
    return jnp.asarray(kl_coef, jnp.float32) * jnp.maximum(1.0 + step, 0.1)
