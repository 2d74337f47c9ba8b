import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.core.policy_losses import clipped_policy_loss

MASK = jnp.ones((1, 1), bool)


def random_inputs(seed, num=3, scale=1.0):
    rng = np.random.default_rng(seed)
    arrays = scale * rng.normal(size=(num, 6, 5))
    return (*arrays.astype(np.float32), rng.random((6, 5)) < 0.6)


def scalar(x):
    return jnp.full((1, 1), x, jnp.float32)


@pytest.mark.parametrize("high", [None, 0.5, 0.0])
def test_the_policy_loss_equals_the_loop(high):
    logprobs, old_logprobs, advantages, mask = inputs = random_inputs(0, scale=0.5)
    losses, clipped, squares, ratios = [], [], [], []
    for b, t in zip(*np.nonzero(mask), strict=True):
        d = float(logprobs[b, t]) - float(old_logprobs[b, t])
        ratio, advantage = np.exp(d), float(advantages[b, t])
        limited = min(max(ratio, 1 - 0.2), 1 + (0.2 if high is None else high))
        losses.append(max(-advantage * ratio, -advantage * limited))
        clipped.append(-advantage * limited > -advantage * ratio)
        squares.append(d * d)
        ratios.append(ratio)
    loss, metrics = clipped_policy_loss(
        *map(jnp.asarray, inputs), clip_range=0.2, clip_range_high=high
    )
    expected = {
        "policy/loss": np.mean(losses),
        "policy/clip_fraction": np.mean(clipped),
        "policy/approx_kl": 0.5 * np.mean(squares),
        "policy/ratio_mean": np.mean(ratios),
        "policy/ratio_max": np.max(ratios),
    }
    np.testing.assert_allclose(loss, expected["policy/loss"], rtol=1e-5)
    assert metrics.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "gradient"),
    [
        # A > 0 pays no more above 1.2; A < 0 is let off no further below 0.8. On the other
        # side, where the policy has moved the wrong way, nothing is clipped: dL/dlogp = -A r.
        (1.5, 2.0, -2.4, 0.0),
        (0.5, 2.0, -1.0, -1.0),
        (1.5, -2.0, 3.0, 3.0),
        (0.5, -2.0, 1.6, 0.0),
        (1.1, 2.0, -2.2, -2.2),
    ],
)
def test_the_policy_loss_by_hand(ratio, advantage, expected, gradient):
    def loss(logprobs):
        return clipped_policy_loss(logprobs, scalar(0.0), scalar(advantage), MASK)[0]

    got, grad = jax.value_and_grad(loss)(jnp.log(scalar(ratio)))
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    np.testing.assert_allclose(grad, [[gradient]], rtol=1e-6)


def test_at_ratio_one_the_gradient_is_the_policy_gradient():
    logprobs, advantages, mask = random_inputs(1, num=2)

    def loss(logprobs):
        # The old log-probs may even be the same array: they count as constants.
        return clipped_policy_loss(logprobs, logprobs, jnp.asarray(advantages), mask)

    (value, metrics), grad = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(logprobs))
    np.testing.assert_allclose(grad, np.where(mask, -advantages / mask.sum(), 0.0), rtol=1e-6)
    np.testing.assert_allclose(value, -advantages[mask].mean(), rtol=1e-5)
    assert metrics["policy/approx_kl"] == metrics["policy/clip_fraction"] == 0.0
    assert metrics["policy/ratio_mean"] == metrics["policy/ratio_max"] == 1.0
