"""Losses of the policy: each returns (loss, metrics). Dimensions: B sequences, T response tokens.

r is the probability ratio of a token, A its advantage. A masked loss divides by the count of its
mask, or by `normalizer`. Give every micro-batch the count of the whole minibatch, and the losses,
the gradients and the metrics add up to those of the minibatch; `policy/ratio_max` alone is a
maximum. Metrics carry no gradient, and are means over tokens whatever the `weights` of the loss.
"""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from ppo_jax.core.checks import Number, assert_numbers
from ppo_jax.core.kl import LOG_RATIO_LIMIT, probability_ratio
from ppo_jax.core.masking import masked_mean, zero_padding

Metrics = dict[str, jax.Array]


def clipped_policy_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip_range: Number = 0.2,
    clip_range_high: Number | None = None,
    weights: jax.Array | None = None,
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
        clip_range: how far the ratio may fall below 1; inf for both is no clip, the surrogate of
            TRPO (eq. 6).
        clip_range_high: how far it may rise above 1; None is the same as clip_range.
        weights: [B, T] float, what each token's term of the loss is multiplied by, see
            `aggregation_weights`; a constant. None is 1.
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
    _, log_ratio, advantages, weights = checked_tokens(
        logprobs, old_logprobs, advantages, mask, weights
    )
    ratio = probability_ratio(log_ratio)
    unclipped, clipped = clipped_terms(ratio, advantages, clip_range, clip_range_high)
    mean = functools.partial(masked_mean, mask=mask, normalizer=normalizer)
    loss = mean(weighted(jnp.maximum(unclipped, clipped), weights))
    return loss, surrogate_metrics(loss, clipped > unclipped, log_ratio, ratio, mask, mean)


def checked_tokens(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    weights: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """(logprobs, log-ratios, advantages, weights) in float32, 0 where masked; all but logprobs
    constants."""
    chex.assert_equal_shape([logprobs, old_logprobs, advantages, mask])
    chex.assert_type([logprobs, old_logprobs, advantages, mask], [float, float, float, bool])
    if weights is not None:
        chex.assert_equal_shape([weights, mask])
        chex.assert_type(weights, float)
        (weights,) = zero_padding(mask, jax.lax.stop_gradient(weights))
    old_logprobs, advantages = jax.lax.stop_gradient((old_logprobs, advantages))
    logprobs, old, advantages = zero_padding(mask, logprobs, old_logprobs, advantages)
    return logprobs, logprobs - old, advantages, weights


def clipped_terms(
    ratio: jax.Array, advantages: jax.Array, low: Number, high: Number | None
) -> tuple[jax.Array, jax.Array]:
    """(-A r, -A clip(r, 1 - low, 1 + high)) of each token; high None is the same as low."""
    assert_numbers(at_least=0, clip_range=low, clip_range_high=high)
    high = low if high is None else high
    return -advantages * ratio, -advantages * jnp.clip(ratio, 1.0 - low, 1.0 + high)


def weighted(terms: jax.Array, weights: jax.Array | None) -> jax.Array:
    """weights · terms, or the terms as they are."""
    return terms if weights is None else weights * terms


def surrogate_metrics(
    loss: jax.Array,
    is_clipped: jax.Array,
    log_ratio: jax.Array,
    ratio: jax.Array,
    mask: jax.Array,
    mean: Callable[[jax.Array], jax.Array],
) -> Metrics:
    """What every loss of the policy reports, see `clipped_policy_loss`; `mean` is over tokens, or
    over sequences."""
    (ratio_or_0,) = zero_padding(mask, ratio)
    metrics = {
        "policy/loss": loss,
        "policy/clip_fraction": mean(is_clipped.astype(jnp.float32)),
        "policy/approx_kl": 0.5 * mean(jnp.square(log_ratio)),
        "policy/ratio_mean": mean(ratio),
        "policy/ratio_max": jnp.max(ratio_or_0, initial=0.0),
    }
    return jax.lax.stop_gradient(metrics)


def dual_clip_policy_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip_range: Number,
    clip_range_high: Number | None = None,
    dual_clip: Number = 3.0,
    weights: jax.Array | None = None,
    normalizer: Number | None = None,
) -> tuple[jax.Array, Metrics]:
    """PPO's loss with a limit on what one bad token can cost.

    L = mean l,  l = the term of `clipped_policy_loss`, and where A < 0 at most -dual_clip A.

    There that term grows with the ratio without a bound; beyond the limit it has no gradient.

    Args:
        logprobs: [B, T] float, of the tokens under the policy that is trained.
        old_logprobs: [B, T] float, of the same tokens when they were sampled; a constant.
        advantages: [B, T] float; a constant.
        mask: [B, T] bool, True counts; what the others hold elsewhere has no effect.
        clip_range: how far the ratio may fall below 1; may be inf.
        clip_range_high: how far it may rise above 1; None is the same as clip_range.
        weights: [B, T] float, see `clipped_policy_loss`; a constant.
        normalizer: what the sum is divided by; None is the count of the mask.
        dual_clip: the largest ratio that counts where A < 0, above 1.

    Returns:
        (loss, metrics): those of `clipped_policy_loss`, and policy/dual_clip_fraction, the share of
        tokens at the limit.

    Reference: Ye et al. 2019, https://arxiv.org/abs/1912.09729, eq. 5.

    >>> loss, metrics = dual_clip_policy_loss(
    ...     jnp.log(jnp.array([[0.8]])), jnp.log(jnp.array([[0.1]])), -jnp.ones((1, 1)),
    ...     jnp.array([[True]]), clip_range=0.2,
    ... )
    >>> round(loss.item(), 6), metrics["policy/dual_clip_fraction"].item()
    (3.0, 1.0)
    """
    assert_numbers(above=1, dual_clip=dual_clip)
    _, log_ratio, advantages, weights = checked_tokens(
        logprobs, old_logprobs, advantages, mask, weights
    )
    ratio = probability_ratio(log_ratio)
    unclipped, clipped = clipped_terms(ratio, advantages, clip_range, clip_range_high)
    terms = jnp.maximum(unclipped, clipped)
    limit = jnp.where(advantages < 0, -dual_clip * advantages, jnp.inf)
    mean = functools.partial(masked_mean, mask=mask, normalizer=normalizer)
    loss = mean(weighted(jnp.minimum(terms, limit), weights))
    metrics = surrogate_metrics(loss, clipped > unclipped, log_ratio, ratio, mask, mean)
    fraction = mean((terms > limit).astype(jnp.float32))
    return loss, metrics | {"policy/dual_clip_fraction": jax.lax.stop_gradient(fraction)}


