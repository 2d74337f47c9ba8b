"""Checkpoints of a whole state, step by step, and of params alone. The only file that knows Orbax.

A folder of checkpoints holds one folder a step, named by its number. Orbax writes a step under a
temporary name and renames it when all of it is on disk, so a folder named by a number alone was
complete once; one with Orbax's mark in its name was being written, or removed, as a process ended.
Orbax has no checksums of what arrays hold, so a step gets those of its files as soon as it is
complete, and is compared with them before it is read.
"""

import contextlib
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from orbax.checkpoint import v1 as ocp

from ppo_jax.checksums import verify_again, verify_checksums, write_checksums
from ppo_jax.leaves import abstract, detach, differences, named_leaves

T = TypeVar("T")
UNFINISHED = ".orbax-checkpoint-tmp"
STEP_FOLDER = re.compile(rf"(\d+)({re.escape(UNFINISHED)}.*)?")


class Checkpoints:
    """The checkpoints of one run in one folder, saved asynchronously; call `close` at the end.

    Args:
        directory: the folder, made at the first save; this object is its only writer.
        keep: how many complete steps stay. An older one goes only when a newer one is complete.
    """

    def __init__(self, directory: str | Path, *, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}.")
        self.directory = Path(directory).absolute()
        self.keep = keep
        self._broken: set[int] = set()  # steps that could not be read
        self._verified: int | None = None  # the newest step that was restored or saved
        self._saving: tuple[int, Future] | None = None  # step, and what ends when it is on disk
        self._background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")

    def save(self, step: int, state: Any, metadata: dict[str, Any] | None = None) -> None:
        """Start to save a state, and return as soon as its buffers may be donated.

        The newest step that this object restored or saved is not written twice: the state is a
        function of the step. A step that `restore` found broken is replaced.

        Args:
            step: number of steps that made this state.
            state: a pytree of arrays (a struct, optax states and nested dicts included).
            metadata: what JSON can hold, given back by `restore`.

        Raises:
            ValueError: a leaf is not an array, or the folder holds a complete checkpoint of this
                step or a later one, which a run that did not restore it would overwrite.
        """
        self.wait()
        if step == self._verified:
            return
        if later := [other for other in self.steps() if other >= step]:
            have = f"step {step} cannot be saved in {self.directory}: it holds steps {later}."
            raise ValueError(f"{have} Restore them first, or choose another workdir.")
        # Named, so that a state is saved under the same paths whatever its nodes are made of.
        tree = unflatten_dict(named_leaves(detach(state)), sep="/")
        # Orbax's transfer to the host is implicit; a caller's guard is for the caller's code.
        with jax.transfer_guard("allow"):
            response = ocp.save_async(
                self.directory / str(step),
                tree,
                overwrite=True,  # only a broken step can be in the way
                custom_metadata={"step": step, "metadata": metadata or {}},
            )
        self._saving = (step, self._background.submit(self._finish, step, response))

    def _finish(self, step: int, response: Any) -> None:
        response.result()
        # A process killed in between leaves a complete step without checksums, which is read as is.
        if jax.process_index() == 0:
            write_checksums(self.directory / str(step))

    def restore(self, example: Any) -> tuple[Any, int, dict[str, Any]] | None:
        """Load the newest step that is whole; a half-written or damaged one is named in a warning.

        Args:
            example: the state's structure: arrays or `jax.ShapeDtypeStruct`s. Shardings are
                respected; a leaf without one goes to the first device.

        Returns:
            (state, step, metadata) with dtypes and bits as saved, or None when no step was ever
            complete.

        Raises:
            ValueError: the checkpoint's paths, shapes or dtypes are not those of the example, or
                all complete steps are damaged.
        """

        def read(step: int, path: Path) -> tuple[Any, dict[str, Any]]:
            saved, metadata = _read_metadata(step, path)
            if lines := differences(saved, example):
                unfit = f"checkpoint {path} does not fit this run's state:"
                raise _Mismatch("\n  ".join([unfit, *lines]))
            return _load_like(path, example), metadata

        self.wait()
        found = _newest_readable(self.directory, read)
        if found is None:
            return None
        self._verified, (state, metadata) = found
        self._broken.update(step for step in self.steps() if step > self._verified)
        return state, self._verified, metadata

    def latest_step(self) -> int | None:
        """The newest of `steps`; None if there is none."""
        return max(self.steps(), default=None)

    def readable_step(self) -> int | None:
        """The newest step whose files are as they were written; None if none was ever complete.

        For decisions, see `verify_again`. Warns and raises as `restore` does.
        """
        found = _newest_readable(self.directory, partial(_read_metadata, verify=verify_again))
        return None if found is None else found[0]

    def wait(self) -> None:
        """Wait until the last `save` is on disk, and drop what `keep` no longer covers.

        Raises: what went wrong while it was written, for instance a full disk.
        """
        if self._saving is None:
            return
        (step, finished), self._saving = self._saving, None
        finished.result()
        self._verified = step
        self._broken.discard(step)
        if jax.process_index() == 0:
            self._remove_old()

    def close(self) -> None:
        """Wait for the last save and end the thread that saves; nothing can be saved any more."""
        with self._background:
            self.wait()

    def steps(self) -> list[int]:
        """All steps that are complete by their names and not found broken, oldest first."""
        folders = _step_folders(self.directory)
        return [step for step, path in folders if path.name.isdigit() and step not in self._broken]

    def _remove_old(self) -> None:
        newest, oldest_kept = self.steps()[-1], self.steps()[-self.keep :][0]
        for step, path in _step_folders(self.directory):
            if path.name.isdigit() and step < oldest_kept:
                # Renamed first: a kill in between must not leave half a step under its name.
                path = path.rename(path.with_name(f"{step}{UNFINISHED}-old"))
            if UNFINISHED in path.name and step <= newest:
                shutil.rmtree(path)


