"""Sweeps of real runs: killed and started again, by two processes at a time, by two as one."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import pytest

from ppo_jax.config.run import with_defaults
from ppo_jax.pipeline import run as pipeline
from ppo_jax.pipeline import study, sweep
from ppo_jax.pipeline.export import export_stage
from tests.support import tiny_run, two_processes, xla_flags
from tests.support.command_line import ROOT, run_script
from tests.support.finished_run import read_lines

pytestmark = pytest.mark.slow
POINTS = [{"ppo.kl_coef": 0.0}, {"ppo.kl_coef": 0.5}]
GRID = "--grid=ppo.kl_coef=0,0.5"
PATIENCE = 240
WAITS = "PPO_JAX_TEST_WAITS_AT"


def letters_or_wait(prompts, responses):
    """A reward function that waits for a kill as soon as the file is there that WAITS names."""
    while os.path.exists(os.environ.get(WAITS, "")):
        time.sleep(0.05)
    return tiny_run.letters(prompts, responses)


def settings(**ppo):
    """A short SFT, and PPO with a function: what the points share, and what they do not."""
    values = tiny_run.config()
    values = {name: values[name] for name in ("prepare", "model", "sft", "ppo")}
    values["sft"] |= {"num_epochs": 0.5, "eval_every": 9}
    values["ppo"] |= {"reward_model": "", "reward_function": f"{__name__}:letters_or_wait"}
    values["ppo"] |= {"num_iterations": 6, "save_every": 2, "kl_control": "fixed"} | ppo
    return with_defaults(values).to_dict()


def judged():
    """The same, with an evaluation behind PPO."""
    return settings() | {"evaluate": with_defaults(tiny_run.config()).evaluate.to_dict()}


def write_config(folder, of="settings"):
    path = folder / "config.py"
    path.write_text(
        "from ppo_jax.config import with_defaults\n"
        f"from {__name__} import {of}\n\n"
        f"def get_config():\n    return with_defaults({of}())\n"
    )
    return path


def start_and_kill(command, saved, holder):
    """Start a sweep, and kill it and the process that holds a folder when that has saved."""
    process = subprocess.Popen(command, env=os.environ | {WAITS: str(saved)})
    try:
        end = time.monotonic() + PATIENCE
        while not saved.exists():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        os.kill(json.loads((holder / ".lock").read_text())["process"], signal.SIGKILL)
    finally:
        process.kill()
        process.wait()


def table(workdir):
    """sweep.json without what the clock says, and without the place of the sweep."""
    rows = json.loads((workdir / "sweep.json").read_text())
    for row in rows:
        row["workdir"] = pathlib.Path(row["workdir"]).relative_to(workdir)
        row["metrics"] = {k: v for k, v in row["metrics"].items() if not k.startswith("time/")}
    return rows


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sweep that nobody interrupts, in this process; nothing may be changed in it."""
    folder = tmp_path_factory.mktemp("whole") / "sweep"
    works = study.plan_sweep(settings(), POINTS, folder, 1)
    assert sweep.run_together(works, folder) == []
    return folder


@pytest.fixture
def as_children(monkeypatch):
    """Processes of a test have one device, and the programs of this one's cache."""
    cache = str(jax.config.jax_compilation_cache_dir)
    monkeypatch.setenv("XLA_FLAGS", xla_flags.with_devices(1))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", cache)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


# A save that the kill cut short is told by whoever looks at the folder next.
@pytest.mark.filterwarnings("ignore:passed over")
def test_a_sweep_that_is_killed_and_goes_on_in_two_processes_has_the_same_table(
    whole, tmp_path, as_children
):
    flags = [f"--config={write_config(tmp_path)}", f"--workdir={tmp_path}/sweep", GRID]
    command = [sys.executable, str(ROOT / "experiments" / "sweep.py"), *flags]
    folder = tmp_path / "sweep"
    first, second = folder / "kl_coef=0", folder / "kl_coef=0.5"
    saved = first / "ppo" / "checkpoints" / "2" / "checksums.json"
    start_and_kill(command, saved, first)
    assert not (folder / "sweep.json").exists()

    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        ended = run_script("sweep", *flags)
        output, _ = other.communicate(timeout=PATIENCE)
    assert (ended.code, other.returncode) == (0, 0), (ended, output)
    assert table(folder) == table(whole)
    assert f"table: {folder}/sweep.csv" in output
    logs = {path.parent.name: path.read_text() for path in folder.rglob("log.txt")}
    (shared,) = (log for name, log in logs.items() if name.startswith("sft-"))
    assert shared.count("sft: compiling") == 1  # made once, and for both
    assert logs[first.name].count("ppo: resuming after step") == 1
    assert logs[second.name].count("ppo: compiling") == 1
    for name in (first.name, second.name):
        lines = [read_lines(x / name / "metrics.jsonl") for x in (folder, whole)]
        assert lines[0] == lines[1]


