"""From scores of reward models to the scores that PPO learns from.

Dimensions: B responses, K reward models, M reference responses, T response tokens. The responses
to one prompt follow each other, `group_size` of them. Penalties are added to scores.
"""

import chex
import jax
import jax.numpy as jnp
from flax import struct

from ppo_jax.core.checks import Number, assert_counts, assert_numbers
from ppo_jax.core.critic_free import grouped
from ppo_jax.core.masking import masked_moments

ENSEMBLE_RULES = ("mean", "min", "mean_minus_std", "mean_minus_var")
THRESHOLD = "threshold"  # the rule of two models that `threshold_scores` is


def ensemble_scores(scores: jax.Array, *, how: str, k: Number = 1.0) -> jax.Array:
    """One score of several reward models for each response.

    mean, min, mean - k std or mean - k var over the models; those of the population. The last
    three doubt what the models disagree about, which is where a policy exploits one of them.

    Args:
        scores: [K, B] float, of K reward models.
        how: "mean", "min" (worst case), "mean_minus_std" or "mean_minus_var".
        k: weight of what the models differ by, for the last two.

    Returns:
        [B] float32.

    Raises:
        ValueError: `how` is none of these.

    Reference: Coste et al. 2023, https://arxiv.org/abs/2310.02743.

    >>> scores = jnp.array([[1.0, 2.0], [5.0, 2.0]])
    >>> [ensemble_scores(scores, how=how).tolist() for how in ENSEMBLE_RULES]
    [[3.0, 2.0], [1.0, 2.0], [1.0, 2.0], [-1.0, 2.0]]
    """
    chex.assert_rank(scores, 2)
    chex.assert_type(scores, float)
    assert_counts(reward_models=len(scores))
    assert_numbers(k=k)
    if how not in ENSEMBLE_RULES:
        raise ValueError(f"unknown rule {how!r}; choose from {list(ENSEMBLE_RULES)}")
    scores = scores.astype(jnp.float32)
    if how == "min":
        return jnp.min(scores, axis=0)
    models = jnp.ones(len(scores), bool)
    mean, variance = jax.vmap(lambda x: masked_moments(x, models), 1)(scores)
    if how == "mean_minus_var":
        return mean - k * variance
    if how == "mean_minus_std":
        return mean - k * jnp.sqrt(variance)
    return mean


def par_scores(scores: jax.Array, reference_scores: jax.Array) -> jax.Array:
    """How probably a response is preferred to a reference response (preference as reward).

    mean over the references of σ(score - reference score): from 0 to 1, steep where the two are
    alike and flat where the response is far better, so that there is little to exploit up there.

    Args:
        scores: [B] float.
        reference_scores: [B] float, or [B, M], of M responses to the same prompt, mostly of the
            policy that PPO starts from.

    Returns:
        [B] float32.

    Reference: Fu et al. 2025, https://arxiv.org/abs/2502.18770 (PAR).

    >>> par_scores(jnp.array([1.0, 90.0]), jnp.array([1.0, 0.0])).tolist()
    [0.5, 1.0]
    """
    chex.assert_rank([scores, reference_scores], [1, {1, 2}])
    chex.assert_equal_shape_prefix([scores, reference_scores], 1)
    chex.assert_type([scores, reference_scores], float)
    references = reference_scores.astype(jnp.float32).reshape(len(scores), -1)
    return jnp.mean(jax.nn.sigmoid(scores.astype(jnp.float32)[:, None] - references), axis=1)


def clip_scores(scores: jax.Array, *, limit: Number) -> jax.Array:
    """Scores within [-limit, limit].

    Args:
        scores: float of any shape.
        limit: infinity clips nothing.

    Returns:
        float32, the shape of scores.

    Raises:
        ValueError: limit is known and not above 0.

    Reference: Zheng et al. 2023, https://arxiv.org/abs/2307.04964 (reward clipping).

    >>> clip_scores(jnp.array([-7.0, 0.5, 7.0]), limit=2.0).tolist()
    [-2.0, 0.5, 2.0]
    """
    chex.assert_type(scores, float)
    assert_numbers(above=0, limit=limit)
    limit = jnp.asarray(limit, jnp.float32)
    return jnp.clip(scores.astype(jnp.float32), -limit, limit)


@struct.dataclass(kw_only=True)
class Moments:
    """How many numbers there were, their mean, and the sum of their squared distances from it."""

    count: jax.Array | int = 0  # [] int32
    mean: jax.Array | float = 0.0  # [] float32
    m2: jax.Array | float = 0.0  # [] float32; m2 / count is their variance


