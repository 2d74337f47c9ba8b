"""Figures of a sweep: a line or a mark a setting, coloured by what was changed.

As in plots.py each function returns what draws into given axes, or None where there is nothing.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, to_hex
from matplotlib.ticker import MaxNLocator

from ppo_jax.evaluation.report.charts import series
from ppo_jax.evaluation.report.plots import Draw, smooth
from ppo_jax.evaluation.sweep_table import (
    Setting,
    field_name,
    figure,
    number,
    ranked,
    short_value,
    varied,
)

SHADES = matplotlib.colormaps["viridis"].resampled(256)
MOST_RANKED = 12  # settings side by side, the best of all
MOST_NAMED = 8  # settings that a legend names; of more the colour alone tells

# {setting's index: the rows of metrics.jsonl of each of its points}
Runs = Mapping[int, Sequence[Sequence[dict]]]


def shortened(text: str, most: int = 60) -> str:
    """A text that leaves room for the figure beside it: of a path its end.

    >>> shortened("0.001"), shortened("runs/reward_models/0123456789/reward", most=20)
    ('0.001', 'runs/r…456789/reward')
    """
    begin = most // 3
    return text if len(text) <= most else f"{text[:begin]}…{text[begin + 1 - most :]}"


def colours(count: int) -> list[str]:
    """Of so many settings, in their order: dark to light, readable on white and on black."""
    return [to_hex(SHADES(0.12 + 0.72 * i / max(count - 1, 1))) for i in range(count)]


def sweep_curves(
    settings: Sequence[Setting], runs: Runs, metric: str, labels: tuple[str, str], *, named: bool
) -> Draw | None:
    """A metric over the steps: thin lines of single points, a strong one of a setting's mean.

    Args:
        settings: of the sweep.
        runs: their rows of one stage.
        metric: which one.
        labels: of the two axes.
        named: whether there is a legend.
    """
    lines = {i: [series(rows, metric) for rows in runs[i]] for i in runs}
    lines = {i: [line for line in some if len(line[0]) > 1] for i, some in lines.items()}
    lines = {i: some for i, some in lines.items() if some}
    if not lines:
        return None

    def draw(axes: Axes) -> None:
        shades = colours(len(settings))
        for i, some in lines.items():
            for steps, values in some:
                axes.plot(steps, values, color=shades[i], lw=0.6, alpha=0.35)
            steps, mean = mean_line(some)
            shown = smooth(mean) if len(mean) >= 12 else mean
            axes.plot(steps, shown, color=shades[i], lw=1.7, label=shortened(settings[i].name))
        axes.set(xlabel=labels[0], ylabel=labels[1])
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
        if named:
            name_settings(axes, lines)

    return draw


def mean_line(lines: Sequence[tuple[Sequence[int], Sequence[float]]]) -> tuple:
    """(steps, mean over the lines that have each step); NaN where none is finite."""
    at: dict[int, list[float]] = {}
    for steps, values in lines:
        for step, value in zip(steps, values, strict=True):
            at.setdefault(step, []).append(value)
    steps = sorted(at)
    known = [[x for x in at[step] if math.isfinite(x)] for step in steps]
    return np.array(steps), np.array([np.mean(x) if x else math.nan for x in known])


def score_against_kl(settings: Sequence[Setting], runs: Runs, score: str, kl: str) -> Draw | None:
    """A line a setting, from the first step to the last; the last points of its runs as dots."""
    paths: dict[int, list[np.ndarray]] = {}
    for i, some in runs.items():
        for rows in some:
            both = [row for row in rows if score in row and kl in row]
            points = np.array([series(both, kl)[1], series(both, score)[1]]).T  # [N, 2]
            points = points[np.isfinite(points).all(axis=1)] if len(points) else points
            if len(points) > 1:
                paths.setdefault(i, []).append(points)
    if not paths:
        return None

    def draw(axes: Axes) -> None:
        shades = colours(len(settings))
        for i, some in paths.items():
            mean = np.mean([x[: min(map(len, some))] for x in some], axis=0)
            shown = np.array([smooth(x) for x in mean.T]) if len(mean) >= 12 else mean.T
            axes.plot(*shown, color=shades[i], lw=1.7, label=shortened(settings[i].name))
            last = 5 if len(mean) >= 12 else 1  # of a long run without its noise
            ends = np.array([x[-last:].mean(axis=0) for x in some])
            axes.scatter(*ends.T, color=[shades[i]], s=16, lw=0, zorder=3)
        axes.set(xlabel="KL from the reference policy (nats per response)", ylabel="mean score")
        name_settings(axes, paths)

    return draw


def name_settings(axes: Axes, shown: Mapping[int, Any]) -> None:
    """A legend of a few settings; the whole names of more stand in the table."""
    if len(shown) <= MOST_NAMED:
        axes.legend(fontsize=7, handlelength=1.4)


def estimates(settings: Sequence[Setting], metric: str, label: str) -> Draw | None:
    """The mean of a metric for each of the best settings, with its interval and its points."""
    order = ranked(settings, metric)[:MOST_RANKED]
    names = list(varied(settings))
    if not order:
        return None

    def draw(axes: Axes) -> None:
        shades = {id(s): shade for s, shade in zip(settings, colours(len(settings)), strict=True)}
        for at, (setting, estimate) in enumerate(order):
            shade = shades[id(setting)]
            if estimate.low is not None:
                axes.plot([estimate.low, estimate.high], [at, at], color=shade, lw=1.4, alpha=0.6)
            axes.scatter(
                estimate.values, [at] * len(estimate.values), color=[shade], s=7, alpha=0.6
            )
            axes.scatter([estimate.mean], [at], color=[shade], s=30, zorder=3)
        axes.set(xlabel=label, yticks=range(len(order)), ylim=(len(order) - 0.4, -0.6))
        values = [[short_value(s.values.get(name)) for name in names] for s, _ in order]
        axes.set_yticklabels(
            [shortened("  ·  ".join(shortened(x, most=26) for x in row)) for row in values]
        )
        axes.set_ylabel(shortened("  ·  ".join(map(field_name, names))))
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        frame(axes, [e for _, e in order])

    return draw


def frame(axes: Axes, found: Sequence) -> None:
    """Intervals of two seeds may be very wide: the means and the points decide what is shown."""
    values = [x for e in found for x in e.values]
    low, high = min(values), max(values)
    room = max(high - low, 1e-3 * abs(high), 1e-9)
    inner = [(e.low, e.high) for e in found if e.low is not None and e.high - e.low < 4 * room]
    ends = [low, high, *(x for pair in inner for x in pair)]
    axes.set_xlim(min(ends) - 0.06 * room, max(ends) + 0.06 * room)


def heat_map(settings: Sequence[Setting], metric: str, label: str) -> Draw | None:
    """A metric over the two numbers that the sweep varies, where every pair was tried."""
    axes_of = varied(settings)
    whole = len(axes_of) == 2 and len(settings) == math.prod(map(len, axes_of.values()))
    whole = whole and all(axes_of.keys() <= s.values.keys() for s in settings)
    if not whole or min(map(len, axes_of.values())) < 2 or len(settings) < 6:
        return None
    (across, columns), (down, rows) = axes_of.items()
    if len(columns) < len(rows):
        (across, columns), (down, rows) = (down, rows), (across, columns)
    found = {(str(s.values[across]), str(s.values[down])): s.estimate(metric) for s in settings}
    table = [[found[(str(x), str(y))] for x in columns] for y in rows]
    values = np.array([[e.mean if e else math.nan for e in row] for row in table])
    if not np.isfinite(values).any():
        return None

    def draw(axes: Axes) -> None:
        axes.imshow(values, aspect="auto", cmap=SHADES, origin="lower")
        middle = (np.nanmin(values) + np.nanmax(values)) / 2
        for (y, x), value in np.ndenumerate(values):
            text = figure(metric, value) if math.isfinite(value) else "none"
            ink = "#ffffff" if not value > middle else "#101418"
            axes.text(x, y, text, ha="center", va="center", color=ink, fontsize=7.5)
        axes.set(xticks=range(len(columns)), xticklabels=[short_value(x) for x in columns])
        axes.set(yticks=range(len(rows)), yticklabels=[short_value(y) for y in rows])
        axes.set(xlabel=field_name(across), ylabel=field_name(down))
        axes.set_title(label)
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.tick_params(length=0)

    return draw


def parallel_coordinates(settings: Sequence[Setting], metric: str, label: str) -> Draw | None:
    """A line a setting through what it changes, to its metric: for searches of many numbers."""
    names = varied(settings)
    known = [(s, e.mean) for s in settings if (e := s.estimate(metric))]
    if len(names) < 2 or len(known) < 6:
        return None
    scales = [scale([s.values.get(name) for s in settings]) for name in names]
    scales.append(scale([mean for _, mean in known]))

    def draw(axes: Axes) -> None:
        means = np.array([mean for _, mean in known])
        shade = Normalize(means.min(), means.max() if np.ptp(means) else means.min() + 1)
        for setting, mean in sorted(known, key=lambda pair: pair[1]):
            through = [*(setting.values.get(name) for name in names), mean]
            places = [place(x) for x, (place, _) in zip(through, scales, strict=True)]
            axes.plot(places, color=SHADES(0.08 + 0.84 * shade(mean)), lw=1.3, alpha=0.85)
        for at, (_, ticks) in enumerate(scales):
            axes.axvline(at, color=matplotlib.rcParams["text.color"], lw=0.7)
            for height, text in ticks:
                axes.text(at + 0.03, height, text, fontsize=7, va="center")
        axes.set(xticks=range(len(scales)), yticks=[], ylim=(-0.06, 1.06))
        axes.set_xlim(-0.1, len(scales) - 1 + 0.35)
        axes.set_xticklabels([*map(field_name, names), label])
        axes.grid(visible=False)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(length=0)

    return draw


def scale(values: Sequence[Any]):
    """(value -> its place in [0, 1], [(place, text)] of the ticks); logarithmic where positive
    numbers span a factor of 30 or more, one place a value where they are no numbers."""
    numbers = [number(value) for value in values]
    if any(x is None for x in numbers):
        names = list(dict.fromkeys(map(str, values)))
        places = {name: i / max(len(names) - 1, 1) for i, name in enumerate(names)}
        return (lambda value: places[str(value)]), [(place, n[:18]) for n, place in places.items()]
    low, high = min(numbers), max(numbers)
    change = np.log if low > 0 and high / low >= 30 else float
    start, width = change(low), (change(high) - change(low)) or 1.0
    ticks = [low, high]
    if change is np.log:
        inner = range(math.ceil(math.log10(low * 1.3)), math.floor(math.log10(high / 1.3)) + 1)
        ticks += [10.0**k for k in inner]
    else:
        ticks.append((low + high) / 2)

    def place(value) -> float:
        return float((change(value) - start) / width)

    return place, [(place(x), short_value(float(x))) for x in dict.fromkeys(ticks)]
