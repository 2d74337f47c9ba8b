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


# --- files from elsewhere -------------------------------------------------------------------------


def test_an_object_is_read_and_anything_else_is_told_with_its_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": [1, 2.5, "NaN"], "b": {"c": null}}')
    assert integrity.read_json(path) == {"a": [1, 2.5, "NaN"], "b": {"c": None}}
    for content, words in (
        (b"", "the file is empty"),
        (b"[]", "must be a JSON object, got []"),
        (b"[" * 10**6, "recursion"),
        (b'{"a": {"b": [1, NaN]}}', "b must be finite, got [1, nan]"),
        (b'{"a": -1e999}', "a must be finite, got -inf"),
        (b'{"a": "\xe9"}', "can't decode byte 0xe9"),
        (b'{"a": 1,}', "line 1 column"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="^" + re.escape(str(path))) as told:
            integrity.read_json(path)
        assert words in str(told.value) and len(str(told.value).splitlines()) == 1
    with pytest.raises(FileNotFoundError):
        integrity.read_json(tmp_path / "gone.json")


@pytest.mark.parametrize(
    "error",
    [
        KeyError("a"),
        RecursionError("deep"),
        MemoryError(),
        OSError("no reason of the system"),
        UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"),
        type("PanicException", (BaseException,), {})("index out of bounds\nat line 3"),
        type("Unprintable", (Exception,), {"__str__": lambda self: 1 / 0})(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_library_raises_is_one_line_that_names_the_file(error):
    with pytest.raises(ValueError, match=r"^model/a\.json: cannot be read: .*$") as told:  # noqa: SIM117
        with integrity.reading_file("model/a.json"):
            raise error
    assert type(error).__name__ in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(2), OSError(24, "too many")])
def test_what_says_nothing_of_a_file_passes(error):
    with pytest.raises(type(error)) as told, integrity.reading_file("a.json"):
        raise error
    assert told.value is error


def test_a_name_does_not_lead_out_of_its_folder(tmp_path):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for path in (folder / "a", folder / "sub" / "b", tmp_path / "c"):
        path.write_text("")
    (folder / "out").symlink_to(tmp_path / "c")
    (folder / "in").symlink_to("sub/b")
    for name in ("a", "sub/b", "in"):
        assert integrity.file_inside(folder, name, "x") == folder / name
    for name in ("../c", "/etc/passwd", "sub/../../c", "out", "sub/../a", str(folder / "a")):
        with pytest.raises(ValueError, match="^x leads out of"):
            integrity.file_inside(folder, name, "x")
    for name in (None, 3, "", "a\0", [], "gone", "sub", "a" * 5000):
        with pytest.raises(ValueError, match="^x (must be the name|is .* no such file)"):
            integrity.file_inside(folder, name, "x")
