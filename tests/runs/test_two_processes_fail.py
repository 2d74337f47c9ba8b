"""What a user's code does to one of two processes ends both, with its reason."""

import time

import pytest

from tests.support import two_processes
from tests.support.two_processes import by_function, stop_at_the_next_place, wait_until
from tests.support.users_code import WAITS

pytestmark = pytest.mark.slow


def test_sigterm_while_the_data_is_made_ends_all_and_leaves_it_whole(tmp_path, monkeypatch):
    monkeypatch.setenv(WAITS, "1")
    processes = two_processes.start(by_function("count_vowels"), tmp_path)
    wait_until((tmp_path / "reached").exists, processes)
    stop_at_the_next_place(processes, 0, tmp_path)
    assert (tmp_path / "data" / "prompts.jsonl").is_file()
    assert not (tmp_path / "base").exists()


def test_when_a_users_code_ends_process_0_it_is_named_and_all_end(tmp_path):
    config = by_function("count_vowels") | {"prepare": "tests.support.users_code:prepare_nothing"}
    began = time.monotonic()
    ended = two_processes.finish(two_processes.start(config, tmp_path), 100)
    assert [code for code, _ in ended] == [1, 2], ended
    told = "prepare tests.support.users_code:prepare_nothing raised SystemExit: 7"
    assert told in ended[0][1] and "process 0 has failed" in ended[1][1]
    assert time.monotonic() - began < 60


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
