"""Figures of an evaluation side by side: win rates, and scores against the KL."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ppo_jax.evaluation.report.plots import COLORS, GRID, INK, Draw

OTHERS = ("#9a6dd0", "#d0892b", "#c2528b", "#3b9fb8", "#8a9a3b", "#b5633f")


def policy_colors(names: Sequence[str]) -> dict[str, str]:
    """A colour a policy: those of a run keep theirs."""
    free = [name for name in names if name not in ("base", "sft", "ppo")]
    others = {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(free)}
    return {name: others.get(name) or COLORS[name] for name in names}


def win_rates(rows: Mapping[str, Mapping[str, Any]], colors: Mapping[str, str]) -> Draw | None:
    """A policy a line: its win rate by one judge with its interval, and that at equal length."""
    rows = {name: row for name, row in rows.items() if "win_rate" in row}
    if not rows:
        return None

    def draw(axes: Any) -> None:
        axes.axvline(0.5, color=INK, lw=0.8, ls=(0, (4, 3)))
        for at, (name, row) in enumerate(rows.items()):
            raw, fair = "win_rate", "length_controlled_win_rate"
            for kind, dy, mark in ((raw, -0.12, "o"), (fair, 0.16, "D")):
                line = dict(color=colors[name], alpha=1.0 if kind == raw else 0.55)
                axes.plot(row[f"{kind}_interval"], [at + dy] * 2, lw=1.6, **line)
                axes.plot([row[kind]], [at + dy], mark, ms=5 if kind == raw else 4, **line)
        axes.set(yticks=range(len(rows)), yticklabels=list(rows), xlim=(0, 1))
        axes.set_ylim(max(len(rows), 3) - 0.5, -0.6)
        axes.set_xlabel("share of prompts")
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)

    return draw


def against_kl(
    points: Mapping[str, tuple[float, float, float]],
    curve: Mapping[str, Sequence[float]],
    colors: Mapping[str, str],
    label: str,
) -> Draw | None:
    """Scores against the square root of the KL: {policy: (KL, mean, standard error)}.

    `curve` has "kl", "mean" and "stderr" of best-of-n, or nothing.
    """
    if len(points) < 2:
        return None

    def draw(axes: Any) -> None:
        if curve:
            x = [math.sqrt(kl) for kl in curve["kl"]]
            low = [m - 1.96 * s for m, s in zip(curve["mean"], curve["stderr"], strict=True)]
            high = [m + 1.96 * s for m, s in zip(curve["mean"], curve["stderr"], strict=True)]
            axes.fill_between(x, low, high, color=INK, alpha=0.1, lw=0)
            axes.plot(x, curve["mean"], color=INK, lw=1.2, ls=(0, (4, 2)), label="best of n")
            axes.legend(loc="lower right")
        for name, (kl, mean, stderr) in points.items():
            at = math.sqrt(max(kl, 0.0))
            axes.plot([at] * 2, [mean - 1.96 * stderr, mean + 1.96 * stderr], color=colors[name])
            axes.plot([at], [mean], "o", ms=5, color=colors[name])
            axes.annotate(
                name, (at, mean), xytext=(5, 4), textcoords="offset points", color=colors[name]
            )
        axes.set(xlabel="√KL from the reference (nats per response)", ylabel=label)
        axes.margins(x=0.18, y=0.18)
        axes.grid(color=GRID)

    return draw
