"""Two processes are stopped or killed, and go on together from the same step."""

import functools
import os
import signal
import time

import pytest

from ppo_jax.io.checkpoints import Checkpoints
from tests.support import two_processes
from tests.support.tiny_state import flip_a_bit, largest_file
from tests.support.two_processes import (
    ACROSS,
    WHOLE,
    assert_same_numbers,
    assert_stopped,
    begun,
    by_function,
    rows,
    wait_until,
)
from tests.support.users_code import CALLS

pytestmark = pytest.mark.slow


# Two devices a process: where and when they stop does not depend on how many there are.
SQUARE = {"data": 2, "fsdp": 2, **WHOLE}
start = functools.partial(two_processes.start, num_devices=4)


@pytest.fixture(scope="module")
def slow_run(tmp_path_factory):
    """(settings of PPO with a slow reward function, the folder of one that nobody stopped)."""
    folder = tmp_path_factory.mktemp("slow")
    config = by_function("sleeps", num_iterations=16, save_every=4) | {"mesh": SQUARE}
    for code, output in two_processes.finish(start(config, folder)):
        assert code == 0, output
    return config, folder


def test_a_signal_to_one_saves_one_step_on_all_and_a_damaged_one_is_passed_over_by_all(
    slow_run, tmp_path
):
    config, whole = slow_run
    checkpoints, newest = Checkpoints(tmp_path / "ppo" / "checkpoints"), 0
    for asked, number in ((1, signal.SIGTERM), (0, signal.SIGINT)):
        processes = start(config, tmp_path)
        wait_until(lambda last=newest: begun(tmp_path, last + 2), processes)
        processes[asked].send_signal(number)
        assert_stopped(processes, lambda: f"step {checkpoints.latest_step()} is saved")
        newest = checkpoints.latest_step()
    flip_a_bit(largest_file(checkpoints.directory / str(newest)))
    older = checkpoints.steps()[-2]
    ended = two_processes.finish(start(config, tmp_path))
    assert [code for code, _ in ended] == [0, 0], ended
    assert f"ppo: resuming after step {older}" in ended[0][1]
    passed_over = f"passed over checkpoint {checkpoints.directory}/{newest}"
    assert [passed_over in output for _, output in ended] == [True, False], ended
    assert_same_numbers(whole, tmp_path, ["ppo"])


def test_rows_that_lie_on_both_processes_are_scored_once(slow_run, tmp_path, monkeypatch):
    monkeypatch.setenv(CALLS, str(tmp_path / "calls.txt"))
    config = by_function("tells", num_iterations=2) | {"mesh": ACROSS}
    for code, output in two_processes.finish(two_processes.start(config, tmp_path)):
        assert code == 0, output
    calls = (tmp_path / "calls.txt").read_text().splitlines()
    assert calls == ["0 3", "0 16", "0 16", "0 3"]  # samples, two iterations, samples
    mine, theirs = (rows(x, "metrics.jsonl")[0] for x in (tmp_path, slow_run[1]))
    assert mine["reward/score_mean"] == pytest.approx(theirs["reward/score_mean"], rel=1e-6)


def test_a_killed_process_ends_the_other_within_a_minute(slow_run, tmp_path):
    config, whole = slow_run
    for killed, saved in ((0, 4), (1, 8)):
        processes = start(config, tmp_path)
        wait_until(lambda step=saved: begun(tmp_path, step + 1), processes)
        os.kill(processes[killed].pid, signal.SIGKILL)
        began = time.monotonic()
        ended = two_processes.finish(processes, seconds=60)
        assert time.monotonic() - began < 60
        code, output = ended[1 - killed]
        assert code != 0 and output.strip(), ended
    again = two_processes.finish(start(config, tmp_path))
    assert [code for code, _ in again] == [0, 0], again
    assert "ppo: resuming after step 8" in again[0][1]
    assert_same_numbers(whole, tmp_path, ["ppo"])
