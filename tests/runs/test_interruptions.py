"""Killed or stopped at any moment and started again, a run is the same run, bit for bit."""

import contextlib
import json
import shutil
import signal
import time

import pytest

from ppo_jax.config.parsing import FunctionFailed
from ppo_jax.evaluation import evaluate as evaluate_module
from ppo_jax.io.checkpoints import load_checkpoint_item
from ppo_jax.io.run_folder import drop_lines_after, read_results
from ppo_jax.pipeline import run as pipeline
from ppo_jax.training import common as training
from ppo_jax.training import sft as sft_loop
from ppo_jax.training import stage as stage_module
from ppo_jax.training.stage import StageRun
from tests.support import tiny_run
from tests.support.finished_run import TRAINED, assert_same_bits, finished_run, read_lines

PATIENCE = 240  # seconds for a process to reach its fourth step on a busy machine
THIRD = "checkpoints/3"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return finished_run(tmp_path_factory)


# --- killed and stopped ---------------------------------------------------------------------------


def wait_for(process, ready):
    end = time.monotonic() + PATIENCE
    while not ready():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, "the process did not reach its fourth step"
        time.sleep(0.02)


def interrupt(settings, workdir, stage, number):
    """Start the run, send a signal after the checkpoint of step 3 of a stage; (code, output)."""
    stalled = workdir / tiny_run.STALLED
    stalled.unlink(missing_ok=True)
    process = tiny_run.start(settings, workdir, stall=stage)
    wait_for(process, lambda: stalled.exists() and (workdir / stage / THIRD).is_dir())
    process.send_signal(number)
    output, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, output


@pytest.mark.slow
def test_a_run_killed_and_stopped_in_every_stage_is_the_uninterrupted_run(workdir, tmp_path):
    """SIGKILL in each stage, SIGINT and SIGTERM in one each, and the last comes to its end."""
    settings, folder = tiny_run.config(), tmp_path / "run"
    code, _ = interrupt(settings, folder, "sft", signal.SIGKILL)
    assert code == -signal.SIGKILL
    code, output = interrupt(settings, folder, "sft", signal.SIGINT)
    assert code == 130 and "sft: stopped by SIGINT, step 5 is saved" in output
    assert "sft: stopping when the optimizer step at hand is finished and saved" in output
    assert output.index("\nsft 5/6  ") < output.index("sft: stopped by SIGINT")
    assert "Traceback" not in output
    code, output = interrupt(settings, folder, "reward", signal.SIGKILL)
    assert code == -signal.SIGKILL and "sft: resuming after step 5" in output
    code, output = interrupt(settings, folder, "ppo", signal.SIGKILL)
    assert code == -signal.SIGKILL and "reward: resuming after step 3" in output
    # A kill can tear the line that was being written.
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"stage": "ppo", "st')
    code, output = interrupt(settings, folder, "ppo", signal.SIGTERM)
    assert code == 143 and "ppo: resuming after step 3" in output
    assert "ppo: stopped by SIGTERM, step 5 is saved" in output
    output, _ = tiny_run.start(settings, folder).communicate(timeout=PATIENCE)
    assert "ppo: resuming after step 5" in output and "sft: complete" in output

    for stage, names in TRAINED.items():
        for name in names:
            a, b = (
                load_checkpoint_item(w / stage / "checkpoints", name, step=6)
                for w in (workdir, folder)
            )
            assert_same_bits(a, b)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert read_lines(folder / name) == read_lines(workdir / name)
    verdicts = [json.loads((w / "results.json").read_text()) for w in (workdir, folder)]
    verdicts = [{k: v for k, v in x.items() if not k.startswith("time/")} for x in verdicts]
    assert verdicts[0] == verdicts[1]


