"""Files and folders that appear whole or not at all."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

PARTIAL = ".partial-"  # prefix of names that are not complete yet


@contextlib.contextmanager
def naming_file(path: str | os.PathLike) -> Iterator[None]:
    """An OSError names the file: one of writing, on a full disk for instance, names none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def atomic_write(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a file, or replace it; a reader, or a crash, finds the old content or the new one.

    Its folder must exist. Text is written as UTF-8.
    """
    path = Path(path)
    # In the same folder, since a rename is atomic only within one file system.
    partial = path.with_name(PARTIAL + path.name)
    try:
        with naming_file(path), open(partial, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # or a power cut might leave the new name with no content
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)  # half a file would keep a full disk full
        raise


@contextlib.contextmanager
def atomic_folder(folder: str | os.PathLike, *, shared: bool = False) -> Iterator[Path]:
    """A new folder to fill, which becomes `folder` at the end of the context; nothing on an error.

    Args:
        folder: absent, or empty.
        shared: other processes may write the same folder at the same time, and the first to finish
            wins. Otherwise the leftovers of a killed process are removed.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{PARTIAL}{folder.name}-"
    for leftover in () if shared else folder.parent.glob(prefix + "[0-9a-f]" * 12):
        shutil.rmtree(leftover)
    new = folder.parent / f"{prefix}{uuid.uuid4().hex[:12]}"
    new.mkdir()
    try:
        with naming_file(folder):
            yield new
        for path in new.rglob("*"):
            sync(path)
        os.rename(new, folder)
    except OSError:
        if not (shared and folder.is_dir()):
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)


def sync(path: Path) -> None:
    """Have the content of a file on disk, not only on its way there."""
    if path.is_file():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def remove_folder(folder: Path) -> None:
    """Remove a folder, or a link to one; a kill leaves the whole of it or none under its name."""
    if folder.is_symlink():
        return folder.unlink()
    leftover = folder.parent / f"{PARTIAL}{folder.name}-{uuid.uuid4().hex[:12]}"
    shutil.rmtree(folder.rename(leftover))
