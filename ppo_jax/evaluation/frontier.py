"""The frontier of over-optimisation: what a policy gains by gold and proxy at each distance.

Pure functions of numbers. d = sqrt(KL), KL in nats a response from the starting policy; R is a
score less that of the starting policy. With a best-of-n policy and with RL, the gold score follows

    R_bon(d) = d (alpha - beta d)
    R_rl(d) = d (alpha - beta log d)

Reference: Gao et al. 2022, https://arxiv.org/abs/2210.10760, section 3.1.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ppo_jax.evaluation.sweep_table import student_interval

RESAMPLES = 2000
LEAST_POINTS = 4  # of a fit of two numbers


class Point(NamedTuple):
    """A policy somewhere on its way."""

    kl: float  # nats a response
    gold: float  # score less that of the starting policy
    proxy: float | None = None  # likewise
    step: int | None = None  # of the training; None of best-of-n
    n: int | None = None  # of best-of-n
    run: int = 0  # which of the runs of a curve, mostly a seed


class Curve(NamedTuple):
    """The points of one setting, in the order of training or of n."""

    name: str  # "kl_coef 0.02", "best of n"
    points: list[Point]
    kind: str = "rl"  # or "bon"


class Fit(NamedTuple):
    """alpha and beta with their 95% intervals."""

    kind: str
    alpha: float
    beta: float
    alpha_interval: tuple[float, float]
    beta_interval: tuple[float, float]
    over: str  # what the intervals are over: "runs" or "points"


def distance(kl: Any) -> np.ndarray:
    """sqrt(KL); an estimate of a KL near 0 may be below it, and counts as 0.

    >>> distance([4.0, -0.1]).tolist()
    [2.0, 0.0]
    """
    return np.sqrt(np.maximum(np.asarray(kl, np.float64), 0.0))


def basis(kind: str, d: np.ndarray) -> np.ndarray:
    """What alpha and beta are multiplied with, [N, 2]: R = basis @ (alpha, beta).

    >>> basis("bon", np.array([2.0])).tolist(), basis("rl", np.array([1.0])).tolist()
    ([[2.0, -4.0]], [[1.0, -0.0]])
    """
    if kind not in ("bon", "rl"):
        raise ValueError(f"kind must be 'bon' or 'rl', got {kind!r}")
    log_d = np.log(np.where(d > 0, d, 1.0))  # d log d is 0 at 0
    return np.stack([d, -d * (d if kind == "bon" else log_d)], axis=1)


def predict(fit: Fit, d: np.ndarray) -> np.ndarray:
    """R of a fitted curve at each distance, [N]."""
    return basis(fit.kind, d) @ np.array([fit.alpha, fit.beta])


def fit_curve(curve: Curve, *, seed: int = 0) -> Fit | None:
    """alpha and beta of the gold score by least squares, in which both are linear.

    With two runs or more each is fitted by itself: alpha and beta are the means over runs, with
    their t interval. The points of one run are no independent draws: its percentile bootstrap over
    points is narrower than what other seeds would give.

    Args:
        curve: with the points of all its runs.
        seed: of the resampling.

    Returns:
        None where fewer than four points are away from the start.
    """
    runs = sorted({point.run for point in curve.points})
    points = {run: [p for p in curve.points if p.run == run and p.kl > 0] for run in runs}
    inputs = {run: basis(curve.kind, distance([p.kl for p in x])) for run, x in points.items()}
    gold = {run: np.array([p.gold for p in x]) for run, x in points.items()}
    runs = [run for run in runs if len(gold[run]) >= LEAST_POINTS]
    if not runs:
        return None
    each = np.array([least_squares(inputs[run], gold[run]) for run in runs])  # [R, 2]
    if len(runs) > 1:
        alpha, beta = (student_interval(column) for column in each.T)
        intervals = (alpha.low, alpha.high), (beta.low, beta.high)
        return Fit(curve.kind, alpha.mean, beta.mean, *intervals, "runs")
    inputs, gold = inputs[runs[0]], gold[runs[0]]
    drawn = np.random.default_rng(seed).integers(len(gold), size=(RESAMPLES, len(gold)))
    draws = [least_squares(inputs[rows], gold[rows]) for rows in drawn]
    bounds = np.quantile(draws, [0.025, 0.975], axis=0).T.tolist()
    return Fit(curve.kind, *each[0].tolist(), *(tuple(x) for x in bounds), "points")


def least_squares(inputs: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The coefficients [2] of [N, 2] inputs; of several that fit alike the smallest."""
    return np.linalg.lstsq(inputs, values, rcond=None)[0]


def fitted_peak(fit: Fit) -> tuple[float, float] | None:
    """(KL, R) where a fitted curve is highest; None where it only rises, or only falls.

    R_bon: d = alpha / (2 beta).  R_rl: log d = alpha / beta - 1.

    >>> kl, gain = fitted_peak(Fit("bon", 2.0, 0.5, (2, 2), (0.5, 0.5), "points"))
    >>> (round(kl, 6), round(gain, 6))
    (4.0, 2.0)
    """
    if fit.beta <= 0 or (fit.kind == "bon" and fit.alpha <= 0):
        return None
    exponent = fit.alpha / fit.beta - 1
    if fit.kind == "rl" and exponent > 50:  # far beyond any KL
        return None
    d = fit.alpha / (2 * fit.beta) if fit.kind == "bon" else math.exp(exponent)
    return d * d, float(predict(fit, np.array([d]))[0])


