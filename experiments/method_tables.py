"""Tables and curves of the studies that compare methods, from the curves that they keep.

A score, a KL or an explained variance is the mean of a run's last `LAST` iterations, since that of
one iteration is the mean of few responses.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ppo_jax.evaluation.sweep_table import Setting, by_setting, ranked

SCORE, KL, EXPLAINED = "reward/score_mean", "kl/ref", "value/explained_variance"
LENGTH = "response/length"  # tokens
CLOCK, COST = "reward/cpu_s", "time/cpu_s_per_iteration"
# Of a reward that is 0 or 1: the share of responses that have it.
SHARE, EQUAL = "reward/fraction", "reward/fraction_at_equal_cpu_s"
RATE = "ppo.optimizer.learning_rate"
LAST = 5  # iterations
CURVES = {  # what is kept of each iteration of a study's points
    "methods_acting": (SCORE, KL),
    "late_reward": (SCORE, KL, EXPLAINED, LENGTH),
    "value_updates": (SCORE, KL, EXPLAINED),
    "shared_critic": (SCORE, KL, EXPLAINED),
}

Rows = Sequence[Mapping[str, Any]]  # {"point", "status", "metrics", "curves": {metric: [x]}}


def read_curves(folder: Path) -> dict[str, list[float]]:
    """{metric: its number at each iteration} of a run's PPO."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    steps = {line["step"]: line for line in lines if line["stage"] == "ppo"}
    rows = [steps[step] for step in sorted(steps)]
    return {name: [row[name] for row in rows] for name in rows[0] if name in rows[-1]}


def with_curves(rows: Rows, study: str, folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The complete rows of a study, with what `CURVES` keeps and the CPU seconds of an iteration.

    Points of one program have one clock, and take turns on it.
    """
    done = [row["status"] == "complete" for row in rows]
    read = [read_curves(x) if ok else {} for ok, x in zip(done, folders, strict=True)]
    lanes = Counter(tuple(curves[CLOCK]) for curves in read if CLOCK in curves)
    found = []
    for row, curves in zip(rows, read, strict=True):
        row = dict(row)
        if study in CURVES and curves:
            kept = {name: [float(f"{x:.4g}") for x in curves[name]] for name in CURVES[study]}
            row["curves"] = kept
        if CLOCK in curves:
            clock = curves[CLOCK]
            cost = float(np.median(np.diff(clock))) / lanes[tuple(clock)]
            row["metrics"] = row["metrics"] | {COST: float(f"{cost:.4g}")}
        found.append(row)
    return found


def with_ends(rows: Rows) -> list[dict[str, Any]]:
    """The rows, with the end of each curve among their metrics, and the score that each had when
    its method had used the CPU seconds in which the cheapest one did all its iterations."""
    costs: dict[str, list[float]] = {}
    for row in rows:
        if COST in row["metrics"]:
            costs.setdefault(method_of(row["point"]), []).append(row["metrics"][COST])
    cost = {method: float(np.median(x)) for method, x in costs.items()}
    found = []
    for row in rows:
        curves = row.get("curves", {})
        ends = {name: end(curve) for name, curve in curves.items()}
        if SCORE in curves:
            ends[SHARE] = ends[SCORE]
        if SCORE in curves and COST in row["metrics"]:
            share = min(cost.values()) / cost[method_of(row["point"])]
            ends[EQUAL] = end(curves[SCORE], round(share * len(curves[SCORE])))
        found.append(dict(row) | {"metrics": row["metrics"] | ends})
    return found


def end(curve: Sequence[float], stop: int | None = None) -> float:
    """The mean of the last `LAST` numbers of a curve, or of those before its number `stop`.

    >>> end([0.0, 1.0, 2.0, 3.0, 4.0, 5.0]), end([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], 5)
    (3.0, 2.0)
    """
    return float(np.mean(curve[:stop][-LAST:]))


def method_of(point: Mapping[str, Any]) -> str:
    """What a point changes besides rate and seed."""
    change = {k: v for k, v in point.items() if k not in (RATE, "ppo.seed")}
    return json.dumps(change, sort_keys=True).replace('"inf"', "Infinity")


def best_of_each(
    rows: Rows, changes: Mapping[str, Mapping[str, Any]], metric: str
) -> dict[str, Setting]:
    """{name: its setting at its best rate}, in the order of `changes`; without those that have not
    run."""
    groups: dict[str, list[Setting]] = {}
    for setting in by_setting(rows):
        groups.setdefault(method_of(setting.values), []).append(setting)
    settings = {name: groups.get(method_of(change), []) for name, change in changes.items()}
    best = {name: ranked(group, metric) for name, group in settings.items()}
    return {name: found[0][0] for name, found in best.items() if found}


def curves_of(setting: Setting, metric: str) -> np.ndarray:
    """[seeds, iterations], of the runs that are complete."""
    kept = [row["curves"][metric] for row in setting.rows if row["status"] == "complete"]
    return np.array(kept)
