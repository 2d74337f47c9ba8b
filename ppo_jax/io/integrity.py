"""Whether files are what they should be: checksums of a folder, JSON objects, names of files.

What is read from elsewhere may hold anything: every error is one line that names the file.
"""

import contextlib
import functools
import json
import math
import os
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ppo_jax.config.parsing import describe_error
from ppo_jax.data.atomic import atomic_write
from ppo_jax.data.readers import short_repr

CHECKSUMS = "checksums.json"  # {"state/_METADATA": {"bytes": 46983, "crc32": 3298103}, ...}
CHUNK = 2**20  # bytes read at a time; they stay in the processor's cache


def write_checksums(folder: Path) -> None:
    """Write the size and checksum of every file under a folder into it, whole or not at all."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "crc32": _crc32(path)}
        for path in files
        if not path.name.startswith(CHECKSUMS)
    }
    atomic_write(folder / CHECKSUMS, json.dumps(sums))


def verify_checksums(folder: Path) -> None:
    """Raise OSError, with its name, for a file that is missing or has changed.

    A folder without checksums passes, with a warning: of a process that was killed at its end.
    """
    if not (folder / CHECKSUMS).exists():
        message = f"{folder} has no {CHECKSUMS}: its files are read without being verified."
        warnings.warn(message, stacklevel=4)
        return
    for name, expected in read_json(folder / CHECKSUMS).items():
        path = folder / name
        size = path.stat().st_size if path.exists() else "none"
        if size != expected["bytes"]:
            raise OSError(f"{name} should have {expected['bytes']} bytes, found {size}.")
        if _crc32(path) != expected["crc32"]:
            raise OSError(f"{name} has changed since it was written: its checksum differs.")


def verify_again(folder: Path) -> None:
    """`verify_checksums`, cached by the sizes and dates of the folder's files.

    For decisions only: a disk may change a bit without changing a date, so what is to be computed
    with is read and compared every time.
    """
    files = [(path, path.stat()) for path in sorted(folder.rglob("*"))]
    dates = tuple((path, x.st_size, x.st_mtime_ns, x.st_ctime_ns) for path, x in files)
    _verify_as_of(folder, dates)


@functools.lru_cache(maxsize=64)  # which caches no errors: damage is reported every time
def _verify_as_of(folder: Path, dates: tuple) -> None:
    del dates  # a key of the cache
    verify_checksums(folder)


def read_json(path: Path, *, finite: bool = True) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        path: of the file.
        finite: whether NaN and infinity, which Python writes, are refused.

    Raises:
        OSError: the file is absent or may not be read.
        ValueError: it is not JSON in UTF-8, is nested too deeply, or holds something else than an
            object.
    """
    content = path.read_bytes()
    try:
        if not content.strip():
            raise ValueError("the file is empty")
        hook = finite_numbers if finite else None
        value = json.loads(content.decode("utf-8-sig"), object_hook=hook)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must be a JSON object, got {short_repr(value)}")
    return value


def finite_numbers(item: dict[str, Any]) -> dict[str, Any]:
    """An object of a JSON file; Python reads NaN, Infinity and 1e999, which JSON does not have."""
    for key, value in item.items():
        numbers = value if isinstance(value, list) else [value]
        if not all(math.isfinite(x) for x in numbers if isinstance(x, float)):
            raise ValueError(f"{key} must be finite, got {short_repr(value)}")
    return item


def file_inside(folder: Path, name: Any, named_by: str) -> Path:
    """A file of a folder by the name that another file of it gives.

    A link may lead out of the folder only within the cache of the Hugging Face hub, where it is
    how the files are kept.

    Args:
        folder: that the name must not leave.
        name: as it stands in the other file.
        named_by: that file and the field of it, for the message.

    Raises:
        ValueError: it is no relative path to a file under the folder.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"{named_by} must be the name of a file, got {short_repr(name)}")
    root = folder.parents[1] if folder.parent.name == "snapshots" else folder
    path = folder / name
    leaves = os.path.isabs(name) or ".." in Path(name).parts
    if leaves or not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{named_by} leads out of {folder}: {short_repr(name)}")
    if not os.path.isfile(path):  # which is False for a name that is too long
        raise ValueError(f"{named_by} is {short_repr(name)}, but {folder} has no such file")
    return path


@contextlib.contextmanager
def reading_file(path: str | os.PathLike) -> Iterator[None]:
    """Every error is a ValueError of one line that begins with the file or folder that is read.

    Libraries raise anything at files from elsewhere, and those in Rust a BaseException at a panic.
    An OSError with a reason of the system passes: the file may be intact.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        plain = type(error) is ValueError
        message = f"cannot be read: {describe_error(error)}"
        if plain:
            message = " ".join(str(error).split())
        raise ValueError(message if str(path) in message else f"{path}: {message}") from error


def _crc32(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            total = zlib.crc32(chunk, total)
    return total
