"""Files and folders appear whole or not at all."""

import contextlib
import resource
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from ppo_jax.data import atomic
from ppo_jax.data.atomic import atomic_folder, atomic_write, remove_folder


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


@pytest.fixture
def full_disk():
    """A context: no file may be longer than 1,000 bytes, which stands for a full disk."""

    @contextlib.contextmanager
    def limit():
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


def test_on_a_full_disk_the_old_file_stays_and_the_error_names_it(tmp_path, full_disk):
    path = tmp_path / "file.json"
    atomic_write(path, "old")
    with full_disk(), pytest.raises(OSError, match=f"File too large: '{path}'"):
        atomic_write(path, "new" * 1000)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_on_a_full_disk_a_folder_is_named_whatever_library_writes_into_it(tmp_path, full_disk):
    weights = {"a": np.zeros(1000, np.float32)}
    tokenizer = Tokenizer(WordLevel({f"word {i}": i for i in range(1000)}))
    for write in (
        lambda new: (new / "file").write_text("1" * 2000),
        lambda new: save_file(weights, new / "model.safetensors"),
        lambda new: tokenizer.save(str(new / "tokenizer.json")),
    ):
        with full_disk(), pytest.raises(OSError, match=f"File too large: '{tmp_path}/model'"):
            with atomic_folder(tmp_path / "model") as new:
                write(new)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_removed_whole_and_of_a_link_the_link_alone(tmp_path):
    (tmp_path / "base" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "base")
    remove_folder(tmp_path / "link")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    remove_folder(tmp_path / "base")
    assert not list(tmp_path.iterdir())


def test_a_kill_while_a_folder_is_removed_leaves_none_under_its_name(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    monkeypatch.setattr(atomic.shutil, "rmtree", lambda *_, **__: None)  # as if killed before
    remove_folder(tmp_path / "base")
    assert [path.name[:14] for path in tmp_path.iterdir()] == [".partial-base-"]
    monkeypatch.undo()
    with atomic_folder(tmp_path / "base"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
