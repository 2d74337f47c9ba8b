"""Gradients of the KL penalty against the exact ones: every action, or every path of a tree, is a
row whose weight is its probability, so that a loss is its expectation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.core.critic_free import reinforce_advantages
from ppo_jax.core.kl import LOSS_ESTIMATORS, kl_estimate, kl_loss
from ppo_jax.core.policy_losses import clipped_policy_loss, vpg_policy_loss
from ppo_jax.core.rewards import token_rewards

LOGITS, REF_LOGITS, OLD_LOGITS = np.random.default_rng(0).normal(size=(3, 5))
ACTIONS = jnp.ones((1, 5), bool)


def softmax(logits):
    exp = np.exp(np.asarray(logits, np.float64))
    return exp / exp.sum(axis=-1, keepdims=True)


def logprobs_of(logits):
    return jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))[None]


PROBS, REF_PROBS = softmax(LOGITS), softmax(REF_LOGITS)
REF, OLD = logprobs_of(REF_LOGITS), logprobs_of(OLD_LOGITS)
LOG_RATIOS = np.log(PROBS / REF_PROBS)
EXACT = PROBS * (LOG_RATIOS - PROBS @ LOG_RATIOS)  # of KL(policy || reference)
FORWARD = PROBS - REF_PROBS  # of KL(reference || policy)


def gradient(loss):
    """Of loss(logprobs of all actions) by the logits of the policy."""
    return jax.grad(lambda logits: loss(logprobs_of(logits)))(jnp.asarray(LOGITS, jnp.float32))


def is_close(got, expected):
    return np.allclose(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("estimator", LOSS_ESTIMATORS)
def test_the_kl_in_the_loss_has_the_gradient_of_the_kl(estimator):
    def on_policy(logprobs):
        how = dict(weights=jnp.exp(logprobs), normalizer=1)
        return kl_loss(logprobs, REF, ACTIONS, estimator=estimator, **how)[0]

    def off_policy(logprobs):
        how = dict(old_logprobs=OLD, weights=jnp.exp(OLD), normalizer=1)
        return kl_loss(logprobs, REF, ACTIONS, estimator=estimator, **how)[0]

    assert is_close(gradient(on_policy), EXACT)
    assert is_close(gradient(off_policy), EXACT)
    assert not is_close(EXACT, FORWARD)


def test_k1_in_the_reward_has_the_gradient_of_the_kl():
    def loss(policy_loss, logprobs):
        constant = jax.lax.stop_gradient(logprobs)
        rewards = token_rewards(jnp.zeros(1), constant, REF, ACTIONS, kl_coef=1.0)
        how = dict(weights=jnp.exp(constant), normalizer=1)
        return policy_loss(logprobs, constant, rewards, ACTIONS, **how)[0]

    for policy_loss in (vpg_policy_loss, clipped_policy_loss):
        assert is_close(gradient(lambda x, of=policy_loss: loss(of, x)), EXACT)


def naive(estimator):
    """The estimate as a loss, without the weight of importance."""

    def loss(logprobs):
        probs = jax.lax.stop_gradient(jnp.exp(logprobs))
        return jnp.sum(probs * kl_estimate(logprobs, REF, estimator=estimator))

    return gradient(loss)


def test_k1_in_the_loss_has_mean_0_and_k3_alone_descends_the_forward_kl():
    np.testing.assert_allclose(naive("k1"), 0.0, atol=1e-6)
    assert is_close(naive("k3"), FORWARD) and not is_close(naive("k3"), EXACT)


def test_with_the_weight_held_constant_k3_is_the_forward_kl_again():
    def loss(logprobs):
        weights = jax.lax.stop_gradient(jnp.exp(logprobs))  # old probability x ratio
        return jnp.sum(weights * kl_estimate(logprobs, REF, estimator="k3"))

    assert is_close(gradient(loss), FORWARD)


# --- a tree: one of two actions, and then one of two that depend on it ---------------------------

TREE, REF_TREE = np.random.default_rng(1).normal(size=(2, 3, 2))  # at the root, after 0, after 1
PATHS = [(0, 0), (0, 1), (1, 0), (1, 1)]
STEPS = jnp.ones((4, 2), bool)


def path_logprobs(tree):
    logprobs = jax.nn.log_softmax(jnp.asarray(tree, jnp.float32))
    return jnp.stack([jnp.stack([logprobs[0, a], logprobs[1 + a, b]]) for a, b in PATHS])


def tree_gradient(loss):
    return np.asarray(jax.grad(lambda x: loss(path_logprobs(x)))(jnp.asarray(TREE, jnp.float32)))


def exact_tree_gradient(with_later_states):
    """In float64, of KL at the root + the mean KL after it; its root's share of the latter, or not.

    The gradient of the mean of numbers x over the root's actions is p (x - mean x).
    """
    probs, ref_probs = softmax(TREE), softmax(REF_TREE)
    ratios = np.log(probs / ref_probs)
    kls = (probs * ratios).sum(axis=1)
    exact = probs * (ratios - kls[:, None])
    exact[1:] *= probs[0][:, None]
    if with_later_states:
        exact[0] += probs[0] * (kls[1:] - probs[0] @ kls[1:])
    return exact


def weights_of_paths(logprobs):
    probs = jax.lax.stop_gradient(jnp.exp(logprobs.sum(axis=1, keepdims=True)))
    return dict(weights=jnp.broadcast_to(probs, (4, 2)), normalizer=1)


def test_k1_in_the_reward_has_the_effect_on_later_states_that_a_loss_omits():
    ref = path_logprobs(REF_TREE)

    def in_reward(logprobs):
        rewards = token_rewards(jnp.zeros(4), logprobs, ref, STEPS, kl_coef=1.0)
        to_go = reinforce_advantages(rewards, STEPS, 0.0)
        return vpg_policy_loss(logprobs, logprobs, to_go, STEPS, **weights_of_paths(logprobs))[0]

    assert is_close(tree_gradient(in_reward), exact_tree_gradient(True))
    for estimator in LOSS_ESTIMATORS:

        def in_loss(logprobs, estimator=estimator):
            how = weights_of_paths(logprobs)
            return kl_loss(logprobs, ref, STEPS, estimator=estimator, **how)[0]

        assert is_close(tree_gradient(in_loss), exact_tree_gradient(False))
    assert not is_close(exact_tree_gradient(True), exact_tree_gradient(False))
