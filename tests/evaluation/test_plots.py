"""The labels of both ends of a trajectory are inside the axes, apart, and beside their points."""

import math

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from ppo_jax.evaluation.report import plots, report

RADIUS = 2.5  # points: of a drawn point


def run_of(kl, score):
    rows = zip(kl, score, strict=True)
    return [{"step": i, "kl/ref": k, "reward/score_mean": s} for i, (k, s) in enumerate(rows, 1)]


def noisy(count, seed=0):
    """Score rises with KL, as in a run that goes well."""
    rng, t = np.random.default_rng(seed), np.linspace(0, 1, count)
    kl = 12 * t + 0.5 * rng.normal(size=count)
    return run_of(kl, 2 * np.sqrt(t) + 0.3 * rng.normal(size=count))


def cloud(count):
    return run_of(*np.random.default_rng(1).uniform(size=(2, count)))


RUNS = {
    "two points": run_of([0, 5], [0, 1]),
    "two points at the same place": run_of([1, 1], [2, 2]),
    "a level line": run_of(range(9), [0.5] * 9),
    "a column": run_of([3] * 9, range(9)),
    "falling": run_of(range(25), range(25, 0, -1)),
    "back to where it began": run_of([0, 4, 0.1], [0, 1, 0.02]),
    "few": noisy(8),
    "a smoothed line": noisy(25),
    "a smoothed line where no point is": run_of([0] + [3, -3] * 20, [0, *np.linspace(-9, 9, 40)]),
    "many": noisy(200),
    "a cloud": cloud(400),
    "gaps": run_of([None, 0, 1, None, 2], [1, 0, 1, 2, float("inf")]),
}


def drawn(rows, size):
    """(the axes, the labels, the box of each in pixels) of a figure with its score against KL."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    plots.trajectory(rows)(axes)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [Text.get_window_extent(text, canvas.get_renderer()) for text in axes.texts]
    return axes, list(axes.texts), boxes


def gap(box, points):
    """The distance of the nearest of some points [N, 2] from a box; 0 is inside."""
    outside = np.maximum(np.maximum(box.min - points, points - box.max), 0)
    return np.hypot(*outside.T).min(initial=math.inf)


def is_known(row):
    return all(value is not None and math.isfinite(value) for value in row.values())


@pytest.mark.parametrize("size", [report.WIDE, (4.2, 2.7)])
@pytest.mark.parametrize("run", RUNS)
def test_the_labels_of_both_ends_are_inside_the_axes_and_do_not_overlap(run, size):
    axes, labels, boxes = drawn(RUNS[run], size)
    known = [row["step"] for row in RUNS[run] if is_known(row)]
    assert [text.get_text() for text in labels] == [f"iteration {known[i]}" for i in (0, -1)]
    assert len(axes.collections[0].get_offsets()) == len(known)
    for box in boxes:
        assert (axes.bbox.min <= box.min).all() and (box.max <= axes.bbox.max).all()
    assert not boxes[0].overlaps(boxes[1])


@pytest.mark.parametrize("run", RUNS)
def test_a_label_is_beside_its_point_and_does_not_cover_it(run):
    axes, labels, boxes = drawn(RUNS[run], report.WIDE)
    for text, box in zip(labels, boxes, strict=True):
        point = axes.transData.transform(text.xy)[None]
        assert RADIUS < gap(box, point) * 72 / axes.figure.dpi < 12


def test_a_run_without_two_points_has_no_trajectory():
    for rows in ([], RUNS["two points"][:1], run_of([None, 1.0], [1.0, 2.0])):
        assert plots.trajectory(rows) is None
