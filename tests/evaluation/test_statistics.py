"""Judges order texts as they should, and the statistics of a comparison are right."""

import numpy as np
import pytest

from ppo_jax.evaluation import statistics as judges
from ppo_jax.training.reward_functions import FunctionFailed
from tests.support.documents import PAGES, python_blocks


def test_rating_accuracy_equals_the_loop_over_pairs():
    rng = np.random.default_rng(1)
    ratings, scores = rng.integers(-4, 5, 40).astype(float), rng.integers(0, 6, 40).astype(float)
    for gap in (1.0, 2.0):
        results = [
            1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
            for i in range(40)
            for j in range(40)
            if ratings[i] - ratings[j] >= gap
        ]
        assert judges.rating_accuracy(scores, ratings, gap=gap) == pytest.approx(np.mean(results))


def test_rating_accuracy_with_no_gap_leaves_out_pairs_of_equal_ratings():
    assert (
        judges.rating_accuracy(np.array([5.0, 1.0, 3.0]), np.array([1.0, 1.0, 0.0]), gap=0) == 0.5
    )


def test_a_gap_of_exactly_one_counts_in_spite_of_rounding():
    ratings = np.array([2.466666667, 1.46666666701])
    assert judges.rating_accuracy(np.array([1.0, 0.0]), ratings, gap=1.0) == 1.0


def test_win_rates_of_both_sides_add_to_one():
    a, b = np.random.default_rng(2).integers(0, 3, (2, 50)).astype(float)
    assert judges.win_rate(a, b) + judges.win_rate(b, a) == pytest.approx(1.0)
    assert judges.win_rate(a, a) == 0.5


def test_the_interval_agrees_with_the_binomial_standard_error():
    # 80 wins of 100: standard error sqrt(.8 * .2 / 100) = .04, so about .8 +- 1.96 * .04.
    a, b = np.r_[np.ones(80), np.zeros(20)], np.full(100, 0.5)
    low, high = judges.bootstrap_interval(a, b, seed=0)
    assert low == pytest.approx(0.8 - 1.96 * 0.04, abs=0.011)
    assert high == pytest.approx(0.8 + 1.96 * 0.04, abs=0.011)
    assert (low, high) == judges.bootstrap_interval(a, b, seed=0)


def test_the_interval_holds_the_true_rate_as_often_as_it_says():
    rng = np.random.default_rng(3)
    inside = 0
    for seed in range(200):
        wins = (rng.uniform(size=100) < 0.7).astype(float)
        low, high = judges.bootstrap_interval(wins, np.full(100, 0.5), seed=seed, level=0.9)
        inside += low <= 0.7 <= high
    assert 0.83 <= inside / 200 <= 0.96


def test_ties_narrow_the_interval_to_a_half():
    assert judges.bootstrap_interval(np.ones(9), np.ones(9), seed=0) == (0.5, 0.5)


def test_distinct_n_counts_over_the_whole_set_and_not_across_texts():
    assert judges.distinct_n(["the cat", "the dog"], 1) == 3 / 4
    assert judges.distinct_n(["the cat", "The CAT!"], 2) == 1 / 2
    assert judges.distinct_n(["one two three"] * 5, 3) == 1 / 5
    assert judges.distinct_n(["word", ""], 2) == 0.0


def test_the_table_has_means_win_rates_and_the_judges_own_accuracy():
    def length(texts):
        return np.array([float(len(text)) for text in texts])

    responses = {"base": ["a", "a"], "sft": ["aa", "aaaa"], "ppo": ["aaa", "aaa"]}
    rated = (["aaa", "a", "aa"], np.array([2.0, 0.0, 2.5]))
    (row,) = judges.judge_table(
        {"length": length}, responses, rated=rated, notes={"length": "counts letters"}
    )
    assert row["judge"] == "length" and row["note"] == "counts letters"
    assert (row["mean_base"], row["mean_sft"], row["mean_ppo"]) == (1.0, 3.0, 3.0)
    assert (row["win_rate_ppo_vs_base"], row["win_rate_ppo_vs_sft"]) == (1.0, 0.5)
    assert row["win_rate_ppo_vs_sft_interval"] == [0.0, 1.0]
    assert row["length_controlled_win_rate_ppo_vs_base"] == 1.0
    low, high = row["length_controlled_win_rate_ppo_vs_sft_interval"]
    assert low <= row["length_controlled_win_rate_ppo_vs_sft"] <= high
    assert (row["pair_accuracy_margin1"], row["num_prompts"]) == (1.0, 2)


def by_length(texts):
    return np.array([float(len(text)) for text in texts])


def test_a_table_without_rated_texts_does_not_claim_an_accuracy():
    (row,) = judges.judge_table({"length": by_length}, {"sft": ["bad"], "ppo": ["good"]})
    assert "pair_accuracy_margin1" not in row and "note" not in row
    assert row["win_rate_ppo_vs_sft"] == 1.0


def says(scores):
    """The table of a judge that says the same of any two texts."""
    return judges.judge_table(
        {"mine": lambda texts: scores}, {"sft": ["a", "b"], "ppo": ["c", "d"]}
    )


