"""What wandb and trackio are given: by stand-ins with the real signatures, which a test compares
with the packages where they are installed, and by the packages themselves, offline."""

import inspect
import json
import sqlite3
import sys
import types

import jax
import pytest

from ppo_jax.config.run import WRITERS, from_config_dict
from ppo_jax.pipeline import run as pipeline
from ppo_jax.training.metrics import MetricsWriter
from ppo_jax.training.writers import check_writers
from tests.support import tiny_config, tiny_run


class Wandb(types.ModuleType):
    """Takes what `wandb` takes, and keeps it."""

    def __init__(self):
        super().__init__("wandb")
        self.begun, self.lines, self.axes, self.codes, self.fails = [], [], {}, [], set()

    def Settings(self, console, init_timeout, finish_timeout):
        return {"console": console, "seconds": (init_timeout, finish_timeout)}

    def init(
        self,
        project=None,
        dir=None,
        id=None,
        name=None,
        config=None,
        mode=None,
        resume=None,
        settings=None,
    ):
        if mode in self.fails or "init" in self.fails:
            raise RuntimeError("no server")
        self.begun.append(dict(id=id, dir=dir, config=config, mode=mode, resume=resume))
        return self

    def define_metric(self, name, step_metric=None):
        self.axes[name] = step_metric

    def log(self, data, step=None, commit=None):
        if "log" in self.fails:
            raise ConnectionError("gone")
        assert step is None  # wandb drops what is logged at a step that has passed
        self.lines.append(data)

    def finish(self, exit_code=None):
        self.codes.append(exit_code)

    def teardown(self):
        self.codes.append("teardown")


class Trackio(types.ModuleType):
    def __init__(self):
        super().__init__("trackio")
        self.begun, self.lines = [], []

    def init(self, project, name=None, config=None, resume="never", embed=True):
        self.begun.append((name, resume, config))
        return self

    def log(self, metrics, step=None):
        self.lines.append((step, metrics))

    def finish(self):
        self.lines.append("end")


@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Wandb())
    return sys.modules["wandb"]


