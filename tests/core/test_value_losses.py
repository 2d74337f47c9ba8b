import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.core.value_losses import (
    classification_value_loss,
    clipped_value_loss,
    hl_gauss_targets,
    hl_gauss_value,
)

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


BINS = jnp.array([-2.0, -1.0, -0.5, 0.0, 1.5, 3.0])


def gaussian_mass(target, bins, sigma):
    target = min(max(target, bins[0]), bins[-1])
    below = [0.5 * (1 + math.erf((b - target) / (sigma * math.sqrt(2)))) for b in bins]
    mass = [high - low for low, high in zip(below, below[1:], strict=False)]
    return [m / sum(mass) for m in mass]


def test_targets_are_the_mass_of_a_normal_distribution_in_each_bin():
    returns = [-7.0, -2.0, -0.7, 0.0, 1.0, 2.9, 3.0, 1e30]
    for sigma in (0.1, 0.75, 40.0):
        expected = [gaussian_mass(r, BINS.tolist(), sigma) for r in returns]
        got = hl_gauss_targets(jnp.array(returns), bins=BINS, sigma=sigma)
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_targets_by_hand():
    # Within 1, 2 and 3 σ of the mean lie 68.27, 95.45 and 99.73 % of the mass.
    bins = jnp.array([-3.0, -2.0, -1.0, 1.0, 2.0, 3.0])
    got = hl_gauss_targets(jnp.float32(0), bins=bins, sigma=1.0)
    one_side = [(0.9973002 - 0.9544997) / 2, (0.9544997 - 0.6826895) / 2]
    np.testing.assert_allclose(got * 0.9973002, [*one_side, 0.6826895, *one_side[::-1]], atol=1e-6)


@pytest.mark.parametrize("sigma", [1e-37, 1e37])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_the_ends_of_sigma_are_one_bin_and_widths_and_never_nan(sigma, scale):
    bins, returns = BINS * scale, jnp.array([-0.75, 0.5, -jnp.inf, jnp.inf]) * scale
    widths = jnp.diff(BINS) / 5
    expected = jnp.eye(5)[jnp.array([1, 3, 0, 4])] if sigma < 1 else jnp.tile(widths, (4, 1))
    for targets in (hl_gauss_targets, jax.jit(hl_gauss_targets)):
        np.testing.assert_allclose(targets(returns, bins=bins, sigma=sigma), expected, atol=1e-5)


def test_the_value_of_a_target_is_its_return():
    # Away from the edges, with bins of one width, for σ of 0.75 bins.
    bins, returns = jnp.linspace(-5.0, 5.0, 41), jnp.linspace(-3.0, 3.0, 50)
    targets = hl_gauss_targets(returns, bins=bins, sigma=0.75 * 0.25)
    np.testing.assert_allclose(hl_gauss_value(jnp.log(targets), bins=bins), returns, atol=1e-3)


def test_the_loss_of_a_critic_that_classifies_equals_the_loop():
    rng = np.random.default_rng(7)
    logits, returns = rng.normal(size=(6, 4, 5)), 2 * rng.normal(size=(6, 4))
    mask = rng.random((6, 4)) < 0.6
    losses, outside = [], []
    for b, t in zip(*np.nonzero(mask), strict=True):
        target = gaussian_mass(returns[b, t], BINS.tolist(), 0.75)
        log_total = math.log(sum(math.exp(x) for x in logits[b, t]))
        losses.append(-sum(p * (x - log_total) for p, x in zip(target, logits[b, t], strict=True)))
        outside.append(not -2.0 <= returns[b, t] <= 3.0)
    arrays = [jnp.asarray(x, jnp.float32) for x in (logits, returns)]
    loss, metrics = classification_value_loss(*arrays, jnp.asarray(mask), bins=BINS, sigma=0.75)
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(metrics["value/outside_bins"], np.mean(outside), rtol=1e-5)
    assert 0.0 < np.mean(outside) < 1.0


def test_the_gradient_of_a_critic_that_classifies_is_softmax_less_target():
    logits, returns = jnp.asarray(random_inputs(8)[0])[None, :1], scalar(0.3)

    def loss(logits, returns):
        return classification_value_loss(logits, returns, MASK, bins=BINS[:6], sigma=0.75)[0]

    grads = jax.grad(loss, argnums=(0, 1))(logits, returns)
    target = hl_gauss_targets(returns, bins=BINS, sigma=0.75)
    np.testing.assert_allclose(grads[0], jax.nn.softmax(logits) - target, atol=1e-6)
    assert grads[1] == 0.0
