"""Fits, peaks and sentences of the frontier, against curves that are known."""

import numpy as np
import pytest

from ppo_jax.evaluation.frontier import (
    Curve,
    Fit,
    Point,
    as_json,
    basis,
    conclusion,
    distance,
    fit_curve,
    fitted_peak,
    measured_peak,
    points_of_best_of_n,
    points_of_run,
    predict,
    sentence,
)

FORMS = {
    "bon": lambda d, alpha, beta: d * (alpha - beta * d),
    "rl": lambda d, alpha, beta: d * (alpha - beta * np.log(d)),
}


def known_curve(kind, alpha, beta, *, runs=1, noise=0.0):
    rng = np.random.default_rng(0)
    points = [
        Point(d * d, FORMS[kind](d, alpha, beta) + noise * rng.normal(), step=i, run=run)
        for run in range(runs)
        for i, d in enumerate(np.linspace(0.2, 6, 15))
    ]
    return Curve("known", [Point(0.0, 0.0, step=0, run=run) for run in range(runs)] + points, kind)


@pytest.mark.parametrize("kind", FORMS)
def test_the_coefficients_of_a_known_curve_are_found(kind):
    fit = fit_curve(known_curve(kind, 1.3, 0.4))
    assert (fit.alpha, fit.beta) == pytest.approx((1.3, 0.4)) and fit.over == "points"
    assert fit.alpha_interval == pytest.approx((1.3, 1.3), abs=1e-6)
    d = np.array([0.5, 2.0])
    np.testing.assert_allclose(predict(fit, d), FORMS[kind](d, 1.3, 0.4))
    assert predict(fit, np.zeros(1)) == 0.0


@pytest.mark.parametrize("kind", FORMS)
def test_the_peak_of_a_fit_is_that_of_its_curve_on_a_grid(kind):
    fit = Fit(kind, 1.3, 0.4, (0, 0), (0, 0), "points")
    d = np.linspace(1e-3, 40, 400_001)
    values = FORMS[kind](d, 1.3, 0.4)
    kl, gain = fitted_peak(fit)
    assert kl == pytest.approx(d[values.argmax()] ** 2, rel=1e-3)
    assert gain == pytest.approx(values.max(), rel=1e-6)
    for alpha, beta in ((1.0, -0.1), (1.0, 0.0), (-1.0, 0.1)):
        none = fitted_peak(Fit(kind, alpha, beta, (0, 0), (0, 0), "points"))
        assert none is None or (kind == "rl" and alpha < 0)
    assert fitted_peak(Fit("rl", 1.0, 1e-3, (0, 0), (0, 0), "points")) is None


def test_intervals_hold_the_truth_and_are_over_runs_where_there_are_several():
    fit = fit_curve(known_curve("rl", 1.3, 0.4, runs=4, noise=0.05))
    assert fit.over == "runs"
    for (low, high), value in ((fit.alpha_interval, 1.3), (fit.beta_interval, 0.4)):
        assert low < value < high and high - low < 0.2
    assert fit_curve(known_curve("rl", 1.3, 0.4, runs=4, noise=0.05)) == fit  # repeatable


def test_fewer_than_four_points_give_no_fit():
    assert fit_curve(Curve("x", known_curve("rl", 1, 1).points[:4])) is None
    with pytest.raises(ValueError, match="kind must be 'bon' or 'rl', got 'sft'"):
        basis("sft", np.ones(1))
    assert distance(-1e-3) == 0


def rows(gold, proxy, kl):
    both = enumerate(zip(gold, proxy, kl, strict=True))
    found = [
        {"step": 5 * i, "eval/gold_score": g, "eval/proxy_score": p, "eval/kl": k}
        for i, (g, p, k) in both
    ]
    return [*found[:1], {"step": 1, "kl/ref": 0.1}, *found[1:]]


def test_gains_are_measured_from_the_starting_policy_and_means_are_over_runs():
    first = points_of_run(rows([1.0, 3.0, 2.0], [0.0, 1.0, 4.0], [0.0, 2.0, 9.0]))
    other = points_of_run(rows([2.0, 5.0, 5.0], [0.0, 3.0, 6.0], [0.0, 4.0, 11.0]), run=1)
    assert [p.gold for p in first] == [0, 2, 1] and [p.step for p in first] == [0, 5, 10]
    peak, last = measured_peak(Curve("x", first + other))
    assert (peak.kl, peak.gold, peak.proxy, peak.step) == (3.0, 2.5, 2.0, 5)
    assert (last.kl, last.gold, last.proxy) == (10.0, 2.0, 5.0)
    assert measured_peak(Curve("x", first + other[:2]))[1].step == 5  # one run has not come so far
    assert points_of_run(rows([1.0, 2.0], [0.0, 0.0], [0.0, 0.0])[1:]) == []
    assert points_of_run([{"step": 1, "kl/ref": 1.0}]) == []
    with pytest.raises(ValueError, match="the curve 'x' has no point"):
        measured_peak(Curve("x", []))


@pytest.mark.parametrize(
    ("gold", "expected"),
    [
        (
            [0.0, 2.0, 1.0],
            "x: the gold score peaked 2.00 above the start at 4.0 nats of KL (step 5) and lost "
            "1.00 (50%) of that by 9.0 nats of KL (step 10), while the proxy score rose by 3.00.",
        ),
        (
            [0.0, 1.0, -0.5],
            "x: the gold score peaked 1.00 above the start at 4.0 nats of KL (step 5) and lost "
            "1.50, more than all of that, by 9.0 nats of KL (step 10), while the proxy score rose "
            "by 3.00.",
        ),
        (
            [0.0, 1.0, 2.0],
            "x: the gold score did not fall; it was highest, 2.00 above the start, at the end, "
            "9.0 nats of KL (step 10).",
        ),
        (
            [0.0, -1.0, -2.0],
            "x: the gold score was never above the start; it was -2.00 at 9.0 nats of KL "
            "(step 10).",
        ),
    ],
)
def test_the_sentence_says_where_it_peaked_and_what_was_lost(gold, expected):
    curve = Curve("x", points_of_run(rows(gold, [0.0, 1.0, 4.0], [0.0, 4.0, 9.0])))
    assert sentence(curve) == expected


def test_best_of_n_is_measured_from_the_policy_itself():
    given = [
        {"n": 4, "kl": 0.636, "gold": 2.0, "proxy": 3.0},
        {"n": 1, "kl": 0.0, "gold": 1.5, "proxy": 1.0},
    ]
    points = points_of_best_of_n(given)
    assert [(p.n, p.gold, p.proxy) for p in points] == [(1, 0.0, 0.0), (4, 0.5, 2.0)]
    with pytest.raises(ValueError, match="best-of-n needs a row for n = 1"):
        points_of_best_of_n(given[:1])
    curves = [
        Curve("best of n", points, "bon"),
        Curve("x", [Point(0, 0, step=0), Point(1, 3, step=2)]),
    ]
    assert "highest with x: +3.00 against the start, at 1.0 nats of KL (step 2)" in conclusion(
        curves
    )
    figures = as_json(curves)
    assert figures["curves"]["best of n"]["points"][1]["n"] == 4
    assert figures["curves"]["x"]["fit"] is None
