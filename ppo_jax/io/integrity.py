"""Checksums of a folder's files: written when it is complete, verified before it is read."""

import functools
import json
import warnings
import zlib
from pathlib import Path

from ppo_jax.data.atomic import atomic_write

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
    for name, expected in json.loads((folder / CHECKSUMS).read_text(encoding="utf-8")).items():
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


def _crc32(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            total = zlib.crc32(chunk, total)
    return total
