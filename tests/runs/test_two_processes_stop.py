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


def test_stops_kills_and_a_damaged_checkpoint_change_no_number(slow_run, tmp_path):
    """A signal to one process saves one step on all; all pass over a damaged one; where one is
    killed the other ends within a minute. What goes on each time ends as what nobody stopped."""
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
    outputs = kill_one_and_wait(start(config, tmp_path), 1, lambda: begun(tmp_path, 8 + 1))
    assert f"ppo: resuming after step {older}" in outputs[0]
    passed_over = f"passed over checkpoint {checkpoints.directory}/{newest}"
    assert [passed_over in output for output in outputs] == [True, False], outputs
    kill_one_and_wait(start(config, tmp_path), 0, lambda: begun(tmp_path, 12 + 1))
    again = two_processes.finish(start(config, tmp_path))
    assert [code for code, _ in again] == [0, 0], again
    assert "ppo: resuming after step 12" in again[0][1]
    assert_same_numbers(whole, tmp_path, ["ppo"])


def kill_one_and_wait(processes, killed, ready):
    """What they printed: the other one, too, ends within a minute, and says why."""
    wait_until(ready, processes)
    os.kill(processes[killed].pid, signal.SIGKILL)
    began = time.monotonic()
    ended = two_processes.finish(processes, seconds=60)
    assert time.monotonic() - began < 60
    code, output = ended[1 - killed]
    assert code != 0 and output.strip(), ended
    return [output for _, output in ended]


def test_rows_that_lie_on_both_processes_are_scored_once(slow_run, tmp_path, monkeypatch):
    monkeypatch.setenv(CALLS, str(tmp_path / "calls.txt"))
    config = by_function("tells", num_iterations=2) | {"mesh": ACROSS}
    for code, output in two_processes.finish(two_processes.start(config, tmp_path)):
        assert code == 0, output
    calls = (tmp_path / "calls.txt").read_text().splitlines()
    assert calls == ["0 3", "0 16", "0 16", "0 3"]  # samples, two iterations, samples
    mine, theirs = (rows(x, "metrics.jsonl")[0] for x in (tmp_path, slow_run[1]))
    assert mine["reward/score_mean"] == pytest.approx(theirs["reward/score_mean"], rel=1e-6)
