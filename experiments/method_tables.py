"""Tables and curves of the studies that compare methods, from the curves that they keep.

A score, a KL or an explained variance is the mean of a run's last `LAST` iterations, since that of
one iteration is the mean of few responses.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ppo_jax.evaluation.sweep_table import Setting, by_setting, figure, ranked, short_value

SCORE, KL, EXPLAINED = "reward/score_mean", "kl/ref", "value/explained_variance"
EQUAL = "score at equal CPU seconds"
RATE = "ppo.optimizer.learning_rate"
LAST = 5  # iterations

Rows = Sequence[Mapping[str, Any]]  # {"point", "status", "metrics", "curves": {metric: [x]}}


def with_ends(rows: Rows) -> list[dict[str, Any]]:
    """The rows, with the end of each curve among their metrics."""
    return [
        dict(row)
        | {"metrics": row["metrics"] | {k: end(x) for k, x in row.get("curves", {}).items()}}
        for row in rows
    ]


def end(curve: Sequence[float], stop: int | None = None) -> float:
    """The mean of the last `LAST` numbers of a curve, or of those before its number `stop`."""
    return float(np.mean(curve[:stop][-LAST:]))


def at_equal_seconds(rows: Rows, names: Callable[[Mapping], str], cost: Mapping[str, float]):
    """The rows, with the score that each had when the cheapest method was done.

    Args:
        rows: with curves.
        names: (point) -> its method.
        cost: CPU seconds an iteration of each method; those without one are left as they are.
    """
    found = []
    for row in rows:
        row, name = dict(row), names(row["point"])
        curve = row.get("curves", {}).get(SCORE)
        if curve and name in cost:
            stop = round(len(curve) * min(cost.values()) / cost[name])
            row["metrics"] = row["metrics"] | {EQUAL: end(curve, stop)}
        found.append(row)
    return found


def namer(changes: Mapping[str, Mapping[str, Any]]) -> Callable[[Mapping], str]:
    """(point) -> the name of what it changes besides rate and seed."""
    names = {json.dumps(change, sort_keys=True): name for name, change in changes.items()}

    def name(point: Mapping[str, Any]) -> str:
        change = {k: v for k, v in point.items() if k not in (RATE, "ppo.seed")}
        return names[json.dumps(change, sort_keys=True).replace('"inf"', "Infinity")]

    return name


def best_of_each(
    rows: Rows, changes: Mapping[str, Mapping[str, Any]], metric: str
) -> dict[str, tuple[Setting, float]]:
    """{name: (the setting at its best rate, the rate)}, in the order of `changes`."""
    name, groups = namer(changes), {}
    for setting in by_setting(rows):
        groups.setdefault(name(setting.values), []).append(setting)
    best = {key: ranked(groups[key], metric) for key in changes if key in groups}
    return {key: (x[0][0], x[0][0].values[RATE]) for key, x in best.items() if x}


def seconds_cell(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.2f}"


def equal_cell(setting: Setting) -> str:
    estimate = setting.estimate(EQUAL)
    return "" if estimate is None else figure(SCORE, estimate.mean)


def curves_of(setting: Setting, metric: str) -> np.ndarray:
    """[seeds, iterations], of the runs that are complete."""
    kept = [row["curves"][metric] for row in setting.rows if row["status"] == "complete"]
    return np.array(kept)


def rate_cell(rate: float) -> str:
    return short_value(rate)
