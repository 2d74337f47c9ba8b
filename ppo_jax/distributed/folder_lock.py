"""One run a folder: a lock file that names the process, and the machine, that hold it.

On one machine `flock` decides: it ends with its process, however that ends. Another machine that
shares the folder may not see it (NFS and Lustre can be mounted either way), and some file systems
have none. There the holder shows by the date of the file that it lives: one whose date stands
still is dead. What is relied on: two starts within a second, on machines that see no lock of each
other, may not be told apart.
"""

import contextlib
import datetime
import errno
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"
BEAT_S = 3  # between two signs of life
PATIENCE_S = 15  # without a sign of life, and the holder is taken for dead
POLL_S = 0.5
SETTLE_S = 1  # without `flock`: who is in the file by then has the folder
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)

_held: set[int] = set()  # open lock files


class FolderInUse(ValueError):
    """Another process holds the folder."""


def _let_go_in_child():
    """A forked process may live longer than its parent, and would hold the folder on."""
    for lock in _held:
        os.close(lock)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


@contextlib.contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder: two would mix their metrics and checkpoints.

    The folder is made where it is not there, and removed again where nothing was put into it. One
    that cannot be written to is not held: nothing can be mixed in it.

    Raises:
        FolderInUse: another process holds the folder.
        ValueError: it cannot be made, or its lock is another user's.
        FileNotFoundError: the folder was removed meanwhile, which made the work in it fail.
    """
    made = _make_folder(folder)
    try:
        path, lock = folder / LOCK, _acquire(folder / LOCK)
        try:
            yield
        except Exception as error:
            if lock is not None and not path.exists():
                message = f"{folder} was removed while a run was under way in it"
                raise FileNotFoundError(message) from error
            raise
        finally:
            if lock is not None:
                _release(lock, path)
    finally:
        for new in made:
            with contextlib.suppress(OSError):  # there is something in it
                new.rmdir()


@contextlib.contextmanager
def hold_when_free(folder: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """`hold_folder`, but wait where another process holds it.

    Args:
        folder: as for `hold_folder`.
        tell: is called once, with who holds it, if there is a wait.
    """
    told = False
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(hold_folder(folder))
                break
            except FolderInUse as error:
                if not told:
                    tell(str(error).partition(": wait for")[0])
                told = True
                time.sleep(POLL_S)
        yield


def _make_folder(folder: Path) -> list[Path]:
    """Make a folder and those above it; returns those that are new, the innermost first."""
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"the workdir {folder} cannot be made: {error.strerror}") from error
    return made


def _acquire(path: Path) -> int | None:
    """The lock file, open and with our record in it; None where it cannot be written."""
    while True:
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)  # to write: NFS asks for that
        except FileNotFoundError:  # a holder that has put nothing into it has removed the folder
            path.parent.mkdir(parents=True, exist_ok=True)
            continue
        except OSError as error:
            if error.errno not in NOT_WRITABLE:
                raise
            if path.exists() and os.access(path.parent, os.W_OK):
                raise ValueError(
                    f"{path} is another user's: wait for the end of that run, or choose another "
                    "workdir; where none is under way, remove the file"
                ) from error
            return None
        try:
            if _take(lock, path):
                _held.add(lock)
                threading.Thread(target=_beat, args=(lock, path), daemon=True).start()
                return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _take(lock: int, path: Path) -> bool:
    """Whether the open file is our lock now; False where its holder has just removed it.

    Raises:
        FolderInUse: another process holds it.
    """
    locked, holder = _flock(lock), _read(lock)
    # With the lock of a process on this machine that process is dead, whatever its record says.
    unsure = holder and not (locked and holder.get("machine") == _machine())
    if locked is None or (unsure and _is_alive(path, holder)):
        raise FolderInUse(_refusal(path.parent, holder))
    if not path.exists() or not os.path.samestat(os.fstat(lock), path.stat()):
        return False
    ours = _record()
    os.lseek(lock, 0, os.SEEK_SET)
    os.ftruncate(lock, 0)
    os.write(lock, json.dumps(ours).encode())
    if not locked:
        time.sleep(SETTLE_S)
        if (holder := _read(lock)) != ours:
            raise FolderInUse(_refusal(path.parent, holder))
    return True


def _flock(lock: int) -> bool | None:
    """Whether we have locked the file; None where another has, False where there are no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError:
        return False
    return True


def _release(lock: int, path: Path):
    if lock not in _held:  # in a forked process
        return
    _held.remove(lock)  # ends its heartbeat
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(lock), path.stat()):
            path.unlink()
    os.close(lock)


def _beat(lock: int, path: Path):
    while lock in _held:
        with contextlib.suppress(OSError):  # the folder was removed
            if not os.path.samestat(os.fstat(lock), path.stat()):
                return  # released, and the number is another file's by now
            os.utime(path)
        time.sleep(BEAT_S)


def _is_alive(path: Path, holder: dict[str, Any]) -> bool:
    """Whether the file's date changes while we look; no two clocks are compared."""
    print(f"{path.parent} was left by {_named(holder)}: is it alive?", flush=True)
    before, end = _date(path), time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        time.sleep(POLL_S)
        if _date(path) != before:
            return path.exists()
    return False


def _date(path: Path) -> int:
    """When the file was last changed; opened first, for NFS then asks its server."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return 0


def _record() -> dict[str, Any]:
    since = datetime.datetime.now(datetime.UTC).strftime("%d %B %Y, %H:%M:%S UTC")
    who = {"process": os.getpid(), "host": platform.node(), "machine": _machine()}
    return who | {"since": since, "id": uuid.uuid4().hex}


def _machine() -> str:
    """One start of one machine: containers on it may have any host name, and any process id."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else platform.node()


def _read(lock: int) -> dict[str, Any]:
    """The record in a lock file; {} where it is new, or no record."""
    os.lseek(lock, 0, os.SEEK_SET)
    try:
        record = json.loads(os.read(lock, 4096))
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _named(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return "process {} on {}, begun on {}".format(
        *(holder.get(key, "?") for key in ("process", "host", "since"))
    )


def _refusal(folder: Path, holder: dict[str, Any]) -> str:
    return f"{folder} is in use by {_named(holder)}: wait for its end, or choose another workdir"
