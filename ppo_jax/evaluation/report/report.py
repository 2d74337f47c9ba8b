"""report.html and the picture of a run, made from the files of its workdir alone.

A run that was interrupted, or that has some of the stages only, gets the parts that it has.
"""

from html import escape
from pathlib import Path

import numpy as np

from ppo_jax.evaluation.report import page, plots
from ppo_jax.evaluation.report.panels import PANELS, STAGES, STEP_NAMES, Group
from ppo_jax.evaluation.report.summary import (
    Run,
    duration,
    headlines,
    read_run,
    unfinished,
    verdict,
)

NAMES = {"base": "base", "sft": "SFT", "reward": "reward model", "ppo": "PPO"}
SHOWN_SAMPLES = 6  # the others are folded
SHOWN_VERSIONS = 6  # of the response to one prompt during training
# Inches of 72 points; the page scales them.
SMALL, HALF, TALL, WIDE = (3.6, 2.3), (5.5, 2.6), (3.6, 3.05), (7.4, 3.05)


def write_report(workdir: str | Path) -> Path:
    """Writes `workdir/report.html`, one file with its style and figures inside; returns its path.

    Args:
        workdir: the folder of a run, with any of config.json, metrics.jsonl, samples.jsonl and
            results.json.

    Raises:
        ValueError: the folder holds none of them, or one is not JSON (file:line).
    """
    run = read_run(workdir)
    parts = [_header(run), _judgement(run), _samples(run), _stages(run)]
    parts += [_curves(run, stage) for stage in STAGES] + [_changes(run), _settings(run)]
    path = Path(workdir) / "report.html"
    path.write_text(page.page(f"{run.name} · ppo_jax", *parts), encoding="utf-8")
    return path


def save_curves_png(workdir: str | Path, path: str | Path) -> None:
    """One compact picture of the result: loss, accuracy, score against KL, judges.

    Args:
        workdir: the folder of a run.
        path: the PNG file to write.

    Raises:
        ValueError: the run has nothing to draw yet.
    """
    run = read_run(workdir)
    pictures = {
        "SFT: loss": plots.curves(run.rows("sft"), "sft", PANELS["sft"][0].panels[0]),
        "Reward model: accuracy": plots.references(run.results),
        "PPO: score against KL": plots.trajectory(run.rows("ppo")),
        "PPO against SFT, by judge": plots.win_rates(run.results, "sft"),
    }
    drawn = {title: draw for title, draw in pictures.items() if draw}
    if not drawn:
        raise ValueError(f"{workdir} has no curves to draw yet.")
    plots.save_png(drawn, Path(path), columns=min(len(drawn), 2))


# The parts of the page, from the top


def _header(run: Run) -> str:
    todo = unfinished(run)
    warning = f'<p class="warning">This run has not finished: {escape(todo)}.</p>\n'
    return (
        f'<header>\n<div class="kicker">ppo_jax · {escape(run.date)}</div>\n'
        f'<h1>{escape(run.name)}</h1>\n<p class="verdict">{escape(verdict(run))}</p>\n'
        + (warning if todo else "")
        + f"{page.cards(headlines(run))}</header>\n"
    )


def _judgement(run: Run) -> str:
    figures = [
        _figure(
            "Score against KL",
            plots.trajectory(run.rows("ppo")),
            "Each point is an iteration, from the SFT policy (blue) to the end of PPO (green). "
            "Further up and to the left is better: more score for less drift.",
            size=WIDE,
        ),
        _figure(
            "PPO against SFT, by judge",
            plots.win_rates(run.results, "sft"),
            "Share of prompts on which the judge prefers PPO, ties half. Whiskers: 95% interval; "
            "dashed: no preference.",
            size=TALL,
        ),
    ]
    judges = run.results.get("judges", [])
    note = (
        "The judges had no part in the training. The accuracy of each, on unseen pairs that people "
        "rated at least 1 apart, tells how far to trust it."
    )
    return page.section(
        "Result", page.grid(figures), _judge_table(judges), note=note if judges else ""
    )


def _judge_table(judges: list[dict]) -> str:
    keys = [key for key in (judges or [{}])[0] if key.startswith(("pair_", "mean_", "win_"))]
    keys = [key for key in keys if not key.endswith("_interval")]
    rows = [
        [f"{escape(row['judge'])}<small>{escape(row.get('note', ''))}</small>"]
        + [_judge_cell(row, key) for key in keys]
        for row in judges
    ]
    return page.table(["judge", *map(_judge_heading, keys)], rows) if rows else ""


def _judge_heading(key: str) -> str:
    if key == "pair_accuracy_margin1":
        return "its accuracy"
    if key.startswith("mean_"):
        return f"mean, {_name(key.removeprefix('mean_'))}"
    return " over ".join(map(_name, key.removeprefix("win_rate_").split("_vs_")))


def _judge_cell(row: dict, key: str) -> str:
    if key not in row:
        return ""
    if key.startswith("mean_"):
        return f"{row[key]:+.2f}"
    interval = row.get(f"{key}_interval")
    return f"{row[key]:.1%}" + (
        '<small class="short">{:.0%} to {:.0%}</small>'.format(*interval) if interval else ""
    )


