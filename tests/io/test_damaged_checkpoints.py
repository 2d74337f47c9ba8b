"""What is half-written or damaged is passed over by name, however the process ended."""

import errno
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.distributed.processes import ProcessMismatch
from ppo_jax.io import checkpoints as checkpoints_module
from ppo_jax.io.checkpoints import Checkpoints, load_checkpoint_item, load_params, save_params
from tests.support.tiny_state import (
    assert_identical,
    flip_a_bit,
    largest_file,
    make_state,
    restore,
    save_all,
    saved_steps,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]
UNFINISHED = ".orbax-checkpoint-tmp"


def test_of_several_processes_a_step_that_cannot_be_loaded_is_an_error_with_advice(
    tmp_path, monkeypatch
):
    save_all(tmp_path, [3, 6])
    monkeypatch.setattr(checkpoints_module, "is_multiprocess", lambda: True)
    assert restore(tmp_path)[1] == 6
    shutil.rmtree(tmp_path / "6" / "state" / "d")
    monkeypatch.setattr(checkpoints_module, "verify_checksums", lambda folder: None)
    monkeypatch.setattr(checkpoints_module, "_verified", lambda step, path, verify: None)
    with pytest.raises(ValueError, match=r"/6 cannot be read: .*; remove or rename that folder"):
        restore(tmp_path)


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError, ProcessMismatch, MemoryError])
def test_what_is_no_damage_is_told_as_it_is(tmp_path, monkeypatch, error):
    def fail(*args):
        raise error("out of memory")

    save_params(tmp_path / "params", make_state().policy_params)
    monkeypatch.setattr(checkpoints_module, "_load", fail)
    with pytest.raises(error, match="^out of memory"):
        load_params(tmp_path / "params")


# Of TensorStore, as it says them.
TENSORSTORE = "RESOURCE_EXHAUSTED: Failed to open: \"d/1\": {} [os_error_code='{}']"


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.ENOMEM])
@pytest.mark.parametrize("kind", [OSError, ValueError, KeyError])
def test_too_few_open_files_or_no_permission_is_no_damage(tmp_path, monkeypatch, number, kind):
    """To pass over the step would lose work, and to call it damaged would mislead."""
    save_all(tmp_path, [3, 6])
    told = TENSORSTORE.format(os.strerror(number), number)

    def fail(*args):
        if kind is OSError:
            raise OSError(number, os.strerror(number))
        if kind is ValueError:
            raise ValueError(told)
        raise KeyError("some array") from ValueError(told)  # as Orbax wraps them

    monkeypatch.setattr(checkpoints_module, "_load", fail)
    for read in (
        lambda: restore(tmp_path),
        lambda: load_checkpoint_item(tmp_path, "policy_params"),
        lambda: load_checkpoint_item(tmp_path, "policy_params", step=6),
    ):
        with pytest.raises(OSError, match=re.escape(f"{os.strerror(number)}: '{tmp_path}/6'")):
            read()


FEW_FILES = """
import os, resource, sys, warnings
from tests.support.tiny_state import make_state, restore
warnings.simplefilter("error", UserWarning)
folder = sys.argv[1]
restore(folder)
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
for left in range(14):
    files = []
    while len(files) < 256:
        try:
            files.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            break
    for file in files[:left]:
        os.close(file)
    try:
        step = restore(folder)[1]
    except OSError as error:
        step = error.errno
    for file in files[left:]:
        os.close(file)
    print(step)
"""