def mean_points(curve: Curve) -> list[Point]:
    """The mean over runs at each step or n, of those that all runs have."""
    groups: dict[int | None, list[Point]] = {}
    for point in curve.points:
        groups.setdefault(point.step if point.n is None else point.n, []).append(point)
    runs = len({point.run for point in curve.points})
    means = []
    for group in (group for group in groups.values() if len(group) == runs):
        proxies = [p.proxy for p in group if p.proxy is not None]
        means.append(
            group[0]._replace(
                kl=float(np.mean([p.kl for p in group])),
                gold=float(np.mean([p.gold for p in group])),
                proxy=float(np.mean(proxies)) if len(proxies) == len(group) else None,
                run=0,
            )
        )
    return means


def measured_peak(curve: Curve) -> tuple[Point, Point]:
    """(where the mean gold score over runs was highest, the last point); the first of equal ones.

    Raises:
        ValueError: the curve has no points.
    """
    means = mean_points(curve)
    if not means:
        raise ValueError(f"the curve {curve.name!r} has no point that all of its runs have")
    return max(means, key=lambda p: p.gold), means[-1]


def place(point: Point) -> str:
    """Where a point is, for a reader."""
    at = f"n = {point.n}" if point.n is not None else f"step {point.step}"
    return f"{max(point.kl, 0.0):.1f} nats of KL ({at})"


def sentence(curve: Curve) -> str:
    """Where the gold score of a curve peaked and what was lost after it, or that it did not fall.

    >>> points = [Point(0, 0, 0, 0), Point(4, 1.5, 1, 10), Point(9, 1.25, 3, 20)]
    >>> print(sentence(Curve("kl_coef 0", points)).partition(", while ")[0])
    kl_coef 0: the gold score peaked 1.50 above the start at 4.0 nats of KL (step 10) and lost \
0.25 (17%) of that by 9.0 nats of KL (step 20)
    """
    peak, last = measured_peak(curve)
    runs = len({point.run for point in curve.points})
    name = f"{curve.name}, mean of {runs} runs" if runs > 1 else curve.name
    if peak.gold <= 0:
        return (
            f"{name}: the gold score was never above the start; it was {last.gold:+.2f} at "
            f"{place(last)}."
        )
    if peak == last:
        return (
            f"{name}: the gold score did not fall; it was highest, {peak.gold:.2f} above the "
            f"start, at the end, {place(last)}."
        )
    lost = peak.gold - last.gold
    text = f"{name}: the gold score peaked {peak.gold:.2f} above the start at {place(peak)} and "
    if last.gold < 0:
        text += f"lost {lost:.2f}, more than all of that, by {place(last)}"
    else:
        text += f"lost {lost:.2f} ({lost / peak.gold:.0%}) of that by {place(last)}"
    if peak.proxy is not None and last.proxy is not None:
        change = last.proxy - peak.proxy
        text += f", while the proxy score {'rose' if change > 0 else 'fell'} by {abs(change):.2f}"
    return f"{text}."


def conclusion(curves: Sequence[Curve]) -> str:
    """Which of several settings had the highest gold score, where, in one sentence."""
    peaks = {curve.name: measured_peak(curve)[0] for curve in curves}
    name = max(peaks, key=lambda name: peaks[name].gold)
    best = peaks[name]
    return (
        f"The gold score was highest with {name}: {best.gold:+.2f} against the start, at "
        f"{place(best)}."
    )


def points_of_run(rows: Sequence[Mapping[str, Any]], run: int = 0) -> list[Point]:
    """The points of one training, from its lines of metrics.jsonl with `eval/*`.

    Args:
        rows: of the ppo stage, oldest first.
        run: the number that its points get.

    Returns:
        [] where there is no evaluation of the starting policy, step 0, to measure from.
    """
    known = [row for row in rows if row.get("eval/gold_score") is not None]
    known = [row for row in known if row.get("eval/kl") is not None]
    if not known or known[0]["step"] != 0:
        return []
    gold, proxy = known[0]["eval/gold_score"], known[0].get("eval/proxy_score")

    def gain(row: Mapping[str, Any]) -> float | None:
        now = row.get("eval/proxy_score")
        return None if now is None or proxy is None else now - proxy

    return [
        Point(row["eval/kl"], row["eval/gold_score"] - gold, gain(row), step=row["step"], run=run)
        for row in known
    ]


def points_of_best_of_n(rows: Sequence[Mapping[str, Any]]) -> list[Point]:
    """The points of best-of-n, from rows of {"n", "kl", "gold", "proxy"} with one for n = 1."""
    first = next((row for row in rows if row["n"] == 1), None)
    if first is None:
        raise ValueError("best-of-n needs a row for n = 1, the policy itself, to measure from")
    return [
        Point(
            row["kl"],
            row["gold"] - first["gold"],
            None if row.get("proxy") is None else row["proxy"] - first["proxy"],
            n=row["n"],
        )
        for row in sorted(rows, key=lambda row: row["n"])
    ]


def as_json(curves: Sequence[Curve]) -> dict[str, Any]:
    """Points, fits and sentences, as JSON has them."""
    found = {}
    for curve in curves:
        fit = fit_curve(curve)
        found[curve.name] = {
            "kind": curve.kind,
            "points": [point._asdict() for point in curve.points],
            "fit": None if fit is None else fit._asdict() | {"peak": fitted_peak(fit)},
            "sentence": sentence(curve),
        }
    return {"curves": found, "conclusion": conclusion(curves)}
