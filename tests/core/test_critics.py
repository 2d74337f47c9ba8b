import jax.numpy as jnp
import numpy as np

from ppo_jax.core.critics import (
    disputed_states,
    ensemble_values,
    explained_variance,
    explained_variance_by_position,
    mask_agreed_advantages,
    value_bias,
    value_calibration,
)


def random_inputs(seed):
    rng = np.random.default_rng(seed)
    values, returns = rng.normal(size=(2, 6, 9)).astype(np.float32)
    return values, returns, rng.random((6, 9)) < 0.7


def test_explained_variance_by_hand():
    # Returns 1, 3: variance 1. Values 1, 2: errors 0, 1, mean square 0.5.
    mask = jnp.array([[True, True, False]])
    returns = jnp.array([[1.0, 3.0, 9.0]])
    assert explained_variance(jnp.array([[1.0, 2.0, 0.0]]), returns, mask) == 0.5
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance(jnp.full((1, 3), 2.0), returns, mask) == 0.0  # the mean alone
    assert explained_variance(returns, jnp.ones((1, 3)), mask) == 0.0  # nothing to explain


def test_explained_variance_by_position_equals_the_loop():
    values, returns, mask = random_inputs(0)
    mask[2] = False  # a response without tokens
    parts = [[] for _ in range(4)]
    for b in range(6):
        tokens = np.flatnonzero(mask[b])
        for i, t in enumerate(tokens):
            parts[4 * i // len(tokens)].append((values[b, t], returns[b, t]))
    expected = []
    for part in parts:
        v, r = np.array(part, np.float64).T
        expected.append(1 - np.mean((r - v) ** 2) / np.var(r))
    got = explained_variance_by_position(values, returns, mask, num_bins=4)
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    one_token = jnp.eye(6, 9, dtype=bool)
    got = explained_variance_by_position(values, returns, one_token, num_bins=4)
    assert (got[1:] == 0.0).all() and got[0] != 0.0


def test_a_critic_that_knows_the_end_alone_is_seen_by_position():
    returns = jnp.tile(jnp.array([[1.0], [2.0], [4.0]]), (1, 8))
    values = returns.at[:, :6].set(2.0)
    got = explained_variance_by_position(values, returns, jnp.ones((3, 8), bool), num_bins=4)
    assert got[3] == 1.0 and (got[:3] < 0.0).all()


def test_bias_and_calibration_equal_the_loop():
    values, returns, mask = random_inputs(1)
    v, r = values[mask], returns[mask]
    np.testing.assert_allclose(value_bias(values, returns, mask), np.mean(v - r), rtol=1e-4)
    bins = [[] for _ in range(4)]
    for rank, i in enumerate(np.argsort(v)):
        bins[4 * rank // len(v)].append(i)
    got = value_calibration(values, returns, mask, num_bins=4)
    np.testing.assert_allclose(got[0], [v[i].mean() for i in bins], rtol=1e-4)
    np.testing.assert_allclose(got[1], [r[i].mean() for i in bins], rtol=1e-4)
    few = value_calibration(values, returns, jnp.eye(6, 9, dtype=bool), num_bins=12)
    assert jnp.isnan(few[0]).sum() == 6


def test_an_ensemble_has_the_mean_and_deviation_of_its_values():
    values = np.random.default_rng(2).normal(size=(3, 4, 5)).astype(np.float32)
    mean, std = ensemble_values(values)
    np.testing.assert_allclose(mean, values.mean(0, dtype=np.float64), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(std, values.std(0, dtype=np.float64), rtol=1e-4)
    assert (ensemble_values(jnp.full((3, 4, 5), 0.1))[1] == 0.0).all()


def test_the_share_that_agrees_most_teaches_nothing_and_that_which_disagrees_most_is_told():
    advantages, stds, mask = random_inputs(3)
    stds = np.abs(stds)
    order = np.sort(stds[mask])
    num = round(0.3 * len(order))
    assert 0 < num < len(order) / 2
    got = mask_agreed_advantages(advantages, stds, mask, fraction=0.3)
    expected = np.where(mask & (stds >= order[num]), advantages, 0.0)
    np.testing.assert_array_equal(got, expected)
    assert (mask & (got == 0)).sum() == num
    disputed = disputed_states(stds, mask, fraction=0.3)
    np.testing.assert_array_equal(disputed, mask & (stds > order[-num - 1]))
    assert disputed.sum() == num


def test_critics_that_are_all_equal_mask_nothing_and_the_whole_share_masks_all():
    advantages, stds, mask = random_inputs(4)
    equal = jnp.full(stds.shape, 0.5)
    got = mask_agreed_advantages(advantages, equal, mask, fraction=0.9)
    np.testing.assert_array_equal(got, np.where(mask, advantages, 0.0))
    assert not disputed_states(equal, mask, fraction=0.9).any()
    assert (mask_agreed_advantages(advantages, stds, mask, fraction=1.0) == 0.0).all()
    np.testing.assert_array_equal(disputed_states(stds, mask, fraction=1.0), mask)
    assert not disputed_states(stds, mask, fraction=0.0).any()
