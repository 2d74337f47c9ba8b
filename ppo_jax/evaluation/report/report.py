"""report.html and the picture of a run, made from the files of its workdir alone.

A run that was interrupted, or that has some of the stages only, gets the parts that it has.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup

from ppo_jax.data.atomic import atomic_write
from ppo_jax.evaluation.frontier import Curve, points_of_run, sentence
from ppo_jax.evaluation.report import critic_plots, plots
from ppo_jax.evaluation.report.charts import (
    CHARTS,
    Group,
    compared,
    display_name,
    idle_metrics,
)
from ppo_jax.evaluation.report.frontier_plots import frontier
from ppo_jax.evaluation.report.summary import (
    EXPLAINED,
    FILES,
    Run,
    critic_alone,
    duration,
    headlines,
    read_run,
    settings_of,
    unfinished,
    verdict,
)
from ppo_jax.training.stages import TRAINING_STAGES, find_stage

SHOWN_SAMPLES = 6  # the others are folded
SHOWN_VERSIONS = 6  # of the response to one prompt during training
# Inches of 72 points; the page scales them.
SMALL, HALF, TALL, WIDE = (3.6, 2.3), (5.5, 2.6), (3.6, 3.05), (7.4, 3.05)
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


class Figure(NamedTuple):
    """A figure of the page: its heading, the drawing, how to read it."""

    title: str
    svg: Markup
    note: str
    wide: bool = False


def write_report(workdir: str | Path) -> Path:
    """Writes `workdir/report.html`, one file with its style and figures inside; returns its path.

    Args:
        workdir: the folder of a run, with any of config.json, metrics.jsonl, samples.jsonl and
            results.json.

    Raises:
        ValueError: the folder holds none of them, or one is not as a run writes it.
    """
    run = read_run(workdir)
    config = run.config.get("config", run.config)
    environment = {key: value for key, value in run.config.items() if key != "config"}
    text = TEMPLATES.get_template("page.html.jinja").render(
        run=run,
        verdict=verdict(run),
        unfinished=unfinished(run),
        headlines=headlines(run),
        result=_result(run),
        samples=_samples(run),
        shown_samples=SHOWN_SAMPLES,
        timeline=_timeline(run),
        stages=_stages(run),
        curves=[(stage.title, _groups(run, stage.name)) for stage in TRAINING_STAGES],
        changes=_changes(run),
        environment=_flat(environment) if "config" in run.config else [],
        configuration=_flat(config),
    )
    path = Path(workdir) / "report.html"
    atomic_write(path, text)
    return path


def is_current(workdir: str | Path) -> bool:
    """Whether `workdir/report.html` is whole, and no older than the files that it is made from."""
    path = Path(workdir) / "report.html"
    if not path.is_file() or not path.read_bytes().rstrip().endswith(b"</html>"):
        return False
    files = [file for name in FILES if (file := Path(workdir) / name).is_file()]
    return path.stat().st_mtime_ns >= max((x.stat().st_mtime_ns for x in files), default=0)


def save_curves_png(workdir: str | Path, path: str | Path) -> None:
    """One compact picture of the result: loss, accuracy, score against KL, judges.

    Raises:
        ValueError: the run has nothing to draw yet.
    """
    run = read_run(workdir)
    candidate, reference = map(display_name, compared(run.results))
    pictures = {
        "SFT: loss": plots.curves(run.rows("sft"), "sft", CHARTS["sft"][0].charts[0]),
        "Reward model: accuracy": plots.references(run.results),
        "PPO: score against KL": plots.trajectory(run.rows("ppo")),
        f"{candidate} against {reference}, by judge": plots.win_rates(run.results),
    }
    drawn = {title: draw for title, draw in pictures.items() if draw}
    if not drawn:
        raise ValueError(f"{workdir} has no curves to draw yet.")
    plots.save_png(drawn, Path(path), columns=min(len(drawn), 2))


# What the template shows, from the top of the page


def _result(run: Run) -> dict[str, Any]:
    candidate, reference = map(display_name, compared(run.results))
    figures = [
        make_figure(
            "Score against KL",
            plots.trajectory(run.rows("ppo")),
            "Each point is an iteration, from the first (blue) to the last (green). "
            "Further up and to the left is better: more score for less drift.",
            size=WIDE,
        ),
        make_figure(
            f"{candidate} against {reference}, by judge",
            plots.win_rates(run.results),
            f"Share of prompts on which the judge prefers {candidate}, ties half. Whiskers: 95% "
            "interval; dashed: no preference.",
            size=TALL,
        ),
        make_figure(
            "Over-optimisation",
            frontier(curves := frontier_of(run)),
            f"{sentence(curves[0])} Gold (solid) and proxy score (dashed) on the same unseen "
            "prompts; thin: R = d (alpha - beta log d) fitted to gold; a ring: its highest."
            if curves
            else "",
            size=WIDE,
        ),
    ]
    rows = run.results.get("judges", [])
    keys = [key for key in (rows or [{}])[0] if key.startswith(("pair_", "mean_", "win_"))]
    keys = [key for key in keys if not key.endswith("_interval")]
    return {
        "figures": [figure for figure in figures if figure],
        "headings": ["judge", *map(_judge_heading, keys)],
        "judges": [
            (row["judge"], row.get("note", ""), [_judge_cell(row, key) for key in keys])
            for row in rows
        ],
    }


def frontier_of(run: Run) -> list[Curve]:
    """The run's own way over the frontier, where it was evaluated while PPO trained."""
    points = points_of_run(run.rows("ppo"))
    return [Curve("This run", points)] if len(points) > 1 else []


