"""What a sweep says: means over seeds, the best setting, and what follows."""

import numpy as np
import pytest
from scipy import stats

from ppo_jax.evaluation.sweep_table import (
    beyond,
    by_setting,
    conclusion,
    differ,
    main_metric,
    metric_names,
    ranked,
    student_interval,
    varied,
)

WIN = "gold/win_rate_ppo_vs_sft"


def row(values, status="complete", **metrics):
    return {"point": values, "workdir": "x", "status": status, "metrics": metrics}


def sweep(found, kl=None):
    """{kl_coef: win rates of its seeds} as rows."""
    return [
        row(
            {"ppo.kl_coef": coef, "ppo.seed": seed},
            **{WIN: rate, "policy/kl_per_response": (kl or {}).get(coef, 1.0)},
        )
        for coef, rates in found.items()
        for seed, rate in enumerate(rates)
    ]


def test_an_interval_holds_the_mean_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(3.0, 2.0, size=(2000, 4))
    inside = [low <= 3.0 <= high for _, low, high, _ in map(student_interval, draws)]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)


def test_an_interval_is_that_of_scipy():
    values = [0.3, 0.9, 0.4, 0.45]
    expected = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    np.testing.assert_allclose(student_interval(values)[1:3], expected)


def test_one_number_has_no_interval():
    assert student_interval([2.0])[:3] == (2.0, None, None)


def test_welchs_test_finds_what_is_there_and_seldom_what_is_not():
    rng = np.random.default_rng(1)
    same = [differ(rng.normal(size=3), rng.normal(size=3)) for _ in range(1000)]
    apart = [differ(rng.normal(size=5), 5 + rng.normal(size=5)) for _ in range(200)]
    assert np.mean(same) < 0.07 and np.mean(apart) > 0.95
    assert differ([1.0, 1.0], [2.0, 2.0]) and not differ([1.0, 1.0], [1.0, 1.0])
    assert differ([0.1, 0.1, 0.1], [0.7, 0.8, 0.9])  # one of them without any spread: no warning


def test_points_that_differ_in_seeds_alone_are_one_setting():
    rows = [
        row({"ppo.kl_coef": coef, "seed": seed, "ppo.seed": own}, **{WIN: coef + seed + own})
        for seed in (0, 1)
        for own in (0, 1)
        for coef in (0.2, 0.1)
    ]
    settings = by_setting(rows)
    assert [s.values for s in settings] == [{"ppo.kl_coef": 0.1}, {"ppo.kl_coef": 0.2}]
    assert settings[0].numbers(WIN) == pytest.approx([0.1, 1.1, 1.1, 2.1])
    assert varied(settings) == {"ppo.kl_coef": [0.1, 0.2]}


def test_words_and_numbers_and_lists_may_be_settings():
    values = ["gae", "leave_one_out", 2, [1, 2], None, True]
    settings = by_setting([row({"a.b": value}, **{WIN: 1.0}) for value in values])
    assert [s.values["a.b"] for s in settings] == values
    assert settings[-1].name == "b true"


def test_a_point_that_failed_has_no_say():
    rows = [*sweep({0.1: [0.5]}), row({"ppo.kl_coef": 0.1, "ppo.seed": 1}, "failed", **{WIN: 0.9})]
    (setting,) = by_setting(rows)
    assert setting.estimate(WIN).values == (0.5,)
    assert metric_names(by_setting(rows[1:])) == []


def test_numbers_alone_are_metrics():
    metrics = {WIN: None, "a/nan": float("nan"), "a/list": [1], "a/zero": 0, "kl/ref": 2.5}
    assert metric_names(by_setting([row({}, **metrics)])) == ["a/zero", "kl/ref"]


@pytest.mark.parametrize(
    ("metrics", "main"),
    [
        ({WIN: 0.5, f"{WIN}_interval": 0.1, "reward/score_mean": 1.0}, WIN),
        ({"reward/score_mean": 1.0, "ppo/loss": 2.0}, "reward/score_mean"),
        ({"reward_model/accuracy": 0.7, "reward_model/loss": 0.6}, "reward_model/accuracy"),
        ({"sft/loss": 2.0, "sft/learning_rate": 0.1}, "sft/loss"),
        ({"time/total_s": 2.0}, ""),
    ],
)
def test_what_a_sweep_is_about(metrics, main):
    assert main_metric(by_setting([row({}, **metrics)])) == main


def test_the_best_of_a_loss_is_the_least():
    rows = [row({"a": i}, **{"sft/loss": loss}) for i, loss in enumerate([2.0, 1.0, 3.0])]
    assert [s.values["a"] for s, _ in ranked(by_setting(rows), "sft/loss")] == [1, 0, 2]


def said(found, kl=None):
    return conclusion(by_setting(sweep(found, kl)), WIN, "win rate")


def test_a_clear_winner_is_to_be_taken():
    text = said({0.0: [0.50, 0.51, 0.52], 0.05: [0.80, 0.81, 0.82], 0.2: [0.60, 0.61, 0.62]})
    assert text.startswith("Take kl_coef 0.05: win rate 81.0% (78.5% to 83.5% over 3 seeds)")
    assert text.endswith("better than every other setting.")


def test_a_winner_at_the_end_of_what_was_tried_says_so():
    found = {0.1: [0.50, 0.51], 0.2: [0.60, 0.61], 0.4: [0.90, 0.91]}
    assert said(found).endswith("; nothing was tried above kl_coef 0.4.")
    settings = by_setting(sweep({0.0: [0.9], 0.1: [0.8], 0.2: [0.7]}))
    assert beyond(settings[0], settings) == ""  # below 0 there is no coefficient
    settings = by_setting(sweep({0.01: [0.9], 0.1: [0.8], 0.2: [0.7]}))
    assert beyond(settings[0], settings) == "; nothing was tried below kl_coef 0.01"


def test_of_those_that_cannot_be_told_apart_the_least_kl_is_taken():
    found = {0.02: [0.70, 0.80, 0.90], 0.05: [0.69, 0.79, 0.89], 0.2: [0.40, 0.41, 0.42]}
    text = said(found, kl={0.02: 9.0, 0.05: 4.0, 0.2: 1.0})
    assert "chance may explain its lead over 1 of the 2 others" in text
    assert "take kl_coef 0.05, which has the least KL (4.0 nats), or add seeds" in text


def test_where_nothing_can_be_told_apart_seeds_are_to_be_added():
    text = said({0.02: [0.70, 0.80, 0.90], 0.05: [0.69, 0.79, 0.89]})
    assert "chance may explain its lead over the other setting: add seeds before a choice." in text
    text = said({0.02: [0.7, 0.9], 0.05: [0.69, 0.89], 0.1: [0.68, 0.88]})
    assert "over every other setting: add seeds before a choice; nothing was tried below" in text


def test_single_runs_are_to_be_repeated():
    assert "in one run each: repeat" in said({0.0: [0.5], 0.1: [0.6]})


def test_little_is_said_of_little():
    assert said({}) == "No point has come to a result yet."
    assert "nothing to compare" in said({0.1: [0.5, 0.6]})