def test_a_checkpoint_that_was_being_written_is_passed_over_by_name(workdir, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(workdir, folder)
    checkpoints = folder / "sft" / "checkpoints"
    # As after a kill while step 6 was being written, and before any later stage began.
    (checkpoints / "6").rename(checkpoints / "6.orbax-checkpoint-tmp-1")
    for stage in ("reward", "ppo"):
        shutil.rmtree(folder / stage)
        drop_lines_after(folder / "metrics.jsonl", stage, None)
    with pytest.warns(UserWarning, match="passed over .*6.orbax-checkpoint-tmp-1"):
        pipeline.run(tiny_run.config(), folder, only=("sft",))
    names = [load_checkpoint_item(x / "sft" / "checkpoints", "params") for x in (workdir, folder)]
    assert_same_bits(*names)
    sft = [row for row in read_lines(workdir / "metrics.jsonl") if row["stage"] == "sft"]
    assert read_lines(folder / "metrics.jsonl") == sft


def test_a_loss_that_is_no_number_stops_the_run_with_its_step(workdir, tmp_path):
    values = tiny_run.config()
    values["model"] = {"path": str(workdir / "base")}
    values = {name: values[name] for name in ("model", "sft")}
    for name in ("data", "validation_data"):
        values["sft"][name] = values["sft"][name].replace("{workdir}", str(workdir))
    values["sft"] |= {"save_every": 1, "optimizer": tiny_run.optimizer(learning_rate=1e30)}
    with pytest.raises(FloatingPointError, match=r"sft/.*loss is .* at step 2; last checkpoint 1"):
        pipeline.run(values, tmp_path)
    assert [path.name for path in (tmp_path / "sft" / "checkpoints").iterdir()] == ["1"]
    assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")] == [0, 1, 2]


def test_a_stage_whose_folder_is_removed_says_so_and_does_not_make_it_again(
    workdir, tmp_path, monkeypatch
):
    end_step = StageRun.end_step

    def removed(self, step, *rest):
        if step == 2:
            shutil.rmtree(self.folder)
        end_step(self, step, *rest)

    monkeypatch.setattr(StageRun, "end_step", removed)
    with pytest.raises(FileNotFoundError, match="/sft was removed while the stage was under way$"):
        pipeline.run(tiny_run.on_base(workdir, sft={}), tmp_path)
    assert not (tmp_path / "sft").exists()


def test_a_validation_is_not_booked_on_the_step_before(workdir, tmp_path, monkeypatch):
    """The steps before it are logged, with their times, when it begins."""
    logged, row_batches = [], sft_loop.row_batches

    def begin_validation(*args):
        path = tmp_path / "metrics.jsonl"
        logged.append(len(read_lines(path)) if path.exists() else 0)
        return row_batches(*args)

    monkeypatch.setattr(sft_loop, "row_batches", begin_validation)
    pipeline.run(tiny_run.on_base(workdir, sft={}), tmp_path)
    assert logged == [0, 2, 4, 6]  # step 0 has a line of its own


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_less_than_an_epoch_runs_the_frozen_layers_on_the_texts_that_it_takes(
    workdir, tmp_path, monkeypatch, stage
):
    rows, make_inputs = [], training.make_inputs

    def record(texts, **parts):
        rows.append(parts.get("used"))
        return make_inputs(texts, **parts)

    monkeypatch.setattr(training, "make_inputs", record)
    changes = {"num_epochs": 0.1} | ({"init_from": "base"} if stage == "reward" else {})
    pipeline.run(tiny_run.on_base(workdir, **{stage: changes}), tmp_path)
    assert len(rows[0]) == 8 and all(used is None for used in rows[1:])  # a batch of 48 texts


def test_a_start_that_is_killed_leaves_its_seconds(workdir, tmp_path, monkeypatch):
    """A step that ends without the end of the stage, as in a process that is gone."""
    monkeypatch.setattr(stage_module, "KEEP_TIME_S", 0)
    values = tiny_run.on_base(workdir, sft={"save_every": 1})
    seconds = [0.0]
    for step in (3, 5, 6):  # two starts that are killed after a step, and one that is not
        with monkeypatch.context() as patch:
            if step < 6:
                patch.setattr(pipeline, "timed", lambda *_: contextlib.nullcontext())
            end_step = StageRun.end_step

            def killed_at(self, number, *rest, end_step=end_step, last=step):
                end_step(self, number, *rest)
                if number == last < 6:
                    raise InterruptedError

            patch.setattr(StageRun, "end_step", killed_at)
            with contextlib.suppress(InterruptedError):
                pipeline.run(values, tmp_path)
        seconds.append(read_results(tmp_path)["time/sft_s"])
    assert seconds == sorted(set(seconds))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert seconds[-1] >= sum(row.get("time/step_s", 0.0) for row in rows)


# --- the evaluation -------------------------------------------------------------------------------


FAILURES = (FunctionFailed, ZeroDivisionError)  # of a user's code, of our own


def test_what_was_found_before_a_judge_fails_is_kept(workdir, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(workdir, folder)
    whole = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text("{}")  # not evaluated yet
    names = {"judges": (tiny_run, "judges"), "samples": (evaluate_module, "side_by_side")}
    found = []
    for where in names.values():
        with monkeypatch.context() as patch, pytest.raises(FAILURES):
            patch.setattr(*where, lambda *_: 1 / 0)
            pipeline.run(tiny_run.config(), folder)
        found.append(json.loads((folder / "results.json").read_text()))
    for name in ("policy/kl_per_response", "text/distinct2_ratio"):
        assert [results[name] for results in found] == [whole[name]] * 2
    assert ["judges" in results for results in found] == [False, True]
    assert not any("evaluated" in results or "samples" in results for results in found)
    pipeline.run(tiny_run.config(), folder)
    results = json.loads((folder / "results.json").read_text())
    without_times = [{k: v for k, v in x.items() if "time/" not in k} for x in (whole, results)]
    assert without_times[0] == without_times[1]
