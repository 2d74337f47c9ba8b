"""The frontier as a figure: gold and proxy score of several settings against sqrt(KL)."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from ppo_jax.evaluation.frontier import (
    Curve,
    Point,
    distance,
    fit_curve,
    mean_points,
    measured_peak,
    predict,
)
from ppo_jax.evaluation.report.plots import COLORS, Draw, ink, smooth
from ppo_jax.evaluation.report.sweep_plots import colours
from ppo_jax.training.ppo import PPO

DASHED = (0, (4, 2.2))
NOISY = 12  # points: from here on a line is smoothed, and the dots alone are what was measured


def frontier(curves: Sequence[Curve]) -> Draw | None:
    """Gold as a solid line, proxy as a dashed one, fits of gold as thin ones, peaks as rings.

    Curves of RL have a colour each, from dark to light; best-of-n has one of its own.
    """
    shown = [(curve, means) for curve in curves if len(means := mean_points(curve)) > 1]
    if not shown:
        return None

    def draw(axes: Axes) -> None:
        shades = iter(colours(sum(curve.kind == "rl" for curve, _ in shown)))
        axes.axhline(0, color=ink(), lw=0.6)
        handles = []
        for curve, means in shown:
            color = next(shades) if curve.kind == "rl" else COLORS["evaluate"]
            draw_curve(axes, curve, means, color)
            handles.append(Line2D([], [], color=color, lw=1.8, label=curve.name))
        styles = {"gold": {"lw": 1.8}, "proxy": {"lw": 1.2, "ls": DASHED}}
        styles["fit of gold"] = {"lw": 0.8, "alpha": 0.8}
        handles += [Line2D([], [], color=ink(), label=k, **style) for k, style in styles.items()]
        axes.set(
            xlabel="√KL from the reference policy (KL in nats per response)",
            ylabel="score less the starting policy's",
        )
        axes.margins(x=0.03, y=0.06)
        axes.set_xlim(left=0)
        axes.legend(handles=handles, fontsize=7, handlelength=2.2, loc="best")

    return draw


def draw_curve(axes: Axes, curve: Curve, means: Sequence[Point], color: str) -> None:
    """One setting: the mean over its runs, each run's gold points as dots, the peak of the mean."""
    d = way(distance([p.kl for p in means]))
    marker = {"marker": "o", "ms": 3.4} if curve.kind == "bon" else {}
    axes.plot(d, way([p.gold for p in means]), color=color, lw=1.8, zorder=3, **marker)
    if all(p.proxy is not None for p in means):
        axes.plot(d, way([p.proxy for p in means]), color=color, lw=1.2, ls=DASHED)
    every = distance([p.kl for p in curve.points])
    axes.scatter(every, [p.gold for p in curve.points], color=[color], s=7, lw=0, alpha=0.5)
    peak, last = measured_peak(curve)
    if peak != last and peak.gold > 0:
        ring = dict(facecolors="none", edgecolors=ink(), s=46, lw=1.0, zorder=4)
        at = (float(distance(peak.kl)), peak.gold)
        axes.scatter(*at, **ring)
        text = f"n = {peak.n}" if peak.step is None else f"{PPO.step_unit} {peak.step}"
        label = axes.annotate(
            text, at, xytext=(0, 8), textcoords="offset points", ha="center", fontsize=7, zorder=5
        )
        paper = matplotlib.rcParams["figure.facecolor"]  # a word stays clear of a line
        label.set_path_effects([withStroke(linewidth=2.5, foreground=paper)])
    fit = fit_curve(curve)
    if fit is not None and fit.beta > 0:  # bent as the form is meant to be
        x = np.linspace(0, max(d), 200)
        axes.plot(x, predict(fit, x), color=color, lw=0.8, alpha=0.8)


def way(values: Sequence[float]) -> np.ndarray:
    """A long way without its noise, from where it began; a short one as it is."""
    values = np.asarray(values, np.float64)
    return values if len(values) < NOISY else np.concatenate([values[:1], smooth(values)[1:]])