def update_moments(moments: Moments, scores: jax.Array) -> Moments:
    """The moments of all numbers so far, and those of a batch, together.

    n = n_a + n_b,  mean = mean_a + δ n_b / n,  M2 = M2_a + M2_b + δ² n_a n_b / n,  where
    δ = mean_b - mean_a. It does not matter how the numbers are split into batches.

    Args:
        moments: of all before; `Moments()` where there were none.
        scores: float of any shape.

    Returns:
        Moments of arrays.

    Reference: Chan et al. 1979, "Updating formulae and a pairwise algorithm for computing sample
    variances", Stanford CS-79-773.

    >>> moments = update_moments(Moments(), jnp.array([1.0, 3.0]))
    >>> moments = update_moments(moments, jnp.array([8.0]))
    >>> moments.count.item(), moments.mean.item(), moments.m2.item()
    (3, 4.0, 26.0)
    """
    chex.assert_type(scores, float)
    mean, variance = masked_moments(scores, jnp.ones(scores.shape, bool))
    before, mean_before, m2_before = (
        jnp.asarray(x, jnp.float32) for x in (moments.count, moments.mean, moments.m2)
    )
    size = jnp.float32(scores.size)
    count = jnp.maximum(before + size, 1.0)
    delta = mean - mean_before
    m2 = m2_before + variance * size + jnp.square(delta) * before * size / count
    return Moments(
        count=jnp.asarray(moments.count, jnp.int32) + jnp.int32(scores.size),
        mean=mean_before + delta * size / count,
        m2=m2,
    )


def normalize_scores(scores: jax.Array, moments: Moments, *, shift_mean: bool = True) -> jax.Array:
    """Scores in standard deviations of all scores so far.

    y = (score - mean) / √(M2 / n + 1e-8), plus the mean if it is not to be shifted; as `whiten`,
    but by the moments of a whole run, so that a score means the same in each batch. Numbers that
    were equal but for rounding have no deviation, and score - mean then counts as 0.

    Args:
        scores: float of any shape.
        moments: of `update_moments`, mostly with these scores in it.
        shift_mean: False keeps the mean, and with it the sign of a score.

    Returns:
        float32, the shape of scores.

    Reference: Zheng et al. 2023, https://arxiv.org/abs/2307.04964 (reward normalisation).

    >>> moments = update_moments(Moments(), jnp.array([1.0, 3.0]))
    >>> normalize_scores(jnp.array([1.0, 5.0]), moments).tolist()
    [-1.0, 3.0]
    """
    chex.assert_type(scores, float)
    mean = jnp.asarray(moments.mean, jnp.float32)
    centred = (scores.astype(jnp.float32) - mean) / score_deviation(moments)
    return centred if shift_mean else centred + mean


def score_deviation(moments: Moments) -> jax.Array:
    """What `normalize_scores` divides by, [] float32: √(M2 / n + 1e-8), or infinity where the
    numbers were equal but for rounding.

    >>> score_deviation(update_moments(Moments(), jnp.array([1.0, 5.0]))).item()
    2.0
    """
    count, mean, m2 = (
        jnp.asarray(x, jnp.float32) for x in (moments.count, moments.mean, moments.m2)
    )
    variance = m2 / jnp.maximum(count, 1.0)
    is_rounding = jnp.sqrt(variance) <= 8 * jnp.finfo(jnp.float32).eps * jnp.abs(mean)
    return jnp.where(is_rounding, jnp.inf, jnp.sqrt(variance + 1e-8))


def length_penalty(mask: jax.Array, *, coef: Number, free_tokens: Number = 0.0) -> jax.Array:
    """What a response loses for its length: -coef max(0, l - free_tokens), with l its tokens.

    Args:
        mask: [B, T] bool, True on response tokens.
        coef: score per token.
        free_tokens: length up to which nothing is lost.

    Returns:
        [B] float32, at most 0 where coef is at least 0; to be added to the scores.

    >>> mask = jnp.array([[True, True, True], [True, False, False]])
    >>> length_penalty(mask, coef=0.5, free_tokens=1).tolist()
    [-1.0, 0.0]
    """
    assert_numbers(coef=coef)
    assert_numbers(at_least=0, free_tokens=free_tokens)
    beyond = jnp.maximum(0.0, lengths(mask) - jnp.asarray(free_tokens, jnp.float32))
    return jnp.where(beyond > 0, -coef * beyond, 0.0)


def overlong_penalty(mask: jax.Array, *, max_length: Number, cache_length: Number) -> jax.Array:
    """What a response loses near its length limit: 0, then in a line down to -1 at the limit.

    With l its tokens: 0 where l ≤ L - C, ((L - C) - l) / C up to l = L, and -1 beyond; L is
    max_length, C cache_length.

    Args:
        mask: [B, T] bool, True on response tokens.
        max_length: L, tokens; mostly T.
        cache_length: C, the last tokens of it, in which the penalty grows; a traced one below 1
            counts as 1.

    Returns:
        [B] float32, from -1 to 0; to be added to the scores.

    Raises:
        ValueError: a length is known and less than 1.

    Reference: Yu et al. 2025, https://arxiv.org/abs/2503.14476, section 3.4 (DAPO,
    soft overlong punishment).

    >>> mask = jnp.arange(4)[None] < jnp.array([[2], [3], [4]])
    >>> overlong_penalty(mask, max_length=4, cache_length=2).tolist()
    [0.0, -0.5, -1.0]
    """
    assert_numbers(at_least=1, max_length=max_length, cache_length=cache_length)
    cache = jnp.maximum(jnp.asarray(cache_length, jnp.float32), 1.0)
    free = jnp.asarray(max_length, jnp.float32) - cache
    return jnp.clip((free - lengths(mask)) / cache, -1.0, 0.0)


