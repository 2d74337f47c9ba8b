"""Losses of the policy: each returns (loss, metrics). Dimensions: B sequences, T response tokens.

A masked loss divides by the count of its mask, or by `normalizer`. Give every micro-batch the
count of the whole minibatch, and the losses, the gradients and the metrics add up to those of
the minibatch; `policy/ratio_max` alone is a maximum. Metrics carry no gradient.
"""

import chex
import jax
import jax.numpy as jnp

from ppo_jax.core.checks import Number, assert_numbers
from ppo_jax.core.kl import LOG_RATIO_LIMIT
from ppo_jax.core.masking import masked_mean, zero_padding

Metrics = dict[str, jax.Array]


def probability_ratio(log_ratio: jax.Array) -> jax.Array:
    """exp(log_ratio) with a log-ratio within ±20: finite, and without a gradient beyond.

    Args:
        log_ratio: float of any shape, in nats.

    Returns:
        float of the same shape, within exp(±20).

    >>> probability_ratio(jnp.array([0.0, 1000.0])).round().tolist()
    [1.0, 485165184.0]
    """
    return jnp.exp(jnp.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def clipped_policy_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip_range: Number = 0.2,
    clip_range_high: Number | None = None,
    normalizer: Number | None = None,
) -> tuple[jax.Array, Metrics]:
    """The clipped surrogate objective of PPO, as a loss.

    L = mean max(-A r, -A clip(r, 1 - clip_range, 1 + clip_range_high)),  r = exp(logprobs -
    old_logprobs), in float32. A log-ratio beyond ±20 counts as ±20, without a gradient.

    Args:
        logprobs: [B, T] float, of the tokens under the policy that is trained.
        old_logprobs: [B, T] float, of the same tokens when they were sampled; a constant.
        advantages: [B, T] float; a constant. Not whitened here.
        mask: [B, T] bool, True counts; what the others hold elsewhere has no effect.
        clip_range: how far the ratio may fall below 1.
        clip_range_high: how far it may rise above 1; None is the same as clip_range.
        normalizer: what the sum is divided by; None is the count of the mask.

    Returns:
        (loss, metrics): policy/loss; policy/clip_fraction, the share of tokens whose clipped
        term is the larger; policy/approx_kl = mean (logprobs - old_logprobs)² / 2;
        policy/ratio_mean; policy/ratio_max (0 for an empty mask).

    Reference: Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 7.

    >>> loss, metrics = clipped_policy_loss(
    ...     logprobs=jnp.log(jnp.array([[0.6, 0.5]])),
    ...     old_logprobs=jnp.log(jnp.array([[0.4, 0.5]])),
    ...     advantages=jnp.array([[1.0, 1.0]]),
    ...     mask=jnp.array([[True, True]]),
    ... )
    >>> round(loss.item(), 6), metrics["policy/clip_fraction"].item()
    (-1.1, 0.5)
    """
    chex.assert_equal_shape([logprobs, old_logprobs, advantages, mask])
    chex.assert_type([logprobs, old_logprobs, advantages, mask], [float, float, float, bool])
    assert_numbers(at_least=0, clip_range=clip_range, clip_range_high=clip_range_high)

    old_logprobs, advantages = jax.lax.stop_gradient((old_logprobs, advantages))
    logprobs, old, advantages = zero_padding(mask, logprobs, old_logprobs, advantages)
    high = clip_range if clip_range_high is None else clip_range_high
    log_ratio = logprobs - old
    ratio = probability_ratio(log_ratio)
    unclipped = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1.0 - clip_range, 1.0 + high)

    def mean(x):
        return masked_mean(x, mask, normalizer=normalizer)

    loss = mean(jnp.maximum(unclipped, clipped))
    (ratio_or_0,) = zero_padding(mask, ratio)
    metrics = {
        "policy/loss": loss,
        "policy/clip_fraction": mean((clipped > unclipped).astype(jnp.float32)),
        "policy/approx_kl": 0.5 * mean(jnp.square(log_ratio)),
        "policy/ratio_mean": mean(ratio),
        "policy/ratio_max": jnp.max(ratio_or_0, initial=0.0),
    }
    return loss, jax.lax.stop_gradient(metrics)
