"""Proposed points go on where they were left, whichever process they came from."""

import json
import sys

import pytest

from ppo_jax.config.points import Interval, parse_grid
from ppo_jax.pipeline import search as search_module
from ppo_jax.pipeline.search import Search, corners
from ppo_jax.pipeline.shared_stages import Work
from ppo_jax.pipeline.sweep import Task

GRID = "ppo.optimizer.learning_rate=log(1e-5,1e-1); ppo.num_epochs=uniform(1,4); ppo.lora.rank=4,8"


@pytest.fixture
def optuna():
    return pytest.importorskip("optuna", reason="needs pip install 'ppo_jax[optimize]'")


def plan(workdir):
    def one(point):
        name = "_".join(map(str, point.values()))
        if point["ppo.lora.rank"] == 8 and point["ppo.num_epochs"] == 4:
            raise ValueError("not together")
        folder = workdir / name
        return Work(name=name, folder=folder, settings={}, stages=(), point=point)

    return one


def search(workdir, trials=8, **options):
    options = {"metric": "a/score", "direction": "maximize", "seed": 0} | options
    return Search(parse_grid(GRID), trials=trials, workdir=workdir, plan=plan(workdir), **options)


def end(found, work, value, state="complete"):
    work.folder.mkdir(exist_ok=True)
    (work.folder / "results.json").write_text(json.dumps({"a/score": value, "a/other": 1.0}))
    found.tell(Task(work, state=state))


def run(found, score):
    points = []
    while (work := found.ask()) is not None:
        points.append(work.point)
        end(found, work, score(work.point))
    return points


def test_points_are_of_the_grid_repeatable_and_better_in_the_end(tmp_path, optuna):
    def score(point):
        return -abs(point["ppo.optimizer.learning_rate"] - 1e-2)

    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
    points = run(search(tmp_path / "a", 14), score)
    assert points == run(search(tmp_path / "b", 14), score)
    axes = {axis.name: axis.values for axis in parse_grid(GRID)}
    for point in points:
        for name, value in point.items():
            values = axes[name]
            is_interval = isinstance(values, Interval)
            assert values.low <= value <= values.high if is_interval else value in values
        assert (type(point["ppo.num_epochs"]), type(point["ppo.lora.rank"])) == (int, int)
    assert 10 < len(points) <= 14  # what is not allowed together counts as a trial
    assert max(map(score, points)) > -0.005
    found = search(tmp_path / "a", 14)
    assert found.finished() == 14 and found.ask() is None
    best = max(points, key=score)
    assert str(best["ppo.optimizer.learning_rate"]) in found.best()


def test_a_trial_of_a_dead_process_is_taken_over_and_one_of_a_living_is_not(
    tmp_path, optuna, monkeypatch
):
    first, second = search(tmp_path), search(tmp_path)
    left = first.ask()
    monkeypatch.setattr(search_module, "in_use", lambda folder: "process 1")
    other = second.ask()
    assert other.point != left.point
    monkeypatch.setattr(search_module, "in_use", lambda folder: "")
    taken = search(tmp_path, 2)
    again = [taken.ask().point, taken.ask().point]
    assert again == [left.point, other.point] and taken.ask() is None
    for found, work in ((taken, left), (first, left), (second, other)):
        end(found, work, 0.5)  # told twice, by the living and by who thought it dead
    assert taken.finished() == 2


def test_what_failed_is_a_trial_without_a_value(tmp_path, optuna):
    found = search(tmp_path, 2, direction="minimize")
    end(found, found.ask(), 0.1, "failed")
    assert found.best() == ""
    end(found, found.ask(), 0.7)
    assert found.ask() is None and found.best().endswith("0.7")


def test_another_metric_or_search_is_refused(tmp_path, optuna):
    found = search(tmp_path, metric="a/none")
    work = found.ask()
    with pytest.raises(ValueError, match="has no metric 'a/none'; it has, for instance, a/"):
        end(found, work, 0.5)
    found = search(tmp_path)  # nothing was told yet: the right metric begins anew
    assert (again := found.ask()).folder == work.folder
    end(found, again, 0.5)
    with pytest.raises(ValueError, match="of a search with another metric .its metric is a/score"):
        search(tmp_path, metric="a/none")


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match=r"--optimize needs optuna: pip install 'ppo_jax\[opt"):
        search(tmp_path)


def test_the_corners_have_every_end_and_every_value():
    points = corners(parse_grid("ppo.kl_coef=log(0.1,1); seed=3,4,5"))
    assert [tuple(point.values()) for point in points] == [(0.1, 3), (1.0, 4), (1.0, 5)]
