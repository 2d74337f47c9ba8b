"""Scores as PPO learns from them: in deviations, clipped, by the rules, less the penalties."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.algorithms.experience import response_rewards
from ppo_jax.algorithms.ppo import init_ppo, update_from_rollout
from ppo_jax.algorithms.scores import count_scores
from ppo_jax.core.rewards import token_scores
from ppo_jax.core.shaping import Moments
from tests.support import tiny

NUMBERS = dict(score_clip=1.5, overlong_tokens=4.0, missing_eos_score=-5.0, kl_coef=0.0)
NUMBERS |= dict(length_penalty=0.25, length_penalty_free=3.0)
BEFORE = np.array([4.0, -1.0, 7.0])  # scores of an earlier iteration


def rollout_and_scores(run):
    """Responses of several lengths, the second cut off, and their scores."""
    rollout = run.rollout()
    width, count = rollout.response_mask.shape[1], len(rollout.has_eos)
    lengths = width - np.arange(count) % 6
    mask = jnp.arange(width)[None] < lengths[:, None]
    has_eos = jnp.arange(count) != 1
    rollout = dataclasses.replace(rollout, response_mask=mask, has_eos=has_eos)
    return rollout, lengths, np.linspace(-4.0, 6.0, count).astype(np.float32)


def with_moments(state, *batches):
    """The state after these scores."""
    state = dataclasses.replace(state, score_moments=Moments())
    for scores in batches:
        state = count_scores(state, jnp.asarray(scores, jnp.float32), jnp.ones((1, 1), bool))
    return state


@pytest.mark.parametrize("of_tokens", [False, True])
def test_scores_are_normalized_clipped_adjusted_then_less_both_penalties(of_tokens):
    run = tiny.Run("whole", **NUMBERS)
    options = tiny.options(missing_eos="replace")
    rollout, lengths, given = rollout_and_scores(run)
    scores = jnp.asarray(given)
    if of_tokens:
        scores = token_scores(scores, rollout.response_mask)
    state = count_scores(with_moments(run.state, BEFORE), scores, rollout.response_mask)
    rewards, metrics = response_rewards(
        rollout, scores, rollout.logprobs, state, run.numbers, options
    )
    every = np.concatenate([BEFORE, given]).astype(np.float64)
    expected = np.clip((given - every.mean()) / every.std(), -1.5, 1.5)
    assert (np.abs(expected) == 1.5).any() and (np.abs(expected) < 1.5).any()
    expected[1] = -5.0
    expected -= 0.25 * np.maximum(lengths - 3, 0)
    expected -= np.clip((lengths - (8 - 4)) / 4, 0.0, 1.0)
    np.testing.assert_allclose(rewards.sum(axis=1), expected, atol=1e-5)
    np.testing.assert_allclose(rewards[np.arange(len(given)), lengths - 1], expected, atol=1e-5)
    assert metrics["reward/adjusted_score_mean"] == pytest.approx(expected.mean(), abs=1e-5)
    assert metrics["reward/score_mean"] == pytest.approx(given.mean(), abs=1e-5)  # as it came
    assert metrics["reward/running_score_mean"] == pytest.approx(every.mean(), abs=1e-5)
    assert metrics["reward/running_score_std"] == pytest.approx(every.std(), abs=1e-5)


def test_the_score_of_a_token_is_in_the_same_deviations_as_that_of_its_response():
    run = tiny.Run("whole", kl_coef=0.0)
    rollout, lengths, _ = rollout_and_scores(run)
    mask = np.asarray(rollout.response_mask)
    scores = jax.random.normal(jax.random.key(3), mask.shape)
    state = count_scores(with_moments(run.state, BEFORE), scores, rollout.response_mask)
    rewards, _ = response_rewards(
        rollout, scores, rollout.logprobs, state, run.numbers, tiny.options()
    )
    own = np.where(mask, scores, 0.0).astype(np.float64)
    every = np.concatenate([BEFORE, own.sum(axis=1)])
    expected = own / every.std()
    expected[np.arange(len(own)), lengths - 1] -= every.mean() / every.std()
    np.testing.assert_allclose(rewards, expected, atol=1e-5)


def test_an_update_counts_its_scores_before_it_learns_from_them():
    run = tiny.Run("whole", kl_coef=0.0)
    rollout, _, given = rollout_and_scores(run)
    state = init_ppo(
        run.setup.policy_params, run.setup.value_params, run.numbers, score_normalization=True
    )
    for times in (1, 2):
        state, metrics = tiny.update_from_rollout(
            state, run.numbers, rollout, jnp.asarray(given), tiny.RUN_KEY, **run.parts
        )
        assert state.score_moments.count == times * len(given)
        np.testing.assert_allclose(state.score_moments.mean, given.mean(), rtol=1e-5)
        np.testing.assert_allclose(metrics["reward/adjusted_score_mean"], 0.0, atol=1e-6)


def test_without_moments_there_is_no_leaf_and_no_metric_of_them():
    run = tiny.Run("whole")
    assert run.state.score_moments is None
    rollout, _, given = rollout_and_scores(run)
    state, metrics = run.update_from_rollout(rollout, jnp.asarray(given))
    assert state.score_moments is None and "reward/running_score_mean" not in metrics


def test_each_lane_has_moments_of_its_own():
    run = tiny.Run("whole")
    rollout, _, given = rollout_and_scores(run)
    state = with_moments(run.state, [])
    state = dataclasses.replace(state, score_moments=jax.tree.map(jnp.asarray, state.score_moments))

    def lane(scale):
        scores = scale * jnp.asarray(given)
        return update_from_rollout(state, run.numbers, rollout, scores, tiny.RUN_KEY, **run.parts)

    states, metrics = jax.jit(jax.vmap(lane))(jnp.array([1.0, 10.0]))
    means = given.mean() * np.array([1.0, 10.0])
    np.testing.assert_allclose(states.score_moments.mean, means, rtol=1e-5)
    # In deviations both lanes learn from the same.
    tiny.leaves_close(
        *(jax.tree.map(lambda x, i=i: x[i], states.policy_params) for i in (0, 1)),
        rtol=1e-3,
        atol=1e-5,
    )
    np.testing.assert_allclose(*metrics["reward/running_score_std"] / np.array([1, 10]), rtol=1e-5)
