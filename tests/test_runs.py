"""Killed or stopped at any moment and started again, a run is the same run, bit for bit."""

import json
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from ppo_jax import evaluate as evaluate_module
from ppo_jax import pipeline, sft_loop, training
from ppo_jax.checkpoints import Checkpoints, load_checkpoint_item
from ppo_jax.config import from_config_dict
from ppo_jax.models import DESCRIPTION
from ppo_jax.origins import check_origin
from ppo_jax.runs import check_settings, describe
from ppo_jax.workdir import drop_lines_after
from tests import tiny_run

PATIENCE = 240  # seconds for a process to reach its fourth step on a busy machine
THIRD = "checkpoints/3"
TRAINED = {
    "sft": ("params", "opt_state", "step"),
    "reward": ("params", "opt_state", "step"),
    "ppo": ("policy_params", "value_params", "opt_state", "kl_coef", "episodes", "step"),
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("run")
    pipeline.run(tiny_run.config(), folder)
    return folder


def read_lines(path):
    """The lines of a file without what the clock says."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


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
    assert "sft: stopping when the step at hand is finished and saved" in output
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


def copy_unfinished(workdir, folder):
    """The SFT stage of a run as after its third step."""
    shutil.copytree(workdir / "sft", folder / "sft")
    shutil.rmtree(folder / "sft" / "checkpoints" / "6")
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(workdir / name, folder)


def test_changed_data_are_refused_on_resume_by_the_name_of_the_file(workdir, tmp_path):
    values = tiny_run.config()
    data = tmp_path / "run" / "data" / "train_texts.jsonl"
    shutil.copytree(workdir / "data", data.parent)
    shutil.copytree(workdir / "base", tmp_path / "run" / "base")
    copy_unfinished(workdir, tmp_path / "run")
    lines = data.read_text().splitlines(keepends=True)
    since = rf"^{data} has changed since {tmp_path}/run/sft was begun \("
    for changed, told in ((lines[:40], "48 -> 40 rows"), (lines[::-1], "48 rows, but others")):
        data.write_text("".join(changed))
        for start in (pipeline.run, pipeline.dry_run):
            with pytest.raises(ValueError, match=rf"{since}{told}\): put it back, or choose"):
                start(values, tmp_path / "run", only=("sft",))
    path = tmp_path / "run" / "sft" / "stage.json"
    description = json.loads(path.read_text())
    path.write_text(json.dumps({k: x for k, x in description.items() if k != "data"}))
    pipeline.run(values, tmp_path / "run", only=("sft",))  # as a stage of before
    assert Checkpoints(path.parent / "checkpoints").latest_step() == 6


def test_a_stage_without_a_checkpoint_is_begun_anew_whatever_differs(workdir, tmp_path, capsys):
    """A reward function that fails at the first iteration, then its correction."""
    values = tiny_run.on_base(workdir, ppo={"init_from": "base", "num_iterations": 2})
    values["ppo"] |= {"reward_model": "", "reward_function": "tests.tiny_run:too_few"}
    with pytest.raises(ValueError, match="must return"):
        pipeline.run(values, tmp_path)
    assert json.loads((tmp_path / "ppo" / "stage.json").read_text())["num_steps"] == 2
    values["ppo"] |= {"reward_function": "tests.tiny_run:letters", "rollout_batch_size": 4}
    pipeline.run(values, tmp_path)
    settings = json.loads((tmp_path / "ppo" / "stage.json").read_text())["settings"]
    assert settings["reward_function"] == "tests.tiny_run:letters"
    assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")] == [1, 2]
    assert sorted({row["step"] for row in read_lines(tmp_path / "samples.jsonl")}) == [0, 2]
    printed = capsys.readouterr().out
    assert f"ppo: samples (every 2 iterations) go to {tmp_path}/samples.jsonl\n" in printed
    assert printed.count("ppo: compiling the first iteration\n") == 2
    # With a checkpoint the settings bind.
    values["ppo"]["rollout_batch_size"] = 8
    with pytest.raises(ValueError, match="begun with other settings: rollout_batch_size: 4 -> 8"):
        pipeline.run(values, tmp_path)
    values["ppo"] |= {"rollout_batch_size": 4, "num_iterations": 1}
    description = json.loads((tmp_path / "ppo" / "stage.json").read_text()) | {"num_steps": 9}
    (tmp_path / "ppo" / "stage.json").write_text(json.dumps(description))
    pipeline.run(values, tmp_path)
    line = "ppo: has taken 2 iterations, num_iterations is 1: nothing to do\n"
    assert line in capsys.readouterr().out


def test_a_base_model_that_nothing_learned_from_is_made_anew(tmp_path, monkeypatch):
    """A mistake that is found when the base model is made already binds nothing."""
    whole = json.loads(json.dumps(tiny_run.config()))
    values = {name: whole[name] for name in ("prepare", "model", "sft")}
    values["sft"]["max_length"] = 2
    with pytest.raises(ValueError, match="see sft.max_length"):
        pipeline.run(values, tmp_path)
    before = json.loads((tmp_path / "base" / "config.json").read_text())
    values["sft"]["max_length"], values["model"]["scratch"]["embed_dim"] = 48, 16
    monkeypatch.setattr(pipeline, "run_stage", lambda *_: None)
    monkeypatch.setattr(pipeline, "closing", lambda *_: "")
    pipeline.dry_run(values, tmp_path)
    assert json.loads((tmp_path / "base" / "config.json").read_text()) == before
    pipeline.run(values, tmp_path)
    after = json.loads((tmp_path / "base" / "config.json").read_text())
    assert (before["hidden_size"], after["hidden_size"]) == (32, 16)


def test_other_data_are_refused_on_resume(workdir, tmp_path):
    data = tmp_path / "texts.jsonl"
    lines = (workdir / "data" / "train_texts.jsonl").read_text().splitlines(keepends=True)
    data.write_text("".join(lines[:40]))
    values = tiny_run.on_base(workdir, sft={"data": str(data)})
    shutil.copytree(workdir / "sft", tmp_path / "run" / "sft")
    path = tmp_path / "run" / "sft" / "stage.json"
    description = json.loads(path.read_text())
    config = from_config_dict(values)
    description |= describe("sft", config, tmp_path / "run") | {"num_steps": 9}
    del description["data"]  # as in a stage of before
    path.write_text(json.dumps(description))
    with pytest.raises(ValueError, match="begun with data for 9 steps, sft.data now gives 5"):
        pipeline.run(values, tmp_path / "run")


# --- what a stage starts from ---------------------------------------------------------------------


def test_a_source_that_goes_on_meanwhile_is_read_at_the_step_that_was_taken(workdir, tmp_path):
    """PPO from another run's PPO, which is given more iterations."""
    source, straight, broken_off = (tmp_path / name for name in ("source", "straight", "run"))
    shutil.copytree(workdir, source)
    start = {"init_from": str(source / "ppo"), "reward_model": str(source / "reward")}

    def train(folder, iterations):
        changes = start | {"num_iterations": iterations, "save_every": 1}
        pipeline.run(tiny_run.on_base(workdir, ppo=changes), folder)

    def more(iterations):
        values = tiny_run.config()
        values["ppo"] |= {"num_iterations": iterations, "save_every": 1}
        pipeline.run(values, source, only=("ppo",))

    train(straight, 2)
    train(broken_off, 1)
    description = json.loads((broken_off / "ppo" / "stage.json").read_text())
    assert description["sources"] == {"init_from": 6, "reward_model": 6}
    more(7)
    path = source / "ppo" / "stage.json"  # as of a run that goes on, with the step still there
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_steps": 99}))
    train(broken_off, 2)
    for name in TRAINED["ppo"]:
        folders = (folder / "ppo" / "checkpoints" for folder in (straight, broken_off))
        assert_same_bits(*(load_checkpoint_item(folder, name, step=2) for folder in folders))
    more(8)
    told = (
        rf"{source}/ppo had taken 6 steps when this run began from it, .* steps \[7, 8\] alone now"
    )
    with pytest.raises(ValueError, match=told):
        train(broken_off, 3)
    values = tiny_run.on_base(workdir, ppo=start | {"num_iterations": 2}, evaluate={})
    with pytest.raises(ValueError, match=told):  # which would compare it with another policy
        pipeline.run(values, broken_off)
    assert Checkpoints(broken_off / "ppo" / "checkpoints").latest_step() == 2


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


# --- the evaluation -------------------------------------------------------------------------------


def test_what_was_found_before_a_judge_fails_is_kept(workdir, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(workdir, folder)
    whole = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text("{}")  # not evaluated yet
    names = {"judges": (tiny_run, "judges"), "samples": (evaluate_module, "side_by_side")}
    found = []
    for where in names.values():
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
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


def test_numbers_may_change_on_resume_and_sizes_may_not(tmp_path):
    sizes = {"rollout_batch_size": 8, "kl_coef": 0.1, "optimizer": {"learning_rate": 1e-3}}
    description = dict.fromkeys(DESCRIPTION) | {"settings": sizes}
    (tmp_path / "stage.json").write_text(json.dumps(description))
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    numbers = sizes | {"kl_coef": 0.2, "optimizer": {"learning_rate": 1e-4}}
    check_settings(tmp_path, {"stage": "ppo", "settings": numbers})
    with pytest.raises(ValueError, match="begun with other settings: rollout_batch_size: 8 -> 16"):
        check_settings(tmp_path, {"stage": "ppo", "settings": numbers | {"rollout_batch_size": 16}})
    check_settings(tmp_path / "absent", {"stage": "ppo", "settings": numbers})
    # A field that is younger than the stage had its default then.
    younger = numbers | {"critic_init_from": ""}
    check_settings(tmp_path, {"stage": "ppo", "settings": younger})
    with pytest.raises(ValueError, match="critic_init_from:  -> policy"):
        changed = numbers | {"critic_init_from": "policy"}
        check_settings(tmp_path, {"stage": "ppo", "settings": changed})


def test_remat_may_change_on_resume_and_the_dtype_may_not(tmp_path):
    """It changes memory and time alone; runs from before it was a setting had none."""
    made = {"path": "", "vocabulary_data": "x", "dtype": "float32"}
    asked = made | {"remat": "full", "scratch": None, "scan_layers": False}
    description = dict.fromkeys(DESCRIPTION) | {"settings": {"model": made}}
    (tmp_path / "sft" / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "sft" / "stage.json").write_text(json.dumps(description))
    check_settings(tmp_path / "sft", {"stage": "sft", "settings": {"model": asked}})
    other = asked | {"dtype": "bfloat16"}
    with pytest.raises(ValueError, match="settings: model.dtype: float32 -> bfloat16. Set"):
        check_settings(tmp_path / "sft", {"stage": "sft", "settings": {"model": other}})

    (tmp_path / "base").mkdir()
    before = {"model": {name: x for name, x in asked.items() if name != "remat"}, "seed": 0}
    (tmp_path / "config.json").write_text(json.dumps({"config": before}))
    check_origin(tmp_path, {"model": asked, "seed": 0})
    with pytest.raises(ValueError, match="settings: model.dtype: float32 -> bfloat16. Set"):
        check_origin(tmp_path, {"model": other, "seed": 0})