def _samples(run: Run) -> str:
    samples = run.results.get("samples", [])
    scores = [score for row in samples for score in row.get("scores", {}).values()]
    cards = [_sample(row, max(map(abs, scores), default=1.0)) for row in samples]
    folded = cards[SHOWN_SAMPLES:]
    more = page.details(f"{len(folded)} more prompts", *folded) if folded else ""
    note = "Unseen prompts (grey), one response of each stage, with its score."
    return page.section("Samples", *cards[:SHOWN_SAMPLES], more, note=note)


def _sample(row: dict, largest: float) -> str:
    columns = [
        f'<div style="border-color: var(--{stage})">'
        + page.chip(row.get("scores", {}).get(stage), largest)
        + f'<span class="stage">{_name(stage)}</span>{page.text(row["prompt"], row[stage])}</div>'
        for stage in ("base", "sft", "ppo")
        if stage in row
    ]
    return f'<div class="sample"><div class="columns">{"".join(columns)}</div></div>\n'


def _stages(run: Run) -> str:
    times = {
        key.removeprefix("time/").removesuffix("_s"): seconds
        for key, seconds in run.results.items()
        if key.startswith("time/") and key != "time/total_s"
    }
    stages = [stage for stage in STAGES if stage not in times and run.rows(stage)]
    rows = [
        [
            escape(_name(stage)),
            f'<span class="time">{duration(times[stage])}</span>' if stage in times else "",
            _outcome(run, stage),
        ]
        for stage in [*times, *stages]
    ]
    bar = page.timeline(
        [
            (f"{_name(s)} {duration(t)}", s if s in plots.COLORS else "other", t)
            for s, t in times.items()
        ]
    )
    return page.section(
        "Stages",
        bar if times else "",
        page.table(["stage", "time", "outcome"], rows) if rows else "",
    )


def _outcome(run: Run, stage: str) -> str:
    """Steps done, and the first and last value of what the stage is about."""
    names = {
        "sft": {"sft/validation_perplexity": "validation perplexity {:.4g} → {:.4g}"},
        "reward": {"reward_model/validation_accuracy": "validation accuracy {:.1%} → {:.1%}"},
        "ppo": {
            "reward/score_mean": "mean score {:.2f} → {:.2f}",
            "kl/ref": "KL per response {:.1f} → {:.1f} nats",
        },
    }.get(stage, {})
    rows = run.rows(stage)
    ends = [(form, run.ends(stage, name)) for name, form in names.items()]
    # + 0.0: the KL begins at 0 but for rounding, which is no reason for a sign.
    told = [form.format(*(round(v, 3) + 0.0 for v in values)) for form, values in ends if values]
    steps = [f"{STEP_NAMES[stage]} {rows[-1]['step']}"] if rows and stage in STEP_NAMES else []
    return escape("; ".join(steps + told))


def _curves(run: Run, stage: str) -> str:
    groups = [_group(run, stage, group) for group in PANELS[stage]]
    return page.section(STAGES[stage], *groups)


def _group(run: Run, stage: str, group: Group) -> str:
    """The figures of a group: two or four of them stand in two columns, else in three."""
    figures = [(p.title, plots.curves(run.rows(stage), stage, p), p.note) for p in group.panels]
    figures += _accuracies(run) if stage == "reward" else []
    figures = [figure for figure in figures if figure[1]]
    columns, size = (2, HALF) if len(figures) in (2, 4) else (3, SMALL)
    parts = [_figure(*figure, size=size) for figure in figures]
    return page.grid(parts, group.heading, columns=columns)


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


def _changes(run: Run) -> str:
    """How the responses to the same prompts changed during training."""
    prompts: dict[str, list[dict]] = {}
    for row in run.samples:
        prompts.setdefault(row["prompt"], []).append(row)
    largest = max((abs(row["score"]) for row in run.samples if _scored(row)), default=1.0)
    folds = [
        page.details(prompt.strip() or "(empty prompt)", _versions(rows, largest))
        for prompt, rows in prompts.items()
    ]
    if folds:
        folds[0] = folds[0].replace("<details>", "<details open>", 1)
    note = "The responses to the same prompts, every few steps."
    return page.section("During training", *folds, note=note)


def _versions(rows: list[dict], largest: float) -> str:
    kept = np.unique(np.linspace(0, len(rows) - 1, SHOWN_VERSIONS).round().astype(int))
    cells = [
        [
            f'<span class="soft">{escape(_name(row["stage"]))} {row["step"]}</span>',
            page.text(row["prompt"], row["response"]),
            page.chip(row["score"] if _scored(row) else None, largest),
        ]
        for row in (rows[i] for i in kept)
    ]
    return page.table(["step", "response", "score"], cells)


def _settings(run: Run) -> str:
    """The config, folded, under the environment: whatever config.json holds beside `config`."""
    whole = run.config
    config = whole.get("config", whole)
    environment = {k: v for k, v in whole.items() if k != "config"} if "config" in whole else {}
    parts = [page.key_table(environment)] if environment else []
    if config:
        parts.append(page.details("Configuration", page.key_table(config)))
    return page.section("Environment and configuration", *parts)


# Small pieces


def _figure(title: str, draw: plots.Draw | None, note: str, *, size: tuple = SMALL) -> str:
    """A figure of the page; nothing when there is nothing to draw."""
    if draw is None:
        return ""
    return page.figure(
        title, plots.svg(draw, size=size, name=f"{title}: {note}"), note, wide=size == WIDE
    )


def _name(stage: str) -> str:
    return NAMES.get(stage, stage)


def _scored(row: dict) -> bool:
    return row.get("score") is not None