def test_a_judge_that_fails_is_named():
    def fails(texts):
        raise KeyError("no such word")

    with pytest.raises(FunctionFailed, match="the judge 'mine' raised KeyError: 'no such word'"):
        judges.judge_table({"mine": fails}, {"sft": ["a"], "ppo": ["b"]})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: judges.win_rate(np.zeros(2), np.zeros(3)), "scores_b must have shape"),
        (lambda: judges.win_rate(np.zeros(0), np.zeros(0)), "empty"),
        (lambda: judges.bootstrap_interval(np.ones(2), np.ones(2), seed=0, level=95), "level"),
        (lambda: judges.rating_accuracy(np.zeros(2), np.zeros(2), gap=1), "min_gap=1"),
        (lambda: judges.distinct_n(["a"], 0), "n must be at least 1"),
        (lambda: judges.judge_table({}, {"sft": ["a"]}), "candidate 'ppo'"),
        (lambda: judges.judge_table({}, {"sft": ["a"], "ppo": []}), "one a prompt"),
        (lambda: judges.judge_table({}, {"ppo": ["a"]}, notes={"gold": "x"}), "unknown judges"),
        (lambda: says([1.0]), "the judge 'mine' must return 2 finite numbers, one a text, got 1"),
        (lambda: says([1.0, float("nan")]), "'mine' must return 2 finite .* nan for response 1"),
        (lambda: says(["good", "bad"]), "'mine' must return 2 finite numbers, one a text, got"),
    ],
)
def test_mistakes_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- length control and repetition ----------------------------------------------------------------


def by_sklearn(x, outcomes):
    """The same fit, of each outcome as a share of a win and a share of a loss."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    both = np.concatenate([x, x])[:, None]
    labels = np.repeat([1, 0], len(x))
    weights = np.concatenate([outcomes, 1 - outcomes])
    fit = linear_model.LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000)
    return fit.fit(both, labels, sample_weight=weights).predict_proba([[0.0]])[0, 1]


@pytest.mark.parametrize("bias", [-3.0, 0.0, 1.5])
def test_the_length_controlled_rate_is_that_of_a_logistic_fit_at_equal_length(bias):
    rng = np.random.default_rng(4)
    differences = rng.normal(5, 20, 80)
    outcomes = rng.choice([0.0, 0.5, 1.0], 80)
    outcomes = np.where(rng.normal(bias, 1, 80) + differences / 10 > 0, 1.0, outcomes)
    rate, (low, high) = judges.length_controlled_win_rate(outcomes, differences, seed=0)
    expected = by_sklearn(np.tanh(differences / differences.std()), outcomes)
    assert rate == pytest.approx(expected, abs=1e-5) and low < rate < high


def test_a_judge_that_likes_length_alone_has_no_preference_at_equal_length():
    """Every win is due to length: the raw rate is 0.8, the controlled one about 0.5."""
    differences = np.random.default_rng(5).normal(10, 12, 400)
    outcomes = (differences > 0).astype(float)
    rate, (low, high) = judges.length_controlled_win_rate(outcomes, differences, seed=0)
    assert outcomes.mean() > 0.75 and low < 0.5 < high and abs(rate - 0.5) < 0.1


def test_without_a_difference_in_length_or_in_outcome_the_rate_is_the_win_rate():
    outcomes = np.array([1.0, 0.0, 0.5, 1.0])
    assert judges.length_controlled_win_rate(outcomes, np.full(4, 7.0), seed=0)[0] == (
        pytest.approx(outcomes.mean())
    )
    for same in (0.0, 1.0):
        result = judges.length_controlled_win_rate(np.full(3, same), np.arange(3.0), seed=0)
        assert result == (same, (same, same))


def test_separated_outcomes_have_a_finite_fit():
    differences = np.array([-3.0, -2.0, -1.0, 1.0, 2.0, 3.0])
    rate, _ = judges.length_controlled_win_rate((differences > 0) * 1.0, differences, seed=0)
    assert rate == pytest.approx(0.5)


def test_the_seeds_of_a_prompt_are_one_observation():
    """Three copies of each outcome are no more evidence than one."""
    rng = np.random.default_rng(6)
    outcomes, differences = rng.choice([0.0, 1.0], 60), rng.normal(size=60)
    _, (low, high) = judges.length_controlled_win_rate(outcomes, differences, seed=0)
    thrice = [np.repeat(values[:, None], 3, axis=1) for values in (outcomes, differences)]
    _, (low3, high3) = judges.length_controlled_win_rate(*thrice, seed=0)
    assert high3 - low3 == pytest.approx(high - low, rel=0.1)
    assert judges.mean_and_stderr(thrice[0])[1] == judges.mean_and_stderr(outcomes)[1]
    assert judges.mean_and_stderr(np.array([2.0])) == (2.0, None)


def test_repetition_is_within_a_response():
    assert judges.repetition(["a b c", "a b c"], 2) == 0.0
    assert judges.repetition(["a b a b a b a"], 2) == pytest.approx(4 / 6)
    assert judges.repetition(["short", ""], 3) == 0.0
    with pytest.raises(ValueError, match="n must be at least 1"):
        judges.repetition(["a"], 0)


def test_the_example_of_the_page_on_evaluation_runs_as_it_stands(capsys):
    (code,) = python_blocks(PAGES["evaluation.md"])
    exec(compile(code, "docs/evaluation.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[0].startswith("1 0.0 ")
