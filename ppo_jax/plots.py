"""Figures of a run by matplotlib: curves, score against KL, accuracies, win rates.

Every `draw_*` function draws one figure's content into given axes; `svg` and `save_png` give it a
canvas. The SVG takes its ink from the page around it, so one file serves light and dark themes.
"""

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

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
SMOOTHING_SPAN = 8  # steps


class Line(NamedTuple):
    """One curve: N points, and (optional) the half-width of a band around it."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    color: str
    band: Sequence[float] | None = None


def svg(draw: Callable[[Axes], None], *, size: tuple[float, float], name: str) -> str:
    """The figure as an `<svg>` element to stand inside a page; `name` keeps its ids unique.

    Args:
        draw: draws into the axes that it is given.
        size: width and height in inches of 72 points; the element scales to its column.
        name: another for every figure of a page.
    """
    with matplotlib.rc_context(STYLE | _inks(INK, GRID, PAPER) | {"svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    return _inline(buffer.getvalue())


def save_png(draws: Sequence[Callable[[Axes], None]], path: Path, *, columns: int) -> None:
    """All figures side by side in one picture on white, `columns` in a row."""
    rows = -(-len(draws) // columns)
    with matplotlib.rc_context(STYLE | _inks("#22272e", "#e3e6ea", "#ffffff")):
        figure = Figure(figsize=(3.7 * columns, 2.6 * rows), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
        for i, draw in enumerate(draws):
            draw(figure.add_subplot(rows, columns, i + 1))
        figure.savefig(path, dpi=160)


def draw_lines(axes: Axes, lines: Sequence[Line], *, xlabel: str, ylabel: str) -> None:
    """Curves over steps. A long noisy one stands thin behind its running mean."""
    for line in lines:
        steps, values = np.asarray(line.steps, float), np.asarray(line.values, float)
        noisy = len(values) >= 3 * SMOOTHING_SPAN
        thin = {"lw": 0.8, "alpha": 0.45} if noisy else {"lw": 1.6}
        marker = {"marker": "o", "ms": 3.2} if len(values) <= 12 else {}
        label = {"label": line.label}
        axes.plot(steps, values, color=line.color, **thin, **marker, **({} if noisy else label))
        if noisy:
            axes.plot(steps, running_mean(values), color=line.color, lw=1.8, **label)
        if line.band is not None:
            band = np.asarray(line.band, float)
            axes.fill_between(
                steps, values - band, values + band, color=line.color, alpha=0.13, lw=0
            )
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.margins(x=0.02)
    if len(lines) > 1:
        axes.legend()


def draw_trajectory(axes: Axes, kl: Sequence, score: Sequence, steps: Sequence) -> None:
    """Score against KL, coloured from the first iteration (SFT blue) to the last (PPO green)."""
    kl, score, steps = (np.asarray(x, float) for x in (kl, score, steps))
    colors = LinearSegmentedColormap.from_list("sft to ppo", [COLORS["sft"], COLORS["ppo"]])
    shade = (steps - steps[0]) / max(steps[-1] - steps[0], 1)
    if len(kl) >= 3 * SMOOTHING_SPAN:
        axes.plot(running_mean(kl), running_mean(score), color=_ink(), lw=0.8, alpha=0.5)
    axes.scatter(kl, score, c=shade, cmap=colors, s=20, lw=0, alpha=0.9)
    for index, offset in ((0, (7, -11)), (-1, (-4, 8))):
        axes.annotate(
            f"iteration {steps[index]:g}",
            (kl[index], score[index]),
            xytext=offset,
            textcoords="offset points",
            ha="left" if index == 0 else "right",
            fontweight="bold",
        )
    axes.set(xlabel="KL from the SFT policy (nats per response)", ylabel="mean score")
    axes.margins(x=0.06, y=0.15)


def draw_bars(
    axes: Axes,
    names: Sequence[str],
    values: Sequence[float],
    colors: Sequence[str],
    *,
    xlabel: str,
    start: float = 0.0,
    mark: float | None = None,
    intervals: Sequence[Sequence[float] | None] | None = None,
) -> None:
    """Horizontal bars with their figures, from `start` to 1, the first name on top.

    Args:
        axes: where to draw.
        names: N labels.
        values: N shares in [0, 1].
        colors: N colours.
        xlabel: what the shares are of.
        start: where the bars begin: 0.5 when a coin toss gives that much.
        mark: where a dashed line stands, if anywhere.
        intervals: N times (low, high) or None, drawn as whiskers.
    """
    rows = np.arange(len(names))
    axes.barh(rows, np.asarray(values) - start, left=start, color=colors, height=0.62)
    for row, value, interval in zip(rows, values, intervals or [None] * len(names), strict=True):
        end = value
        if interval is not None:
            axes.plot(interval, [row, row], color=_ink(), lw=1.0)
            end = max(value, interval[1])
        axes.text(end + 0.012 * (1 - start), row, f"{value:.3f}", va="center")
    if mark is not None:
        axes.axvline(mark, color=_ink(), lw=0.8, ls=(0, (4, 3)))
    axes.set(yticks=rows, yticklabels=names, xlabel=xlabel, xlim=(start, 1 + 0.14 * (1 - start)))
    axes.set_xticks(np.linspace(start, 1, 6))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def running_mean(values: np.ndarray, span: int = SMOOTHING_SPAN) -> np.ndarray:
    """Exponential mean m_t = sum_i a^(t-i) x_i / sum_i a^(t-i), a = 1 - 1 / span; NaN is skipped.

    >>> running_mean(np.array([3.0, 3.0, np.nan, 3.0])).tolist()
    [3.0, 3.0, 3.0, 3.0]
    """
    total = weight = 0.0
    means = []
    for value in values:
        known = not np.isnan(value)
        total = (1 - 1 / span) * total + (value if known else 0.0)
        weight = (1 - 1 / span) * weight + known
        means.append(total / weight if weight else np.nan)
    return np.array(means)


def _ink() -> str:
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