# A save that the kill cut short is told by whoever looks at the folder next.
@pytest.mark.filterwarnings("ignore:passed over")
def test_lanes_that_are_killed_while_they_save_go_on_as_one_and_are_judged_in_one_process(
    whole, tmp_path, as_children
):
    flags = [f"--config={write_config(tmp_path, 'judged')}", f"--workdir={tmp_path}/sweep", GRID]
    flags.append("--vectorize")
    command = [sys.executable, str(ROOT / "experiments" / "sweep.py"), *flags]
    folder = tmp_path / "sweep"
    points = [folder / "kl_coef=0", folder / "kl_coef=0.5"]
    saved = points[0] / "ppo" / "checkpoints" / "2" / "checksums.json"
    start_and_kill(command, saved, points[0])  # the second lane may have step 2, or not
    ended = run_script("sweep", *flags)
    assert ended.code == 0, ended
    assert "2/2  kl_coef=0.5  complete  " in ended.out
    assert not any((point / "log.txt").exists() for point in points)  # no process of their own
    (log,) = [path.read_text() for path in folder.glob("shared/lanes-*/log.txt")]
    assert log.count("2 as one program") == 2
    assert log.count("responses of ppo") == 2 and log.count("report: ") == 2
    for row, alone in zip(table(folder), table(whole), strict=True):
        assert row["status"] == "complete" and "policy/kl_per_response" in row["metrics"]
        for name, value in alone["metrics"].items():
            assert row["metrics"][name] == pytest.approx(value, rel=2e-3, abs=2e-4), name


def test_a_point_is_an_ordinary_run(whole, tmp_path, capsys):
    point = whole / "kl_coef=0.5"
    assert os.readlink(point / "sft") == os.readlink(whole / "kl_coef=0" / "sft")
    assert {row["stage"] for row in read_lines(point / "metrics.jsonl")} == {"sft", "ppo"}
    assert "Supervised fine-tuning" in (point / "report.html").read_text()
    rows = table(whole)
    assert [row["point"] for row in rows] == POINTS
    assert all("sft/validation_loss" in row["metrics"] for row in rows)
    assert rows[0]["metrics"]["kl/coef"] == 0.0 and rows[1]["metrics"]["kl/coef"] == 0.5
    for stage in ("sft", "ppo"):
        export_stage(point, stage, tmp_path / stage)
    works = study.plan_sweep(settings(), POINTS, whole, 1)
    pipeline.run(works[1].settings, point)
    assert "every stage is complete: nothing to do" in capsys.readouterr().out
    shown = sweep.preview(works, whole)
    assert shown.startswith("2 points, 3 shared parts") and shown.count("complete") == 5
    assert sweep.preview([], whole).startswith("0 points, 0 shared parts")  # an empty shard
    more = [*POINTS, {"ppo.kl_coef": 1.0}, {"sft.batch_size": 4}]
    shown = sweep.preview(study.plan_sweep(settings(), more, whole, 1), whole).splitlines()
    assert shown[0].startswith("4 points, 4 shared parts")
    assert [line.split("  ")[-1].strip() for line in shown[-2:]] == ["not begun"] * 2
    assert sum("of 3 points  complete" in line for line in shown) == 1  # SFT, not that of the last


def together(folder):
    """Two points, in all processes."""
    sys.modules.pop("torch")  # `two_processes` leaves it out, which SciPy does not like
    values = settings(init_from="base", num_iterations=1, num_samples=0)
    works = study.plan_sweep(values | {"sft": None}, POINTS, folder / "sweep", 2)
    assert sweep.run_together(works, folder / "sweep") == []


def test_two_processes_run_the_points_together(tmp_path):
    start = two_processes.start(f"{__name__}:together", tmp_path, num_devices=2)
    ended = two_processes.finish(start)
    assert [code for code, _ in ended] == [0, 0], ended
    assert ["2/2  kl_coef=0.5  complete in" in output for _, output in ended] == [True, False]
    rows = table(tmp_path / "sweep")
    assert (tmp_path / "sweep" / "sweep.html").exists()
    assert [(row["point"], row["status"]) for row in rows] == [(x, "complete") for x in POINTS]
    scores = [row["metrics"]["reward/score_mean"] for row in rows]
    assert scores[0] == scores[1]  # of the first rollout, from the same model


def as_lanes(folder):
    """The same points as one program of all processes, a lane a device."""
    sys.modules.pop("torch")
    values = settings(init_from="base", num_iterations=2, save_every=1, num_samples=1)
    works = study.plan_sweep(values | {"sft": None}, POINTS, folder / "sweep", 2)
    groups = study.lane_groups(works, folder / "sweep")
    assert [[lane.name for lane in group.lanes] for group in groups] == [[x.name for x in works]]
    assert sweep.run_together(works, folder / "sweep", groups) == []


def test_two_processes_train_the_points_as_one_program(tmp_path):
    start = two_processes.start(f"{__name__}:as_lanes", tmp_path, num_devices=2)
    ended = two_processes.finish(start)
    assert [code for code, _ in ended] == [0, 0], ended
    assert "2 as one program, which differ in kl_coef" in ended[0][1]
    rows = table(tmp_path / "sweep")
    assert [(row["point"], row["status"]) for row in rows] == [(x, "complete") for x in POINTS]
    coefs = [row["metrics"]["kl/coef"] for row in rows]
    assert coefs == [0.0, 0.5]
    for name in ("kl_coef=0", "kl_coef=0.5"):
        point = tmp_path / "sweep" / name
        lines = [row for row in read_lines(point / "metrics.jsonl") if row["stage"] == "ppo"]
        assert [row["step"] for row in lines] == [1, 2]
        export_stage(point, "ppo", tmp_path / name)