@pytest.fixture
def trackio(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", Trackio())
    return sys.modules["trackio"]


def written(workdir, stage, steps, *writers, restored=None):
    """A start of a stage."""
    writer = MetricsWriter(workdir, stage, total_steps=5, restored_step=restored, writers=writers)
    for step in steps:
        writer.write(step, {"kl/ref": step / 2, "x/absent": float("nan")})
    writer.close()


def without_times(line):
    return {name: x for name, x in line.items() if "/time/" not in name}


def test_all_stages_and_starts_of_a_folder_are_one_run_of_wandb(tmp_path, wandb):
    (tmp_path / "config.json").write_text(json.dumps({"config": {"seed": 3}}))
    written(tmp_path, "sft", [1], "wandb")
    written(tmp_path, "ppo", [0, 1, 2], "wandb")
    written(tmp_path, "ppo", [2, 3], "wandb", restored=1)
    assert len({run["id"] for run in wandb.begun}) == 1 and len(wandb.begun) == 3
    settings = {"dir": str(tmp_path), "config": {"seed": 3}, "mode": None, "resume": "allow"}
    assert all(run == settings | {"id": run["id"]} for run in wandb.begun)
    assert [without_times(line) for line in wandb.lines] == [
        {"kl/ref": 0.5, "sft/step": 1},
        *({"kl/ref": step / 2, "ppo/step": step} for step in (0, 1, 2, 2, 3)),
    ]
    assert wandb.axes["kl/ref"] == "ppo/step" and wandb.axes["sft/time/step_s"] == "sft/step"
    assert wandb.codes == [0, 0, 0] and not (tmp_path / "tensorboard").exists()
    (tmp_path / "other").mkdir()
    written(tmp_path / "other", "sft", [1], "wandb")
    assert wandb.begun[3]["id"] != wandb.begun[0]["id"]


def test_a_run_that_fails_is_a_failed_run_of_wandb(tmp_path, wandb):
    MetricsWriter(tmp_path, "sft", total_steps=1, writers=["wandb"]).abandon()
    assert wandb.codes == [1]


def test_without_its_server_wandb_writes_to_the_folder(tmp_path, wandb, capsys):
    wandb.fails = {None}  # the mode of the first call
    written(tmp_path, "sft", [1], "wandb")
    assert [run["mode"] for run in wandb.begun] == ["offline"] and len(wandb.lines) == 1
    assert wandb.codes[0] == "teardown"
    told = capsys.readouterr().out
    assert f"sft: wandb is offline (RuntimeError: no server): its run is kept in {tmp_path}" in told


@pytest.mark.parametrize("where", ["init", "log"])
def test_a_writer_that_fails_is_told_once_and_ends_nothing(tmp_path, wandb, capsys, where):
    wandb.fails = {where}
    written(tmp_path, "sft", [1, 2, 3], "wandb", "tensorboard")
    assert capsys.readouterr().out.count("sft: wandb failed (") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert list((tmp_path / "tensorboard" / "sft").iterdir())


def test_all_stages_and_starts_of_a_folder_are_one_run_of_trackio(tmp_path, trackio):
    written(tmp_path, "sft", [1], "trackio")
    written(tmp_path, "ppo", [1], "trackio", restored=0)
    [(name, resume, config)] = {x[:2] + (str(x[2]),) for x in trackio.begun}
    assert name.startswith(f"{tmp_path.name}-") and (resume, config) == ("allow", "{}")
    (step, first), end, (_, second), _ = trackio.lines
    assert (step, without_times(first), end) == (1, {"kl/ref": 0.5}, "end")
    assert "sft/time/step_s" in first and "ppo/time/step_s" in second


def test_process_0_alone_writes(tmp_path, wandb, trackio, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    written(tmp_path, "sft", [1, 2], *WRITERS)
    assert not wandb.begun and not trackio.begun and not list(tmp_path.iterdir())


def test_unknown_writers_are_refused():
    message = r"writers must be any of \['tensorboard', 'wandb', 'trackio'\], each once, got "
    for names in (["mlflow"], ["wandb", "wandb"]):
        with pytest.raises(ValueError, match=message):
            from_config_dict(tiny_config.changed({"writers": names}))
    assert from_config_dict(tiny_config.changed({"writers": []})).writers == ()


def test_a_missing_package_ends_a_run_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    message = r"^writers has 'wandb', but .* not installed: pip install 'ppo_jax\[wandb\]', or "
    with pytest.raises(ValueError, match=message):
        pipeline.run(tiny_run.config() | {"writers": ["tensorboard", "wandb"]}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_runs_is_not_taken_for_the_package(tmp_path, monkeypatch):
    (tmp_path / "trackio").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    with pytest.raises(ValueError, match="the package trackio is not installed"):
        check_writers(["trackio"])
    sys.modules.pop("trackio", None)


# --- the packages themselves ----------------------------------------------------------------------


def parameters(function):
    return set(inspect.signature(function).parameters)


def test_the_stand_in_of_wandb_takes_what_wandb_takes(tmp_path, monkeypatch):
    real, fake = pytest.importorskip("wandb"), Wandb()
    pairs = [(real.init, fake.init), (real.teardown, fake.teardown)]
    names = ("log", "finish", "define_metric")
    pairs += [(getattr(real.sdk.wandb_run.Run, name), getattr(fake, name)) for name in names]
    for theirs, ours in pairs:
        assert parameters(ours) <= parameters(theirs)
    assert parameters(fake.Settings) <= set(real.Settings.model_fields)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for restored in (None, 1):
        written(tmp_path, "ppo", [1, 2], "wandb", restored=restored)
    name = json.loads((tmp_path / "writers.json").read_text())["wandb"]
    assert list((tmp_path / "wandb").glob(f"offline-run-*-{name}"))


def test_trackio_keeps_the_steps_of_both_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    real, fake = pytest.importorskip("trackio"), Trackio()
    pairs = [(real.init, fake.init), (real.finish, fake.finish), (real.Run.log, fake.log)]
    for theirs, ours in pairs:
        assert parameters(ours) <= parameters(theirs)
    for restored in (None, 1):
        written(tmp_path, "ppo", [1, 2], "trackio", restored=restored)
    with sqlite3.connect(tmp_path / "trackio" / "ppo_jax.db") as database:
        rows = database.execute("select run_name, step from metrics").fetchall()
    [name] = {name for name, _ in rows}
    assert json.loads((tmp_path / "writers.json").read_text()) == {"trackio": name}
    assert [step for _, step in rows] == [1, 2, 1, 2]
