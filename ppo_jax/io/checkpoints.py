"""Checkpoints of a whole state, step by step, and of params alone. The only file that knows Orbax.

A folder of checkpoints holds one folder a step, see `step_folders`. Orbax has no checksums of array
contents, so a step gets those of its files as soon as it is complete, and is verified against them
before it is read. Of several processes, process 0 verifies and chooses the step for all.
"""

import contextlib
import errno
import logging
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

from ppo_jax.config.parsing import describe_error
from ppo_jax.data.atomic import system_error
from ppo_jax.distributed.processes import (
    ProcessMismatch,
    is_multiprocess,
    on_primary,
    require_all_processes,
)
from ppo_jax.distributed.trees import abstract, detach, differences, named_leaves
from ppo_jax.io.integrity import verify_again, verify_checksums, write_checksums

T = TypeVar("T")
Shardings = Callable[[Any], Any]
Verify = Callable[[Path], None]


class Checkpoints:
    """The checkpoints of one run in one folder, saved asynchronously; call `close` at the end.

    Args:
        directory: made at the first save; this object is its only writer.
        keep: number of complete steps to keep. An older one is removed only when a newer one is
            complete.
        best: from complete steps, oldest first, to the one that is kept beside those; None is none.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int = 2,
        best: Callable[[list[int]], int] | None = None,
    ):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}.")
        self.directory = Path(directory).absolute()
        self.keep, self.best = keep, best
        self._broken: set[int] = set()  # steps that could not be read
        self._verified: int | None = None  # the newest step that was restored or saved
        self._saving: tuple[int, Future] | None = None  # step, done when it is on disk
        self._background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")

    def save(self, step: int, state: Any, metadata: dict[str, Any] | None = None) -> None:
        """Start to save a pytree of arrays, and return as soon as its buffers may be donated.

        The newest step that this object restored or saved is not written twice: the state is a
        function of the step. A step that `restore` found broken is replaced. The metadata are what
        JSON can hold; `restore` returns them.

        Raises:
            ProcessMismatch: it is called in `on_primary`, where Orbax would wait for the others.
            ValueError: a leaf is not an array, or the folder holds a complete checkpoint of this
                step or a later one, which a run that did not restore it would overwrite.
        """
        require_all_processes(f"step {step} of {self.directory} must be saved")
        self.wait()
        if step == self._verified:
            return
        # The others wait here while process 0 writes checksums; inside of Orbax they would give up.
        on_primary(self._make_room, step)
        # By name, so that the paths are the same whatever types the nodes have.
        tree = unflatten_dict(named_leaves(detach(state)), sep="/")
        # Orbax's transfer to the host is implicit; a caller's guard is for the caller's code.
        with failures_named(self.directory / str(step)), jax.transfer_guard("allow"):
            response = ocp.save_async(
                self.directory / str(step),
                tree,
                custom_metadata={"step": step, "metadata": metadata or {}},
            )
        self._saving = (step, self._background.submit(self._finish, step, response))

    def _make_room(self, step: int) -> None:
        """No complete step is in the way; a broken one is put aside until the new one is there.

        Orbax would remove it while the other processes go on to write into its folder."""
        if later := [other for other in self.steps() if other >= step]:
            raise ValueError(
                f"step {step} cannot be saved in {self.directory}: it holds steps {later}. "
                "Restore them first, or choose another workdir."
            )
        path = self.directory / str(step)
        if path.exists():
            set_aside(path)

    def _finish(self, step: int, response: Any) -> None:
        path = self.directory / str(step)
        with failures_named(path):
            response.result()
        # A process killed in between leaves a complete step without checksums, which is read as is.
        if jax.process_index() == 0:
            write_checksums(path)

    def restore(
        self, example: Any, step: int | None = None
    ) -> tuple[Any, int, dict[str, Any]] | None:
        """Load a step, by default the newest intact one; others are named in a warning.

        Several processes load the step whose files process 0 has verified, and no other.

        Args:
            example: the state's structure: arrays or `jax.ShapeDtypeStruct`s. Shardings are
                respected; a leaf without one goes to the first device.
            step: those after it are replaced when their turn comes; 0 loads nothing.

        Returns:
            (state, step, metadata) with dtypes and bits as saved, or None when no step was ever
            complete.

        Raises:
            ValueError: the checkpoint's paths, shapes or dtypes are not those of the example, or
                all complete steps are damaged, or several processes cannot load the arrays of the
                step that process 0 has chosen.
        """

        def load(path: Path, saved: Any, metadata: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if lines := differences(saved, example):
                message = f"checkpoint {path} does not fit this run's state:"
                raise Mismatch("\n  ".join([message, *lines]))
            return _load_like(path, example), metadata

        self.wait()
        if step is None:
            newest = _load_newest(self.directory, load)
        else:
            newest = (step, _load_step(self.directory / str(step), step, load)) if step else None
        if newest is None:
            self._broken.update(() if step is None else self.steps())
            return None
        self._verified, (state, metadata) = newest
        self._broken.update(step for step in self.steps() if step > self._verified)
        return state, self._verified, metadata

    def latest_step(self) -> int | None:
        """The newest of `steps`; None if there is none."""
        return max(self.steps(), default=None)

    def readable_step(self) -> int | None:
        """The newest intact step, for decisions (see `verify_again`); None if none was complete.

        Warns and raises as `restore` does.
        """
        return on_primary(_newest_step, self.directory, verify_again)

    def finish_write(self) -> None:
        """Wait until the last `save` is on disk; the older steps stay. Raises as `wait`."""
        if self._saving is not None:
            self._saving[1].result()

    def wait(self) -> None:
        """Wait until the last `save` is on disk, and remove what `keep` no longer covers.

        Raises: the error of the write, for instance of a full disk.
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
        """Wait for the last save and end the background thread; nothing can be saved any more."""
        with self._background:
            self.wait()

    def steps(self) -> list[int]:
        """All steps that are complete by their names and not known as broken, oldest first."""
        folders = step_folders(self.directory)
        return [step for step, path in folders if path.name.isdigit() and step not in self._broken]

    def _remove_old(self) -> None:
        steps = self.steps()
        newest, kept = steps[-1], set(steps[-self.keep :])
        if self.best is not None:
            kept.add(self.best(steps))
        folders = step_folders(self.directory)
        for step, path in folders:
            if UNFINISHED in path.name and step <= newest:
                shutil.rmtree(path)
        for step, path in folders:
            if path.name.isdigit() and step < newest and step not in kept:
                # Renamed first: a kill in between must not leave half a step under its name.
                shutil.rmtree(set_aside(path))


