"""Multi-process runs: primary-only work, barriers, coordinated shutdown.

All processes see the folder of the run. In a run of one process `on_primary` is a plain call,
barriers do nothing, and signals are handled elsewhere.
"""

import contextlib
import itertools
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import jax
from jax._src import distributed
from jax.experimental import multihost_utils

T = TypeVar("T")
HEARTBEAT_S = 20  # the others end when a process gives no sign of life for so long
# Processes wait for each other without a limit, which a collective has: one that dies ends all.
NO_LIMIT_MS = 365 * 24 * 3600 * 1000
POLL_S = 1  # how soon a waiting process reacts to Ctrl-C
FAREWELL_MS = 10_000  # the time to learn of a failure before the failed process is gone
STOPS = {signal.SIGTERM: 143, signal.SIGINT: 130}  # signal: exit code of a run that was saved
# Counters are equal on all processes, without gaps: jax waits for the next number.
_preemption_checks = itertools.count(1)
_primary_sections = itertools.count(1)
_in_primary_section = threading.Event()  # set on process 0 while the others wait in `on_primary`


class ProcessMismatch(ValueError):
    """The processes disagree on what to do; nothing is wrong with what they read or write."""


def initialize(coordinator: str | None, num_processes: int | None, process_id: int | None):
    """Join a multi-process run, before anything else of jax.

    `coordinator` is HOST:PORT of process 0. On TPU pods, and under SLURM and Open MPI, jax finds
    all three arguments by itself.

    Raises:
        ValueError: an argument is neither given nor found.
    """
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, heartbeat_timeout_seconds=HEARTBEAT_S
        )
    except ValueError as error:
        raise ValueError(
            "--multihost finds TPU pods, SLURM and Open MPI by itself; elsewhere it needs "
            f"--coordinator=HOST:PORT --num_processes=N --process_id=I ({error})"
        ) from error
    if not is_primary():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # process 0 prints for all


def is_initialized() -> bool:
    """Whether this process has joined a multi-process run."""
    return jax.distributed.is_initialized()


def is_primary() -> bool:
    """Whether this is process 0, which writes files and prints."""
    return jax.process_index() == 0


def is_multiprocess() -> bool:
    """Whether other processes take part in the current work: not inside `on_primary`."""
    return jax.process_count() > 1 and not _in_primary_section.is_set()


def barrier(name: str):
    """Wait until all processes are here; no other barrier has this name."""
    if is_multiprocess():
        _wait(distributed.global_state.client.wait_at_barrier, f"ppo_jax/{name}")


def require_all_processes(what: str):
    """Refuse inside `on_primary` what all processes must do: process 0 would wait for ever.

    The message begins with `what`, for instance "FOLDER must be saved".

    Raises:
        ProcessMismatch: the others are waiting for the end of `on_primary`.
    """
    if _in_primary_section.is_set():
        raise ProcessMismatch(
            f"{what} by all processes, not by process 0 alone, as judges and `prepare` are "
            "called; the function that evaluate.judges names is called by all"
        )


