"""What is made of scores, against plain numpy, hand numbers and those of other libraries' tests."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.core import shaping
from ppo_jax.core.shaping import (
    Moments,
    best_and_worst,
    clip_scores,
    ensemble_scores,
    groups_with_variance,
    length_penalty,
    normalize_scores,
    overlong_penalty,
    par_scores,
    threshold_scores,
    update_moments,
)

RNG = np.random.default_rng(0)


def masks_of(lengths, width):
    return jnp.arange(width)[None] < jnp.asarray(lengths)[:, None]


def test_ensembles_equal_numpy_by_the_statistics_of_the_population():
    scores = RNG.normal(size=(5, 7)) + 3
    mean, var = scores.mean(axis=0), scores.var(axis=0)
    expected = {
        "mean": mean,
        "min": scores.min(axis=0),
        "mean_minus_std": mean - 0.7 * np.sqrt(var),
        "mean_minus_var": mean - 0.7 * var,
    }
    assert expected.keys() == set(shaping.ENSEMBLE_RULES)
    for how, numbers in expected.items():
        got = ensemble_scores(jnp.asarray(scores, jnp.float32), how=how, k=0.7)
        np.testing.assert_allclose(got, numbers, rtol=1e-5, atol=1e-6)


def test_an_ensemble_that_agrees_has_exactly_no_deviation_and_a_gradient():
    scores = jnp.full((3, 2), 0.1)

    def total(scores):
        return ensemble_scores(scores, how="mean_minus_std", k=1e6).sum()

    assert ensemble_scores(scores, how="mean_minus_std", k=1e6).tolist() == scores[0].tolist()
    np.testing.assert_allclose(jax.grad(total)(scores), np.full((3, 2), 1 / 3), rtol=1e-6)


def test_preference_as_reward_is_the_mean_probability_over_the_references():
    scores, references = RNG.normal(size=4) * 3, RNG.normal(size=(4, 3))
    expected = (1 / (1 + np.exp(references - scores[:, None]))).mean(axis=1)
    arrays = jnp.asarray(scores, jnp.float32), jnp.asarray(references, jnp.float32)
    np.testing.assert_allclose(par_scores(*arrays), expected, rtol=1e-5)
    one = par_scores(arrays[0], arrays[1][:, 0])
    np.testing.assert_array_equal(one, par_scores(arrays[0], arrays[1][:, :1]))


def test_scores_are_clipped_on_both_sides():
    assert clip_scores(jnp.array([[-3.0, -1.0], [0.2, 5.0]]), limit=1.5).tolist() == [
        [-1.5, -1.0],
        [np.float32(0.2), 1.5],
    ]


@pytest.mark.parametrize("splits", [[64], [1, 63], [30, 0, 34], [1] * 64], ids=str)
def test_moments_are_those_of_all_numbers_however_they_are_split(splits):
    scores = RNG.normal(size=64) * 0.5 + 100
    moments, begin, update = Moments(), 0, jax.jit(update_moments)
    for size in splits:
        moments = update(moments, jnp.asarray(scores[begin : begin + size], jnp.float32))
        begin += size
    assert moments.count == 64 and moments.count.dtype == jnp.int32
    np.testing.assert_allclose(moments.mean, scores.mean(), rtol=1e-6)
    np.testing.assert_allclose(moments.m2, ((scores - scores.mean()) ** 2).sum(), rtol=2e-4)


def test_normalised_scores_are_in_standard_deviations_of_all_so_far():
    first, second = RNG.normal(size=(2, 16)) * 3 + 5
    moments = Moments()
    for batch in (first, second):
        moments = update_moments(moments, jnp.asarray(batch, jnp.float32))
    seen = np.concatenate([first, second])
    expected = (second - seen.mean()) / seen.std()
    got = normalize_scores(jnp.asarray(second, jnp.float32), moments)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    kept = normalize_scores(jnp.asarray(second, jnp.float32), moments, shift_mean=False)
    np.testing.assert_allclose(kept, expected + seen.mean(), rtol=1e-4)


def test_scores_that_are_equal_but_for_rounding_are_exactly_0():
    moments, after = Moments(), np.nextafter(np.float32(1000.1), np.float32(np.inf))
    for value in (np.float32(1000.1), after):
        scores = jnp.full(7, value)
        moments = update_moments(moments, scores)
        assert (normalize_scores(scores, moments) == 0).all()


def test_a_response_loses_by_the_tokens_beyond_those_that_are_free():
    mask = masks_of([0, 2, 5], 6).at[2, 1].set(False)  # with a hole: 4 tokens
    assert length_penalty(mask, coef=0.25).tolist() == [0.0, -0.5, -1.0]
    assert length_penalty(mask, coef=0.25, free_tokens=3).tolist() == [0.0, 0.0, -0.25]


def test_the_penalty_of_overlong_responses_equals_the_formula_and_a_peers_numbers():
    lengths = np.arange(31)
    got = overlong_penalty(masks_of(lengths, 30), max_length=24, cache_length=8)
    expected = [0 if n <= 16 else -1 if n > 24 else (16 - n) / 8 for n in lengths.tolist()]
    np.testing.assert_allclose(got, expected)
    # NeMo-RL, tests/unit/algorithms/test_reward_functions.py: a limit of 25 with a buffer of 5,
    # weight 0.5. (Theirs goes on falling beyond the limit, the paper's does not.)
    rewards = jnp.array([1.0, 0.8, 0.6])
    shaped = rewards + 0.5 * overlong_penalty(
        masks_of([10, 22, 25], 25), max_length=25, cache_length=5
    )
    np.testing.assert_allclose(shaped, [1.0, 0.6, 0.1], atol=1e-6)


def test_safety_counts_where_it_is_in_question():
    safety, helpfulness = jnp.array([-1.0, 0.5, 2.0]), jnp.array([9.0, 8.0, 7.0])
    assert threshold_scores(safety, helpfulness, threshold=0.5).tolist() == [-1.0, 8.0, 7.0]
    is_safety = jnp.array([False, False, True])
    got = threshold_scores(safety, helpfulness, threshold=0.5, is_safety=is_safety)
    assert got.tolist() == [-1.0, 8.0, 2.0]


@pytest.mark.parametrize("keep", [1, 2])
def test_the_best_and_the_worst_of_each_group_are_kept(keep):
    scores = RNG.normal(size=(3, 5))
    expected = np.zeros((3, 5), bool)
    for row, of_row in zip(expected, scores, strict=True):
        order = np.argsort(of_row)
        row[order[:keep]] = row[order[-keep:]] = True
    got = best_and_worst(jnp.asarray(scores.ravel(), jnp.float32), group_size=5, keep=keep)
    assert got.tolist() == expected.ravel().tolist()


def test_as_many_are_kept_where_scores_are_equal():
    scores = jnp.array([1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    kept = best_and_worst(scores, group_size=4, keep=1).reshape(2, 4)
    assert kept.sum(axis=1).tolist() == [2, 2]
    assert kept.tolist() == [[False, False, True, True], [True, False, True, False]]


def test_groups_of_equal_scores_are_left_out_whole():
    scores = jnp.array([0.1] * 3 + [0.0, 0.0, 1.0] + [1.0] * 3)
    varied = jax.jit(groups_with_variance, static_argnames="group_size")(scores, group_size=3)
    assert varied.tolist() == [False] * 3 + [True] * 3 + [False] * 3
