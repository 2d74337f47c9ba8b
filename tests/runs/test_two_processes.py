"""Two processes of four devices are one of eight, and what they save one can go on with."""

import json
import shutil

import jax
import pytest

from ppo_jax.distributed import layout as sharding
from ppo_jax.evaluation import evaluate
from ppo_jax.pipeline import run as pipeline
from tests.support import two_processes
from tests.support.two_processes import (
    WHOLE,
    assert_same_numbers,
    rows,
    settings,
    stop_at_the_next_place,
    wait_until,
)
from tests.support.users_code import WAITS, wait_if_asked

pytestmark = pytest.mark.slow
EVALUATED = {"evaluate_every": 3, "evaluate_prompts": 6}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """All stages in one process with eight devices."""
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "devices_of_run", jax.devices)
        pipeline.run(settings(**EVALUATED), folder)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The same in two processes."""
    folder = tmp_path_factory.mktemp("two") / "run"  # not there yet
    for code, output in two_processes.finish(two_processes.start(settings(**EVALUATED), folder)):
        assert code == 0, output
    return folder


def test_two_processes_run_every_stage_as_one_does(one, two):
    assert_same_numbers(one, two)
    texts = [[row["response"] for row in rows(x, "samples.jsonl")] for x in (one, two)]
    assert texts[0] == texts[1]
    for name in ("eval/kl", "eval/length", "eval/proxy_score"):
        mine, theirs = (
            {row["step"]: row[name] for row in rows(x, "metrics.jsonl") if name in row}
            for x in (one, two)
        )
        assert list(mine) == [0, 3, 6] and mine == pytest.approx(theirs, abs=1e-3), name


def test_judges_are_asked_by_one_process_alone(two):
    # Three times while PPO trains, then base, SFT and PPO.
    assert (two / "judged.txt").read_text().split() == ["0"] * 6
    (row,) = json.loads((two / "results.json").read_text())["judges"]
    assert 0 < row["mean_ppo"] < 1


def test_what_two_processes_saved_one_goes_on_with(one, two, tmp_path, all_devices):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    pipeline.run(settings(num_iterations=8, **EVALUATED), tmp_path, only=["ppo"])
    whole = tmp_path / "whole"
    shutil.copytree(one, whole)
    pipeline.run(
        settings({"data": 1, "fsdp": 8, **WHOLE}, num_iterations=8, **EVALUATED),
        whole,
        only=["ppo"],
    )
    assert_same_numbers(whole, tmp_path, ["ppo"])


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
        told = "the same command takes up the evaluation again"
        stop_at_the_next_place(processes, 1, tmp_path, told)
    assert "evaluated" not in json.loads((tmp_path / "results.json").read_text())
    pipeline.run(fewer_prompts(), tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["evaluated"]["settings"]["num_prompts"] == results["judges"][0]["num_prompts"]
