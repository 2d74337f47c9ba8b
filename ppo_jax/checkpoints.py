"""Checkpoints of a whole state, step by step, and of params alone. The only file that knows Orbax.

A folder of checkpoints holds one folder a step, named by its number. Orbax writes a step under a
temporary name and renames it when all of it is on disk, so a folder named by a number alone was
complete once; one with Orbax's mark in its name was being written, or removed, as a process ended.
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from orbax.checkpoint import v1 as ocp

UNFINISHED = ".orbax-checkpoint-tmp"
FILES = "files.json"  # our list of a checkpoint's files and their sizes
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
        self._saving: tuple[int, Any] | None = None  # step and Orbax's response

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
        later = [other for other in self._complete_steps() if other >= step]
        if later:
            have = f"step {step} cannot be saved in {self.directory}: it holds steps {later}."
            raise ValueError(f"{have} Restore them first, or choose another workdir.")
        tree = unflatten_dict({k: _detached(k, x) for k, x in _named(state).items()}, sep="/")
        # Orbax's transfer to the host is implicit; a caller's guard is for the caller's code.
        with jax.transfer_guard("allow"):
            response = ocp.save_async(
                self.directory / str(step),
                tree,
                overwrite=True,  # only a broken step can be in the way
                custom_metadata={"step": step, "metadata": metadata or {}},
            )
        self._saving = (step, response)

    def restore(self, example: Any) -> tuple[Any, int, dict[str, Any]] | None:
        """Load the newest complete step; one that is half-written or broken is named in a warning.

        Args:
            example: the state's structure: arrays or `jax.ShapeDtypeStruct`s. Shardings are
                respected; a leaf without one goes to the first device.

        Returns:
            (state, step, metadata) with dtypes and bits as saved, or None when nothing can be read.

        Raises:
            ValueError: the checkpoint's paths, shapes or dtypes are not those of the example.
        """
        self.wait()
        for step, path in _newest_first(self.directory):
            try:
                saved, metadata = _read_metadata(path, step)
                _check_same_structure(path, saved, example)
                state = _load_like(path, example)
            except (_Mismatch, MemoryError, jax.errors.JaxRuntimeError):
                raise  # the checkpoint may be whole: passing it over would lose work
            except Exception as error:  # Orbax has no common error for damaged files
                self._broken.add(step)
                warnings.warn(f"passed over checkpoint {path}: {_reason(error)}", stacklevel=2)
                continue
            self._verified = step
            return state, step, metadata
        return None

    def latest_step(self) -> int | None:
        """The newest step, complete by its name and not found broken; None if there is none."""
        return max(self._complete_steps(), default=None)

    def readable_step(self) -> int | None:
        """The newest step whose files are all there; None if there is none.

        One that is half-written or broken is named in a warning, as by `restore`.
        """
        for step, path in _newest_first(self.directory):
            try:
                _read_metadata(path, step)
                return step
            except Exception as error:  # as in `restore`
                warnings.warn(f"passed over checkpoint {path}: {_reason(error)}", stacklevel=2)
        return None

    def wait(self) -> None:
        """Wait until the last `save` is on disk, and drop what `keep` no longer covers.

        Raises: what went wrong while it was written, for instance a full disk.
        """
        if self._saving is None:
            return
        (step, response), self._saving = self._saving, None
        response.result()
        self._verified = step
        self._broken.discard(step)
        if jax.process_index() == 0:
            _list_files(self.directory / str(step))
            self._remove_old()

    def close(self) -> None:
        """Wait for the last save; nothing else is held open."""
        self.wait()

    def _complete_steps(self) -> list[int]:
        folders = _step_folders(self.directory)
        return [step for step, path in folders if path.name.isdigit() and step not in self._broken]

    def _remove_old(self) -> None:
        newest, oldest_kept = self._complete_steps()[-1], self._complete_steps()[-self.keep :][0]
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
        ValueError: there is no such checkpoint, or no such field in it.
    """
    directory = Path(directory).absolute()
    candidates = [(step, directory / str(step))] if step is not None else _newest_first(directory)
    for number, path in candidates:
        try:
            saved, _ = _read_metadata(path, number)
            if name not in saved:
                raise _Mismatch(f"no field {name!r} in {path}; it holds {sorted(saved)}.")
            return _load_as_numpy(path, {name: saved[name]})[name]
        except (_Mismatch, MemoryError):
            raise
        except Exception as error:  # as in `Checkpoints.restore`
            if step is not None:
                raise ValueError(f"checkpoint {path} cannot be read: {_reason(error)}") from error
            warnings.warn(f"passed over checkpoint {path}: {_reason(error)}", stacklevel=2)
    raise ValueError(f"no complete checkpoint in {directory}.")


