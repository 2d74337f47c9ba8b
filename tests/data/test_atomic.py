"""Files and folders appear whole or not at all."""

import subprocess
import sys

import pytest

from ppo_jax.data.atomic import atomic_folder, atomic_write


def test_a_file_is_replaced_and_nothing_else_stays(tmp_path):
    path = tmp_path / "file.json"
    for content in ("old", b"new \xc3\xa9", "é"):
        atomic_write(path, content)
    assert path.read_text() == "é"
    assert [x.name for x in tmp_path.iterdir()] == ["file.json"]


def test_a_folder_that_fails_halfway_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="halfway"), atomic_folder(tmp_path / "model") as new:
        (new / "half").write_text("1")
        assert not (tmp_path / "model").exists()
        raise RuntimeError("halfway")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_appears_when_it_is_whole(tmp_path):
    with atomic_folder(tmp_path / "a" / "model") as new:
        (new / "file").write_text("1")
    assert (tmp_path / "a" / "model" / "file").read_text() == "1"
    assert [x.name for x in (tmp_path / "a").iterdir()] == ["model"]


def test_what_a_killed_process_has_left_is_removed(tmp_path):
    code = (
        "import os, sys\nfrom ppo_jax.data.atomic import atomic_folder\n"
        "with atomic_folder(sys.argv[1]) as new:\n    os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], check=False)
    assert [x.name[:9] for x in tmp_path.iterdir()] == [".partial-"]
    with atomic_folder(tmp_path / "model"):
        pass
    assert [x.name for x in tmp_path.iterdir()] == ["model"]


def test_a_folder_whose_name_goes_on_is_left_alone(tmp_path):
    with atomic_folder(tmp_path / "model-bf16") as other:
        with atomic_folder(tmp_path / "model"):
            pass
        (other / "file").write_text("1")
    assert {x.name for x in tmp_path.iterdir()} == {"model", "model-bf16"}


def test_of_two_that_share_a_folder_the_first_wins(tmp_path):
    with atomic_folder(tmp_path / "model", shared=True) as slow:
        (slow / "who").write_text("slow")
        with atomic_folder(tmp_path / "model", shared=True) as fast:
            (fast / "who").write_text("fast")
    assert (tmp_path / "model" / "who").read_text() == "fast"
    with pytest.raises(OSError), atomic_folder(tmp_path / "model"):
        pass
