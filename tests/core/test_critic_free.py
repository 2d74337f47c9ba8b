import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.core.critic_free import (
    grpo_advantages,
    leave_one_out,
    reinforce_advantages,
    reinforce_plus_plus_advantages,
    remax_advantages,
    rloo_advantages,
    running_baseline,
)


def random_inputs(seed, shape=(6, 5)):
    """(rewards, mask) with holes, and a row without a token."""
    rng = np.random.default_rng(seed)
    rewards, mask = rng.normal(size=shape).astype(np.float32), rng.random(shape) < 0.7
    mask[1] = False
    return rewards, mask


def groups_of(scores, size):
    return [scores[i : i + size] for i in range(0, len(scores), size)]


def by_loop(scores, size, formula):
    """One number a response, in float64: formula(its score, its group, the others of the group)."""
    advantages = []
    for group in groups_of(np.asarray(scores, np.float64), size):
        for i, score in enumerate(group):
            advantages.append(formula(score, group, np.delete(group, i)))
    return advantages


def standard(ddof, eps):
    return lambda score, group, others: (score - group.mean()) / (group.std(ddof=ddof) + eps)


FORMULAS = [
    (rloo_advantages, {}, lambda score, group, others: score - others.mean()),
    (grpo_advantages, {}, standard(0, 1e-6)),
    (grpo_advantages, dict(ddof=1, eps=1e-4), standard(1, 1e-4)),
    (grpo_advantages, dict(eps=0.0), standard(0, 0.0)),
    (grpo_advantages, dict(scale_by_std=False), lambda score, group, others: score - group.mean()),
]


@pytest.mark.parametrize("group_size", [2, 3, 6])
@pytest.mark.parametrize(("estimator", "how", "formula"), FORMULAS)
def test_each_estimator_of_groups_equals_the_loop(estimator, how, formula, group_size):
    scores = np.random.default_rng(group_size).normal(size=12).astype(np.float32)
    got = estimator(jnp.asarray(scores), group_size=group_size, **how)
    np.testing.assert_allclose(got, by_loop(scores, group_size, formula), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("estimator", "how", "_"), FORMULAS)
@pytest.mark.parametrize("value", [0.1, 1000.1, -3.3, 1e18])
def test_a_group_of_equal_scores_has_no_advantage(estimator, how, _, value):
    scores = np.full(7, value, np.float32)
    scores[0] = np.nextafter(scores[0], np.float32(np.inf))  # what rounding leaves of equal ones
    scores = jnp.asarray(scores)
    assert (estimator(scores, group_size=7, **how) == 0.0).all()
    half = jnp.concatenate([scores, jnp.arange(7.0)])
    got = estimator(half, group_size=7, **how)
    assert (got[:7] == 0.0).all() and (got[7:] != 0.0).sum() == 6
    gradient = jax.grad(lambda x: estimator(x, group_size=7, **how)[0])(half)
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize(("estimator", "how", "_"), FORMULAS)
def test_a_score_that_is_nan_is_seen_in_its_group_alone(estimator, how, _):
    scores = jnp.array([1.0, jnp.nan, 1.0, 0.0, 1.0, 2.0])
    got = np.asarray(estimator(scores, group_size=3, **how))
    assert np.isnan(got[:3]).any() and np.isfinite(got[3:]).all()


