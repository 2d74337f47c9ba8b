import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.core.importance import importance_weights
from ppo_jax.core.policy_losses import (
    clipped_policy_loss,
    dual_clip_policy_loss,
    kl_penalty_policy_loss,
    vpg_policy_loss,
)
from tests.support.losses import (
    NeMo,
    assert_equals_the_loop,
    assert_golden,
    random_tokens,
    value_and_gradient,
)

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


def surrogate(logp, old, a, low, high):
    ratio = np.exp(logp - old)
    return max(-a * ratio, -a * min(max(ratio, 1 - low), 1 + high))


def beyond(low, high):
    return lambda r, a, now, old: (a > 0 and r > 1 + high) or (a < 0 and r < 1 - low)


def never(r, a, now, old):
    return False


def test_each_loss_equals_a_loop_over_the_tokens():
    assert_equals_the_loop(
        clipped_policy_loss,
        lambda x, now, old, a: surrogate(x, old, a, 0.2, 0.3),
        beyond(0.2, 0.3),
        clip_range=0.2,
        clip_range_high=0.3,
    )
    assert_equals_the_loop(
        dual_clip_policy_loss,
        lambda x, now, old, a: min(surrogate(x, old, a, 0.2, 0.2), -1.5 * a if a < 0 else np.inf),
        beyond(0.2, 0.2),
        clip_range=0.2,
        dual_clip=1.5,
    )
    assert_equals_the_loop(
        kl_penalty_policy_loss,
        lambda x, now, old, a: -a * np.exp(x - old) + 0.7 * (np.expm1(x - old) - (x - old)),
        never,
        penalty_coef=0.7,
    )
    assert_equals_the_loop(vpg_policy_loss, lambda x, now, old, a: -a * x, never)


def test_without_a_clip_it_is_the_importance_weighted_policy_gradient():
    new, old, advantages, _, mask = random_tokens(3)
    advantages = advantages.at[:, 0].set(0.0)
    for high in (None, jnp.inf):
        how = dict(clip_range=jnp.inf, clip_range_high=high)
        value, metrics, grad = value_and_gradient(
            clipped_policy_loss, new, old, advantages, mask, **how
        )
        expected = np.where(mask, -advantages * np.exp(new - old) / mask.sum(), 0.0)
        np.testing.assert_allclose(grad, expected, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(value, expected.sum(), rtol=1e-5)
        assert metrics["policy/clip_fraction"] == 0.0


def test_above_its_limit_a_bad_token_costs_no_more():
    how = dict(clip_range=0.2, dual_clip=3.0)
    for ratio, advantage, loss, gradient, share in (
        (2.5, -2.0, 5.0, 5.0, 0.0),
        (4.0, -2.0, 6.0, 0.0, 1.0),
        (4.0, 2.0, -2.4, 0.0, 0.0),
        (4.0, 0.0, 0.0, 0.0, 0.0),
    ):
        given = (jnp.log(scalar(ratio)), scalar(0.0), scalar(advantage), MASK)
        value, metrics, grad = value_and_gradient(dual_clip_policy_loss, *given, **how)
        np.testing.assert_allclose([value, grad[0, 0]], [loss, gradient], rtol=1e-6)
        assert metrics["policy/dual_clip_fraction"] == share


def test_the_penalty_is_never_negative_and_loses_no_digits():
    small = np.concatenate([sign * np.logspace(-8, -1, 200) for sign in (1, -1)])
    new = jnp.asarray(small, jnp.float32)[:, None]
    one = jnp.ones((1, 1), bool)

    def penalty(x):
        x = x[None]
        how = dict(penalty_coef=1.0)
        return kl_penalty_policy_loss(x, 0 * x, 0 * x, one, **how)[1]["policy/penalty_kl"]

    got = np.asarray(jax.vmap(penalty)(new))
    assert (got >= 0).all()
    exact = np.expm1(np.float64(new[:, 0])) - np.float64(new[:, 0])
    np.testing.assert_allclose(got, exact, rtol=1e-3, atol=1e-9)


def test_the_numbers_of_nemo_rl():
    given = (NeMo.new, NeMo.before, NeMo.advantages, NeMo.mask)
    clip = dict(clip_range=0.2)
    ppo = [[-0.13171479239, 0.18898023268, -0.05926545753], [0.26870860625, -0.0804384053, 0.0]]
    assert_golden(value_and_gradient(clipped_policy_loss, *given, **clip), 0.18627018364, ppo)
    dual = (NeMo.new, NeMo.before_dual, NeMo.advantages, NeMo.mask)
    ppo[0][1] = 0.0
    assert_golden(value_and_gradient(dual_clip_policy_loss, *dual, **clip), 0.41728995011, ppo)
    pg = [[-0.23999999952, 0.13999999972, -0.07999999984], [0.21999999956, -0.11999999976, 0.0]]
    assert_golden(value_and_gradient(vpg_policy_loss, *given), 0.373999999252, pg)
    truncated = [
        [-0.1608768107267998, 0.24567430248748398, -0.05362560357559994],
        [0.3493211881351662, -0.059590236335788666, 0.0],
    ]
    limits = dict(low=0.7, high=1.3)
    weights, _ = importance_weights(NeMo.before, NeMo.sampled, NeMo.mask, **limits)
    got = value_and_gradient(clipped_policy_loss, *given, weights=weights, **clip)
    assert_golden(got, 0.3209028399844618, truncated)


def test_weights_may_be_nan_in_padding_and_carry_no_gradient():
    new, old, advantages, weights, mask = random_tokens(4)

    def loss(weights):
        return clipped_policy_loss(new, old, advantages, mask, clip_range=0.2, weights=weights)[0]

    value, grad = jax.value_and_grad(loss)(jnp.where(mask, weights, jnp.nan))
    assert value == loss(weights) and not grad.any()
