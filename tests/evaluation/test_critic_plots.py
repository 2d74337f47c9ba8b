"""What the figures of the critic show, and of which iterations."""

import numpy as np
from matplotlib.figure import Figure

from ppo_jax.evaluation.report import critic_plots


def rows_of(count):
    """In iteration i every metric of part n is i + 10 n, and that of the returns 0.5 more."""
    return [
        {"stage": "ppo", "step": i}
        | {name: i + 10.0 * n for n, name in enumerate(critic_plots.QUARTERS)}
        | {name: i + 10.0 * n for n, name in enumerate(critic_plots.FIFTHS[0])}
        | {name: i + 10.0 * n + 0.5 for n, name in enumerate(critic_plots.FIFTHS[1])}
        for i in range(1, count + 1)
    ]


def lines(draw):
    axes = Figure().subplots()
    draw(axes)
    return {x.get_label(): x.get_xydata() for x in axes.lines if x.get_label()[0] != "_"}


def test_the_first_and_the_last_tenth_of_the_iterations_are_shown():
    drawn = lines(critic_plots.by_position(rows_of(30)))
    assert list(drawn) == ["iterations 1 to 3", "iterations 28 to 30"]
    first, last = drawn.values()
    np.testing.assert_allclose(first, [[1, 2], [2, 12], [3, 22], [4, 32]])
    np.testing.assert_allclose(last - first, [[0, 27]] * 4)
    drawn = lines(critic_plots.calibration(rows_of(2)))
    assert list(drawn) == ["iteration 1", "iteration 2"]
    expected = [[1 + 10 * n, 1.5 + 10 * n] for n in range(5)]
    np.testing.assert_allclose(drawn["iteration 1"], expected)
    assert list(lines(critic_plots.calibration(rows_of(1)))) == ["iteration 1"]


def test_iterations_without_all_the_metrics_are_left_out():
    rows = rows_of(4)
    rows[0]["value/mean_fifth5"] = None  # fewer than five tokens
    del rows[3][critic_plots.QUARTERS[0]], rows[3][critic_plots.FIFTHS[1][2]]
    assert list(lines(critic_plots.by_position(rows))) == ["iteration 1", "iteration 3"]
    assert list(lines(critic_plots.calibration(rows))) == ["iteration 2", "iteration 3"]
    assert critic_plots.by_position([{"stage": "ppo", "step": 1}]) is None
    assert critic_plots.calibration([]) is None
