"""From scores of responses, or of their tokens, to rewards. Dimensions: B sequences, T tokens."""

import chex
import jax
import jax.numpy as jnp

from ppo_jax.core.checks import Number, assert_numbers
from ppo_jax.core.kl import kl_estimate
from ppo_jax.core.masking import last_token_index, zero_padding
from ppo_jax.core.renamed import renamed


@renamed(kl_kind="estimator")
def token_rewards(
    scores: jax.Array,
    logprobs: jax.Array,
    ref_logprobs: jax.Array,
    mask: jax.Array,
    *,
    kl_coef: Number,
    estimator: str = "k1",
) -> jax.Array:
    """Reward of each token: a KL penalty, and the score at the last response token or its own.

    r_t = -kl_coef kl_t + score_t, with score_t = [t is the last response token] score of [B].

    Args:
        scores: [B] float, one per response, or [B, T] float, one per token.
        logprobs: [B, T] float, of the response tokens when they were sampled.
        ref_logprobs: [B, T] float, under the reference.
        mask: [B, T] bool, True on response tokens, the stop token included.
        kl_coef: weight of the KL penalty, in score per nat.
        estimator: estimator of the KL, see `kl_estimate`; any but k1 leads away from the reference.

    Returns:
        [B, T] float32, zero where mask is False, whatever the scores there are. The score of a
        row without any response token is dropped.

    Reference: Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, eq. 2; Ziegler et al. 2019,
    https://arxiv.org/abs/1909.08593, eq. 2.

    >>> token_rewards(
    ...     scores=jnp.array([3.0]),
    ...     logprobs=jnp.array([[-1.0, -1.0, 0.0]]),
    ...     ref_logprobs=jnp.array([[-2.0, -1.0, 0.0]]),
    ...     mask=jnp.array([[True, True, False]]),
    ...     kl_coef=0.5,
    ... ).tolist()
    [[-0.5, 3.0, 0.0]]
    """
    chex.assert_rank([scores, mask], [{1, 2}, 2])
    chex.assert_equal_shape([logprobs, ref_logprobs, mask])
    chex.assert_type([scores, logprobs, ref_logprobs, mask], [float, float, float, bool])
    assert_numbers(kl_coef=kl_coef)

    logprobs, ref_logprobs = zero_padding(mask, logprobs, ref_logprobs)
    penalty = kl_coef * kl_estimate(logprobs, ref_logprobs, estimator=estimator)
    return token_scores(scores, mask) - penalty


def token_scores(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """The score of each token: that of a response stands at its last token.

    Args:
        scores: [B] float, one per response, or [B, T] float, one per token.
        mask: [B, T] bool, True on response tokens.

    Returns:
        [B, T] float32, zero where mask is False.
    """
    chex.assert_rank([scores, mask], [{1, 2}, 2])
    chex.assert_equal_shape_prefix([scores, mask], scores.ndim)
    chex.assert_type([scores, mask], [float, bool])
    if scores.ndim == 2:
        return jnp.where(mask, scores.astype(jnp.float32), 0.0)
    positions = jnp.arange(mask.shape[1], dtype=jnp.int32)[None, :]
    is_last = mask & (positions == last_token_index(mask)[:, None])
    return jnp.where(is_last, scores.astype(jnp.float32)[:, None], 0.0)


def whole_scores(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """The score of each response: the sum of those of its tokens, where they have scores.

    Args:
        scores: [B] float, one per response, or [B, T] float, one per token; what padding holds has
            no effect.
        mask: [B, T] bool, True on response tokens.

    Returns:
        [B] float32.

    >>> whole_scores(jnp.array([[1.0, 2.0, jnp.nan]]), jnp.array([[True, True, False]])).item()
    3.0
    """
    return scores if scores.ndim == 1 else token_scores(scores, mask).sum(axis=1)


def missing_eos_scores(
    scores: jax.Array,
    has_eos: jax.Array,
    *,
    replace: Number | None = None,
    penalty: Number | None = None,
) -> jax.Array:
    """Scores under the rule for responses that reached their length limit without stopping.

    score' = score where the response has stopped, else `replace`, or else score - `penalty`.

    Args:
        scores: [B] float, one per response.
        has_eos: [B] bool, True where the response contains a stop token.
        replace: the score of a response without one (-1 in most recipes).
        penalty: what is subtracted from the score of a response without one.

    Returns:
        [B] float32; the scores themselves if neither number is given.

    Raises:
        ValueError: both numbers are given.

    Reference: Huang et al. 2024, https://arxiv.org/abs/2403.17031, detail "EOS trick".

    >>> missing_eos_scores(jnp.array([2.0, 2.0]), jnp.array([True, False]), replace=-1.0).tolist()
    [2.0, -1.0]
    """
    chex.assert_rank([scores, has_eos], 1)
    chex.assert_equal_shape([scores, has_eos])
    chex.assert_type([scores, has_eos], [float, bool])
    assert_numbers(replace=replace, penalty=penalty)
    if replace is not None and penalty is not None:
        raise ValueError(
            f"replace and penalty exclude each other, got replace={replace}, penalty={penalty}."
        )
    scores = scores.astype(jnp.float32)
    if replace is not None:
        return jnp.where(has_eos, scores, replace)
    if penalty is not None:
        return jnp.where(has_eos, scores, scores - penalty)
    return scores