def on_primary(fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Run `fn` on process 0 and broadcast its result, a value that can be pickled.

    It starts when all processes are here, so that nobody still reads a file that it changes, and
    the others go on when it has ended. Inside it nothing can be done by all processes together.

    Raises:
        SystemExit: on all processes, if `fn` raises it.
        ProcessMismatch: on the others, if process 0 raises anything else, be it Ctrl-C, or has
            called another function.
    """
    if not is_multiprocess():
        return fn(*args, **kwargs)
    section = f"section {next(_primary_sections)}"
    name = getattr(fn, "__qualname__", type(fn).__qualname__)
    if is_primary():
        return _run_and_broadcast(section, name, lambda: fn(*args, **kwargs))
    barrier(section)
    get = distributed.global_state.client.blocking_key_value_get_bytes
    called, result, error = pickle.loads(_wait(get, f"ppo_jax/{section}"))
    if error is not None:
        _failure_barrier(section)
    if called != name:
        me = f"process {jax.process_index()}"
        raise ProcessMismatch(
            f"{me} waits for {name}, but process 0 has called {called}: all processes must make "
            "the same calls in the same order"
        )
    if error is not None:
        raise error
    return result


def _run_and_broadcast(section: str, name: str, fn: Callable[[], T]) -> T:
    """Run `fn` when all are here, and broadcast its result or its failure."""
    client = distributed.global_state.client
    try:
        barrier(section)
        _in_primary_section.set()
        result = fn()
        message = pickle.dumps((name, result, None))
    except BaseException as error:  # a user's code may call sys.exit, or be interrupted
        failure: BaseException = ProcessMismatch("process 0 has failed, and says why")
        if isinstance(error, SystemExit):  # all leave properly, with the same exit code
            failure = SystemExit(error.code if isinstance(error.code, int | str | None) else 1)
        client.key_value_set_bytes(f"ppo_jax/{section}", pickle.dumps((name, None, failure)))
        _failure_barrier(section)
        raise
    finally:
        _in_primary_section.clear()
    client.key_value_set_bytes(f"ppo_jax/{section}", message)
    return result


def _wait(call: Callable[[str, int], T], name: str) -> T:
    """`call(name, no limit)` in a thread: the call itself would block Ctrl-C."""
    done: Future = Future()

    def wait():
        try:
            done.set_result(call(name, NO_LIMIT_MS))
        except Exception as error:
            done.set_exception(error)

    threading.Thread(target=wait, daemon=True).start()
    while True:
        with contextlib.suppress(TimeoutError):
            return done.result(timeout=POLL_S)


def _failure_barrier(section: str):
    """All learn of a failure before process 0, and the connection to it, is gone."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        distributed.global_state.client.wait_at_barrier(f"ppo_jax/{section} failed", FAREWELL_MS)


def preempted() -> bool:
    """Whether some process was asked to stop, and all stop after this call.

    Every process calls it once a step: calls are counted, over all stages, and all processes stop
    after the same one.
    """
    reached = multihost_utils.reached_preemption_sync_point
    return is_multiprocess() and reached(next(_preemption_checks))


def stop_if_asked(message: str = "nothing is lost; the same command goes on"):
    """Exit if some process was asked to stop: for places where nothing has to be saved.

    Called after the data and after the base model are made, before each stage, and before each
    batch of responses of an evaluation; the steps of training call `preempted`. Between two such
    places (a user's `prepare`, loading, compilation) nothing is interrupted: a SIGTERM waits for
    the next. Judges that were asked are not asked in vain: from there on an evaluation comes to its
    end. `message` says what is left, and what the same command will do.

    Raises:
        SystemExit: with code 143, on all processes at the same call.
    """
    if preempted():
        print(f"stopped by SIGTERM, {message}", flush=True)
        sys.exit(STOPS[signal.SIGTERM])


def stop_handlers(stop_soon: Callable[[int, Any], None]) -> dict[signal.Signals, Callable]:
    """A stage's signal handlers. In a multi-process run jax handles SIGTERM, which it forwards to
    all, and Ctrl-C becomes one."""
    if is_multiprocess():
        return {signal.SIGINT: lambda number, frame: os.kill(os.getpid(), signal.SIGTERM)}
    return {signal.SIGINT: stop_soon, signal.SIGTERM: stop_soon}


_wakeup: list[int] = []  # both ends of a pipe


def end_on_second_signal():
    """Have a second Ctrl-C or SIGTERM end this process at once, whatever it is doing.

    Python's own handlers wait for the main thread, which may be compiling for minutes or in a
    user's function, and its proper end waits for all threads, of which one may be saving. So a
    thread of our own hears of the signals, and ends the process as if it were killed: what is on
    disk is whole at any moment.
    """
    if _wakeup or threading.current_thread() is not threading.main_thread():
        return
    reader, writer = os.pipe()
    _wakeup.extend((reader, writer))
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # A forked process has the same pipe: what it hears would count here, too.
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    threading.Thread(target=_count_stops, args=(reader,), daemon=True).start()


def _count_stops(reader: int):
    heard: list[int] = []
    while len(heard) < 2:
        heard += [number for number in os.read(reader, 64) if number in STOPS]
    os.write(2, b"\nended at once; the same command goes on from the last checkpoint\n")
    os._exit(STOPS[signal.Signals(heard[-1])])
