"""Two processes of four devices are one of eight; together they stop, and together they end."""

import json
import os
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from ppo_jax import pipeline, sharding
from ppo_jax.checkpoints import load_checkpoint_item
from ppo_jax.leaves import named_leaves
from tests import tiny_run, two_processes

pytestmark = pytest.mark.slow
# The tokenizer of these runs has 317 tokens.
WHOLE = {"rules": {"vocab": ()}, "rollout_rules": {"vocab": ()}}
CUBE = {"data": 2, "fsdp": 2, "model": 2, **WHOLE}
PATIENCE = 300  # seconds


def settings(mesh=CUBE, **ppo):
    config = tiny_run.config()
    config["mesh"] = mesh
    config["ppo"] |= {"rollout_batch_size": 16, **ppo}
    config["ppo"]["optimizer"]["schedule"] = "constant"
    return config


def by_function(name, **ppo):
    """PPO alone, from the base model, with a reward function of this module."""
    config = settings(init_from="base", reward_model="", **ppo)
    config["ppo"]["reward_function"] = f"tests.test_two_processes:{name}"
    return {name: config[name] for name in ("prepare", "model", "mesh", "ppo")}


def count_vowels(prompts, responses):
    return [float(sum(r.count(v) for v in "aeiou")) for r in responses]


def fails_on_process_1(prompts, responses):
    if jax.process_index() == 1:
        raise KeyError("no such word")
    return count_vowels(prompts, responses)


def hangs_on_process_1(prompts, responses):
    time.sleep(3600 * jax.process_index())
    return count_vowels(prompts, responses)


def sleeps(prompts, responses):
    time.sleep(0.4)
    return count_vowels(prompts, responses)


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
    config = by_function("sleeps", num_iterations=12, save_every=4)
    for code, output in two_processes.finish(two_processes.start(config, folder)):
        assert code == 0, output
    return config, folder


def test_sigterm_on_one_host_saves_one_step_on_all(slow_run, tmp_path):
    config, whole = slow_run
    processes = two_processes.start(config, tmp_path)
    wait_until(lambda: begun(tmp_path, 2), processes)
    processes[1].send_signal(signal.SIGTERM)
    ended = two_processes.finish(processes)
    assert [code for code, _ in ended] == [143, 143], ended
    assert "stopped by SIGTERM" in ended[0][1]
    for code, output in two_processes.finish(two_processes.start(config, tmp_path)):
        assert code == 0, output
    assert_same_numbers(whole, tmp_path, ["ppo"])


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
        ("hangs_on_process_1", "took more than ppo.reward_seconds=2 for 2 responses"),
    ],
)
def test_a_reward_function_that_fails_names_the_process_and_ends_both(tmp_path, function, told):
    config = by_function(function, reward_seconds=2.0)
    ended = two_processes.finish(two_processes.start(config, tmp_path), 200)
    assert [code == 0 for code, _ in ended] == [False, False], ended
    assert "process 1: ppo.reward_function tests.test_two_processes:" in ended[1][1], ended
    assert f"{told} (rows 2 to 3 of 4)" in ended[1][1]