def lengths(mask: jax.Array) -> jax.Array:
    """[B] float32, the True positions of each row of a mask [B, T]."""
    chex.assert_rank(mask, 2)
    chex.assert_type(mask, bool)
    return jnp.sum(mask, axis=1, dtype=jnp.int32).astype(jnp.float32)


def threshold_scores(
    safety_scores: jax.Array,
    helpfulness_scores: jax.Array,
    *,
    threshold: Number,
    is_safety: jax.Array | None = None,
) -> jax.Array:
    """Two reward models with a rule: safety where it is in question, else helpfulness.

    The safety score where it is below the threshold or the prompt is one of safety, else the
    helpfulness score.

    Args:
        safety_scores: [B] float.
        helpfulness_scores: [B] float, on a scale that can be compared.
        threshold: of the safety score. The paper's 0.15 is a probability: as the logit that reward
            models give here, -1.73.
        is_safety: [B] bool, True on prompts that are meant to provoke; None is no such prompt.

    Returns:
        [B] float32.

    Reference: Touvron et al. 2023, https://arxiv.org/abs/2307.09288, section 3.2.3 (LLaMA-2).

    >>> safe, helpful = jnp.array([-3.0, 2.0]), jnp.array([5.0, 6.0])
    >>> threshold_scores(safe, helpful, threshold=-1.73).tolist()
    [-3.0, 6.0]
    """
    chex.assert_rank([safety_scores, helpfulness_scores], 1)
    chex.assert_equal_shape([safety_scores, helpfulness_scores])
    chex.assert_type([safety_scores, helpfulness_scores], float)
    assert_numbers(threshold=threshold)
    safety, helpfulness = (x.astype(jnp.float32) for x in (safety_scores, helpfulness_scores))
    by_safety = counts_safety(safety, threshold=threshold, is_safety=is_safety)
    return jnp.where(by_safety, safety, helpfulness)


def counts_safety(
    safety_scores: jax.Array, *, threshold: Number, is_safety: jax.Array | None = None
) -> jax.Array:
    """[B] bool, where `threshold_scores` gives the safety score; its arguments."""
    if is_safety is None:
        return safety_scores < threshold
    chex.assert_equal_shape([safety_scores, is_safety])
    chex.assert_type(is_safety, bool)
    return (safety_scores < threshold) | is_safety


def best_and_worst(scores: jax.Array, *, group_size: int, keep: int) -> jax.Array:
    """The best and the worst responses to each prompt: a reward model errs most in between.

    Args:
        scores: [B] float; of equal ones the later counts as the better.
        group_size: responses to each prompt, at least 2; those of one prompt follow each other.
        keep: how many of the best are kept, and how many of the worst.

    Returns:
        [B] bool, True on 2 keep responses of each group.

    Raises:
        ValueError: the group size is less than 2, or does not divide B; keep is less than 1, or
            more than half of the group size.

    Reference: Zhang et al. 2024, https://arxiv.org/abs/2409.06957 (PF-PPO, best-worst).

    >>> scores = jnp.array([0.3, 0.9, 0.1, 0.5])
    >>> best_and_worst(scores, group_size=4, keep=1).tolist()
    [False, True, True, False]
    """
    groups, _, _ = grouped(scores, group_size)
    assert_counts(keep=keep)
    if 2 * keep > group_size:
        raise ValueError(
            f"keep must be at most half of the group_size {group_size}, got {keep}: that many of "
            "the best are kept, and of the worst"
        )
    rank = jnp.argsort(jnp.argsort(groups, axis=1), axis=1)
    return ((rank < keep) | (rank >= group_size - keep)).reshape(-1)


def groups_with_variance(scores: jax.Array, *, group_size: int) -> jax.Array:
    """Responses to prompts whose responses differ in score: the others teach an estimator nothing.

    Args:
        scores: [B] float.
        group_size: responses to each prompt, at least 2; those of one prompt follow each other.

    Returns:
        [B] bool, False on all responses of a group of equal scores, see `masked_moments`.

    Raises:
        ValueError: the group size is less than 2, or does not divide B.

    Reference: Yu et al. 2025, https://arxiv.org/abs/2503.14476, section 3.2 (DAPO).

    >>> groups_with_variance(jnp.array([1.0, 0.0, 1.0, 1.0]), group_size=2).tolist()
    [True, True, False, False]
    """
    groups, is_equal, _ = grouped(scores, group_size)
    return jnp.broadcast_to(~is_equal, groups.shape).reshape(-1)
