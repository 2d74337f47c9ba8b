"""PPO with a KL penalty of coefficient β in the rewards ends at π ∝ π_ref exp(r / β), whatever its
loss, if the advantages are unscaled: on a bandit, by exact expectations.

Every arm is a row whose weight is its probability under the policy that samples.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.core import off_policy_losses, policy_losses, sequence_losses
from ppo_jax.core.covariance import kl_cov_policy_loss
from ppo_jax.core.kl import LOSS_ESTIMATORS, kl_loss
from ppo_jax.core.named import call_named, parameters
from ppo_jax.core.policy_losses import clipped_policy_loss
from ppo_jax.core.rewards import token_rewards

SCORES = jnp.array([1.0, 0.5, 0.0, -0.5])
REF = jax.nn.log_softmax(jnp.array([0.0, 1.0, 0.5, -0.5]))[:, None]
ARMS = jnp.ones((4, 1), bool)
BETA, BOUND = 0.5, 1e-3  # the largest difference of a probability
NUMBERS = dict(
    clip_range=0.2,
    penalty_coef=1.0,
    divergence_limit=0.1,
    covariance_fraction=0.3,
    dual_clip=3.0,
)
LOSSES = [
    getattr(module, name)
    for module in (policy_losses, off_policy_losses, sequence_losses)
    for name in sorted(vars(module))
    if name.endswith("_policy_loss") and getattr(module, name).__module__ == module.__name__
]


def target(beta=BETA):
    """π_ref exp(r / β) / Z in float64."""
    tilted = np.exp(np.asarray(REF[:, 0], np.float64) + np.asarray(SCORES, np.float64) / beta)
    return tilted / tilted.sum()


def call(loss, logprobs, old, advantages):
    """Its expectation over the arms, those of the old policy by their probabilities.

    A loss that takes no weights has the advantages multiplied by them: a maximum of terms that are
    linear in A is the same.
    """
    weights = jnp.exp(old)
    takes_weights = "weights" in parameters(loss)
    advantages = advantages if takes_weights else weights * advantages
    given = dict(logprobs=logprobs, old_logprobs=old, advantages=advantages, mask=ARMS)
    given |= dict(behavior_logprobs=old, weights=weights, normalizer=1)
    return call_named(loss, given | NUMBERS)[0]


def unscaled(rewards, probs):
    return rewards - jnp.sum(probs * rewards)


def scaled(rewards, probs):
    centred = unscaled(rewards, probs)
    return centred / jnp.sqrt(jnp.sum(probs * centred**2) + 1e-6)


def ends_at(loss, advantage=unscaled, beta=BETA, num_epochs=3, rate=0.5, iterations=3000):
    """[4] probabilities after iterations of a batch of all arms and some epochs of plain SGD."""

    @jax.jit
    def run(logits):
        def iteration(logits, _):
            old = jax.nn.log_softmax(logits)[:, None]
            rewards = token_rewards(SCORES, old, REF, ARMS, kl_coef=beta)
            advantages = advantage(rewards, jnp.exp(old))

            def epoch(_, logits):
                def of(logits):
                    return loss(jax.nn.log_softmax(logits)[:, None], old, advantages)

                return logits - rate * jax.grad(of)(logits)

            return jax.lax.fori_loop(0, num_epochs, epoch, logits), None

        return jax.lax.scan(iteration, logits, length=iterations)[0]

    return np.asarray(jax.nn.softmax(run(jnp.array([-1.0, 0.0, 1.0, 2.0]))))


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_every_loss_ends_at_the_reference_tilted_by_the_reward(loss):
    np.testing.assert_allclose(ends_at(functools.partial(call, loss)), target(), atol=BOUND)


def test_an_arm_that_kl_cov_penalises_stays_where_its_advantage_is_below_the_penalty():
    """|log r| has a slope of penalty_coef at 0, against which a smaller advantage moves nothing."""
    got = ends_at(functools.partial(call, kl_cov_policy_loss))
    assert got[3] - target()[3] > 10 * BOUND
    rewards = np.asarray(SCORES) - BETA * (np.log(got) - np.asarray(REF[:, 0]))
    advantages = rewards - got @ rewards
    assert 0.1 < abs(advantages[3]) < NUMBERS["penalty_coef"]
    np.testing.assert_allclose(
        got[:3] / got[:3].sum(), target()[:3] / target()[:3].sum(), rtol=1e-3
    )


def test_another_coefficient_ends_elsewhere():
    loss = functools.partial(call, clipped_policy_loss)
    np.testing.assert_allclose(ends_at(loss, beta=1.0), target(1.0), atol=BOUND)
    assert np.abs(target(1.0) - target()).max() > 100 * BOUND


def with_kl_in_loss(estimator, beta=BETA):
    def loss(logprobs, old, advantages):
        how = dict(old_logprobs=old, weights=jnp.exp(old), normalizer=1)
        penalty = kl_loss(logprobs, REF, ARMS, estimator=estimator, **how)[0]
        return call(clipped_policy_loss, logprobs, old, advantages) + beta * penalty

    return loss


def of_scores(advantage):
    """The advantages of the scores alone, without the KL penalty."""
    return lambda rewards, probs: advantage(SCORES[:, None], probs)


@pytest.mark.parametrize("estimator", LOSS_ESTIMATORS)
def test_of_one_token_the_kl_in_the_loss_ends_there_too(estimator):
    """There are no later states, whose KL a loss would omit."""
    got = ends_at(with_kl_in_loss(estimator), of_scores(unscaled))
    np.testing.assert_allclose(got, target(), atol=BOUND)


def test_scores_over_their_std_with_the_kl_in_the_loss_end_elsewhere():
    """GRPO: the std divides the scores and not the penalty, and so multiplies β, by the std at the
    end itself: there is none where a small β lets all go to the best arm."""
    got = ends_at(with_kl_in_loss("k3", 2.0), of_scores(scaled))
    scores = np.asarray(SCORES, np.float64)
    std = np.sqrt(got @ np.square(scores - got @ scores))
    np.testing.assert_allclose(got, target(2.0 * std), atol=BOUND)
    assert np.abs(got - target(2.0)).max() > 100 * BOUND
    assert ends_at(with_kl_in_loss("k3"), of_scores(scaled))[0] > 0.99 > target()[0] + 0.5