def kl_penalty_policy_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    penalty_coef: Number,
    weights: jax.Array | None = None,
    normalizer: Number | None = None,
) -> tuple[jax.Array, Metrics]:
    """The surrogate with a penalty on the KL divergence from the old policy instead of a clip.

    L = mean (-A r + penalty_coef d),  d = r - 1 - log r, never negative; its mean over samples of
    the old policy estimates KL(old || new). A log-ratio beyond ±20 counts as ±20.

    Args:
        logprobs: [B, T] float, of the tokens under the policy that is trained.
        old_logprobs: [B, T] float, of the same tokens when they were sampled; a constant.
        advantages: [B, T] float; a constant.
        mask: [B, T] bool, True counts; what the others hold elsewhere has no effect.
        weights: [B, T] float, see `clipped_policy_loss`; a constant.
        normalizer: what the sum is divided by; None is the count of the mask.
        penalty_coef: weight of the penalty, in loss per nat; `adaptive_penalty_coef` adapts it to
            the measured KL.

    Returns:
        (loss, metrics): those of `clipped_policy_loss`, and policy/penalty_kl = mean d.

    Reference: Schulman et al. 2017, https://arxiv.org/abs/1707.06347, section 4, eq. 8.

    >>> loss, metrics = kl_penalty_policy_loss(
    ...     jnp.log(jnp.array([[0.6]])), jnp.log(jnp.array([[0.3]])), jnp.ones((1, 1)),
    ...     jnp.array([[True]]), penalty_coef=10.0,
    ... )
    >>> round(loss.item(), 4), round(metrics["policy/penalty_kl"].item(), 4)
    (1.0685, 0.3069)
    """
    assert_numbers(at_least=0, penalty_coef=penalty_coef)
    _, log_ratio, advantages, weights = checked_tokens(
        logprobs, old_logprobs, advantages, mask, weights
    )
    ratio = probability_ratio(log_ratio)
    limited = jnp.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    divergence = jnp.expm1(limited) - limited
    mean = functools.partial(masked_mean, mask=mask, normalizer=normalizer)
    loss = mean(weighted(-advantages * ratio + penalty_coef * divergence, weights))
    metrics = surrogate_metrics(loss, jnp.zeros_like(mask), log_ratio, ratio, mask, mean)
    return loss, metrics | {"policy/penalty_kl": jax.lax.stop_gradient(mean(divergence))}


def vpg_policy_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    weights: jax.Array | None = None,
    normalizer: Number | None = None,
) -> tuple[jax.Array, Metrics]:
    """The loss of the plain policy gradient (VPG, A2C): no ratio, no clip.

    L = mean -A logprobs. Right for one step on samples of the policy itself.

    Args:
        logprobs: [B, T] float, of the tokens under the policy that is trained.
        advantages: [B, T] float; a constant.
        mask: [B, T] bool, True counts; what the others hold elsewhere has no effect.
        weights: [B, T] float, see `clipped_policy_loss`; a constant.
        normalizer: what the sum is divided by; None is the count of the mask.
        old_logprobs: [B, T] float, for the metrics alone.

    Returns:
        (loss, metrics): those of `clipped_policy_loss`; policy/clip_fraction is 0.

    Reference: Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 2; A2C: Mnih et al. 2016,
    https://arxiv.org/abs/1602.01783.

    >>> one = jnp.ones((1, 1))
    >>> vpg_policy_loss(-2 * one, -one, one, jnp.array([[True]]))[0].item()
    2.0
    """
    logprobs, log_ratio, advantages, weights = checked_tokens(
        logprobs, old_logprobs, advantages, mask, weights
    )
    mean = functools.partial(masked_mean, mask=mask, normalizer=normalizer)
    loss = mean(weighted(-advantages * logprobs, weights))
    ratio = probability_ratio(log_ratio)
    return loss, surrogate_metrics(loss, jnp.zeros_like(mask), log_ratio, ratio, mask, mean)
