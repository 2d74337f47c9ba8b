"""Preferences from single ratings, held-out pairs from mean ratings, and accuracy on them."""

import itertools

import numpy as np
import pytest

from ppo_jax.data import ratings

CONSTANT = [(float(n),) for n in range(8)]  # one rating each: the order is known


def unordered(rows):
    return [tuple(sorted(row)) for row in rows.tolist()]


def test_the_higher_rating_wins():
    drawn, valid = ratings.rating_pairs(CONSTANT, 0, 0, num_pairs=100)
    assert drawn.shape == (100, 2) and drawn.dtype == np.int32 and valid.dtype == bool
    assert valid.all() and (drawn[:, 0] > drawn[:, 1]).all()


def test_a_tie_is_not_valid():
    _, valid = ratings.rating_pairs([(1.0, 1.0), (1.0,), (2.0,)], 0, 0, num_pairs=3)
    assert valid.sum() == 2


@pytest.mark.parametrize("size", [2, 3, 7, 8])
def test_all_texts_meet_once_before_any_two_meet_again(size):
    all_pairs = list(itertools.combinations(range(size), 2))
    drawn, _ = ratings.rating_pairs(CONSTANT[:size], 1, 2, num_pairs=len(all_pairs))
    assert sorted(unordered(drawn)) == all_pairs


def test_every_text_is_in_equally_many_pairs():
    drawn, _ = ratings.rating_pairs([(0.0,)] * 64, 0, 0, num_pairs=512)
    assert np.bincount(drawn.ravel()).tolist() == [16] * 64


def test_ratings_are_drawn_one_by_one_for_each_pair():
    # P(first wins) = P(its 4 is drawn) = 1/4: 4 standard deviations of 4000 draws are 0.027.
    drawn, valid = ratings.rating_pairs([(4.0, 0.0, 0.0, 0.0), (1.0,)], 0, 0, num_pairs=4000)
    assert valid.all()
    assert abs((drawn[:, 0] == 0).mean() - 0.25) < 0.027


def test_pairs_follow_from_seed_and_step():
    def draw(seed, step):
        return ratings.rating_pairs(CONSTANT, seed, step, num_pairs=8)[0].tolist()

    assert draw(3, 4) == draw(3, 4)
    assert draw(3, 4) != draw(3, 5) != draw(4, 4) != draw(3, 4)


def test_bad_ratings_are_refused():
    with pytest.raises(ValueError, match="two texts or more"):
        ratings.rating_pairs([(1.0,)], 0, 0, num_pairs=1)
    with pytest.raises(ValueError, match=r"one rating or more of each, got counts \[1, 0\]"):
        ratings.rating_pairs([(1.0,), ()], 0, 0, num_pairs=1)
    with pytest.raises(ValueError, match="ratings must be finite, got nan at 2"):
        ratings.rating_pairs([(1.0, 2.0), (float("nan"),)], 0, 0, num_pairs=1)
    with pytest.raises(ValueError, match="num_pairs must be at least 1, got 0"):
        ratings.rating_pairs(CONSTANT, 0, 0, num_pairs=0)


@pytest.mark.parametrize("min_gap", [0.0, 0.1, 1.0, 2.5])
def test_held_out_pairs_are_all_pairs_with_the_gap_when_all_are_asked_for(min_gap):
    # Tenths, so that many gaps are equal to min_gap but for rounding.
    tenths = np.random.default_rng(0).integers(-20, 20, size=30)
    expected = [
        (i, j)
        for i, j in itertools.permutations(range(30), 2)
        if tenths[i] > tenths[j] and tenths[i] - tenths[j] >= round(10 * min_gap)
    ]
    drawn = ratings.held_out_pairs(tenths / 10, 0, num_pairs=10_000, min_gap=min_gap)
    assert sorted(map(tuple, drawn.tolist())) == expected


def test_held_out_pairs_are_a_draw_without_repeats():
    means = np.arange(40.0)
    drawn = ratings.held_out_pairs(means, 7, num_pairs=100, min_gap=1.0)
    assert drawn.shape == (100, 2) and drawn.dtype == np.int32
    assert len(set(unordered(drawn))) == 100
    assert (means[drawn[:, 0]] > means[drawn[:, 1]]).all()
    assert (drawn == ratings.held_out_pairs(means, 7, num_pairs=100, min_gap=1.0)).all()
    assert (drawn != ratings.held_out_pairs(means, 8, num_pairs=100, min_gap=1.0)).any()


def test_held_out_pairs_that_do_not_exist_are_refused():
    for means in ([], [1.0], [1.0, 1.0], [1.0, 1.5]):
        with pytest.raises(ValueError, match="min_gap=0.75 leaves no pair"):
            ratings.held_out_pairs(means, 0, num_pairs=5, min_gap=0.75)
    with pytest.raises(ValueError, match="means must be finite, got nan at 1"):
        ratings.held_out_pairs([1.0, np.nan], 0, num_pairs=5, min_gap=0.0)


def test_pair_accuracy_counts_ties_half():
    scores = np.array([3.0, 2.0, 2.0, 1.0])
    # Right, a tie, wrong, right: 2.5 of 4.
    order = np.array([[0, 1], [1, 2], [3, 0], [2, 3]])
    assert ratings.pair_accuracy(scores, order) == 0.625
    assert ratings.pair_accuracy(np.zeros(4), order) == 0.5


def test_accuracy_of_nothing_or_of_nan_is_refused():
    with pytest.raises(ValueError, match="at least one pair"):
        ratings.pair_accuracy(np.zeros(2), np.zeros((0, 2), np.int32))
    with pytest.raises(ValueError, match="scores must be finite, got nan at 1"):
        ratings.pair_accuracy(np.array([0.0, np.nan]), np.array([[0, 1]]))
