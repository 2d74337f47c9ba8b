"""Best-of-n is what a loop over all choices of n samples says."""

import itertools

import numpy as np
import pytest

from ppo_jax.inference.best_of_n import best_of_first, expected_best, kl_bound, rank_weights


def by_brute_force(scores, values, n):
    """Mean over all sets of n samples; of equal best ones each is as likely."""
    worth = []
    for chosen in itertools.combinations(range(len(scores)), n):
        best = max(scores[i] for i in chosen)
        worth.append(np.mean([values[i] for i in chosen if scores[i] == best]))
    return np.mean(worth)


@pytest.mark.parametrize("levels", [2, 4, 1000])
def test_the_expected_best_is_that_of_all_choices_with_ties_and_without(levels):
    rng = np.random.default_rng(levels)
    scores, values = rng.integers(0, levels, (5, 7)).astype(float), rng.normal(size=(5, 7))
    for n in range(1, 8):
        expected = [by_brute_force(s, v, n) for s, v in zip(scores, values, strict=True)]
        np.testing.assert_allclose(expected_best(scores, values, n), expected, atol=1e-12)


def test_it_begins_with_the_mean_and_ends_with_the_best():
    rng = np.random.default_rng(0)
    scores, values = rng.normal(size=(2, 3, 9))
    np.testing.assert_allclose(expected_best(scores, values, 1), values.mean(axis=1))
    rows = np.arange(3)
    np.testing.assert_allclose(expected_best(scores, values, 9), values[rows, scores.argmax(1)])
    rising = [expected_best(scores, scores, n).mean() for n in range(1, 10)]
    assert rising == sorted(rising)


def test_an_estimate_from_more_samples_has_the_same_mean_and_less_variance():
    """Unbiased: over many draws of N it agrees with one choice among n fresh samples."""
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(20_000, 8))
    values = scores + rng.normal(size=scores.shape)
    estimate, choice = expected_best(scores, values, 4), values[:, :4]
    choice = choice[np.arange(len(choice)), best_of_first(scores, 4)]
    assert estimate.mean() == pytest.approx(choice.mean(), abs=0.03)
    assert estimate.var() < 0.8 * choice.var()


def test_the_weights_of_many_samples_do_not_overflow():
    weights = rank_weights(5000, 64)
    assert weights.sum() == pytest.approx(1.0) and (np.diff(weights) >= 0).all()


def test_the_kl_is_that_of_the_chosen_rank():
    """The best of n has density n u^(n-1) at the share u of the samples: its KL from uniform."""
    u = (np.arange(200_000) + 0.5) / 200_000
    for n in (1, 4, 16):
        density = n * u ** (n - 1)
        assert kl_bound(n) == pytest.approx(np.mean(density * np.log(density)), abs=1e-4)


def test_what_is_no_n_is_refused():
    for n in (0, 4):
        with pytest.raises(ValueError, match=f"at most the 3 samples of a prompt, got {n}"):
            expected_best(np.zeros((2, 3)), np.zeros((2, 3)), n)
    with pytest.raises(ValueError, match=r"must be \[P, N\] alike, got \(3,\) and \(3,\)"):
        expected_best(np.zeros(3), np.zeros(3), 1)
    with pytest.raises(ValueError, match="values must be finite"):
        expected_best(np.zeros((1, 2)), np.array([[0.0, np.nan]]), 1)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        kl_bound(0)