def save_params(path: str | Path, params: Any) -> None:
    """Save params alone as a folder that is complete or absent, and replace one that is there.

    Args:
        path: the folder.
        params: nested dicts with string keys, of jax or numpy arrays.
    """
    path = Path(path).absolute()
    tree = jax.tree_util.tree_map_with_path(lambda keys, x: _detached(_name(keys), x), params)
    with jax.transfer_guard("allow"):
        ocp.save(path, tree, overwrite=True, custom_metadata={"step": None, "metadata": {}})
    if jax.process_index() == 0:
        _list_files(path)


def load_params(path: str | Path) -> Any:
    """Load what `save_params` wrote: nested dicts of numpy arrays, on no device yet.

    Raises:
        ValueError: the folder is absent or damaged.
    """
    path = Path(path).absolute()
    if not path.is_dir():
        raise ValueError(f"no params in {path}: the folder does not exist.")
    try:
        return _load_as_numpy(path, _read_metadata(path, None)[0])
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"params in {path} cannot be read: {_reason(error)}") from error


class _Mismatch(ValueError):
    """The checkpoint is whole, but not what the caller asks for: never a reason to pass it over."""


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _named(tree: Any) -> dict[str, Any]:
    """{"opt_state/0/mu/kernel": leaf, ...} in the order of the tree's leaves."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _detached(name: str, leaf: Any) -> Any:
    """The leaf in memory of its own, where Orbax would write from the buffer that a step donates.

    On CPU the host's view of an array is the array itself. Elsewhere Orbax has copied it to the
    host when `save_async` returns; a copy on the device would cost memory for nothing.
    """
    if isinstance(leaf, jax.Array):
        on_cpu = next(iter(leaf.sharding.device_set)).platform == "cpu"
        return leaf.copy() if on_cpu else leaf
    if isinstance(leaf, np.ndarray | np.generic):
        return np.array(leaf)
    raise ValueError(f"{name or 'the state'} must be an array to be saved, got {type(leaf)}.")


def _step_folders(directory: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all steps, finished or not, oldest first."""
    names = directory.iterdir() if directory.is_dir() else ()
    matches = [(STEP_FOLDER.fullmatch(path.name), path) for path in names]
    return sorted((int(match[1]), path) for match, path in matches if match)


def _newest_first(directory: Path) -> Iterator[tuple[int, Path]]:
    """(step, folder) that were complete once; the unfinished ones met on the way are named."""
    for step, path in reversed(_step_folders(directory)):
        if not path.name.isdigit():
            warnings.warn(f"passed over {path}: it was not written to its end.", stacklevel=3)
            continue
        yield step, path


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"


def _read_metadata(path: Path, step: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the tree of what was saved, with shapes and dtypes; the caller's metadata)."""
    _check_files(path)
    found = ocp.metadata(path)
    own = found.custom_metadata
    # Orbax logs what it could not read, and returns None in its place.
    if not found.metadata or not own or own["step"] != step:
        raise OSError("its metadata are missing or damaged.")
    return found.metadata, own["metadata"]


def _list_files(path: Path) -> None:
    files = [file for file in path.rglob("*") if file.is_file()]
    sizes = {str(file.relative_to(path)): file.stat().st_size for file in files}
    (path / f"{FILES}.tmp").write_text(json.dumps(sizes))
    os.replace(path / f"{FILES}.tmp", path / FILES)


def _check_files(path: Path) -> None:
    """Name a lost or shortened file before Orbax starts many reads, of which each may fail.

    The list is written after Orbax has committed: a process killed in between leaves a complete
    checkpoint without it, and then Orbax's own errors must do.
    """
    if not (path / FILES).exists():
        return
    for name, size in json.loads((path / FILES).read_text()).items():
        found = (path / name).stat().st_size if (path / name).exists() else "none"
        if found != size:
            raise OSError(f"{name} should have {size} bytes, found {found}.")


def _check_same_structure(path: Path, saved: Any, example: Any) -> None:
    saved, expected = (
        {name: f"{tuple(leaf.shape)} {np.dtype(leaf.dtype)}" for name, leaf in _named(tree).items()}
        for tree in (saved, example)
    )
    lines = [
        f"  {name}: saved {saved.get(name, 'nothing')}, expected {expected.get(name, 'nothing')}"
        for name in {**expected, **saved}
        if saved.get(name) != expected.get(name)
    ]
    if lines:
        raise _Mismatch("\n".join([f"checkpoint {path} does not fit this run's state:", *lines]))


def _load_like(path: Path, example: Any) -> Any:
    abstract = {name: _abstract(leaf) for name, leaf in _named(example).items()}
    with jax.transfer_guard("allow"):
        loaded = _named(ocp.load(path, unflatten_dict(abstract, sep="/")))
    return jax.tree.unflatten(jax.tree.structure(example), [loaded[name] for name in abstract])


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _load_as_numpy(path: Path, saved: Any) -> Any:
    """Load the part of a checkpoint that `saved`, a subtree of its metadata, describes."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        return ocp.load(path, jax.tree.map(lambda _: np.ndarray, saved))
