"""The frontier of several runs: read from their workdirs, as a picture, figures and sentences."""

import glob
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppo_jax.data.atomic import atomic_write
from ppo_jax.evaluation.frontier import (
    Curve,
    Point,
    as_json,
    points_of_best_of_n,
    points_of_run,
)
from ppo_jax.evaluation.report import plots
from ppo_jax.evaluation.report.frontier_plots import frontier
from ppo_jax.evaluation.sweep_table import field_name, short_value
from ppo_jax.io.run_folder import read_config, read_object, read_results, read_rows


def write_frontier(
    runs: Sequence[str], out: str | Path, *, by: str = "ppo.kl_coef", evaluation: str = ""
) -> str:
    """Write OUT.png and OUT.json; runs that differ in seeds alone are one curve.

    Args:
        runs: folders of runs that had `ppo.evaluate_every`, or patterns of them, "runs/kl/*".
        out: a path, whose ending is left out.
        by: the setting that tells the curves apart.
        evaluation: a folder with the evaluation.json of best-of-n; "" is none.

    Returns:
        The conclusion, a sentence a curve, and what is left out or not comparable, a line each.

    Raises:
        ValueError: no folder has such a run, or a file is not as it should be.
    """
    curves, left_out = read_curves(runs, by)
    if evaluation:
        best, more = read_best_of_n(Path(evaluation))
        curves, left_out = curves + best, left_out + more
        left_out += other_gold(find_runs(runs), Path(evaluation))
    figures, out = as_json(curves), Path(out)
    stem = out.with_suffix("") if out.suffix in (".png", ".json") else out
    stem.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(stem.with_suffix(".json"), (json.dumps(figures, indent=2) + "\n").encode())
    if (draw := frontier(curves)) is None:
        raise ValueError(
            f"--runs={','.join(runs)}: a curve needs two steps at which all of its runs are "
            f"evaluated; choose a --by that tells runs apart which are not, got {by}"
        )
    plots.save_png({"Over-optimisation": draw}, stem.with_suffix(".png"), columns=1, size=(7, 4.4))
    sentences = [figures["curves"][curve.name]["sentence"] for curve in curves]
    return "\n".join([figures["conclusion"], *sentences, *left_out])


def read_curves(patterns: Sequence[str], by: str) -> tuple[list[Curve], list[str]]:
    """(a curve for each value of a setting, in the order of the values; lines on what is left out).

    Raises:
        ValueError: no folder has an evaluation of the starting policy, or a run lacks the setting.
    """
    points: dict[Any, list[Point]] = {}
    without: list[str] = []
    for number, folder in enumerate(find_runs(patterns)):
        rows, _ = read_rows(folder / "metrics.jsonl")
        found = points_of_run([row for row in rows if row["stage"] == "ppo"], number)
        if found:
            points.setdefault(setting_of(folder, by), []).extend(found)
        else:
            without.append(folder.name)
    if not points:
        raise ValueError(
            f"--runs must have a run with eval/gold_score from step 0 on (ppo.evaluate_every), got "
            f"{', '.join(patterns)}"
        )
    order = sorted(points, key=lambda x: (isinstance(x, str), x))
    curves = [Curve(f"{field_name(by)} {short_value(value)}", points[value]) for value in order]
    told = [f"left out, not evaluated from step 0 on: {', '.join(without)}"] if without else []
    return curves, told


def find_runs(patterns: Sequence[str]) -> list[Path]:
    """The folders with metrics.jsonl that some patterns name, or whose folder they name."""
    folders = [Path(x) for pattern in patterns for x in sorted(glob.glob(pattern))]
    inside = [[x] if (x / "metrics.jsonl").is_file() else sorted(x.glob("*")) for x in folders]
    runs = [x for found in inside for x in found if (x / "metrics.jsonl").is_file()]
    return list(dict.fromkeys(runs))


def setting_of(folder: Path, name: str) -> Any:
    """The value of a setting in a run's config.json."""
    value = read_config(folder) or {}
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ValueError(f"--by={name}: {folder}/config.json has no such setting")
        value = value[part]
    return value


def read_best_of_n(folder: Path) -> tuple[list[Curve], list[str]]:
    """(the curve of best-of-n of the reference policy in an evaluation side by side, by its first
    judge; a line on best-of-n of others, whose distance from the reference is not known).

    Raises:
        ValueError: there is no evaluation, or one without best-of-n of its reference.
    """
    path = folder / "evaluation.json"
    wanted = {"best_of_n": "an object", "settings": "an object"}
    found = read_object(path, wanted) or {}
    pools, name = found.get("best_of_n", {}), found.get("settings", {}).get("reference")
    if name not in pools:
        raise ValueError(
            f"--evaluation must have best-of-n of its reference policy in {path}, see evaluate.py"
        )
    pool, others = pools[name], [other for other in pools if other != name]
    if not pool.get("judges"):
        raise ValueError(f"{path}: best_of_n of {name} has no judge")
    gold = next(iter(pool["judges"].values()))["mean"]
    both = zip(pool["n"], pool["kl_bound"], gold, pool["score"]["mean"], strict=True)
    rows = [{"n": n, "kl": kl, "gold": g, "proxy": p} for n, kl, g, p in both]
    left_out = f"left out: best of n of {', '.join(others)}, whose KL from {name} is not known"
    curve = Curve(f"best of n ({name})", points_of_best_of_n(rows), "bon")
    return [curve], [left_out] if others else []


def other_gold(runs: Sequence[Path], evaluation: Path) -> list[str]:
    """A line where the gold score of the runs is by another judge than that of best-of-n."""
    notes = {}
    for folder in runs:
        for judge in read_results(folder).get("judges", [])[:1]:  # the headline comes first
            notes[judge["note"]] = judge["judge"]
    judges = (read_object(evaluation / "evaluation.json", {}) or {}).get("judges", {})
    name, note = next(((k, x.get("note", "")) for k, x in judges.items()), ("", ""))
    if not notes or not judges or note in notes:
        return []
    return [
        f"not one scale: gold is by the judge {', '.join(notes.values())} in the runs and by "
        f"another one, {name} ({note or 'without a note'}), in {evaluation}"
    ]
