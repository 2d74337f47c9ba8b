"""Losses of the policy for samples that are not quite its own, each with a limit of another kind.

Dimensions: B sequences, T response tokens. They add up over micro-batches as those of
`policy_losses` do.
"""

import functools

import chex
import jax
import jax.numpy as jnp

from ppo_jax.core.checks import Number, assert_numbers
from ppo_jax.core.masking import masked_mean, zero_padding
from ppo_jax.core.policy_losses import (
    Metrics,
    checked_tokens,
    clipped_policy_loss,
    probability_ratio,
    surrogate_metrics,
    weighted,
)


def cispo_policy_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip_range: Number,
    clip_range_high: Number | None = None,
    weights: jax.Array | None = None,
    normalizer: Number | None = None,
) -> tuple[jax.Array, Metrics]:
    """The policy gradient with clipped importance weights: no token loses its gradient.

    L = mean -sg(clip(r, 1 - clip_range, 1 + clip_range_high)) A logprobs,  sg: a constant. The
    published runs limit r from above alone: clip_range at least 1.

    Args:
        logprobs: [B, T] float, of the tokens under the policy that is trained.
        old_logprobs: [B, T] float, of the same tokens when they were sampled; a constant.
        advantages: [B, T] float; a constant.
        mask: [B, T] bool, True counts; what the others hold elsewhere has no effect.
        clip_range: how far the ratio may fall below 1; may be inf.
        clip_range_high: how far it may rise above 1; None is the same as clip_range.
        weights: [B, T] float, see `clipped_policy_loss`; a constant.
        normalizer: what the sum is divided by; None is the count of the mask.

    Returns:
        (loss, metrics): those of `clipped_policy_loss`; policy/clip_fraction is the share of tokens
        whose weight is at a limit.

    Reference: MiniMax 2025, https://arxiv.org/abs/2506.13585, eq. 4 and 5.

    >>> loss, _ = cispo_policy_loss(
    ...     jnp.log(jnp.array([[0.5]])), jnp.log(jnp.array([[0.1]])), jnp.ones((1, 1)),
    ...     jnp.array([[True]]), clip_range=0.2,
    ... )
    >>> round(loss.item(), 6)  # -1.2 log 0.5
    0.831777
    """
    logprobs, log_ratio, advantages, weights = checked_tokens(
        logprobs, old_logprobs, advantages, mask, weights
    )
    ratio = probability_ratio(log_ratio)
    assert_numbers(at_least=0, clip_range=clip_range, clip_range_high=clip_range_high)
    high = clip_range if clip_range_high is None else clip_range_high
    clipped = jnp.clip(ratio, 1.0 - clip_range, 1.0 + high)
    mean = functools.partial(masked_mean, mask=mask, normalizer=normalizer)
    loss = mean(weighted(-jax.lax.stop_gradient(clipped) * advantages * logprobs, weights))
    return loss, surrogate_metrics(loss, clipped != ratio, log_ratio, ratio, mask, mean)