def test_goldens_of_peers():
    # NeMo-RL, tests/unit/algorithms/test_grpo_group_identity.py: leave-one-out baselines of two
    # prompts, 4 responses each. The row 1, 2, 3, 4, whose first baseline is 3, is by hand.
    scores = jnp.array([0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    baselines = scores - rloo_advantages(scores, group_size=4)
    np.testing.assert_allclose(baselines[:4], [1 / 3, 1 / 3, 1 / 3, 0.0], atol=1e-6)
    scores = jnp.array([1.0, 2.0, 3.0, 4.0])
    assert (scores - rloo_advantages(scores, group_size=4))[0] == 3.0
    # tests/unit/algorithms/test_grpo.py of the same: test_calculate_baseline_and_std_per_prompt_
    # basic, and test_grpo_advantage_estimator_zero_std, _small_nonzero_std (std of a sample).
    scores = jnp.arange(1.0, 7.0)
    baselines = scores - rloo_advantages(scores, group_size=3)
    np.testing.assert_allclose(baselines, [2.5, 2.0, 1.5, 5.5, 5.0, 4.5], rtol=1e-5)
    scores = jnp.array([2.0, 2.0, 1.0, 3.0, 1.0, 1.01])
    got = grpo_advantages(scores, group_size=2, ddof=1)
    half = np.sqrt(0.5)
    np.testing.assert_allclose(got, [0, 0, -half, half, -half, half], rtol=1e-3)


def test_grpo_by_hand():
    # Mean 2, deviations -2, 0, 2: variance 8 / 3 of the population, 4 of a sample.
    scores = jnp.array([0.0, 2.0, 4.0])
    got = grpo_advantages(scores, group_size=3, eps=0.0)
    np.testing.assert_allclose(got, np.array([-2.0, 0.0, 2.0]) / np.sqrt(8 / 3), rtol=1e-6)
    assert grpo_advantages(scores, group_size=3, ddof=1, eps=0.0).tolist() == [-1.0, 0.0, 1.0]
    assert grpo_advantages(scores, group_size=3, scale_by_std=False).tolist() == [-2.0, 0.0, 2.0]


def test_rloo_is_dr_grpo_times_n_over_n_minus_1():
    scores = jnp.asarray(np.random.default_rng(3).normal(size=12), jnp.float32)
    grpo = grpo_advantages(scores, group_size=4, scale_by_std=False)
    np.testing.assert_allclose(rloo_advantages(scores, group_size=4), grpo * 4 / 3, atol=1e-6)


@pytest.mark.parametrize("ddof", [2, -1, 0.5])
def test_another_ddof_is_refused(ddof):
    with pytest.raises(ValueError, match="ddof must be 0 .population. or 1"):
        grpo_advantages(jnp.ones(4), group_size=2, ddof=ddof)


def whitened(x, mask):
    mean, variance = x[mask].mean(), x[mask].var()
    return np.where(mask, (x - mean) / np.sqrt(variance + 1e-8), 0.0)


def to_go_by_loop(rewards, mask, gamma=1.0):
    expected = np.zeros(mask.shape)
    for b, row in enumerate(mask):
        following = 0.0
        for t in np.nonzero(row)[0][::-1]:
            expected[b, t] = following = float(rewards[b, t]) + gamma * following
    return expected


def test_reinforce_plus_plus_equals_the_loops():
    rewards, mask = random_inputs(0)
    got = reinforce_plus_plus_advantages(jnp.asarray(rewards), jnp.asarray(mask))
    np.testing.assert_allclose(got, whitened(to_go_by_loop(rewards, mask), mask), atol=1e-5)
    totals = np.where(mask, rewards, 0.0).sum(axis=1, dtype=np.float64)
    got = reinforce_plus_plus_advantages(jnp.asarray(rewards), jnp.asarray(mask), group_size=3)
    centred = np.array(by_loop(totals, 3, lambda score, group, others: score - group.mean()))
    expected = whitened(np.repeat(centred[:, None], 5, axis=1), mask)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_reinforce_plus_plus_by_hand():
    # Row sums 3, 1 | 5, 5: 1, -1, 0, 0 at 1, 3, 1, 1 tokens; mean -2 / 6, mean square 4 / 6.
    rewards = jnp.array([[3.0, 0, 0], [0, 0, 1.0], [5.0, 0, 0], [5.0, 0, 0]])
    mask = jnp.arange(3)[None] < jnp.array([[1], [3], [1], [1]])
    got = reinforce_plus_plus_advantages(rewards, mask, group_size=2)
    std = np.sqrt(4 / 6 - 1 / 9)
    np.testing.assert_allclose(got[:, 0] * std, [4 / 3, -2 / 3, 1 / 3, 1 / 3], rtol=1e-6)
    assert (got[1] == got[1, 0]).all() and (got[~mask] == 0.0).all()


def test_equal_scores_everywhere_teach_nothing():
    rewards = jnp.zeros((4, 3)).at[:, 0].set(0.1)
    mask = jnp.ones((4, 3), bool)
    assert (reinforce_plus_plus_advantages(rewards, mask, group_size=2) == 0.0).all()
    once = mask.at[:, 1:].set(False)
    assert (reinforce_plus_plus_advantages(rewards, once) == 0.0).all()


def test_reinforce_equals_the_loop():
    rewards, mask = random_inputs(1)
    for gamma in (1.0, 0.9, 0.0):
        got = reinforce_advantages(jnp.asarray(rewards), jnp.asarray(mask), 0.3, gamma=gamma)
        expected = np.where(mask, to_go_by_loop(rewards, mask, gamma) - 0.3, 0.0)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_without_a_baseline_yet_that_of_the_rows_serves():
    rewards, mask = map(jnp.asarray, random_inputs(2))
    mean = jnp.where(mask, rewards, 0.0).sum(axis=1).mean()
    got = reinforce_advantages(rewards, mask, jnp.nan)
    np.testing.assert_allclose(got, reinforce_advantages(rewards, mask, mean), atol=1e-6)


def test_the_running_baseline_is_that_of_the_loop_and_starts_at_the_first_mean():
    batches = np.random.default_rng(4).normal(5.0, size=(6, 8)).astype(np.float32)
    got, expected = jnp.float32(jnp.nan), None
    for scores in batches:
        got = running_baseline(got, jnp.asarray(scores), decay=0.9)
        mean = float(scores.mean(dtype=np.float64))
        expected = mean if expected is None else 0.9 * expected + 0.1 * mean
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert abs(got - 5.0) < 0.3  # from 0 it would be at 5 (1 - 0.9 ** 6) = 2.3


def test_remax_is_the_difference():
    scores, greedy = jnp.array([1.0, 2.5], jnp.bfloat16), jnp.array([3.0, 0.5])
    got = remax_advantages(scores, greedy)
    assert got.tolist() == [-2.0, 2.0] and got.dtype == jnp.float32


@pytest.mark.parametrize("group_size", [0, 1, 4, -3])
def test_a_group_that_cannot_be_is_refused(group_size):
    rewards, mask = map(jnp.asarray, random_inputs(7))
    message = f"at least 2 and divide the 6 responses, got {group_size}"
    for call in (
        lambda: leave_one_out(rewards, mask, group_size=group_size),
        lambda: rloo_advantages(rewards[:, 0], group_size=group_size),
        lambda: grpo_advantages(rewards[:, 0], group_size=group_size),
        lambda: reinforce_plus_plus_advantages(rewards, mask, group_size=group_size),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_leave_one_out_equals_the_loop_over_the_other_responses():
    rewards, mask = random_inputs(5)
    got = leave_one_out(jnp.asarray(rewards), jnp.asarray(mask), group_size=3)
    totals = np.where(mask, rewards, 0.0).sum(axis=1)
    for i in range(6):
        group = range(i // 3 * 3, i // 3 * 3 + 3)
        others = np.mean([totals[j] for j in group if j != i])
        expected = np.where(mask[i], totals[i] - others, 0.0)
        np.testing.assert_allclose(got[i], expected, rtol=1e-5, atol=1e-5)


def test_padding_changes_no_leave_one_out_advantage():
    rewards, mask = random_inputs(6)
    clean = leave_one_out(jnp.asarray(rewards), jnp.asarray(mask), group_size=2)
    dirty = jnp.where(mask, rewards, jnp.nan)
    assert (leave_one_out(dirty, jnp.asarray(mask), group_size=2) == clean).all()
