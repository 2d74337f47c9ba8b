"""Several processes as one program: who writes, who waits, and how all end together.

The run's folder is one that all processes see. In a run of one process `on_primary` just calls,
nothing waits, and nobody is asked to stop here.
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
HEARTBEAT_S = 20  # without a sign of life from a process for so long, the others end
# Processes wait for each other without a limit, which a collective has: one that dies ends all.
NO_LIMIT_MS = 365 * 24 * 3600 * 1000
POLL_S = 1  # how soon Ctrl-C is heard by a process that waits
FAREWELL_MS = 10_000  # the time to hear of a failure before the process that failed is gone
STOPS = {signal.SIGTERM: 143, signal.SIGINT: 130}  # signal: exit code of a run that was saved
CALLS = itertools.count(1)  # the same on all processes, without gaps: jax waits for the next one
TURNS = itertools.count(1)  # of `on_primary`, the same on all processes
ALONE = threading.Event()  # set on process 0 while the others wait in `on_primary`


class ProcessMismatch(ValueError):
    """The processes do not do the same: nothing is wrong with what they read or write."""


def join(coordinator: str | None, num_processes: int | None, process_id: int | None):
    """Begin to be one of several processes; before anything else of jax.

    On TPU pods, and under SLURM and Open MPI, jax finds all three arguments by itself.

    Args:
        coordinator: HOST:PORT of process 0.
        num_processes: of the run.
        process_id: this one's number.

    Raises:
        ValueError: some are given, others neither given nor found.
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
    if not is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # process 0 tells for all


def joined() -> bool:
    """Whether `join` has made this one of several processes."""
    return jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this process is the one that writes files and tells what happens."""
    return jax.process_index() == 0


def is_multiprocess() -> bool:
    """Whether others take part in what this process does now: not in `on_primary`."""
    return jax.process_count() > 1 and not ALONE.is_set()


def wait_for_all(where: str):
    """No process goes on before all are here.

    Args:
        where: a name that no other call has.
    """
    if is_multiprocess():
        _wait(distributed.global_state.client.wait_at_barrier, f"ppo_jax/{where}")


def require_all_processes(what: str):
    """Refuse in `on_primary` what all processes must do: process 0 would wait for ever.

    Args:
        what: the beginning of the message, for instance "FOLDER must be saved".

    Raises:
        ProcessMismatch: the others wait until this process has ended what it does for all.
    """
    if ALONE.is_set():
        raise ProcessMismatch(
            f"{what} by all processes, not by process 0 alone, as judges and `prepare` are "
            "called; the function that evaluate.judges names is called by all"
        )


def on_primary(do: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """What `do(...)` gives on process 0, which alone calls it, on all processes.

    It begins when all are here, so that nobody reads a file any more that it changes, and the
    others go on when it has ended. Inside of it nothing can be done by all together.

    Args:
        do: what it gives must be a value that pickle knows.
        *args: its arguments.
        **kwargs: the same, by name.

    Raises:
        SystemExit: on all processes, if it ends process 0 so.
        ProcessMismatch: on the others, if anything else is raised on process 0, be it Ctrl-C, or if
            process 0 has called another function.
    """
    if not is_multiprocess():
        return do(*args, **kwargs)
    turn = f"turn {next(TURNS)}"
    name = getattr(do, "__qualname__", type(do).__qualname__)
    if is_first():
        return _tell(turn, name, lambda: do(*args, **kwargs))
    wait_for_all(turn)
    get = distributed.global_state.client.blocking_key_value_get_bytes
    called, given, error = pickle.loads(_wait(get, f"ppo_jax/{turn}"))
    if error is not None:
        _part(turn)
    if called != name:
        me = f"process {jax.process_index()}"
        raise ProcessMismatch(
            f"{me} waits for {name}, but process 0 has called {called}: all processes must make "
            "the same calls in the same order"
        )
    if error is not None:
        raise error
    return given


def _tell(turn: str, name: str, do: Callable[[], T]) -> T:
    """Do it when all are here, and tell the others what came of it, whatever that is."""
    client = distributed.global_state.client
    try:
        wait_for_all(turn)
        ALONE.set()
        given = do()
        told = pickle.dumps((name, given, None))
    except BaseException as error:  # a user's code may call sys.exit, or be interrupted
        failed: BaseException = ProcessMismatch("process 0 has failed, and says why")
        if isinstance(error, SystemExit):  # all leave properly, with the same exit code
            failed = SystemExit(error.code if isinstance(error.code, int | str | None) else 1)
        client.key_value_set_bytes(f"ppo_jax/{turn}", pickle.dumps((name, None, failed)))
        _part(turn)
        raise
    finally:
        ALONE.clear()
    client.key_value_set_bytes(f"ppo_jax/{turn}", told)
    return given


def _wait(call: Callable[[str, int], T], name: str) -> T:
    """`call(name, no limit)` in a thread: inside of it Ctrl-C would not be heard."""
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


def _part(turn: str):
    """All know of a failure before process 0 goes, and the connection to it with it."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        distributed.global_state.client.wait_at_barrier(f"ppo_jax/{turn} failed", FAREWELL_MS)


def preempted() -> bool:
    """Whether some process was asked to stop, and this is the call that all stop after.

    To be asked once a step by every process: the calls are counted, over all stages, and all
    processes stop after the same call.
    """
    return is_multiprocess() and multihost_utils.reached_preemption_sync_point(next(CALLS))


def stop_if_asked(told: str = "nothing is lost; the same command goes on"):
    """End here if some process was asked to stop: where nothing has to be saved.

    It is asked after the data and after the base model are made, before each stage, and before
    each batch of responses of an evaluation; the steps of training ask `preempted`. What lies
    between two such places (a user's `prepare`, the reading of data and models, a compilation) is
    not broken off: a SIGTERM that comes meanwhile waits for the next. Judges that were asked are
    not asked in vain: from there on an evaluation comes to its end.

    Args:
        told: what is left, and what the same command will do.

    Raises:
        SystemExit: with code 143, on all processes at the same call.
    """
    if preempted():
        print(f"stopped by SIGTERM, {told}", flush=True)
        sys.exit(STOPS[signal.SIGTERM])


def ask_all_to_stop(number: int, frame: Any):
    """A handler of Ctrl-C among several processes: what SIGTERM does, which jax tells to all."""
    del number, frame
    os.kill(os.getpid(), signal.SIGTERM)


def stop_handlers(stop_soon: Callable[[int, Any], None]) -> dict[signal.Signals, Callable]:
    """What a stage does on Ctrl-C and SIGTERM; among several processes SIGTERM is jax's."""
    if is_multiprocess():
        return {signal.SIGINT: ask_all_to_stop}
    return {signal.SIGINT: stop_soon, signal.SIGTERM: stop_soon}
