"""Losses: each returns (loss, metrics). Dimensions: B sequences, T response tokens.

A masked loss divides by the count of its mask, or by `normalizer`. Give every micro-batch the
count of the whole minibatch, and the losses, the gradients and the metrics add up to those of
the minibatch; `policy/ratio_max` alone is a maximum. Metrics carry no gradient.
"""

import chex
import jax
import jax.numpy as jnp

from ppo_jax.core.checks import Number, assert_numbers
from ppo_jax.core.kl import LOG_RATIO_LIMIT
from ppo_jax.core.masking import masked_mean, masked_moments, zero_padding

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


def ppo_loss(
    logprobs: jax.Array,
    values: jax.Array | None,
    entropies: jax.Array,
    mask: jax.Array,
    *,
    old_logprobs: jax.Array,
    old_values: jax.Array | None,
    advantages: jax.Array,
    returns: jax.Array | None,
    clip_range: Number = 0.2,
    clip_range_high: Number | None = None,
    value_clip_range: Number | None = 0.2,
    vf_coef: Number = 0.1,
    entropy_coef: Number = 0.0,
    normalizer: Number | None = None,
) -> tuple[jax.Array, Metrics]:
    """The whole loss of a PPO update: policy, critic and entropy bonus.

    L = L_policy + vf_coef L_value - entropy_coef mean H, where L_value is 0 without a critic.

    Args:
        logprobs: [B, T] float, of the tokens under the policy that is trained.
        values: [B, T] float, of the critic that is trained; None without one.
        entropies: [B, T] float, of the policy that is trained, in nats.
        mask: [B, T] bool, True counts; what the others hold elsewhere has no effect.
        old_logprobs: [B, T] float, when the tokens were sampled.
        old_values: [B, T] float, when the tokens were sampled; None without a critic.
        advantages: [B, T] float.
        returns: [B, T] float; None without a critic.
        clip_range: see `clipped_policy_loss`.
        clip_range_high: see `clipped_policy_loss`.
        value_clip_range: see `clipped_value_loss`.
        vf_coef: weight of the value loss.
        entropy_coef: weight of the entropy bonus, in loss per nat.
        normalizer: what the sums are divided by; None is the count of the mask.

    Returns:
        (loss, metrics): ppo/loss, policy/entropy, and the metrics of both losses.

    Raises:
        ValueError: there are values, but not what their loss needs.

    Reference: Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 9.

    >>> one, mask = jnp.ones((1, 1)), jnp.array([[True]])
    >>> loss, metrics = ppo_loss(
    ...     one, one, one, mask, old_logprobs=one, old_values=one, advantages=one, returns=3 * one
    ... )
    >>> round(loss.item(), 6)  # -1 + 0.1 x 2, the clipped and the plain error being equal
    -0.8
    """
    chex.assert_equal_shape([logprobs, entropies, mask])
    chex.assert_type(entropies, float)
    assert_numbers(vf_coef=vf_coef, entropy_coef=entropy_coef)

    clip = {"clip_range": clip_range, "clip_range_high": clip_range_high, "normalizer": normalizer}
    policy_loss, policy_metrics = clipped_policy_loss(
        logprobs, old_logprobs, advantages, mask, **clip
    )
    mean_entropy = masked_mean(entropies, mask, normalizer=normalizer)
    value_loss, value_metrics = 0.0, {}
    if values is not None:
        if old_values is None or returns is None:
            raise ValueError("values need old_values and returns, got None")
        clip = {"value_clip_range": value_clip_range, "normalizer": normalizer}
        value_loss, value_metrics = clipped_value_loss(values, old_values, returns, mask, **clip)
    loss = policy_loss + vf_coef * value_loss - entropy_coef * mean_entropy
    metrics = {"ppo/loss": loss, "policy/entropy": mean_entropy}
    return loss, jax.lax.stop_gradient(metrics | policy_metrics | value_metrics)


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


def next_token_loss(
    logprobs: jax.Array, mask: jax.Array, *, normalizer: Number | None = None
) -> tuple[jax.Array, Metrics]:
    """Cross-entropy of the next token, in nats per token.

    L = -mean logprobs, in float32. Its exponential over a whole data set is the perplexity.

    Args:
        logprobs: [B, T] float, of the true tokens.
        mask: [B, T] bool, True on the tokens to learn (the completion and its stop token);
            what logprobs hold elsewhere has no effect.
        normalizer: what the sum is divided by; None is the count of the mask.

    Returns:
        (loss, metrics): sft/loss.

    >>> loss, _ = next_token_loss(jnp.array([[-1.0, -3.0]]), jnp.array([[True, True]]))
    >>> loss.item()
    2.0
    """
    loss = -masked_mean(logprobs, mask, normalizer=normalizer)
    return loss, {"sft/loss": jax.lax.stop_gradient(loss)}


def preference_loss(
    chosen_scores: jax.Array,
    rejected_scores: jax.Array,
    *,
    margin: Number = 0.0,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """Loss of a reward model on pairs of responses, of which one was preferred.

    L = -mean log σ(chosen - rejected - margin), in float32.

    Args:
        chosen_scores: [B] float, of the preferred responses.
        rejected_scores: [B] float, of the others.
        margin: by how much the chosen score should be larger, a number or [B].
        mask: [B] bool, False on pairs that nobody judged, ties for instance; None counts all.

    Returns:
        (loss, metrics): reward_model/loss; reward_model/accuracy, the share of pairs in the right
        order (a tie counts half); reward_model/margin, the mean of chosen - rejected.

    Reference: Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, eq. 1; the margin is that of
    Touvron et al. 2023, https://arxiv.org/abs/2307.09288, eq. 2.

    >>> loss, metrics = preference_loss(jnp.array([1.0, 2.0]), jnp.array([1.0, 0.0]))
    >>> metrics["reward_model/accuracy"].item(), metrics["reward_model/margin"].item()
    (0.75, 1.0)
    """
    chex.assert_rank([chosen_scores, rejected_scores, margin], [1, 1, {0, 1}])
    chex.assert_equal_shape([chosen_scores, rejected_scores])
    chex.assert_type([chosen_scores, rejected_scores], float)
    mask = jnp.ones(chosen_scores.shape, bool) if mask is None else mask
    chex.assert_equal_shape([chosen_scores, mask])
    chex.assert_type(mask, bool)
    if jnp.ndim(margin):
        chex.assert_equal_shape([chosen_scores, margin])

    chosen, rejected = zero_padding(mask, chosen_scores, rejected_scores)
    difference = chosen - rejected
    margin = jnp.broadcast_to(jnp.asarray(margin, jnp.float32), difference.shape)
    loss = -masked_mean(jax.nn.log_sigmoid(difference - margin), mask)
    metrics = {
        "reward_model/loss": loss,
        "reward_model/accuracy": masked_mean(0.5 * (jnp.sign(difference) + 1.0), mask),
        "reward_model/margin": masked_mean(difference, mask),
    }
    return loss, jax.lax.stop_gradient(metrics)
