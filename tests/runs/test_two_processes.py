"""Two processes of four devices are one of eight; together they stop, and together they end."""

import json
import os
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from ppo_jax.distributed import layout as sharding
from ppo_jax.distributed.trees import named_leaves
from ppo_jax.evaluation import evaluate
from ppo_jax.io.checkpoints import Checkpoints, load_checkpoint_item
from ppo_jax.pipeline import run as pipeline
from tests.support import tiny_run, two_processes
from tests.support.tiny_state import flip_a_bit, largest_file
from tests.support.users_code import CALLS, WAITS, wait_if_asked

pytestmark = pytest.mark.slow
# The tokenizer of these runs has 317 tokens.
WHOLE = {"rules": {"vocab": ()}, "rollout_rules": {"vocab": ()}}
CUBE = {"data": 2, "fsdp": 2, "model": 2, **WHOLE}
# Each row lies on all eight devices, and so on both processes.
WHOLE_ROWS = {"vocab": (), "heads": (), "kv_heads": ()}
ACROSS = {"data": 1, "model": 8, "rules": WHOLE_ROWS, "rollout_rules": WHOLE_ROWS}
PATIENCE = 300  # seconds
NOTICE_S = 5  # jax looks for SIGTERM once a second


def settings(mesh=CUBE, **ppo):
    config = tiny_run.config()
    config["mesh"] = mesh
    config["ppo"] |= {"rollout_batch_size": 16, **ppo}
    config["ppo"]["optimizer"]["schedule"] = "constant"
    config["prepare"] = "tests.support.users_code:prepare"
    config["evaluate"]["judges"] = "tests.support.users_code:judges"
    return config


