import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.core.rewards import missing_eos_scores, token_rewards


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_token_rewards_equal_the_loop(estimator):
    rng = np.random.default_rng(0)
    logprobs, ref_logprobs = rng.normal(size=(2, 6, 5)).astype(np.float32)
    scores = rng.normal(size=6).astype(np.float32)
    mask = rng.random((6, 5)) < 0.6
    mask[0] = False
    expected = np.zeros((6, 5))
    for b in range(6):
        for t in range(5):
            if not mask[b, t]:
                continue
            d = float(logprobs[b, t]) - float(ref_logprobs[b, t])
            kl = {"k1": d, "k2": d * d / 2, "k3": np.exp(-d) - 1 + d}[estimator]
            expected[b, t] = -0.3 * kl
            if not mask[b, t + 1 :].any():
                expected[b, t] += scores[b]
    got = token_rewards(
        *map(jnp.asarray, (scores, logprobs, ref_logprobs, mask)), kl_coef=0.3, estimator=estimator
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_the_rewards_of_a_response_add_up_to_score_minus_coefficient_times_kl():
    # d = (1, -0.5), k1 sums to 0.5 nats: 2 - 0.1 x 0.5 = 1.95
    rewards = token_rewards(
        jnp.array([2.0]),
        jnp.array([[-1.0, -1.0, -7.0]]),
        jnp.array([[-2.0, -0.5, -9.0]]),
        jnp.array([[True, True, False]]),
        kl_coef=0.1,
    )
    np.testing.assert_allclose(rewards, [[-0.1, 2.05, 0.0]], rtol=1e-6)


def test_fractions_of_a_score_survive():
    mask = jnp.ones((1, 2), bool)
    zeros = jnp.zeros((1, 2))
    rewards = token_rewards(jnp.array([0.25]), zeros, zeros, mask, kl_coef=0.1)
    assert rewards.tolist() == [[0.0, 0.25]]


def test_the_score_of_an_empty_response_is_dropped():
    nothing = jnp.zeros((1, 2))
    mask = jnp.zeros((1, 2), bool)
    rewards = token_rewards(jnp.array([5.0]), nothing, nothing, mask, kl_coef=0.1)
    assert (rewards == 0.0).all()


def test_scores_for_another_number_of_rows_are_refused():
    zeros = jnp.zeros((2, 2))
    with pytest.raises(AssertionError):
        token_rewards(jnp.zeros(1), zeros, zeros, jnp.ones((2, 2), bool), kl_coef=0.1)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({}, [2.0, 3.0]),
        ({"replace": -1.0}, [2.0, -1.0]),
        ({"replace": 0.0}, [2.0, 0.0]),  # zero is a number, not "off"
        ({"penalty": 0.5}, [2.0, 2.5]),
        ({"penalty": 0.0}, [2.0, 3.0]),
    ],
)
def test_the_missing_eos_rule_touches_only_rows_that_did_not_stop(rule, expected):
    got = missing_eos_scores(jnp.array([2.0, 3.0]), jnp.array([True, False]), **rule)
    assert got.tolist() == expected


def test_replace_and_penalty_together_are_refused_even_when_zero():
    with pytest.raises(ValueError, match="replace=0.0, penalty=0.0"):
        missing_eos_scores(jnp.zeros(1), jnp.array([True]), replace=0.0, penalty=0.0)


def test_scores_of_tokens_stand_at_their_tokens():
    mask = jnp.array([[True, True, False], [True, True, True]])
    scores = jnp.array([[1.0, 2.0, jnp.nan], [0.5, 0.0, -1.0]])
    logprobs = jnp.array([[-1.0, -2.0, 0.0], [-1.0, -1.0, -1.0]])
    rewards = token_rewards(scores, logprobs, jnp.zeros((2, 3)), mask, kl_coef=0.5)
    # The KL penalty is 0.5 (logprobs - 0) at every token.
    assert rewards.tolist() == [[1.5, 3.0, 0.0], [1.0, 0.5, -0.5]]


def test_scores_at_the_last_token_are_those_of_the_response():
    mask = jnp.array([[True, True, False], [True, True, True], [False, False, False]])
    args = jnp.ones((3, 3)), jnp.zeros((3, 3)), mask
    of_tokens = jnp.array([[0.0, 4.0, 0.0], [0.0, 0.0, 5.0], [6.0, 6.0, 6.0]])
    whole = token_rewards(jnp.array([4.0, 5.0, 6.0]), *args, kl_coef=0.1)
    assert (token_rewards(of_tokens, *args, kl_coef=0.1) == whole).all()
    with pytest.raises(AssertionError):
        token_rewards(jnp.zeros((3, 2)), *args, kl_coef=0.1)
