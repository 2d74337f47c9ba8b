"""The table of a sweep, as sweep.json, sweep.csv and sweep.html: its points and their figures.

It is read from the points' folders, so that any process writes the same one.
"""

import csv
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppo_jax.config.parsing import describe_error
from ppo_jax.data.atomic import atomic_write
from ppo_jax.distributed.folder_lock import hold_when_free
from ppo_jax.evaluation.report.charts import compared
from ppo_jax.io.run_folder import KINDS, read_object, read_results, read_rows, write_object

POINT = "point.json"  # of a point's folder
KINDS_OF_POINT = {"point": "an object", "status": "a text", "error": "a text"}
ENDED = ("complete", "failed")


def read_point(folder: Path) -> dict[str, Any]:
    """What point.json says; {} where there is none.

    Raises:
        ValueError: it is not as `write_point` writes it.
    """
    return read_object(folder / POINT, KINDS_OF_POINT) or {}


def write_point(folder: Path, point: Mapping[str, Any], status: str, error: str = ""):
    """Keep what a point is and how it goes.

    Args:
        folder: of the point.
        point: {dotted name: value}.
        status: "complete", "failed" or "running".
        error: what a failed one ended with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_object(folder / POINT, {"point": point, "status": status, "error": error})


def table_rows(workdir: Path) -> list[dict[str, Any]]:
    """The rows of sweep.json: points that have come to an end, complete or failed, by value."""
    folders = [path.parent for path in workdir.glob(f"*/{POINT}")]
    rows = [row for folder in folders if (row := table_row(folder)) is not None]
    return sorted(rows, key=lambda row: [(k, order(v)) for k, v in sorted(row["point"].items())])


def table_row(folder: Path) -> dict[str, Any] | None:
    """One row; None for a point that has not come to an end, or is no longer of this kind."""
    about = read_point(folder)
    if about.get("status") not in ENDED:
        return None
    metrics = read_metrics(folder)
    path = str(folder.absolute())  # so that a reader anywhere finds it
    row = {"point": about["point"], "workdir": path, "status": about["status"]}
    return row | ({"error": about["error"]} if about["error"] else {}) | {"metrics": metrics}


def order(value: Any) -> tuple:
    """Numbers come before texts, and by size."""
    is_number = isinstance(value, int | float)
    return (0, value, "") if is_number else (1, 0, json.dumps(value))


def read_metrics(folder: Path) -> dict[str, Any]:
    """The figures of results.json, and the last value of each metric of metrics.jsonl."""
    rows, _ = read_rows(folder / "metrics.jsonl")
    found = {name: value for row in rows for name, value in row.items() if value is not None}
    found |= {name: value for name, value in read_results(folder).items() if value is not None}
    kept = {name: value for name, value in found.items() if is_figure(value)}
    return dict(sorted((name, value) for name, value in kept.items() if name != "step"))


def is_figure(value: Any) -> bool:
    return KINDS["a number"](value) or KINDS["two numbers"](value)


def write_table(workdir: Path) -> list[dict[str, Any]]:
    """Write sweep.json, sweep.csv and sweep.html, each whole or not at all; returns the rows."""
    with hold_when_free(workdir / ".table", lambda text: None):
        rows = table_rows(workdir)
        write_object(workdir / "sweep.json", rows)
        atomic_write(workdir / "sweep.csv", as_csv(rows))
        try:
            # It loads SciPy's statistics, a second that a dry run and a refusal need not wait.
            from ppo_jax.evaluation.report import sweep_page

            sweep_page.write_sweep_page(workdir, rows)
        except Exception as error:  # the points to come matter more than a page of those that are
            print(f"{workdir}/sweep.html cannot be made: {describe_error(error)}", flush=True)
    return rows


def as_csv(rows: list[dict[str, Any]]) -> str:
    """One line a point: its settings, workdir, status, metrics; intervals as [low, high]."""
    settings = sorted({name for row in rows for name in row["point"]})
    metrics = sorted({name for row in rows for name in row["metrics"]})
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*settings, "workdir", "status", *metrics])
    for row in rows:
        values = [row["point"].get(name, "") for name in settings]
        values += [row["workdir"], row["status"]]
        values += [row["metrics"].get(name, "") for name in metrics]
        writer.writerow([json.dumps(x) if isinstance(x, list) else x for x in values])
    return file.getvalue()


def figures(folder: Path) -> str:
    """What a line of the progress says of a point that is complete."""
    metrics, results = read_metrics(folder), read_results(folder)
    rate = metrics.get("gold/win_rate_{}_vs_{}".format(*compared(results)))
    parts = [] if rate is None else [f"win rate {rate:.0%}"]
    score, kl = metrics.get("reward/score_mean"), metrics.get("kl/ref")
    if rate is None and score is not None:
        parts.append(f"score {score:z.2f}")
    if (kl := metrics.get("policy/kl_per_response", kl)) is not None:
        parts.append(f"kl {kl:z.1f}")
    names = [x for x in metrics if re.fullmatch(r"\w+/(validation_accuracy|accuracy|.*loss)", x)]
    if not parts and names:  # of a sweep without PPO: an accuracy before a loss
        name = min(names, key=lambda x: x.endswith("loss"))
        parts.append(f"{name} {metrics[name]:z.3f}")
    return "  ".join(parts)