def by_function(name, **ppo):
    """PPO alone, from the base model, with a reward function of `users_code`."""
    config = settings(init_from="base", reward_model="", **ppo)
    config["ppo"]["reward_function"] = f"tests.support.users_code:{name}"
    return {name: config[name] for name in ("prepare", "model", "mesh", "ppo")}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """All stages in one process with eight devices."""
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "devices_of_run", jax.devices)
        pipeline.run(settings(), folder)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The same in two processes."""
    folder = tmp_path_factory.mktemp("two")
    for code, output in two_processes.finish(two_processes.start(settings(), folder)):
        assert code == 0, output
    return folder


def rows(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def assert_same_numbers(folder, other, stages=("sft", "reward", "ppo")):
    fields = {"sft": "params", "reward": "params", "ppo": "policy_params"}
    for stage in stages:
        mine, theirs = (
            named_leaves(load_checkpoint_item(x / stage / "checkpoints", fields[stage]))
            for x in (folder, other)
        )
        assert mine.keys() == theirs.keys()
        for name, leaf in mine.items():
            np.testing.assert_allclose(theirs[name], leaf, atol=1e-3, err_msg=f"{stage} {name}")
    losses = [
        [(r["stage"], r["step"], {k: v for k, v in r.items() if k.endswith("loss")}) for r in found]
        for found in (rows(folder, "metrics.jsonl"), rows(other, "metrics.jsonl"))
    ]
    for (stage, step, mine), (*place, theirs) in zip(*losses, strict=True):
        assert [stage, step] == place and mine.keys() == theirs.keys()
        for name in mine:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), (stage, step)


def test_two_processes_run_every_stage_as_one_does(one, two):
    assert_same_numbers(one, two)
    texts = [[row["response"] for row in rows(x, "samples.jsonl")] for x in (one, two)]
    assert texts[0] == texts[1]


def test_judges_are_asked_by_one_process_alone(two):
    assert (two / "judged.txt").read_text().split() == ["0"] * 3  # base, SFT and PPO
    (row,) = json.loads((two / "results.json").read_text())["judges"]
    assert 0 < row["mean_ppo"] < 1


def test_what_two_processes_saved_one_goes_on_with(one, two, tmp_path, all_devices):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    pipeline.run(settings(num_iterations=8), tmp_path, only=["ppo"])
    whole = tmp_path / "whole"
    shutil.copytree(one, whole)
    pipeline.run(settings({"data": 1, "fsdp": 8, **WHOLE}, num_iterations=8), whole, only=["ppo"])
    assert_same_numbers(whole, tmp_path, ["ppo"])


def begun(folder, step):
    path = folder / "metrics.jsonl"
    return path.exists() and any(
        r["stage"] == "ppo" and r["step"] >= step for r in rows_so_far(path)
    )


def rows_so_far(path):
    return [
        json.loads(line)
        for line in path.read_text().splitlines(keepends=True)
        if line.endswith("\n")
    ]


def wait_until(ready, processes):
    end = time.monotonic() + PATIENCE
    while not ready():
        assert all(p.poll() is None for p in processes), two_processes.finish(processes, 10)
        assert time.monotonic() < end, "the processes did not come so far"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def slow_run(tmp_path_factory):
    """(settings of PPO with a slow reward function, the folder of one that nobody stopped)."""
    folder = tmp_path_factory.mktemp("slow")
    config = by_function("sleeps", num_iterations=16, save_every=4)
    for code, output in two_processes.finish(two_processes.start(config, folder)):
        assert code == 0, output
    return config, folder


def assert_stopped(processes, told):
    ended = two_processes.finish(processes)
    assert [code for code, _ in ended] == [143, 143], ended
    assert told() in ended[0][1], ended


def test_a_signal_to_one_saves_one_step_on_all_and_a_damaged_one_is_passed_over_by_all(
    slow_run, tmp_path
):
    config, whole = slow_run
    checkpoints, newest = Checkpoints(tmp_path / "ppo" / "checkpoints"), 0
    for asked, number in ((1, signal.SIGTERM), (0, signal.SIGINT)):
        processes = two_processes.start(config, tmp_path)
        wait_until(lambda last=newest: begun(tmp_path, last + 2), processes)
        processes[asked].send_signal(number)
        assert_stopped(processes, lambda: f"step {checkpoints.latest_step()} is saved")
        newest = checkpoints.latest_step()
    flip_a_bit(largest_file(checkpoints.directory / str(newest)))
    older = checkpoints.steps()[-2]
    ended = two_processes.finish(two_processes.start(config, tmp_path))
    assert [code for code, _ in ended] == [0, 0], ended
    assert f"ppo: resuming after step {older}" in ended[0][1]
    passed_over = f"passed over checkpoint {checkpoints.directory}/{newest}"
    assert [passed_over in output for _, output in ended] == [True, False], ended
    assert_same_numbers(whole, tmp_path, ["ppo"])


def test_sigterm_while_the_data_is_made_ends_all_and_leaves_it_whole(tmp_path, monkeypatch):
    monkeypatch.setenv(WAITS, "1")
    processes = two_processes.start(by_function("count_vowels"), tmp_path)
    wait_until((tmp_path / "reached").exists, processes)
    stop_at_the_next_place(processes, 0, tmp_path)
    assert (tmp_path / "data" / "prompts.jsonl").is_file()
    assert not (tmp_path / "base").exists()


def evaluate_with_a_wait(folder):
    """The evaluation of a few prompts, which waits behind the responses of the first policy."""

    def respond_and_wait(*args):
        found = respond(*args)
        wait_if_asked(folder)
        return found

    respond, evaluate.respond = evaluate.respond, respond_and_wait
    pipeline.run(fewer_prompts(), folder)


def fewer_prompts():
    config = settings()
    config["evaluate"]["num_prompts"] = 4
    return config


def test_after_sigterm_in_an_evaluation_the_same_command_begins_it_anew(
    two, tmp_path, monkeypatch, all_devices
):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    with monkeypatch.context() as patch:
        patch.setenv(WAITS, "1")
        processes = two_processes.start(f"{__name__}:evaluate_with_a_wait", tmp_path)
        wait_until((tmp_path / "reached").exists, processes)
        told = "the same command starts the evaluation over"
        stop_at_the_next_place(processes, 1, tmp_path, told)
    assert "evaluated" not in json.loads((tmp_path / "results.json").read_text())
    pipeline.run(fewer_prompts(), tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["evaluated"]["settings"]["num_prompts"] == results["judges"][0]["num_prompts"]


def stop_at_the_next_place(processes, asked, folder, told="nothing is lost"):
    """SIGTERM to a process; the one that waits goes on when all know of it."""
    processes[asked].send_signal(signal.SIGTERM)
    time.sleep(NOTICE_S)
    (folder / "go_on").touch()
    assert_stopped(processes, lambda: f"stopped by SIGTERM, {told}")


def test_when_a_users_code_ends_process_0_all_end_with_its_code(tmp_path):
    config = by_function("count_vowels") | {"prepare": "tests.support.users_code:prepare_nothing"}
    began = time.monotonic()
    ended = two_processes.finish(two_processes.start(config, tmp_path), 100)
    assert [code for code, _ in ended] == [7, 7], ended
    assert time.monotonic() - began < 60


def test_rows_that_lie_on_both_processes_are_scored_once(slow_run, tmp_path, monkeypatch):
    monkeypatch.setenv(CALLS, str(tmp_path / "calls.txt"))
    config = by_function("tells", num_iterations=2) | {"mesh": ACROSS}
    for code, output in two_processes.finish(two_processes.start(config, tmp_path)):
        assert code == 0, output
    calls = (tmp_path / "calls.txt").read_text().splitlines()
    assert calls == ["0 3", "0 16", "0 16", "0 3"]  # samples, two iterations, samples
    mine, theirs = (rows(x, "metrics.jsonl")[0] for x in (tmp_path, slow_run[1]))
    assert mine["reward/score_mean"] == pytest.approx(theirs["reward/score_mean"], rel=1e-6)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_within_a_minute(slow_run, tmp_path, killed):
    config, whole = slow_run
    processes = two_processes.start(config, tmp_path)
    wait_until(lambda: begun(tmp_path, 5), processes)
    os.kill(processes[killed].pid, signal.SIGKILL)
    began = time.monotonic()
    ended = two_processes.finish(processes, seconds=60)
    assert time.monotonic() - began < 60
    code, output = ended[1 - killed]
    assert code != 0 and output.strip(), ended
    print(output)
    again = two_processes.finish(two_processes.start(config, tmp_path))
    assert [code for code, _ in again] == [0, 0], again
    assert "ppo: resuming after step 4" in again[0][1]
    assert_same_numbers(whole, tmp_path, ["ppo"])


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("fails_on_process_1", "fails_on_process_1 raised KeyError: 'no such word'"),
        ("hangs_on_process_1", "took more than ppo.reward_timeout_s=2 for 2 responses"),
    ],
)
def test_a_reward_function_that_fails_names_the_process_and_ends_both(tmp_path, function, told):
    config = by_function(function, reward_timeout_s=2.0)
    ended = two_processes.finish(two_processes.start(config, tmp_path), 200)
    assert [code == 0 for code, _ in ended] == [False, False], ended
    assert "process 1: ppo.reward_function tests.support.users_code:" in ended[1][1], ended
    assert f"{told} (rows 2 to 3 of 4)" in ended[1][1]
