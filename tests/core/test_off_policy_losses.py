import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.core.importance import importance_weights
from ppo_jax.core.off_policy_losses import (
    cispo_policy_loss,
    decoupled_policy_loss,
    dppo_policy_loss,
)
from ppo_jax.core.policy_losses import clipped_policy_loss, dual_clip_policy_loss
from ppo_jax.core.sequence_losses import gspo_policy_loss
from tests.support.losses import (
    NeMo,
    assert_equals_the_loop,
    assert_golden,
    random_tokens,
    value_and_gradient,
)


def test_cispo_equals_the_loop_with_the_weight_a_constant():
    assert_equals_the_loop(
        cispo_policy_loss,
        lambda x, now, old, a: -min(max(np.exp(now - old), 0.8), 1.3) * a * x,
        lambda r, a, now, old: not 0.8 <= r <= 1.3,
        clip_range=0.2,
        clip_range_high=0.3,
    )


@pytest.mark.parametrize(
    "loss", [clipped_policy_loss, dual_clip_policy_loss, cispo_policy_loss, gspo_policy_loss]
)
def test_a_clip_of_1_has_no_lower_limit(loss):
    """It is the loss without a lower limit, to the last bit, however far a probability fell."""
    logprobs, old, advantages, _, mask = random_tokens(3)
    given = (logprobs, old.at[0].add(30.0), advantages, mask)
    one, none = (
        value_and_gradient(loss, *given, clip_range=low, clip_range_high=0.3)
        for low in (1.0, np.inf)
    )
    jax.tree.map(np.testing.assert_array_equal, one, none)


def test_dppo_equals_the_loop():
    def is_dropped(r, a, now, old):
        farther = (a > 0 and r > 1) or (a < 0 and r < 1)
        return farther and abs(np.exp(now) - np.exp(old)) > 0.03

    assert_equals_the_loop(
        dppo_policy_loss,
        lambda x, now, old, a: (
            0.0 if is_dropped(np.exp(now - old), a, now, old) else -a * np.exp(x - old)
        ),
        is_dropped,
        divergence_limit=0.03,
    )


def test_dppo_by_hand():
    # A rare token may double; a likely one may not go from 0.6 to 0.8, but may come back.
    new = jnp.log(jnp.array([[0.02, 0.8, 0.8, 0.4, 0.8]]))
    old = jnp.log(jnp.array([[0.01, 0.6, 0.6, 0.6, 0.6]]))
    advantages = jnp.array([[1.0, 1.0, -1.0, -1.0, 0.0]])
    mask = jnp.ones((1, 5), bool)
    how = dict(divergence_limit=0.1, normalizer=1)
    value, metrics, grad = value_and_gradient(dppo_policy_loss, new, old, advantages, mask, **how)
    np.testing.assert_allclose(grad, [[-2.0, 0.0, 0.8 / 0.6, 0.0, 0.0]], rtol=1e-5)
    np.testing.assert_allclose(value, -2.0 + 0.8 / 0.6, rtol=1e-5)
    assert metrics["policy/clip_fraction"] == 2.0


def test_decoupled_equals_the_loop_and_the_plain_loss_where_both_policies_are_one():
    new, old, advantages, shift, mask = random_tokens(1)
    behavior = old + 0.5 * shift
    how = dict(clip_range=0.2, behavior_logprobs=behavior, behavior_weight_limit=0.7)
    given = (new, old, advantages, mask)
    value, metrics, grad = value_and_gradient(decoupled_policy_loss, *given, **how)
    weights = np.minimum(np.exp(np.float64(old) - np.float64(behavior)), 0.7)
    assert (weights[mask] == 0.7).any() and (weights[mask] < 0.7).any()
    expected = value_and_gradient(
        clipped_policy_loss, *given, clip_range=0.2, weights=jnp.asarray(weights, jnp.float32)
    )
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(grad, expected[2], rtol=1e-5)
    np.testing.assert_allclose(metrics["policy/behavior_weight"], weights[mask].mean(), rtol=1e-5)
    same = functools.partial(decoupled_policy_loss, behavior_logprobs=old, clip_range=0.2)
    assert same(*given)[0] == clipped_policy_loss(*given, clip_range=0.2)[0]
    # Weights of the user's multiply, and padding has no part.
    hidden = jnp.where(mask, behavior, jnp.nan)
    doubled = decoupled_policy_loss(
        *given, **how | dict(behavior_logprobs=hidden, weights=2 * jnp.ones(mask.shape))
    )
    np.testing.assert_allclose(doubled[0], 2 * value, rtol=1e-6)


def test_the_numbers_of_nemo_rl():
    limits = dict(low=0.0, high=jnp.inf)
    weights, _ = importance_weights(NeMo.before, NeMo.sampled, NeMo.mask, **limits)
    given = (NeMo.new, NeMo.before, NeMo.advantages, NeMo.mask)
    got = value_and_gradient(cispo_policy_loss, *given, clip_range=0.2, weights=weights)
    gradient = [
        [-0.23450932909773395, 0.2506265487024803, -0.057909594638482234],
        [0.435262414594309, -0.07111854904320782, 0.0],
    ]
    assert_golden(got, 0.03329652014119518, gradient)
