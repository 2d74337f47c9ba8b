"""Advantages without a critic. Dimensions: B sequences, T response tokens.

The responses to one prompt follow each other, `group_size` of them; a score is the sum of the
rewards of a response. An estimator of [B] gives one number a response, the same for each token.
"""

import chex
import jax
import jax.numpy as jnp

from ppo_jax.core.advantages import whiten
from ppo_jax.core.checks import Number, assert_numbers
from ppo_jax.core.masking import masked_mean, masked_moments, zero_padding


def rloo_advantages(scores: jax.Array, *, group_size: int) -> jax.Array:
    """A response against the mean of the others to the same prompt.

    A_i = R_i - mean of R_j over the other responses j of the group. A group of equal scores has
    A = 0, exactly: see `masked_moments`.

    Args:
        scores: [B] float, the sum of the rewards of each response.
        group_size: responses to each prompt, at least 2; those of one prompt follow each other.

    Returns:
        [B] float32.

    Raises:
        ValueError: the group size is less than 2, or does not divide B.

    Reference: Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740, section 3.2 (RLOO).

    >>> rloo_advantages(jnp.array([3.0, 0.0, 5.0, 1.0]), group_size=2).tolist()
    [3.0, -3.0, 4.0, -4.0]
    """
    groups, is_equal, _ = grouped(scores, group_size)
    others = (groups.sum(axis=1, keepdims=True) - groups) / (group_size - 1)
    return jnp.where(is_equal, 0.0, groups - others).reshape(-1)


def grpo_advantages(
    scores: jax.Array,
    *,
    group_size: int,
    scale_by_std: bool = True,
    ddof: int = 0,
    eps: Number = 1e-6,
) -> jax.Array:
    """A response by the standard of its group.

    A_i = (R_i - mean) / (std + eps), both over the group, its response i included. A group of equal
    scores has A = 0, exactly: see `masked_moments`.

    Without the std a group counts by how much its scores differ; with it, one of two scores that
    hardly differ counts as much as any.

    Args:
        scores: [B] float, the sum of the rewards of each response.
        group_size: responses to each prompt, at least 2; those of one prompt follow each other.
        scale_by_std: False is Dr. GRPO: A_i = R_i - mean.
        ddof: the std is that of the population with 0, of a sample with 1.
        eps: keeps the quotient within bounds.

    Returns:
        [B] float32.

    Raises:
        ValueError: the group size is less than 2, or does not divide B; ddof is neither 0 nor 1;
            eps is known and below 0.

    Reference: Shao et al. 2024, https://arxiv.org/abs/2402.03300, section 4.1.2; without the std:
    Liu et al. 2025, https://arxiv.org/abs/2503.20783, section 3.

    >>> grpo_advantages(jnp.array([3.0, 1.0, 5.0, 5.0]), group_size=2, eps=0.0).tolist()
    [1.0, -1.0, 0.0, 0.0]
    """
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 (population) or 1 (sample), got {ddof!r}")
    assert_numbers(at_least=0, eps=eps)
    groups, is_equal, (mean, variance) = grouped(scores, group_size)
    centred = jnp.where(is_equal, 0.0, groups - mean)
    if scale_by_std:
        # 1 where it is 0: 0 / (0 + eps) is NaN with an eps of 0.
        sample_variance = jnp.where(is_equal, 1.0, variance * group_size / (group_size - ddof))
        centred = centred / (jnp.sqrt(sample_variance) + eps)
    return centred.reshape(-1)