def load_checkpoint_item(directory: str | Path, name: str, step: int | None = None) -> Any:
    """Load one top-level field of a saved state, for instance the params without the optimizer.

    Args:
        directory: the folder of a run's checkpoints.
        name: the field, for instance "policy_params".
        step: which checkpoint; None is the newest that can be read (others: a warning each).

    Returns:
        The field as nested dicts of numpy arrays (tuples are dicts with keys "0", "1" ...).

    Raises:
        ValueError: there is no such checkpoint, it is damaged, or there is no such field in it.
    """

    def read(step: int, path: Path) -> Any:
        saved, _ = _read_metadata(step, path)
        if name not in saved:
            raise _Mismatch(f"no field {name!r} in {path}; it holds {sorted(saved)}.")
        return _load_as_numpy(path, {name: saved[name]})[name]

    directory = Path(directory).absolute()
    if step is not None:
        with _damage_named(f"checkpoint {directory / str(step)}"):
            return read(step, directory / str(step))
    found = _newest_readable(directory, read)
    if found is None:
        raise ValueError(f"no complete checkpoint in {directory}.")
    return found[1]


def save_params(path: str | Path, params: Any) -> None:
    """Save params alone as a folder that is complete or absent, and replace one that is there.

    Args:
        path: the folder.
        params: nested dicts with string keys, of jax or numpy arrays.
    """
    path, tree = Path(path).absolute(), detach(params)
    with jax.transfer_guard("allow"):
        ocp.save(path, tree, overwrite=True, custom_metadata={"step": None, "metadata": {}})
    if jax.process_index() == 0:
        write_checksums(path)


def load_params(path: str | Path) -> Any:
    """Load what `save_params` wrote: nested dicts of numpy arrays, on no device yet.

    Raises:
        ValueError: the folder is absent or damaged.
    """
    path = Path(path).absolute()
    if not path.is_dir():
        raise ValueError(f"no params in {path}: the folder does not exist.")
    with _damage_named(f"params in {path}"):
        return _load_as_numpy(path, _read_metadata(None, path)[0])


class _Mismatch(ValueError):
    """The checkpoint is whole, but not what the caller asks for: never a reason to pass it over."""


def _step_folders(directory: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all steps, finished or not, oldest first."""
    names = directory.iterdir() if directory.is_dir() else ()
    matches = [(STEP_FOLDER.fullmatch(path.name), path) for path in names]
    return sorted((int(match[1]), path) for match, path in matches if match)


def _newest_readable(directory: Path, read: Callable[[int, Path], T]) -> tuple[int, T] | None:
    """The newest step and what `read(step, folder)` gives for it; None if none was ever complete.

    Warns of every newer step, by name. Raises ValueError when all complete steps are damaged: to
    begin again as if there were none would lose them without a word.
    """
    damaged = []
    for step, path in reversed(_step_folders(directory)):
        if not path.name.isdigit():
            warnings.warn(f"passed over {path}: it was not written to its end.", stacklevel=3)
            continue
        try:
            return step, read(step, path)
        except (_Mismatch, MemoryError, jax.errors.JaxRuntimeError):
            raise  # the checkpoint may be whole: passing it over would lose work
        except Exception as error:  # Orbax has no common error for damaged files
            damaged.append(f"  {step}: {_reason(error)}")
            warnings.warn(f"passed over checkpoint {path}: {_reason(error)}", stacklevel=3)
    if damaged:
        told = "\n".join([f"none of the checkpoints in {directory} can be read:", *damaged])
        raise ValueError(f"{told}\nMend one from a copy, or move the folder away to begin again.")
    return None


@contextlib.contextmanager
def _damage_named(what: str) -> Iterator[None]:
    try:
        yield
    except (_Mismatch, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{what} cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"


def _read_metadata(
    step: int | None, path: Path, verify: Callable[[Path], None] = verify_checksums
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the tree of what was saved, with shapes and dtypes; the caller's metadata)."""
    verify(path)
    found = ocp.metadata(path)
    own = found.custom_metadata
    # Orbax logs what it could not read, and returns None in its place.
    if not found.metadata or not own or own["step"] != step:
        raise OSError("its metadata are missing or damaged.")
    return found.metadata, own["metadata"]


def _load_like(path: Path, example: Any) -> Any:
    wanted = named_leaves(jax.tree.map(abstract, example))
    with jax.transfer_guard("allow"):
        loaded = named_leaves(ocp.load(path, unflatten_dict(wanted, sep="/")))
    return jax.tree.unflatten(jax.tree.structure(example), [loaded[name] for name in wanted])


def _load_as_numpy(path: Path, saved: Any) -> Any:
    """Load the part of a checkpoint that `saved`, a subtree of its metadata, describes."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        return ocp.load(path, jax.tree.map(lambda _: np.ndarray, saved))
