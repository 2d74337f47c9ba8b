"""Figures of a run by matplotlib: curves, score against KL, accuracies, win rates.

A figure is a function that draws into given axes; `svg` and `save_png` give it a canvas. The SVG
takes its ink from the page around it, so one file serves light and dark themes.
"""

import io
import re
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ppo_jax.evaluation.report.charts import Chart, compared, drawn, series
from ppo_jax.training.ppo import PPO
from ppo_jax.training.stages import find_stage

COLORS = {
    "base": "#8b929c",
    "sft": "#4a86d8",
    "reward": "#d0892b",
    "ppo": "#1d9d78",
    "evaluate": "#9a6dd0",
}
# Stand-ins that no figure uses otherwise: `svg` exchanges them for colours of the page.
PAGE_COLORS = {"#010203": "currentColor", "#040506": "var(--grid)", "#070809": "var(--card)"}
INK, GRID, PAPER = PAGE_COLORS

STYLE = {
    "svg.fonttype": "none",
    "font.size": 8.0,
    "axes.titlesize": 9.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-3, 4),
    "axes.formatter.use_mathtext": False,
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
}
NOISY = 24  # points: from here on a curve is smoothed

Draw = Callable[[Axes], None]


def svg(draw: Draw, *, size: tuple[float, float], name: str) -> str:
    """The figure as an `<svg>` element to stand inside a page.

    Args:
        draw: draws into the axes that it is given.
        size: width and height in inches of 72 points; the element scales to its column.
        name: another for every figure of a page: its ids are hashes salted with it.
    """
    with matplotlib.rc_context(STYLE | _inks(INK, GRID, PAPER) | {"svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    return _inline(buffer.getvalue())


def save_png(
    draws: Mapping[str, Draw],
    path: Path,
    *,
    columns: int,
    size: tuple[float, float] = (4.2, 2.7),
) -> None:
    """All figures under their titles in one picture on white, `columns` in a row, each of a size in
    inches."""
    rows = -(-len(draws) // columns)
    with matplotlib.rc_context(STYLE | _inks("#22272e", "#e3e6ea", "#ffffff")):
        figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
        for i, (title, draw) in enumerate(draws.items(), 1):
            axes = figure.add_subplot(rows, columns, i)
            draw(axes)
            axes.set_title(title)
        figure.savefig(path, dpi=160)


# Figures of a run. Each returns what draws it, or None when the run has nothing to show there.


def curves(
    rows: Sequence[dict], stage: str, chart: Chart, idle: Container[str] = ()
) -> Draw | None:
    """The metrics of a chart over the steps of a stage, but for idle ones; the first in grey beside
    others, such as training beside validation."""
    known = drawn(rows, chart, idle=idle)
    if not known:
        return None

    def draw(axes: Axes) -> None:
        for name, label in known.items():
            steps, values = map(np.array, series(rows, name))
            muted = name == next(iter(chart.metrics)) and len(known) > 1
            color = COLORS["base" if muted else stage]
            _draw_line(axes, steps, values, color, label, noisy=not chart.exact)
            if name == next(iter(chart.metrics)):
                _draw_band(axes, rows, (name, chart.band), color)
        axes.set(xlabel=find_stage(stage).step_unit, ylabel=chart.unit)
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=[1, 2, 5, 10]))
        if len(known) > 1:
            axes.legend()

    return draw


def trajectory(rows: Sequence[dict]) -> Draw | None:
    """Score against KL, coloured from the first iteration (SFT blue) to the last (PPO green)."""
    rows = [row for row in rows if "kl/ref" in row and "reward/score_mean" in row]
    steps, kl = map(np.array, series(rows, "kl/ref"))
    points = np.stack([kl, series(rows, "reward/score_mean")[1]], axis=1)  # [N, 2]
    known = np.isfinite(points).all(axis=1)
    steps, points = steps[known], points[known]
    if len(points) < 2:
        return None
    shades = LinearSegmentedColormap.from_list("", [COLORS["sft"], COLORS["ppo"]])

    def draw(axes: Axes) -> None:
        line = points[:0]
        if len(points) >= NOISY:
            line = np.stack([smooth(values) for values in points.T], axis=1)
            axes.plot(*line.T, color=ink(), lw=0.8, alpha=0.45)
        axes.scatter(*points.T, c=np.arange(len(points)), cmap=shades, s=20, lw=0, alpha=0.9)
        ends = points[[0, -1]]
        axes.scatter(*ends.T, facecolors="none", edgecolors=ink(), s=34, lw=0.9)
        axes.set(xlabel="KL from the reference policy (nats per response)", ylabel="mean score")
        axes.margins(x=0.05, y=0.25)  # room for a label above and below the points
        up = 1 if ends[1, 1] >= ends[0, 1] else -1
        _label_point(axes, f"{PPO.step_unit} {steps[0]}", ends[0], -up)
        _label_point(axes, f"{PPO.step_unit} {steps[-1]}", ends[1], up)

    return draw


def win_rates(results: dict) -> Draw | None:
    """How often each judge prefers the candidate to its reference, with intervals."""
    key = "win_rate_{}_vs_{}".format(*compared(results))
    rows = [row for row in results.get("judges", []) if key in row]

    def draw(axes: Axes) -> None:
        axes.axvline(0.5, color=ink(), lw=0.8, ls=(0, (4, 3)))
        bars = {row["judge"]: row[key] for row in rows}
        ends = [row.get(f"{key}_interval", [row[key]] * 2) for row in rows]
        _draw_bars(axes, bars, [COLORS["ppo"]] * len(rows), text_at=[high for _, high in ends])
        for at, interval in enumerate(ends):
            axes.plot(interval, [at, at], color=ink(), lw=1.0)
        axes.set_xlabel("share of prompts")

    return draw if rows else None


def margins(results: dict) -> Draw | None:
    """Accuracy of the reward model by the least gap between the mean ratings of a pair."""
    keys = {"all pairs": "", "gap ≥ 1": "_margin1", "gap ≥ 2": "_margin2"}
    bars = {name: results.get(f"reward_model/accuracy{key}") for name, key in keys.items()}
    bars = {name: value for name, value in bars.items() if value is not None}

    def draw(axes: Axes) -> None:
        _draw_bars(axes, bars, [COLORS["reward"]] * len(bars), start=0.5)
        axes.set_xlabel("share of pairs")

    return draw if bars else None


def references(results: dict) -> Draw | None:
    """The reward model's accuracy at a gap of 1 or more among its references, the best on top."""
    own = results.get("reward_model/accuracy_margin1")
    if own is None:
        return None
    bars = {"this reward model": own, **results.get("reference", {})}
    bars = dict(sorted(bars.items(), key=lambda item: -item[1]))
    colors = [COLORS["reward" if name == "this reward model" else "base"] for name in bars]

    def draw(axes: Axes) -> None:
        _draw_bars(axes, bars, colors, start=0.5)
        axes.set_xlabel("share of pairs with a gap of 1 or more")

    return draw


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred mean under a Gaussian, so that a trend is not delayed; NaN is skipped.

    y_i = sum_j w_ij x_j / sum_j w_ij,  w_ij = exp(-((i - j) / width)^2 / 2)

    >>> smooth(np.array([3.0, 3.0, np.nan, 3.0])).round(6).tolist()
    [3.0, 3.0, 3.0, 3.0]
    """
    known, at = ~np.isnan(values), np.arange(len(values))
    width = max(1.5, len(values) / 40)
    weights = np.exp(-(((at[:, None] - at[known]) / width) ** 2) / 2) + 1e-30
    return (weights * values[known]).sum(1) / weights.sum(1)


def _label_point(axes: Axes, text: str, point: np.ndarray, side: int) -> None:
    """The name of a point, above (side 1) or below it (side -1), toward the middle of the axes."""
    left, right = axes.get_xlim()
    toward = 1 if point[0] < (left + right) / 2 else -1
    axes.annotate(
        text,
        point,
        xytext=(-4 * toward, 9 * side),
        textcoords="offset points",
        ha="left" if toward > 0 else "right",
        va="bottom" if side > 0 else "top",
        fontweight="bold",
        bbox={"facecolor": matplotlib.rcParams["figure.facecolor"], "alpha": 0.7, "lw": 0}
        | {"boxstyle": "square,pad=0.1"},
    ).set_in_layout(False)


def _draw_line(
    axes: Axes, steps: np.ndarray, values: np.ndarray, color: str, label: str, *, noisy: bool
) -> None:
    """A curve; a long one is thin behind its smoothed self, a short one has its points."""
    if noisy and len(values) >= NOISY:
        axes.plot(steps, values, color=color, lw=0.8, alpha=0.45)
        axes.plot(steps, smooth(values), color=color, lw=1.8, label=label)
    else:
        marker = {"marker": "o", "ms": 3.2} if len(values) <= 12 else {}
        axes.plot(steps, values, color=color, lw=1.6, label=label, **marker)


def _draw_band(axes: Axes, rows: Sequence[dict], names: tuple[str, str], color: str) -> None:
    """The second metric as the half-width of a band around the first."""
    both = [row for row in rows if all(name in row for name in names)]
    steps, middle = map(np.array, series(both, names[0]))
    width = np.array(series(both, names[1])[1])
    axes.fill_between(steps, middle - width, middle + width, color=color, alpha=0.13, lw=0)


def _draw_bars(
    axes: Axes,
    bars: Mapping[str, float],
    colors: Sequence[str],
    *,
    start: float = 0.0,
    text_at: Sequence[float] | None = None,
) -> None:
    """Horizontal bars of shares from `start` to 1 with their figures, the first on top."""
    start = start if min(bars.values()) > start else 0.0
    rows, values = np.arange(len(bars)), np.array(list(bars.values()))
    paper = matplotlib.rcParams["figure.facecolor"]
    behind = dict(facecolor=paper, edgecolor="none", pad=1)  # a figure stays clear of a line
    axes.barh(rows, values - start, left=start, color=list(colors), height=0.62)
    for row, value, at in zip(rows, values, values if text_at is None else text_at, strict=True):
        axes.text(at + 0.02 * (1 - start), row, f"{value:.3f}", va="center", bbox=behind)
    axes.set(yticks=rows, yticklabels=list(bars), xlim=(start, 1 + 0.17 * (1 - start)))
    axes.set_ylim(max(len(bars), 3) - 0.4, -0.6)  # the first on top; two bars are not fat
    axes.set_xticks(np.linspace(start, 1, 6))
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def ink() -> str:
    return matplotlib.rcParams["text.color"]


def _inks(ink: str, grid: str, paper: str) -> dict:
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    return {key: ink for key in inked} | {"grid.color": grid, "figure.facecolor": paper}


def _inline(text: str) -> str:
    """Only the element: no XML header, metadata, name spaces, fonts, fixed size or unused ids.

    Ids that are used (clip paths, markers) are hashes salted with the figure's name.
    """
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img">', text, count=1)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r" font-family: [^;]*;", "", text)
    for stand_in, color in PAGE_COLORS.items():
        text = text.replace(stand_in, color)
    return text