def test_with_few_files_that_may_be_open_a_step_is_read_or_the_lack_is_told(tmp_path):
    save_all(tmp_path, [3, 6])
    command = [sys.executable, "-c", FEW_FILES, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    steps = list(map(int, done.stdout.split()))
    assert len(steps) == 14 and set(steps) == {6, errno.EMFILE}, done.stderr


def test_a_disk_that_is_full_is_told_and_what_was_saved_stays_good(tmp_path, caplog):
    """The system's limit on the size of a file stands for the disk."""
    save_all(tmp_path, [3])
    checkpoints = Checkpoints(tmp_path)
    checkpoints.restore(make_state())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(OSError, match=rf"File too large: '{tmp_path}/6'"):
            checkpoints.save(6, make_state(6))
            checkpoints.close()
        with pytest.raises(OSError, match=rf"File too large: '{tmp_path}/params'"):
            save_params(tmp_path / "params", make_state().policy_params)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [x for x in caplog.records if x.levelname == "ERROR"]  # Orbax has its tracebacks
    with pytest.warns(UserWarning, match="passed over .*/6.*: it was not written to its end"):
        state, step, _ = restore(tmp_path)
    assert step == 3
    assert_identical(state, make_state(3))


@pytest.mark.filterwarnings("ignore:passed over")
def test_when_every_step_is_damaged_the_error_says_so_and_nothing_is_begun_again(tmp_path):
    save_all(tmp_path, [3, 6])
    flip_a_bit(largest_file(tmp_path / "3"))
    shutil.rmtree(tmp_path / "6" / "state")
    checkpoints = Checkpoints(tmp_path)
    message = rf"none of the checkpoints in {tmp_path} can be read:\n  6: OSError.*\n  3: OSError"
    for read in (
        lambda: checkpoints.restore(make_state()),
        checkpoints.readable_step,
        lambda: load_checkpoint_item(tmp_path, "policy_params"),
    ):
        with pytest.raises(ValueError, match=message):
            read()
    with pytest.raises(ValueError, match=r"holds steps \[3, 6\]"):
        checkpoints.save(3, make_state(9))
    assert saved_steps(tmp_path) == ["3", "6"]


def test_a_run_that_was_killed_in_its_first_save_begins_again(tmp_path):
    (tmp_path / f"5{UNFINISHED}").mkdir()
    with pytest.warns(UserWarning, match="5.* was not written to its end"):
        assert restore(tmp_path) is None


@pytest.fixture
def threads_that_save():
    """() -> the threads that were made for it since the test began."""

    def find():
        return {x for x in threading.enumerate() if x.name.startswith("checkpoints")} - before

    before = set(threading.enumerate())
    return find


def test_close_ends_the_thread_that_saves(tmp_path, threads_that_save):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, make_state(3))
    assert threads_that_save()
    checkpoints.close()
    assert not threads_that_save() and saved_steps(tmp_path) == ["3"]


def test_what_goes_wrong_in_the_background_is_raised_at_the_end(
    tmp_path, monkeypatch, threads_that_save
):
    def fail(folder):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoints_module, "write_checksums", fail)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, make_state(3))
    with pytest.raises(OSError, match="disk full"):
        checkpoints.close()
    assert not threads_that_save()
    with pytest.warns(UserWarning, match=r"/3 has no checksums.json: its files are read without"):
        assert restore(tmp_path)[1] == 3


def test_a_step_under_another_steps_name_is_passed_over(tmp_path):
    save_all(tmp_path, [3])
    shutil.copytree(tmp_path / "3", tmp_path / "9")
    with pytest.warns(UserWarning, match="/9: OSError: its metadata are missing or damaged"):
        assert restore(tmp_path)[1] == 3


def test_a_step_that_was_not_renamed_is_passed_over_though_it_seems_whole(tmp_path):
    save_all(tmp_path, [3, 6])
    (tmp_path / "6").rename(tmp_path / f"6{UNFINISHED}")
    with pytest.warns(UserWarning, match=rf"6{UNFINISHED}: it was not written to its end"):
        assert restore(tmp_path)[1] == 3
    assert Checkpoints(tmp_path).latest_step() == 3


