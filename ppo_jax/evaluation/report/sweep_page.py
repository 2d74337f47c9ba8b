"""sweep.html: the settings of a sweep side by side, made from its rows and its points' files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppo_jax.data.atomic import atomic_write
from ppo_jax.evaluation import sweep_table
from ppo_jax.evaluation.report import sweep_plots
from ppo_jax.evaluation.report.charts import display_name
from ppo_jax.evaluation.report.plots import Draw
from ppo_jax.evaluation.report.report import HALF, SMALL, TEMPLATES, Figure, make_figure
from ppo_jax.evaluation.report.summary import duration
from ppo_jax.evaluation.sweep_table import (
    KL_METRICS,
    Setting,
    field_name,
    figure,
    short_value,
    title_of,
)
from ppo_jax.io.run_folder import read_rows
from ppo_jax.io.stage_folder import LOWER_IS_BETTER
from ppo_jax.training.stages import find_stage

PAGE = "sweep.html"
LABELS = {
    "eval/gold_score": "gold score",
    "reward/score_mean": "score in training",
    "policy/kl_per_response": "KL (nats)",
    "kl/ref": "KL in training (nats)",
    "reward_model/accuracy_margin1": "reward-model accuracy",
    "text/distinct2_ratio": "distinct-2, of the reference's",
    "response/length": "length (tokens)",
    "sft/validation_perplexity": "SFT perplexity",
    "time/total_s": "seconds",
}
# (stage, metric, title, unit) of the curves; of those that the points have, the first six.
CURVES = (
    ("ppo", "eval/gold_score", "Gold score", "score"),
    ("ppo", "reward/score_mean", "Score", "score"),
    ("ppo", "kl/ref", "KL from the reference policy", "nats per response"),
    ("reward", "reward_model/validation_accuracy", "Reward model: accuracy", "share of pairs"),
    ("sft", "sft/validation_loss", "SFT: validation loss", "nats per token"),
    ("ppo", "policy/entropy", "Entropy", "nats per token"),
    ("ppo", "value/explained_variance", "Explained variance", "share"),
    ("ppo", "response/length", "Response length", "tokens"),
    ("ppo", "policy/clip_fraction", "Clip fraction", "share of tokens"),
)
MOST_CURVES = 6
MOST_COLUMNS = 6


def write_sweep_page(folder: str | Path, rows: Sequence[dict]) -> Path:
    """Writes `folder/sweep.html`, one file with its style and figures inside; returns its path.

    Args:
        folder: of the sweep; each point is a folder in it.
        rows: of sweep.json: {"point", "workdir", "status", "metrics"}, of those points that have
            come to an end, and "error" where one failed.
    """
    folder = Path(folder)
    settings = sweep_table.by_setting(rows)
    metric = sweep_table.main_metric(settings)
    label = metric_label(metric)
    runs = {i: [point_rows(folder, row) for row in s.rows] for i, s in enumerate(settings)}
    figures = result_figures(settings, runs, metric, label)
    text = TEMPLATES.get_template("sweep.html.jinja").render(
        name=folder.resolve().name,
        conclusion=sweep_table.conclusion(settings, metric, label),
        unfinished=failures(rows),
        cards=cards(settings, rows, metric, label),
        figures=figures,
        curves=curve_figures(settings, runs),
        varied=[field_name(name) for name in sweep_table.varied(settings)],
        columns=[(name, metric_label(name)) for name in columns(settings, metric)],
        main_label=label,
        points=[point(folder, row, metric) for row in rows],
        data=table_data(settings, metric),
    )
    path = folder / PAGE
    atomic_write(path, text)
    return path


def point_folder(folder: Path, row: dict) -> Path:
    """The run's folder of a point; the sweep's folder may have been moved."""
    inside = folder / Path(row["workdir"]).name
    return inside if inside.is_dir() else Path(row["workdir"])


def point_rows(folder: Path, row: dict) -> list[dict]:
    return read_rows(point_folder(folder, row) / "metrics.jsonl")[0]


def metric_label(metric: str) -> str:
    """A metric for a reader.

    >>> metric_label("gold/win_rate_ppo_vs_sft"), metric_label("kl/coef")
    ('win rate of PPO over SFT', 'kl/coef')
    """
    if metric.startswith("gold/win_rate_"):
        ours, theirs = metric.removeprefix("gold/win_rate_").split("_vs_")
        return f"win rate of {display_name(ours)} over {display_name(theirs)}"
    return LABELS.get(metric, metric)


def columns(settings: Sequence[Setting], metric: str) -> list[str]:
    """The metrics that the table always shows: the main one first."""
    known = sweep_table.metric_names(settings)
    shown = [name for name in LABELS if name in known]
    if "policy/kl_per_response" in shown and "kl/ref" in shown:
        shown.remove("kl/ref")  # of the same policies, from fewer responses
    if metric.startswith("gold/") and "eval/gold_score" in shown:
        shown.remove("eval/gold_score")
    shown = [name for name in shown if name != metric and unlike(settings, name)]
    return [*([metric] if metric else []), *shown][:MOST_COLUMNS]


def unlike(settings: Sequence[Setting], metric: str) -> bool:
    """Whether a metric tells any two points apart; a stage that all share has the same for all."""
    return len({x for setting in settings for x in setting.numbers(metric)}) > 1


def result_figures(
    settings: Sequence[Setting], runs: sweep_plots.Runs, metric: str, label: str
) -> list[Figure]:
    """What the sweep has found, in two columns."""
    of_ppo = of_stage(runs, "ppo")
    score = "reward/score_mean"
    if any("eval/gold_score" in r for some in of_ppo.values() for x in some for r in x):
        score = "eval/gold_score"
    kl = "eval/kl" if score.startswith("eval/") else "kl/ref"
    some = f", {sweep_plots.MOST_RANKED} of {len(settings)} settings"
    some = some if len(settings) > sweep_plots.MOST_RANKED else ""
    best = "the least" if LOWER_IS_BETTER.search(metric) else "the greatest"
    grid = sweep_plots.heat_map(settings, metric, label) if metric else None
    search = sweep_plots.parallel_coordinates(settings, metric, label) if metric else None
    drawn: list[tuple[str, Draw | None, str]] = [
        (
            f"{label[:1].upper()}{label[1:]} by setting",
            sweep_plots.estimates(settings, metric, label) if metric else None,
            f"{best.capitalize()} mean on top{some}. Small points: seeds; bars: 95% intervals.",
        ),
        (
            "Score against KL",
            sweep_plots.score_against_kl(settings, of_ppo, score, kl),
            f"{LABELS[score].capitalize()}, from the first step to the last; a dot is the end of a "
            "run. Further up and to the left is better.",
        ),
        (
            "Two numbers at once",
            grid,
            "The mean over seeds of each pair that was tried; light is high.",
        ),
        (
            "What was tried, and what came of it",
            None if grid else search,
            "A line is a setting; light is a high value on the axis to the right.",
        ),
    ]
    return [f for title, draw, note in drawn if (f := make_figure(title, draw, note, size=HALF))]


def curve_figures(settings: Sequence[Setting], runs: sweep_plots.Runs) -> list[Figure]:
    found: list[Figure] = []
    for stage, metric, title, unit in CURVES:
        mine = of_stage(runs, stage)
        if len(found) == MOST_CURVES or (stage != "ppo" and not differ(mine, metric)):
            continue  # a stage that all points share
        labels = (find_stage(stage).step_unit, unit)
        draw = sweep_plots.sweep_curves(settings, mine, metric, labels, named=not found)
        found += filter(None, [make_figure(title, draw, "", size=SMALL)])
    return found


def of_stage(runs: sweep_plots.Runs, stage: str) -> sweep_plots.Runs:
    return {i: [[r for r in x if r["stage"] == stage] for x in some] for i, some in runs.items()}


def differ(runs: sweep_plots.Runs, metric: str) -> bool:
    """Whether two points have other values of a metric."""
    points = [[row[metric] for row in x if metric in row] for some in runs.values() for x in some]
    return any(values != points[0] for values in points[1:])


def failures(rows: Sequence[dict]) -> str:
    failed = [row for row in rows if row["status"] != "complete"]
    if not failed:
        return ""
    names = "; ".join(title_of(row["point"]) for row in failed[:4]) + (
        "; ..." if failed[4:] else ""
    )
    return f"{len(failed)} of {len(rows)} points failed: {names}"


def cards(
    settings: Sequence[Setting], rows: Sequence[dict], metric: str, label: str
) -> list[tuple[str, str, str]]:
    """(figure, what it is, what to compare it with)."""
    done = sum(row["status"] == "complete" for row in rows)
    seeds = f"{len(settings)} settings" if len(settings) > 1 else "one setting"
    found = [(f"{done}", "points complete", f"of {len(rows)}, {seeds}")]
    order = sweep_table.ranked(settings, metric) if metric else []
    if order:
        (best, top), (_, last) = order[0], order[-1]
        found.append((figure(metric, top.mean), label, best.name))
        if len(order) > 1:
            found.append((figure(metric, last.mean), "the worst setting", order[-1][0].name))
        kl = next((e for k in KL_METRICS if (e := best.estimate(k))), None)
        if kl:
            found.append((f"{kl.mean:z.1f} nats", "KL per response", "of the best setting"))
    seconds = [s for setting in settings for s in setting.numbers("time/total_s")]
    if seconds:
        found.append((duration(sum(seconds)), "of all points together", "wall clock of each"))
    return found


def point(folder: Path, row: dict, metric: str) -> dict[str, Any]:
    """A line of the table of points."""
    path, metrics = point_folder(folder, row), row["metrics"]
    value = sweep_table.number(metrics.get(metric))
    seconds = sweep_table.number(metrics.get("time/total_s"))
    return {
        "name": title_of(row["point"]),
        "status": row["status"],
        "failed": row["status"] != "complete",
        "error": row.get("error", ""),
        "value": "" if value is None else figure(metric, value),
        "time": "" if seconds is None else duration(seconds),
        "report": f"{path.name}/report.html" if (path / "report.html").is_file() else "",
    }


def table_data(settings: Sequence[Setting], metric: str) -> dict[str, Any]:
    """What the script of the page sorts."""
    names, shown = sweep_table.metric_names(settings), columns(settings, metric)
    varied = sweep_table.varied(settings)
    best = next((s for s, _ in sweep_table.ranked(settings, metric)), None) if metric else None
    rows = []
    for setting, shade in zip(settings, sweep_plots.colours(len(settings)), strict=True):
        values = [setting.values.get(name) for name in varied]
        rows.append(
            {
                "values": [
                    v if sweep_table.number(v) is not None else short_value(v) for v in values
                ],
                "names": [short_value(v) for v in values],
                "seeds": str(len(setting.rows)),
                "colour": shade,
                "best": setting is best and len(settings) > 1,
                "metrics": {n: cell(n, e) for n in names if (e := setting.estimate(n))},
            }
        )
    rest = [name for name in names if name not in shown]
    return {
        "rows": rows,
        "columns": shown,
        "metrics": rest,
        "other": next((name for name in ("policy/entropy", *rest) if name in rest), ""),
        "main": metric,
        "lower": [name for name in names if LOWER_IS_BETTER.search(name)],
    }


def sortable(value: Any) -> Any:
    """A number as it is, anything else as text."""
    return short_value(value) if sweep_table.number(value) is None else value


def cell(metric: str, estimate: sweep_table.Estimate) -> list:
    """[the number to sort by, the mean, its interval] as text."""
    interval = sweep_table.interval(metric, estimate)
    return [estimate.mean, figure(metric, estimate.mean), interval]
