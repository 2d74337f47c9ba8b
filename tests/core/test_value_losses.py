import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.core.value_losses import clipped_value_loss, explained_variance

MASK = jnp.ones((1, 1), bool)


def random_inputs(seed, num=3, scale=1.0):
    rng = np.random.default_rng(seed)
    arrays = scale * rng.normal(size=(num, 6, 5))
    return (*arrays.astype(np.float32), rng.random((6, 5)) < 0.6)


def scalar(x):
    return jnp.full((1, 1), x, jnp.float32)


def test_the_value_loss_equals_the_loop():
    values, old_values, returns, mask = inputs = random_inputs(2)
    losses, clipped = [], []
    for b, t in zip(*np.nonzero(mask), strict=True):
        v, old, target = (float(x[b, t]) for x in (values, old_values, returns))
        near = min(max(v, old - 0.5), old + 0.5)
        losses.append(0.5 * max((v - target) ** 2, (near - target) ** 2))
        clipped.append((near - target) ** 2 > (v - target) ** 2)
    loss, metrics = clipped_value_loss(*map(jnp.asarray, inputs), value_clip_range=0.5)
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(metrics["value/loss"], np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(metrics["value/clip_fraction"], np.mean(clipped), rtol=1e-5)
    assert 0.0 < np.mean(clipped) < 1.0


@pytest.mark.parametrize(
    ("value", "value_clip_range", "expected", "gradient"),
    [
        # Old value 0, return 2. To 1.0 with a range of 0.5: (0.5 - 2)² / 2, without gradient.
        (1.0, 0.5, 1.125, 0.0),
        (1.0, None, 0.5, -1.0),
        (0.25, 0.5, 1.53125, -1.75),
        # Away from the return the plain error is the larger.
        (-1.0, 0.5, 4.5, -3.0),
    ],
)
def test_the_value_loss_by_hand(value, value_clip_range, expected, gradient):
    def loss(values):
        return clipped_value_loss(
            values, scalar(0.0), scalar(2.0), MASK, value_clip_range=value_clip_range
        )[0]

    got, grad = jax.value_and_grad(loss)(scalar(value))
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    np.testing.assert_allclose(grad, [[gradient]], rtol=1e-6)


def test_inside_the_value_range_nothing_counts_as_clipped():
    # Not even by rounding: old + (values - old) is not always values.
    values, old_values, returns, mask = map(jnp.asarray, random_inputs(3))
    assert (old_values + (values - old_values) != values).any()
    _, metrics = clipped_value_loss(values, old_values, returns, mask, value_clip_range=10.0)
    assert metrics["value/clip_fraction"] == 0.0


def test_a_critic_without_a_clip_has_the_gradient_of_a_plain_squared_error():
    draw = np.random.default_rng(5)
    values, old_values, returns = jnp.asarray(draw.normal(size=(3, 4, 6)), jnp.float32)
    mask = jnp.ones((4, 6), bool)

    def gradient(value_clip_range):
        loss = functools.partial(clipped_value_loss, value_clip_range=value_clip_range)
        return jax.grad(lambda v: loss(v, old_values, returns, mask)[0])(values)

    for off in (None, jnp.inf):
        np.testing.assert_allclose(gradient(off), (values - returns) / 24, rtol=1e-6)
    assert not np.allclose(gradient(0.1), gradient(None))


def test_explained_variance_by_hand():
    # Returns 1, 3: variance 1. Values 1, 2: errors 0, 1, mean square 0.5.
    mask = jnp.array([[True, True, False]])
    returns = jnp.array([[1.0, 3.0, 9.0]])
    assert explained_variance(jnp.array([[1.0, 2.0, 0.0]]), returns, mask) == 0.5
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance(jnp.full((1, 3), 2.0), returns, mask) == 0.0  # the mean alone
    assert explained_variance(returns, jnp.ones((1, 3)), mask) == 0.0  # nothing to explain
