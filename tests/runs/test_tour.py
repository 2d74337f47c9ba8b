"""experiments/tour.ipynb runs from its first cell to its last, and what it trains gets better."""

import contextlib
import io
import json
import re

import matplotlib
import pytest

import ppo_jax
from tests.support.command_line import ROOT

CELLS = json.loads((ROOT / "experiments" / "tour.ipynb").read_text())["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_the_tour_is_ten_cells_without_outputs():
    assert len(CODE) == 10
    assert not [cell for cell in CELLS if cell.get("outputs") or cell.get("execution_count")]


def test_the_tour_takes_only_what_is_public():
    names = {name for code in CODE for name in re.findall(r"ppo_jax\.(\w+)", code)}
    assert len(names) > 15 and names <= set(ppo_jax.__all__)


@pytest.fixture
def without_a_screen():
    backend = matplotlib.get_backend()
    matplotlib.use("agg")
    yield
    matplotlib.pyplot.close("all")
    matplotlib.use(backend)


def test_the_tour_runs_and_its_policy_gets_better(without_a_screen):
    names = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for number, code in enumerate(CODE, start=1):
            exec(compile(code, f"experiments/tour.ipynb, cell {number}", "exec"), names)
    scores = [float(metrics["reward/score_mean"]) for metrics in names["history"]]
    assert scores[0] < 4.5 and scores[-1] > scores[0] + 1
    assert [ax.get_title() for ax in names["axes"]] == ["reward/score_mean", "kl/ref"]
    assert all(len(ax.lines[0].get_xdata()) == 41 for ax in names["axes"])
