"""Folders of steps: which there are, and the newest that can be read.

A step is a folder named by its number. Orbax writes it under a temporary name and renames it when
all of it is on disk, so a folder named by a number alone was complete once; one with Orbax's mark
in its name was being written, or removed, as a process ended.
"""

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import jax

from ppo_jax.processes import NotTogether

T = TypeVar("T")
UNFINISHED = ".orbax-checkpoint-tmp"
STEP_FOLDER = re.compile(rf"(\d+)({re.escape(UNFINISHED)}.*)?")


class Mismatch(ValueError):
    """The checkpoint is whole, but not what the caller asks for: never a reason to pass it over."""


# Neither is a device without memory, or another process that has failed.
NOT_DAMAGED = (Mismatch, NotTogether, MemoryError, jax.errors.JaxRuntimeError)


def step_folders(directory: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all steps, finished or not, oldest first."""
    names = directory.iterdir() if directory.is_dir() else ()
    matches = [(STEP_FOLDER.fullmatch(path.name), path) for path in names]
    return sorted((int(match[1]), path) for match, path in matches if match)


def newest_readable(directory: Path, read: Callable[[int, Path], T]) -> tuple[int, T] | None:
    """The newest step and what `read(step, folder)` gives for it; None if none was ever complete.

    Warns of every newer step, by name. Raises ValueError when all complete steps are damaged: to
    begin again as if there were none would lose them without a word.
    """
    damaged = []
    for step, path in reversed(step_folders(directory)):
        if not path.name.isdigit():
            warnings.warn(f"passed over {path}: it was not written to its end.", stacklevel=4)
            continue
        try:
            return step, read(step, path)
        except NOT_DAMAGED:
            raise  # the checkpoint may be whole: passing it over would lose work
        except Exception as error:  # Orbax has no common error for damaged files
            damaged.append(f"  {step}: {reason(error)}")
            warnings.warn(f"passed over checkpoint {path}: {reason(error)}", stacklevel=4)
    if damaged:
        lines = [f"none of the checkpoints in {directory} can be read:", *damaged]
        lines += ["Mend one from a copy, or move the folder away to begin again."]
        raise ValueError("\n".join(lines))
    return None


@contextlib.contextmanager
def damage_named(what: str, advice: str = "") -> Iterator[None]:
    """Errors say of what they are, and what can be done; those that are no damage stay."""
    try:
        yield
    except NOT_DAMAGED:
        raise
    except Exception as error:
        raise ValueError(f"{what} cannot be read: {reason(error)}{advice}") from error


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