def _judge_heading(key: str) -> str:
    if key == "pair_accuracy_margin1":
        return "its accuracy"
    if key.startswith("mean_"):
        return f"mean, {display_name(key.removeprefix('mean_'))}"
    return " over ".join(map(display_name, key.removeprefix("win_rate_").split("_vs_")))


def _judge_cell(row: dict, key: str) -> tuple[str, str]:
    """A figure of a judge and its interval, if any."""
    if row.get(key) is None:
        return "", ""
    if key.startswith("mean_"):
        return f"{row[key]:+z.2f}", ""
    interval, fair = row.get(f"{key}_interval"), row.get(f"length_controlled_{key}")
    notes = ["{:.0%} to {:.0%}".format(*interval)] if interval else []
    notes += [f"at equal length {fair:.0%}"] if fair is not None else []
    return f"{row[key]:.1%}", "; ".join(notes)


def _samples(run: Run) -> dict[str, Any]:
    """One row a prompt: the response of every policy that was compared."""
    rows = run.results.get("samples", [])
    scores = [score for row in rows for score in row.get("scores", {}).values()]
    columns = [
        [
            {
                "name": display_name(policy),
                "color": policy if policy in plots.COLORS else "other",
                "score": row.get("scores", {}).get(policy),
                "prompt": row["prompt"],
                "response": response,
            }
            for policy, response in row.items()
            if policy not in ("prompt", "scores")
        ]
        for row in rows
    ]
    return {"rows": columns, "largest": max(map(abs, scores), default=1.0)}


def _times(run: Run) -> dict[str, float]:
    return {
        key.removeprefix("time/").removesuffix("_s"): seconds
        for key, seconds in run.results.items()
        if key.startswith("time/") and key != "time/total_s"
    }


def _timeline(run: Run) -> list[tuple[str, str, float, bool]]:
    """(label, colour, seconds, whether the label has room) of each segment of the bar.

    A label without room in its segment shows when the pointer rests there.
    """
    times = _times(run)
    total = sum(times.values())
    return [
        (
            f"{display_name(stage)} {duration(seconds)}",
            stage if stage in plots.COLORS else "other",
            seconds,
            seconds > 0.12 * total,
        )
        for stage, seconds in times.items()
    ]


def _stages(run: Run) -> list[tuple[str, str, str]]:
    """(name, time, outcome) of each stage."""
    times = _times(run)
    names = [stage.name for stage in TRAINING_STAGES]
    untimed = [name for name in names if name not in times and run.rows(name)]
    return [
        (
            display_name(stage),
            duration(times[stage]) if stage in times else "",
            _outcome(run, stage),
        )
        for stage in [*times, *untimed]
    ]