def dppo_policy_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    divergence_limit: Number,
    weights: jax.Array | None = None,
    normalizer: Number | None = None,
) -> tuple[jax.Array, Metrics]:
    """The surrogate without the tokens whose probability has moved too far.

    L = mean -M A r,  M = 0 where |π - π_old| > divergence_limit and the step would move it farther
    (A > 0 and r > 1, or A < 0 and r < 1), else 1.

    |π - π_old| of the sampled token is the total variation between "this token" and "another one".
    A ratio is no measure of it: a rare token moves by large factors, a likely one by small ones.

    Args:
        logprobs: [B, T] float, of the tokens under the policy that is trained.
        old_logprobs: [B, T] float, of the same tokens when they were sampled; a constant.
        advantages: [B, T] float; a constant.
        mask: [B, T] bool, True counts; what the others hold elsewhere has no effect.
        weights: [B, T] float, see `clipped_policy_loss`; a constant.
        normalizer: what the sum is divided by; None is the count of the mask.
        divergence_limit: the largest change of a probability, from 0 to 1.

    Returns:
        (loss, metrics): those of `clipped_policy_loss`; policy/clip_fraction is the share of tokens
        with M = 0.

    Reference: Qi et al. 2026, https://arxiv.org/abs/2602.04879, the binary total variation.

    >>> loss, _ = dppo_policy_loss(
    ...     jnp.log(jnp.array([[0.02, 0.8]])), jnp.log(jnp.array([[0.01, 0.6]])),
    ...     jnp.ones((1, 2)), jnp.array([[True, True]]), divergence_limit=0.1,
    ... )
    >>> round(loss.item(), 6)  # the first, of ratio 2, stays: -2 / 2
    -1.0
    """
    assert_numbers(at_least=0, divergence_limit=divergence_limit)
    logprobs, log_ratio, advantages, weights = checked_tokens(
        logprobs, old_logprobs, advantages, mask, weights
    )
    ratio = probability_ratio(log_ratio)
    change = jnp.exp(logprobs) - jnp.exp(logprobs - log_ratio)
    is_dropped = jnp.where(
        advantages > 0, change > divergence_limit, (advantages < 0) & (-change > divergence_limit)
    )
    mean = functools.partial(masked_mean, mask=mask, normalizer=normalizer)
    loss = mean(weighted(jnp.where(is_dropped, 0.0, -advantages * ratio), weights))
    return loss, surrogate_metrics(loss, is_dropped, log_ratio, ratio, mask, mean)


def decoupled_policy_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    behavior_logprobs: jax.Array,
    behavior_weight_limit: Number = jnp.inf,
    clip_range: Number,
    clip_range_high: Number | None = None,
    weights: jax.Array | None = None,
    normalizer: Number | None = None,
) -> tuple[jax.Array, Metrics]:
    """PPO's loss where the policy that sampled is not the one that clipping stays close to.

    L = mean w l,  w = min(π_old / π_behavior, behavior_weight_limit), l the term of
    `clipped_policy_loss` around the proximal policy π_old.

    Args:
        logprobs: [B, T] float, of the tokens under the policy that is trained.
        advantages: [B, T] float; a constant.
        mask: [B, T] bool, True counts; what the others hold elsewhere has no effect.
        clip_range: how far the ratio may fall below 1; may be inf.
        clip_range_high: how far it may rise above 1; None is the same as clip_range.
        weights: [B, T] float, see `clipped_policy_loss`; a constant.
        normalizer: what the sum is divided by; None is the count of the mask.
        old_logprobs: [B, T] float, under the proximal policy, mostly that of the last update; a
            constant.
        behavior_logprobs: [B, T] float, under the policy that sampled the tokens; a constant.
        behavior_weight_limit: the largest w, above 0.

    Returns:
        (loss, metrics): those of `clipped_policy_loss`, and policy/behavior_weight = mean w.

    References: Hilton et al. 2021, https://arxiv.org/abs/2110.00641. With a limit: Fu et al. 2025
    (AReaL), https://arxiv.org/abs/2505.24298.

    >>> old, behavior = jnp.log(jnp.array([[0.4]])), jnp.log(jnp.array([[0.2]]))
    >>> loss, _ = decoupled_policy_loss(
    ...     old, old, jnp.ones((1, 1)), jnp.array([[True]]), behavior_logprobs=behavior,
    ...     clip_range=0.2,
    ... )
    >>> round(loss.item(), 6)
    -2.0
    """
    chex.assert_equal_shape([behavior_logprobs, mask])
    chex.assert_type(behavior_logprobs, float)
    assert_numbers(above=0, behavior_weight_limit=behavior_weight_limit)
    constants = jax.lax.stop_gradient((old_logprobs, behavior_logprobs))
    old, behavior = zero_padding(mask, *constants)
    ratio = jnp.minimum(probability_ratio(old - behavior), behavior_weight_limit)
    loss, metrics = clipped_policy_loss(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        clip_range=clip_range,
        clip_range_high=clip_range_high,
        weights=weighted(ratio, weights),
        normalizer=normalizer,
    )
    mean_weight = masked_mean(ratio, mask, normalizer=normalizer)
    return loss, metrics | {"policy/behavior_weight": mean_weight}
