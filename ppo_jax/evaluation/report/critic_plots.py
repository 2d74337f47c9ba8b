"""Figures of how good a critic is, by place in the response and by value, at first and at last."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from ppo_jax.evaluation.report.charts import series
from ppo_jax.evaluation.report.plots import COLORS, Draw, ink
from ppo_jax.training.ppo import PPO

QUARTERS = [f"value/explained_variance_quarter{i}" for i in range(1, 5)]
FIFTHS = [[f"value/{name}_fifth{i}" for i in range(1, 6)] for name in ("mean", "return")]
COLOR_OF = {"first": COLORS["sft"], "last": COLORS["ppo"]}


def by_position(rows: Sequence[dict]) -> Draw | None:
    """The explained variance of each quarter of the responses."""
    ends = first_and_last(rows, QUARTERS)

    def draw(axes: Axes) -> None:
        axes.axhline(0.0, color=ink(), lw=0.8, ls=(0, (4, 3)))
        for name, (label, shares) in ends.items():
            axes.plot(range(1, 5), shares, color=COLOR_OF[name], lw=1.6, marker="o", label=label)
        axes.set(xlabel="quarter of the response", ylabel="share", xticks=range(1, 5))
        axes.legend()

    return draw if ends else None


def calibration(rows: Sequence[dict]) -> Draw | None:
    """Mean return against mean value, of each fifth of the tokens by their values."""
    ends = first_and_last(rows, FIFTHS[0] + FIFTHS[1])

    def draw(axes: Axes) -> None:
        for name, (label, means) in ends.items():
            values, returns = means[:5], means[5:]
            axes.plot(values, returns, color=COLOR_OF[name], lw=1.6, marker="o", label=label)
        both = axes.get_xlim(), axes.get_ylim()
        axes.axline((0.0, 0.0), slope=1.0, color=ink(), lw=0.8, ls=(0, (4, 3)))
        axes.set(xlabel="mean value", ylabel="mean return", xlim=both[0], ylim=both[1])
        axes.legend()

    return draw if ends else None


def first_and_last(rows: Sequence[dict], names: Sequence[str]) -> dict[str, tuple[str, np.ndarray]]:
    """{"first" and "last": (which iterations, the mean of each metric over them [N])}, of a tenth
    of the iterations each; an iteration without one of the metrics is left out. Of a single one
    there is "last" alone, and {} where none has all of them."""
    rows = [row for row in rows if all(name in row for name in names)]
    columns = [series(rows, name) for name in names]
    steps, values = np.array(columns[0][0]), np.array([x for _, x in columns])  # [N, iterations]
    known = np.isfinite(values).all(axis=0)
    steps, values = steps[known], values[:, known]
    if not len(steps):
        return {}
    count = -(-len(steps) // 10)
    parts = {"first": slice(count)} if len(steps) > 1 else {}
    parts["last"] = slice(len(steps) - count, None)
    return {name: (iterations(steps[x]), values[:, x].mean(axis=1)) for name, x in parts.items()}


def iterations(steps: np.ndarray) -> str:
    """What some iterations are called in a legend.

    >>> iterations(np.array([1, 2, 3]))
    'iterations 1 to 3'
    """
    if len(steps) == 1:
        return f"{PPO.step_unit} {steps[0]}"
    return f"{PPO.step_unit}s {steps[0]} to {steps[-1]}"