def set_aside(path: Path) -> Path:
    """Give a step's folder the name of an unfinished one, which is removed when it is done with."""
    aside = path.with_name(f"{path.name}{UNFINISHED}-old")
    if aside.exists():  # of a run that was killed here
        shutil.rmtree(aside)
    return path.rename(aside)


def load_checkpoint_item(
    directory: str | Path, name: str, step: int | None = None, shardings: Shardings | None = None
) -> Any:
    """Load one top-level field of a saved state, for instance the params without the optimizer.

    Args:
        directory: the folder of a run's checkpoints.
        name: the field, for instance "policy_params".
        step: of the checkpoint; None is the newest that can be read (others: a warning each).
        shardings: from the tree that is loaded, as `jax.ShapeDtypeStruct`s, to the tree of its
            shardings, for instance `Layout.shardings`. None loads to the host.

    Returns:
        The field as nested dicts (tuples are dicts with keys "0", "1" ...) of numpy arrays or,
        with shardings, of arrays of which each process has read its own shards.

    Raises:
        ValueError: there is no such checkpoint, it is damaged, or there is no such field in it;
            or what `shardings` raises.
    """

    def load(path: Path, saved: Any, _: Any) -> Any:
        if name not in saved:
            raise Mismatch(f"no field {name!r} in {path}; it holds {sorted(saved)}.")
        return _load_subtree(path, {name: saved[name]}, shardings)[name]

    directory = Path(directory).absolute()
    if step is not None:
        return _load_step(directory / str(step), step, load)
    newest = _load_newest(directory, load)
    if newest is None:
        raise ValueError(f"no complete checkpoint in {directory}.")
    return newest[1]