def test_a_half_written_step_is_passed_over_with_a_warning_that_names_it(tmp_path):
    save_all(tmp_path, [3])
    shutil.copytree(tmp_path / "3", tmp_path / f"6{UNFINISHED}")
    (tmp_path / f"6{UNFINISHED}" / "_CHECKPOINT_METADATA").unlink()
    with pytest.warns(UserWarning, match=rf"6{UNFINISHED}: it was not written to its end"):
        state, step, _ = restore(tmp_path)
    assert step == 3
    assert_identical(state, make_state(3))
    assert Checkpoints(tmp_path).latest_step() == 3


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_step_with_any_damaged_file_is_passed_over_and_nothing_is_deleted(tmp_path, damage):
    whole = tmp_path / "whole"
    save_all(whole, [3, 6])
    files = [path for path in (whole / "6").rglob("*") if path.is_file()]
    for number, file in enumerate(file for file in files if file.stat().st_size):
        directory = tmp_path / str(number)
        shutil.copytree(whole, directory)
        damaged = directory / file.relative_to(whole)
        if damage == "missing":
            damaged.unlink()
        elif damage == "truncated":
            damaged.write_bytes(damaged.read_bytes()[: file.stat().st_size // 2])
        else:
            flip_a_bit(damaged)
        if damage == "missing" and file.name == "checksums.json":
            with pytest.warns(UserWarning, match="/6 has no checksums.json"):
                assert restore(directory)[1] == 6
            continue
        with pytest.warns(UserWarning, match=rf"passed over checkpoint {directory}/6: \w+"):
            state, step, _ = restore(directory)
        assert step == 3
        assert_identical(state, make_state(3))
        assert saved_steps(directory) == ["3", "6"]
    assert number >= 8


@pytest.mark.filterwarnings("ignore:.* has no checksums")
def test_a_lost_end_is_found_in_a_step_whose_checksums_were_not_yet_written(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (3, 6):
        checkpoints.save(step, {"w": jax.random.normal(jax.random.key(step), (400, 4))})
    checkpoints.close()
    (tmp_path / "6" / "checksums.json").unlink()
    for data in (tmp_path / "6" / "state" / "ocdbt.process_0" / "d").iterdir():
        data.write_bytes(data.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="passed over checkpoint .*/6: "):
        assert checkpoints.restore({"w": jax.ShapeDtypeStruct((400, 4), jnp.float32)})[1] == 3


def test_a_broken_step_can_be_saved_again(tmp_path):
    save_all(tmp_path, [3, 6])
    shutil.rmtree(tmp_path / "6" / "state" / "d")
    shutil.copytree(tmp_path / "6", tmp_path / f"5{UNFINISHED}")
    checkpoints = Checkpoints(tmp_path)
    with pytest.warns(UserWarning, match="passed over") as caught:
        assert checkpoints.restore(make_state())[1] == 3
    assert len(caught) == 2
    assert checkpoints.latest_step() == 3
    for step in (5, 6):
        checkpoints.save(step, make_state(step + 10))
    checkpoints.close()
    assert saved_steps(tmp_path) == ["5", "6"]
    state, step, _ = restore(tmp_path)
    assert step == 6
    assert_identical(state, make_state(16))


def test_a_broken_step_is_out_of_the_way_when_it_is_saved_again(tmp_path, monkeypatch):
    """Orbax is never asked to remove a folder that other processes write into."""
    save_all(tmp_path, [3, 6])
    flip_a_bit(largest_file(tmp_path / "6"))
    aside = tmp_path / f"6{UNFINISHED}-old"
    aside.mkdir()  # of a run that was killed as it put the step aside
    save, seen = checkpoints_module.ocp.save_async, []

    def save_async(path, *args, **options):
        seen.append((path.exists(), len(list(aside.iterdir())) > 0))
        return save(path, *args, **options)

    monkeypatch.setattr(checkpoints_module.ocp, "save_async", save_async)
    checkpoints = Checkpoints(tmp_path)
    with pytest.warns(UserWarning, match="passed over"):
        assert checkpoints.restore(make_state())[1] == 3
    checkpoints.save(6, make_state(16))
    checkpoints.close()
    assert seen == [(False, True)]
    assert saved_steps(tmp_path) == ["3", "6"] and not aside.exists()


def test_what_a_killed_run_has_put_aside_goes_with_its_step(tmp_path):
    save_all(tmp_path, [3, 6])
    shutil.copytree(tmp_path / "3", tmp_path / f"3{UNFINISHED}-old")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore(make_state())[1] == 6
    checkpoints.save(9, make_state(9))
    checkpoints.close()
    assert saved_steps(tmp_path) == ["6", "9"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["6", "9"]


def test_one_field_of_the_newest_step_that_can_be_read(tmp_path):
    save_all(tmp_path, [3, 6])
    shutil.rmtree(tmp_path / "6" / "state" / "ocdbt.process_0")
    with pytest.warns(UserWarning, match="passed over checkpoint .*/6"):
        params = load_checkpoint_item(tmp_path, "policy_params")
    assert_identical(params, make_state(3).policy_params)
    with pytest.raises(ValueError, match=r"checkpoint .*/6 cannot be read"):
        load_checkpoint_item(tmp_path, "policy_params", step=6)


def test_params_are_complete_or_absent(tmp_path):
    with pytest.raises(ValueError, match="no params in .*: the folder does not exist"):
        load_params(tmp_path / "params")
    save_params(tmp_path / "params", make_state().policy_params)
    shutil.rmtree(tmp_path / "params" / "state" / "d")
    with pytest.raises(ValueError, match="params in .* cannot be read: "):
        load_params(tmp_path / "params")


def test_an_unfinished_folder_stays_until_its_step_is_reached(tmp_path):
    (tmp_path / f"5{UNFINISHED}").mkdir()
    checkpoints = Checkpoints(tmp_path)
    for step, left in ((4, ["4", f"5{UNFINISHED}"]), (6, ["4", "6"])):
        checkpoints.save(step, make_state(step))
        checkpoints.wait()
        assert saved_steps(tmp_path) == left


def test_a_removal_that_was_killed_is_finished_by_the_next_save_without_a_warning(tmp_path):
    save_all(tmp_path, [3])
    shutil.copytree(tmp_path / "3" / "state", tmp_path / f"2{UNFINISHED}-old")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore(make_state())[1] == 3
    checkpoints.save(4, make_state(4))
    checkpoints.close()
    assert saved_steps(tmp_path) == ["3", "4"]


WRITER = """
import sys
import numpy as np
from ppo_jax.io.checkpoints import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
example = {"w": np.zeros((600, 600), np.float32)}
example["n"] = {str(i): np.zeros((), np.int32) for i in range(20)}
restored = checkpoints.restore(example)
step = 0 if restored is None else restored[1]
print("ready", flush=True)
while True:
    step += 1
    state = {"w": np.full((600, 600), step, np.float32)}
    state["n"] = {name: np.int32(step) for name in example["n"]}
    checkpoints.save(step, state, {"step_squared": step * step})
"""


def test_a_process_killed_at_any_moment_leaves_a_complete_step(tmp_path):
    example = {"w": jax.ShapeDtypeStruct((600, 600), jnp.float32)}
    example["n"] = {str(i): jax.ShapeDtypeStruct((), jnp.int32) for i in range(20)}
    moments, reached = random.Random(0), 0
    for _ in range(6):
        command = [sys.executable, "-W", "ignore", "-c", WRITER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as writer:
            assert writer.stdout.readline() == b"ready\n"
            time.sleep(0.2 + moments.random())
            os.kill(writer.pid, signal.SIGKILL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a half-written step is expected here
            restored = restore(tmp_path, example)
        if restored is None:  # killed before the first step was complete
            continue
        state, step, metadata = restored
        assert step >= reached and metadata == {"step_squared": step * step}
        assert all((np.asarray(leaf) == step).all() for leaf in jax.tree.leaves(state))
        reached = step
    assert reached > 0
