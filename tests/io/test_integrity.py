"""What a disk has changed is found before it is used, and is not looked for twice in a row."""

import os
import re
import time

import pytest

from ppo_jax.io import integrity
from ppo_jax.io.checkpoints import Checkpoints, load_checkpoint_item, load_params, save_params
from tests.support.tiny_state import (
    assert_identical,
    flip_a_bit,
    largest_file,
    make_state,
    restore,
    save_all,
)


def test_a_flipped_bit_in_an_array_is_found_and_the_older_step_is_restored(tmp_path):
    save_all(tmp_path, [3, 6])
    data = largest_file(tmp_path / "6")
    flip_a_bit(data)
    named = f"passed over checkpoint {tmp_path}/6: OSError: {data.relative_to(tmp_path / '6')} has"
    with pytest.warns(UserWarning, match=re.escape(named)):
        state, step, _ = restore(tmp_path)
    assert step == 3
    assert_identical(state, make_state(3))
    with pytest.warns(UserWarning, match=re.escape(named)):
        assert Checkpoints(tmp_path).readable_step() == 3
    with pytest.warns(UserWarning, match=re.escape(named)):
        params = load_checkpoint_item(tmp_path, "policy_params")
    assert_identical(params, make_state(3).policy_params)
    with pytest.raises(ValueError, match="6 cannot be read: OSError: .* its checksum differs"):
        load_checkpoint_item(tmp_path, "policy_params", step=6)


def count_reads(monkeypatch):
    """A list that gets each file whose checksum is computed."""
    read, crc32 = [], integrity._crc32
    monkeypatch.setattr(integrity, "_crc32", lambda path: read.append(path) or crc32(path))
    return read


def test_to_decide_reads_a_file_once_and_again_when_it_was_written_to(tmp_path, monkeypatch):
    save_all(tmp_path, [3, 6])
    read = count_reads(monkeypatch)
    for _ in range(3):
        assert Checkpoints(tmp_path).readable_step() == 6
    assert read and len(read) == len(set(read))
    data = largest_file(tmp_path / "6")
    dates = data.stat().st_atime_ns, data.stat().st_mtime_ns
    flip_a_bit(data)
    os.utime(data, ns=dates)  # the date of its content: that of its change of date stays
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"6: OSError: .* its checksum differs"):
            assert Checkpoints(tmp_path).readable_step() == 3


def test_to_load_reads_every_file_whatever_was_decided_before(tmp_path, monkeypatch):
    """A disk that loses a bit changes no date."""
    save_all(tmp_path, [3])
    assert Checkpoints(tmp_path).readable_step() == 3
    read = count_reads(monkeypatch)
    restore(tmp_path)
    once = sorted(read)
    assert once
    load_checkpoint_item(tmp_path, "policy_params")
    assert sorted(read) == sorted(once * 2)


def test_a_flipped_bit_in_params_alone_is_refused(tmp_path):
    save_params(tmp_path / "params", make_state().policy_params)
    flip_a_bit(largest_file(tmp_path / "params"))
    with pytest.raises(ValueError, match="params cannot be read: OSError: .* its checksum differs"):
        load_params(tmp_path / "params")


def test_checksums_are_written_in_the_background_as_soon_as_a_step_is_complete(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, make_state(3))
    until = time.monotonic() + 60
    while not (tmp_path / "3" / "checksums.json").exists() and time.monotonic() < until:
        time.sleep(0.01)
    assert (tmp_path / "3" / "checksums.json").exists()
    checkpoints.close()