def save_params(path: str | Path, params: Any) -> None:
    """Save nested dicts of arrays as a folder that is complete or absent, replacing an old one."""
    require_all_processes(f"{path} must be saved")
    path, tree = Path(path).absolute(), detach(params)
    with failures_named(path), jax.transfer_guard("allow"):
        ocp.save(path, tree, overwrite=True, custom_metadata={"step": None, "metadata": {}})
    if jax.process_index() == 0:
        write_checksums(path)


def load_params(path: str | Path, shardings: Shardings | None = None) -> Any:
    """Load what `save_params` wrote, as `load_checkpoint_item` loads a field.

    Raises:
        ValueError: the folder is absent or damaged, or what `shardings` raises.
    """
    path = Path(path).absolute()
    if not path.is_dir():
        raise ValueError(f"no params in {path}: the folder does not exist.")
    with damage_named("params in", path):
        on_primary(verify_checksums, path)
        return _load_subtree(path, _read_metadata(None, path)[0], shardings)


def _load_newest(directory: Path, load: Callable[..., T]) -> tuple[int, T] | None:
    """(the newest step that can be read, `load(folder, tree of what was saved, metadata)`).

    Several processes load the step that process 0 has verified and chosen."""
    if not is_multiprocess():
        return newest_readable(directory, lambda step, path: load(path, *_verified(step, path)))
    step = on_primary(_newest_step, directory)
    if step is None:
        return None
    path = directory / str(step)
    advice = "; remove or rename that folder, and the step before it is taken"
    with damage_named("checkpoint", path, advice):
        return step, load(path, *_read_metadata(step, path))


def _load_step(path: Path, step: int, load: Callable[..., T]) -> T:
    """`load(folder, tree of what was saved, metadata)` of one step, whose files are verified."""
    with damage_named("checkpoint", path):
        on_primary(verify_checksums, path)
        return load(path, *_read_metadata(step, path))


def _newest_step(directory: Path, verify: Verify = verify_checksums) -> int | None:
    newest = newest_readable(directory, partial(_verified, verify=verify))
    return None if newest is None else newest[0]


def _verified(step: int, path: Path, verify: Verify = verify_checksums) -> tuple[Any, dict]:
    verify(path)
    return _read_metadata(step, path)


def _read_metadata(step: int | None, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the tree of what was saved, with shapes and dtypes; the caller's metadata)."""
    of_orbax = ocp.metadata(path)
    ours = of_orbax.custom_metadata
    # Orbax logs what it could not read, and returns None in its place.
    if not of_orbax.metadata or not ours or ours["step"] != step:
        _open_files(path)
        raise OSError("its metadata are missing or damaged.")
    return of_orbax.metadata, ours["metadata"]


def _open_files(path: Path) -> None:
    """Raise the error of opening a file of a checkpoint, several of them at once, if there is one:
    Orbax takes one that may not be opened for one that is not there."""
    files = [file for file in path.rglob("*") if file.is_file()]
    with contextlib.ExitStack() as opened:
        for number, file in enumerate(files):
            stream = opened.enter_context(file.open("rb"))
            if number >= OPEN_AT_ONCE:
                stream.close()


def _load_like(path: Path, example: Any) -> Any:
    wanted = named_leaves(jax.tree.map(abstract, example))
    loaded = named_leaves(_load(path, unflatten_dict(wanted, sep="/"), ocp.Context()))
    return jax.tree.unflatten(jax.tree.structure(example), [loaded[name] for name in wanted])


def _load_subtree(path: Path, saved: Any, shardings: Shardings | None) -> Any:
    """Load the arrays that `saved`, a subtree of a checkpoint's metadata, describes."""
    wanted = jax.tree.map(lambda _: np.ndarray, saved)
    if shardings is not None:
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), saved)
        try:
            shardings_tree = shardings(shapes)
        except ValueError as error:  # of the layout, not of the checkpoint
            raise Mismatch(str(error)) from error
        wanted = jax.tree.map(
            lambda x, sharding: x.update(sharding=sharding), shapes, shardings_tree
        )
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    return _load(path, wanted, context)


