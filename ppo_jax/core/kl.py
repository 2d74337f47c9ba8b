"""KL divergence between the policy and its reference. Dimensions: B sequences, T tokens."""

import chex
import jax
import jax.numpy as jnp

from ppo_jax.core.renamed import renamed

Number = jax.Array | float

# The estimators, as functions of d = logprobs - ref_logprobs. k3 goes through expm1: near d = 0 the
# terms of the plain form cancel, and it may come out below 0.
ESTIMATORS = {
    "k1": lambda d: d,
    "k2": lambda d: 0.5 * jnp.square(d),
    "k3": lambda d: jnp.expm1(-d) + d,
}


@renamed(kind="estimator")
def kl_estimate(
    logprobs: jax.Array, ref_logprobs: jax.Array, *, estimator: str = "k1"
) -> jax.Array:
    """Per-token estimates of KL(policy || reference), for tokens sampled from the policy.

    With d = logprobs - ref_logprobs:  k1 = d,  k2 = d² / 2,  k3 = exp(-d) - 1 + d.

    k1 and k3 are unbiased; k2 and k3 are never negative.

    Args:
        logprobs: [B, T] float, of the sampled tokens under the policy.
        ref_logprobs: [B, T] float, of the same tokens under the reference.
        estimator: a key of `ESTIMATORS`.

    Returns:
        [B, T] float32 in nats. Elementwise: what padding holds stays in padding.

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
    return ESTIMATORS[estimator](logprobs.astype(jnp.float32) - ref_logprobs.astype(jnp.float32))


def adaptive_kl_coef(
    kl_coef: Number,
    kl: Number,
    *,
    target_kl: Number,
    horizon: Number,
    batch_size: Number,
) -> jax.Array:
    """Next coefficient of the KL penalty, which rises while the KL is above its target.

    kl_coef' = kl_coef (1 + clip(kl / target_kl - 1, -0.2, 0.2) batch_size / horizon).

    Args:
        kl_coef: coefficient of this iteration.
        kl: mean KL of this iteration, in nats per response.
        target_kl: KL to hold, in nats per response.
        horizon: episodes over which the coefficient adapts.
        batch_size: episodes of this iteration.

    Returns:
        A float32 scalar.

    Reference: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, section 2.2.

    >>> round(adaptive_kl_coef(0.1, 12.0, target_kl=6.0, horizon=100, batch_size=10).item(), 6)
    0.102
    """
    chex.assert_rank([kl_coef, kl], 0)
    kl = jnp.asarray(kl, jnp.float32)
    target_kl, horizon = jnp.asarray(target_kl, jnp.float32), jnp.asarray(horizon, jnp.float32)
    error = jnp.clip(kl / target_kl - 1.0, -0.2, 0.2)
    step = error * jnp.asarray(batch_size, jnp.float32) / horizon
    return jnp.asarray(kl_coef, jnp.float32) * (1.0 + step)