def grouped(
    scores: jax.Array, group_size: int
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
    """Scores by group, [P, group_size], and [P, 1]: are they equal, (their mean, their variance).

    Equal where the variance is 0, not where it is not above: NaN is neither, and must not become 0.
    """
    chex.assert_rank(scores, 1)
    chex.assert_type(scores, float)
    if group_size < 2 or len(scores) % group_size:
        raise ValueError(
            f"group_size must be at least 2 and divide the {len(scores)} responses, "
            f"got {group_size}"
        )
    groups = scores.astype(jnp.float32).reshape(-1, group_size)
    mean, variance = jax.vmap(masked_moments)(groups, jnp.ones(groups.shape, bool))
    return groups, (variance == 0)[:, None], (mean[:, None], variance[:, None])


def leave_one_out(rewards: jax.Array, mask: jax.Array, *, group_size: int) -> jax.Array:
    """`rloo_advantages` of rewards of tokens, given to each token.

    A_i = R_i - mean of R_j over the other responses j of the group, the same for each token;
    R_i is the sum of the rewards of response i. A group of equal sums has A = 0, exactly.

    Args:
        rewards: [B, T] float, for taking step t.
        mask: [B, T] bool, True on the steps that count.
        group_size: responses to each prompt, at least 2; those of one prompt follow each other.

    Returns:
        [B, T] float32, zero where mask is False.

    Raises:
        ValueError: the group size is less than 2, or does not divide B.

    Reference: Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740, section 3.2 (RLOO).

    >>> rewards = jnp.array([[1.0, 2.0], [0.0, 9.0]])
    >>> leave_one_out(rewards, jnp.array([[True, True], [True, False]]), group_size=2).tolist()
    [[3.0, 3.0], [-3.0, 0.0]]
    """
    rewards = checked_rewards(rewards, mask)
    advantages = rloo_advantages(rewards.sum(axis=1), group_size=group_size)
    return jnp.where(mask, advantages[:, None], 0.0)


def reinforce_plus_plus_advantages(
    rewards: jax.Array, mask: jax.Array, *, group_size: int | None = None
) -> jax.Array:
    """The policy gradient's returns, whitened over all tokens of the batch.

    A = whiten(G),  G_t = Σ_{s >= t} r_s; with groups G_t = R_i - mean of R over the group of i, at
    each token t of response i, with R_i = Σ_s r_s.

    One scale for the whole batch, where GRPO has one a group: a group of small differences stays
    small. With groups, the mean over tokens is subtracted too; long responses weigh more in it.

    Args:
        rewards: [B, T] float, for taking step t, the KL penalty included.
        mask: [B, T] bool, True on the steps that count.
        group_size: responses to each prompt, at least 2; None is no baseline but the mean.

    Returns:
        [B, T] float32, zero where mask is False. The statistics are those of the whole array.

    Raises:
        ValueError: the group size is less than 2, or does not divide B.

    Reference: Hu et al. 2025, https://arxiv.org/abs/2501.03262 (REINFORCE++); with groups
    as in verl's reinforce_plus_plus_baseline.

    >>> rewards, mask = jnp.array([[2.0, 1.0]]), jnp.array([[True, True]])
    >>> reinforce_plus_plus_advantages(rewards, mask).round(4).tolist()
    [[1.0, -1.0]]
    """
    if group_size is None:
        return whiten(rewards_to_go(rewards, mask, gamma=1.0), mask)
    totals = checked_rewards(rewards, mask).sum(axis=1)
    centred = grpo_advantages(totals, group_size=group_size, scale_by_std=False)
    return whiten(jnp.broadcast_to(centred[:, None], mask.shape), mask)


def remax_advantages(scores: jax.Array, greedy_scores: jax.Array) -> jax.Array:
    """A response against the greedy one to the same prompt.

    A = R(response) - R(greedy response).

    Args:
        scores: [B] float, the sum of the rewards of each response.
        greedy_scores: [B] float, of the response that takes the likeliest token at each step; a
            rollout of its own.

    Returns:
        [B] float32.

    Reference: Li et al. 2023, https://arxiv.org/abs/2310.10505 (ReMax).

    >>> remax_advantages(jnp.array([3.0, 1.0]), jnp.array([2.0, 2.0])).tolist()
    [1.0, -1.0]
    """
    chex.assert_rank([scores, greedy_scores], 1)
    chex.assert_equal_shape([scores, greedy_scores])
    chex.assert_type([scores, greedy_scores], float)
    return scores.astype(jnp.float32) - greedy_scores.astype(jnp.float32)


def reinforce_advantages(
    rewards: jax.Array, mask: jax.Array, baseline: Number, *, gamma: Number = 1.0
) -> jax.Array:
    """The return from each token on, less one number for all.

    A_t = Σ_{s >= t} γ^{s - t} r_s - b, counted in True steps.

    Args:
        rewards: [B, T] float, for taking step t.
        mask: [B, T] bool, True on the steps that count; holes are passed over.
        baseline: b, a number that these rewards had no part in, as `running_baseline` keeps it; NaN
            is none yet, and b then the mean of the rows' sums.
        gamma: discount per step.

    Returns:
        [B, T] float32, zero where mask is False.

    Reference: Williams 1992, https://doi.org/10.1007/BF00992696.

    >>> rewards, mask = jnp.array([[0.0, 1.0]]), jnp.array([[True, True]])
    >>> reinforce_advantages(rewards, mask, 0.25, gamma=0.5).tolist()
    [[0.25, 0.75]]
    """
    chex.assert_rank(baseline, 0)
    assert_numbers(gamma=gamma)
    to_go = rewards_to_go(rewards, mask, gamma=gamma)
    sums = checked_rewards(rewards, mask).sum(axis=1)
    return jnp.where(mask, to_go - running_baseline(baseline, sums, decay=1.0), 0.0)


def running_baseline(baseline: Number, scores: jax.Array, *, decay: Number) -> jax.Array:
    """The baseline of the next iteration: a running mean of the rewards of responses.

    b' = decay b + (1 - decay) mean(scores); the mean itself where b is NaN, as before the first.

    A start at 0 would call every response to a task that pays 5 a good one for about
    1 / (1 - decay) iterations.

    Args:
        baseline: b, NaN before the first iteration.
        scores: [B] float, the sum of the rewards of each response.
        decay: what stays of b, from 0 to 1.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: decay is known and not from 0 to 1.

    Reference: Sutton and Barto 2018, section 13.4, in http://incompleteideas.net/book/the-book.html.

    >>> first = running_baseline(jnp.nan, jnp.array([1.0, 3.0]), decay=0.75)
    >>> first.item(), running_baseline(first, jnp.array([6.0, 6.0]), decay=0.75).item()
    (2.0, 3.0)
    """
    chex.assert_rank([baseline, scores], [0, 1])
    chex.assert_type(scores, float)
    assert_numbers(at_least=0, at_most=1, decay=decay)
    mean = masked_mean(scores, jnp.ones(scores.shape, bool))
    baseline, decay = jnp.asarray(baseline, jnp.float32), jnp.asarray(decay, jnp.float32)
    following = decay * baseline + (1.0 - decay) * mean
    return jnp.where(jnp.isnan(baseline), mean, following)


def rewards_to_go(rewards: jax.Array, mask: jax.Array, *, gamma: Number) -> jax.Array:
    """[B, T] float32, Σ_{s >= t} γ^{s - t} r_s counted in True steps; 0 where mask is False."""
    rewards, gamma = checked_rewards(rewards, mask), jnp.asarray(gamma, jnp.float32)

    def step(following, column):
        reward, is_step = column
        to_go = jnp.where(is_step, reward + gamma * following, following)
        return to_go, to_go

    init = jnp.zeros(len(rewards), jnp.float32)
    _, to_go = jax.lax.scan(step, init, (rewards.T, mask.T), reverse=True)
    return jnp.where(mask, to_go.T, 0.0)


def checked_rewards(rewards: jax.Array, mask: jax.Array) -> jax.Array:
    """Rewards of tokens in float32, 0 where mask is False."""
    chex.assert_rank(rewards, 2)
    chex.assert_equal_shape([rewards, mask])
    chex.assert_type([rewards, mask], [float, bool])
    return zero_padding(mask, rewards)[0]