def _load(path: Path, wanted: Any, context: ocp.Context) -> Any:
    require_all_processes(f"{path} must be loaded")
    with context, jax.transfer_guard("allow"):
        return ocp.load(path, wanted)


UNFINISHED = ".orbax-checkpoint-tmp"
STEP_FOLDER = re.compile(rf"(\d+)({re.escape(UNFINISHED)}.*)?")


class Mismatch(ValueError):
    """The checkpoint is intact, but not what the caller asks for: never a reason to skip it."""


# Neither is a device without memory, or another process that has failed.
NOT_DAMAGED = (Mismatch, ProcessMismatch, MemoryError, jax.errors.JaxRuntimeError)
# Nor are these of the operating system: too many open files, no permission, no memory or space,
# a server that does not answer.
NOT_OF_FILES = {
    *(errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.ENOMEM, errno.ENOSPC),
    *(errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EINTR, errno.EAGAIN),
}
OPEN_AT_ONCE = 16  # files, of Orbax


def underlying_error(error: BaseException | None, path: Path) -> OSError | None:
    """The operating system's error behind one of Orbax, which may be the cause of its cause."""
    while error is not None:
        if (system := system_error(error, path)) is not None:
            return system
        error = error.__cause__ or error.__context__
    return None


def raise_if_not_damage(error: Exception, path: Path) -> None:
    """Raise what says nothing of the files, which may be intact: to skip them would lose work."""
    if isinstance(error, NOT_DAMAGED):
        raise error
    system = underlying_error(error, path)
    if system is not None and system.errno in NOT_OF_FILES:
        raise system from error


@contextlib.contextmanager
def failures_named(path: Path) -> Iterator[None]:
    """A save that fails does so with an OSError that names its folder, on a full disk for instance.

    Raises:
        OSError: whatever Orbax raised.
    """
    try:
        yield
    except NOT_DAMAGED:
        raise
    except Exception as error:
        named = OSError(f"{path} cannot be written: {describe_error(error)}")
        raise underlying_error(error, path) or named from error


def _is_news(record: logging.LogRecord) -> bool:
    """Not of an error in a thread of Orbax, which is raised as well."""
    return "_SignalingThread.run() raised" not in str(record.msg)


logging.getLogger("absl").addFilter(_is_news)


def step_folders(directory: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all steps, finished or not, oldest first."""
    names = directory.iterdir() if directory.is_dir() else ()
    matches = [(STEP_FOLDER.fullmatch(path.name), path) for path in names]
    return sorted((int(match[1]), path) for match, path in matches if match)


def newest_readable(directory: Path, read: Callable[[int, Path], T]) -> tuple[int, T] | None:
    """(the newest step that can be read, `read(step, folder)`); None if none was ever complete.

    Warns of every newer step, by name. Raises ValueError when all complete steps are damaged: to
    start over as if there were none would lose them without a word.
    """
    damaged = []
    for step, path in reversed(step_folders(directory)):
        if not path.name.isdigit():
            warnings.warn(f"passed over {path}: it was not written to its end.", stacklevel=4)
            continue
        try:
            return step, read(step, path)
        except Exception as error:  # Orbax has no common error for damaged files
            raise_if_not_damage(error, path)
            damaged.append(f"  {step}: {describe_error(error)}")
            warnings.warn(f"passed over checkpoint {path}: {describe_error(error)}", stacklevel=4)
    if damaged:
        lines = [f"none of the checkpoints in {directory} can be read:", *damaged]
        lines += ["Mend one from a copy, or move the folder away to begin again."]
        raise ValueError("\n".join(lines))
    return None


@contextlib.contextmanager
def damage_named(what: str, path: Path, advice: str = "") -> Iterator[None]:
    """Errors of damage name what is read, and what can be done; others pass."""
    try:
        yield
    except Exception as error:
        raise_if_not_damage(error, path)
        reason = describe_error(error)
        raise ValueError(f"{what} {path} cannot be read: {reason}{advice}") from error
