"""Losses of whole responses, and how the terms of tokens add up to those of responses.

Dimensions: B rows, T response tokens. A row is a response, unless `segment_ids` tell which response
of its row a token belongs to, where several share one.
"""

import chex
import jax
import jax.numpy as jnp

from ppo_jax.core.checks import Number, assert_numbers
from ppo_jax.core.masking import masked_mean
from ppo_jax.core.policy_losses import (
    Metrics,
    checked_tokens,
    clipped_terms,
    probability_ratio,
    surrogate_metrics,
)

AGGREGATIONS = ("token_mean", "sequence_mean", "constant")


def gspo_policy_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip_range: Number,
    clip_range_high: Number | None = None,
    segment_ids: jax.Array | None = None,
    normalizer: Number | None = None,
) -> tuple[jax.Array, Metrics]:
    """The clipped objective with one ratio for a response (GSPO; GSPO-token where advantages
    differ between its tokens).

    s = exp(mean over the response's tokens of logprobs - old_logprobs)
    L = mean over responses of the mean over their tokens of
        max(-A s', -A clip(s', 1 - clip_range, 1 + clip_range_high)),  s' = sg(s) π / sg(π),

    s' has the value of s and, of one A for a response, its gradient; sg: a constant. A mean
    log-ratio beyond ±20 counts as ±20, without a gradient.

    Args:
        logprobs: [B, T] float, of the tokens under the policy that is trained.
        old_logprobs: [B, T] float, of the same tokens when they were sampled; a constant.
        advantages: [B, T] float; a constant.
        mask: [B, T] bool, True counts; what the others hold elsewhere has no effect.
        clip_range: how far s may fall below 1; may be inf. The paper has 3e-4, as s is much nearer
            to 1 than the ratio of a token.
        clip_range_high: how far it may rise above 1, 4e-4 in the paper; None is the same as
            clip_range.
        segment_ids: [B, T] int, at each token 1, 2, .., up to T: which response of its row it
            belongs to; 0 in padding. None: a row is a response.
        normalizer: the count of responses that the sum is divided by; None is the count of those
            with a token.

    Returns:
        (loss, metrics): those of `clipped_policy_loss` as means over responses, of s:
        policy/clip_fraction is the share of responses that are clipped.

    Reference: Zheng et al. 2025, https://arxiv.org/abs/2507.18071, eq. 5, 7 and 13.

    >>> old = jnp.zeros((1, 2))
    >>> loss, _ = gspo_policy_loss(
    ...     old + jnp.array([[0.2, 0.4]]), old, jnp.ones((1, 2)), jnp.array([[True, True]]),
    ...     clip_range=0.2,
    ... )
    >>> round(loss.item(), 6)  # exp(0.3), clipped
    -1.2
    """
    logprobs, log_ratio, advantages, _ = checked_tokens(
        logprobs, old_logprobs, advantages, mask, None
    )
    lengths = jnp.maximum(sequence_sums(mask.astype(jnp.float32), segment_ids), 1.0)
    means = jax.lax.stop_gradient(sequence_sums(log_ratio, segment_ids) / lengths)
    ratio = probability_ratio(means + (logprobs - jax.lax.stop_gradient(logprobs)))
    unclipped, clipped = clipped_terms(ratio, advantages, clip_range, clip_range_high)
    if normalizer is None:
        normalizer = jnp.round(jnp.sum(jnp.where(mask, 1.0 / lengths, 0.0)))

    def mean(x):
        return masked_mean(x / lengths, mask, normalizer=normalizer)

    loss = mean(jnp.maximum(unclipped, clipped))
    return loss, surrogate_metrics(loss, clipped > unclipped, log_ratio, ratio, mask, mean)


def sequence_sums(x: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """At each token the sum over its response.

    Args:
        x: [B, T] float, 0 in padding.
        segment_ids: see `gspo_policy_loss`.

    Returns:
        [B, T] float.

    >>> sequence_sums(jnp.array([[1.0, 2.0, 4.0]]), jnp.array([[1, 1, 2]])).tolist()
    [[3.0, 3.0, 4.0]]
    """
    if segment_ids is None:
        return jnp.broadcast_to(x.sum(axis=1, keepdims=True), x.shape)
    chex.assert_equal_shape([x, segment_ids])
    chex.assert_type(segment_ids, int)

    def of_row(x, ids):
        return jax.ops.segment_sum(x, ids, num_segments=x.shape[0] + 1)[ids]

    return jax.vmap(of_row)(x, segment_ids)


def aggregation_weights(
    mask: jax.Array, *, how: str = "token_mean", length: Number | None = None
) -> jax.Array:
    """Weights of tokens with which a mean over tokens is another aggregation of their terms.

    With N the tokens and R the responses, Σ w l / N is

    - "token_mean": Σ l / N, w = 1;
    - "sequence_mean": the mean over responses of the mean over their tokens,
      w = N / (R tokens of the response);
    - "constant": Σ l / (R length), w = N / (R length).

    Made of the whole minibatch, before micro-batches or shared rows split it: with the N of the
    minibatch as their normalizer, their losses then add up to that of the minibatch.

    Args:
        mask: [B, T] bool, True counts. A row is a response; one without a token is none, and R does
            not count it.
        how: one of `AGGREGATIONS`.
        length: with "constant" alone, mostly the longest response allowed; above 0.

    Returns:
        [B, T] float32, 0 where masked.

    Raises:
        ValueError: how is unknown, or length is missing or without a use.

    References: "sequence_mean": Shao et al. 2024, https://arxiv.org/abs/2402.03300, eq. 3;
    "token_mean": Yu et al. 2025, https://arxiv.org/abs/2503.14476; "constant": Liu et al. 2025,
    https://arxiv.org/abs/2503.20783.

    >>> mask = jnp.array([[True, True, True], [True, False, False]])
    >>> aggregation_weights(mask, how="constant", length=4).tolist()
    [[0.5, 0.5, 0.5], [0.5, 0.0, 0.0]]
    """
    chex.assert_rank(mask, 2)
    chex.assert_type(mask, bool)
    assert_numbers(above=0, length=length)
    if how not in AGGREGATIONS:
        raise ValueError(f"unknown how {how!r}; choose from {list(AGGREGATIONS)}")
    if (how == "constant") != (length is not None):
        raise ValueError(f'length goes with how="constant" alone, got how={how!r}, length={length}')

    ones = mask.astype(jnp.float32)
    if how == "token_mean":
        return ones
    divisor = jnp.maximum(ones.sum(axis=1, keepdims=True), 1.0) if length is None else length
    responses = jnp.maximum(jnp.any(mask, axis=1).astype(jnp.float32).sum(), 1.0)
    return ones * (ones.sum() / (responses * divisor))
