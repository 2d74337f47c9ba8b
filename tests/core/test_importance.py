import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.core.importance import LEVELS, OUTSIDE, importance_weights


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("level", LEVELS)
def test_the_weights_equal_the_loop(level, outside):
    rng = np.random.default_rng(0)
    new, sampled = 0.5 * rng.normal(size=(2, 20, 5)).astype(np.float32)
    mask = rng.random((20, 5)) < 0.7
    mask[3] = False
    weights, metrics = importance_weights(
        *map(jnp.asarray, (new, sampled, mask)), low=0.6, high=1.5, level=level, outside=outside
    )
    difference = np.where(mask, new.astype(np.float64) - sampled, 0.0)
    expected, hits = np.zeros((20, 5)), set()
    for b, t in zip(*np.nonzero(mask), strict=True):
        d = {
            "token": difference[b, t],
            "sequence": difference[b].sum(),
            "sequence_mean": difference[b].sum() / mask[b].sum(),
        }[level]
        side = (np.exp(d) > 1.5) - int(np.exp(d) < 0.6)
        hits.add(side)
        limit = {-1: 0.6, 0: np.exp(d), 1: 1.5}[side]
        expected[b, t] = limit if outside == "truncate" or side == 0 else 0.0
    assert hits == {-1, 0, 1}
    np.testing.assert_allclose(np.where(mask, weights, 0.0), expected, rtol=1e-5)
    assert np.isfinite(weights).all()
    size = np.abs(difference)[mask]
    np.testing.assert_allclose(metrics["policy/rollout_logprob_error"], size.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["policy/rollout_logprob_error_max"], size.max(), rtol=1e-5)
    mean = expected[mask].mean()
    np.testing.assert_allclose(metrics["policy/importance_weight"], mean, rtol=1e-5)


def test_padding_has_no_part_in_the_weights():
    mask = jnp.array([[True, False], [False, False]])
    new, old = jnp.array([[-1.0, jnp.nan]] * 2), jnp.array([[-1.5, jnp.inf]] * 2)
    for level in LEVELS:
        weights, metrics = importance_weights(new, old, mask, low=0.0, high=2.0, level=level)
        np.testing.assert_allclose(weights[0, 0], np.exp(0.5), rtol=1e-6)
        np.testing.assert_allclose(weights[1], 1.0)
        np.testing.assert_allclose(metrics["policy/rollout_logprob_error"], 0.5)


def test_the_numbers_of_nemo_rl():
    """NeMo-RL, tests/unit/algorithms/data/clipped_pg_loss_goldens.json, cases tis_token and
    icepop_token: the mean weight over tokens is its sampling_importance_ratio."""
    before = jnp.array([[-1.0, -1.1, -0.8], [-0.9, -1.0, 0.0]])
    sampled = jnp.array([[-1.2, -1.5, -0.7], [-1.4, -0.7, 0.0]])
    mask = jnp.array([[True, True, True], [True, True, False]])
    for low, high, outside, expected in (
        (0.7, 1.3, "truncate", 1.093411677188746),
        (0.75, 1.25, "drop", 0.4252480343887298),
    ):
        limits = dict(low=low, high=high, outside=outside)
        _, metrics = importance_weights(before, sampled, mask, **limits)
        np.testing.assert_allclose(metrics["policy/importance_weight"], expected, rtol=1e-6)


def test_the_weights_are_constants():
    def total(new):
        mask = jnp.ones((1, 2), bool)
        weights, metrics = importance_weights(new, jnp.zeros((1, 2)), mask, low=0, high=9)
        return weights.sum() + metrics["policy/importance_weight"]

    assert not jax.grad(total)(jnp.array([[0.1, 0.2]])).any()