def _outcome(run: Run, name: str) -> str:
    """Steps done, and the first and last value of what the stage is about."""
    if (stage := find_stage(name)) is None:
        return ""
    rows = run.rows(name)
    outcome = stage.outcome
    if name == "ppo" and critic_alone(run):
        outcome = {EXPLAINED: "explained variance {:z.2f} → {:z.2f}"}
    ends = [(form, run.ends(name, metric)) for metric, form in outcome.items()]
    parts = [form.format(*values) for form, values in ends if values]
    steps = [f"{stage.step_unit} {rows[-1]['step']}"] if rows else []
    return "; ".join(steps + parts)


def _groups(run: Run, stage: str) -> list[dict[str, Any]]:
    groups = [_group(run, stage, group) for group in CHARTS[stage]]
    return [group for group in groups if group["figures"]]


def _group(run: Run, stage: str, group: Group) -> dict[str, Any]:
    """The figures of a group: two or four of them in two columns, else in three."""
    rows, idle = run.rows(stage), idle_metrics(settings_of(run, "ppo"))
    charts = [(c.title, plots.curves(rows, stage, c, idle), c.note) for c in group.charts]
    charts += _accuracies(run) if stage == "reward" else []
    charts += _critic(run) if group.heading == "Critic" else []
    charts = [chart for chart in charts if chart[1]]
    columns, size = (2, HALF) if len(charts) in (2, 4) else (3, SMALL)
    figures = [make_figure(*chart, size=size) for chart in charts]
    return {"heading": group.heading, "columns": columns, "figures": figures}


def _accuracies(run: Run) -> list[tuple[str, plots.Draw | None, str]]:
    return [
        (
            "Accuracy on unseen pairs",
            plots.margins(run.results),
            "Share of pairs that the score orders as the mean human ratings do, by the gap between "
            "these. A coin toss: 0.5.",
        ),
        (
            "Accuracy among references",
            plots.references(run.results),
            "The same at a gap of 1 or more, beside other ways to order the same texts.",
        ),
    ]


def _critic(run: Run) -> list[tuple[str, plots.Draw | None, str]]:
    rows = run.rows("ppo")
    return [
        (
            "Explained variance by position",
            critic_plots.by_position(rows),
            "Of the tokens in each quarter of the responses. With a score at the end the last "
            "quarter is learned first.",
        ),
        (
            "Calibration",
            critic_plots.calibration(rows),
            "Each point is a fifth of the tokens, from the lowest values to the highest. Dashed: "
            "values that are right on average; below it they are too high.",
        ),
    ]


def _changes(run: Run) -> dict[str, Any]:
    """How the responses to the same prompts changed during training."""
    prompts: dict[str, list[dict]] = {}
    for row in run.samples:
        prompts.setdefault(row["prompt"], []).append(row)
    scores = [abs(row["score"]) for row in run.samples if row.get("score") is not None]
    return {
        "prompts": [
            (prompt.strip() or "(empty prompt)", _versions(rows))
            for prompt, rows in prompts.items()
        ],
        "largest": max(scores, default=1.0),
    }


def _versions(rows: list[dict]) -> list[dict]:
    """Some of the responses to one prompt, the first and the last among them."""
    kept = np.unique(np.linspace(0, len(rows) - 1, SHOWN_VERSIONS).round().astype(int))
    return [
        {
            "step": f"{display_name(row['stage'])} {row['step']}",
            "prompt": row["prompt"],
            "response": row["response"],
            "score": row.get("score"),
        }
        for row in (rows[i] for i in kept)
    ]


def _flat(tree: dict, prefix: str = "") -> list[tuple[str, str]]:
    """Dotted keys and JSON values of a nested dict.

    >>> _flat({"ppo": {"seed": 1, "data": None}, "name": ""})
    [('ppo.seed', '1'), ('ppo.data', 'null'), ('name', '""')]
    """
    rows = []
    for key, value in tree.items():
        nested = isinstance(value, dict) and value
        rows += _flat(value, f"{prefix}{key}.") if nested else [(prefix + key, json.dumps(value))]
    return rows


def make_figure(
    title: str, draw: plots.Draw | None, note: str, *, size: tuple[float, float]
) -> Figure | None:
    """None where there is nothing to draw."""
    if draw is None:
        return None
    svg = plots.svg(draw, size=size, name=f"{title}: {note}")
    return Figure(title, Markup(svg), note, wide=size == WIDE)
