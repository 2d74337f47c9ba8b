"""A folder has one run at a time: who holds it is named, and a dead holder holds nothing."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest

from ppo_jax.distributed import folder_lock
from ppo_jax.distributed.folder_lock import LOCK, hold_folder

HOLD = """
import os, sys, time
from pathlib import Path
from ppo_jax.distributed.folder_lock import hold_folder
with hold_folder(Path(sys.argv[1])):
    print("held", flush=True)
    {then}
"""


@contextlib.contextmanager
def holder(folder, then="time.sleep(60)"):
    """A process that holds the folder."""
    command = [sys.executable, "-c", HOLD.format(then=then), str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def short_patience(monkeypatch):
    monkeypatch.setattr(folder_lock, "PATIENCE_S", 1)
    monkeypatch.setattr(folder_lock, "POLL_S", 0.05)
    monkeypatch.setattr(folder_lock, "BEAT_S", 0.1)
    monkeypatch.setattr(folder_lock, "SETTLE_S", 0.3)


def leave_record(folder, **changes):
    """The lock of a process that is gone, of another machine for instance."""
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_text(json.dumps(folder_lock._record() | changes))


def test_the_holder_is_named_and_a_killed_one_is_taken_over_at_once(tmp_path):
    with holder(tmp_path / "run") as process:
        named = rf"run is in use by process {process.pid} on {folder_lock.platform.node()}, begun "
        with pytest.raises(ValueError, match=named), hold_folder(tmp_path / "run"):
            pass
        process.kill()
        process.wait()
        assert (tmp_path / "run" / LOCK).exists()
        began = time.monotonic()
        with hold_folder(tmp_path / "run"):
            assert time.monotonic() - began < 5
            assert json.loads((tmp_path / "run" / LOCK).read_text())["process"] == os.getpid()
    assert not (tmp_path / "run" / LOCK).exists()


def test_two_holders_in_one_process_exclude_each_other(tmp_path):
    with hold_folder(tmp_path), pytest.raises(ValueError, match="is in use by process"):
        with hold_folder(tmp_path):
            pass
    with hold_folder(tmp_path):
        pass


def test_a_forked_process_that_lives_on_holds_nothing(tmp_path):
    then = "child = os.fork() == 0; child and print('forked', flush=True)"
    with holder(tmp_path, f"{then}; time.sleep(4 if child else 60)") as process:
        assert process.stdout.readline() == "forked\n"
        process.kill()
        process.wait()
        with hold_folder(tmp_path):
            pass


def test_a_folder_into_which_nothing_was_put_is_removed_with_those_above_it(tmp_path):
    with hold_folder(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not list(tmp_path.iterdir())
    with hold_folder(tmp_path / "a" / "b"):
        (tmp_path / "a" / "file").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]


def test_a_folder_that_cannot_be_made_or_is_removed_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file/run cannot be made: Not a directory"):
        with hold_folder(tmp_path / "file" / "run"):
            pass
    with pytest.raises(FileNotFoundError, match="run was removed while a run was under way in it"):
        with hold_folder(tmp_path / "run"):
            shutil.rmtree(tmp_path / "run")
            (tmp_path / "run" / "metrics.jsonl").write_text("")


def test_a_holder_on_another_machine_is_watched(tmp_path, short_patience, capsys):
    leave_record(tmp_path, machine="another", host="node7", process=12)
    with hold_folder(tmp_path):
        pass
    assert "left by process 12 on node7, begun on" in capsys.readouterr().out
    leave_record(tmp_path, machine="another", host="node7", process=12)
    over = threading.Event()

    def beat():
        while not over.wait(0.1):
            os.utime(tmp_path / LOCK)

    alive = threading.Thread(target=beat)
    alive.start()
    try:
        with pytest.raises(ValueError, match="in use by process 12 on node7"):
            with hold_folder(tmp_path):
                pass
    finally:
        over.set()
        alive.join()


def test_without_flock_the_date_of_the_file_tells_who_lives(tmp_path, short_patience, monkeypatch):
    monkeypatch.setattr(folder_lock, "fcntl", None)
    with hold_folder(tmp_path):
        with pytest.raises(ValueError, match=f"is in use by process {os.getpid()} on"):
            with hold_folder(tmp_path):
                pass
    leave_record(tmp_path)  # of this machine, but who could know
    with hold_folder(tmp_path):
        pass


def test_of_many_that_begin_at_once_one_holds_the_folder(tmp_path, monkeypatch):
    """And whoever comes as the holder removes its file does not hold the file that is gone."""
    inside, most, refused, lock = [0], [0], [0], threading.Lock()

    def work():
        for _ in range(40):
            try:
                with hold_folder(tmp_path / "run"):
                    with lock:
                        inside[0] += 1
                        most[0] = max(most[0], inside[0])
                    time.sleep(0.001)
                    with lock:
                        inside[0] -= 1
            except ValueError:
                refused[0] += 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and refused[0]


@pytest.mark.parametrize("record", ["", "{", "[1]", '{"machine": []}'])
def test_a_lock_that_is_no_record_is_taken_over(tmp_path, short_patience, record):
    (tmp_path / LOCK).write_text(record)
    with hold_folder(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_to_is_not_held(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(folder_lock.os, "open", refuse)
    with hold_folder(tmp_path):
        assert not list(tmp_path.iterdir())
