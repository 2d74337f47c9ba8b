"""Several processes as one program: who writes, who waits, and how all end together.

The run's folder is one that all processes see. Everything here is a no-op in a run of one process.
"""

import itertools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

HEARTBEAT_S = 20  # without a sign of life from a process for so long, the others end
CALLS = itertools.count(1)  # the same on all processes, without gaps: jax waits for the next one


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


def is_first() -> bool:
    """Whether this process is the one that writes files and tells what happens."""
    return jax.process_index() == 0


def are_several() -> bool:
    return jax.process_count() > 1


def by_first(do: Callable[..., Any], *args: Any):
    """Process 0 does something to files that all read afterwards; the others wait for it.

    Raises:
        ValueError: on the others, when it failed on process 0, where the error is what it was.
    """
    if not are_several():
        do(*args)
        return
    failed = None
    if is_first():
        try:
            do(*args)
        except Exception as error:
            failed = error
    done = multihost_utils.broadcast_one_to_all(np.int32(failed is None))
    if failed is not None:
        raise failed
    if not done:
        raise ValueError("process 0 has failed, and says why")


def wait_for_all(where: str):
    """No process goes on before all are here."""
    if are_several():
        multihost_utils.sync_global_devices(where)


def preempted() -> bool:
    """Whether some process was asked to stop, and this is the step that all stop after.

    To be called once a step by every process: the calls are counted, over all stages, and all
    processes stop after the same call.
    """
    return are_several() and multihost_utils.reached_preemption_sync_point(next(CALLS))


def ask_all_to_stop(number: int, frame: Any):
    """A handler of Ctrl-C among several processes: what SIGTERM does, which jax tells to all."""
    del number, frame
    os.kill(os.getpid(), signal.SIGTERM)


def stop_handlers(stop_soon: Callable[[int, Any], None]) -> dict[signal.Signals, Callable]:
    """What a stage does on Ctrl-C and SIGTERM; among several processes SIGTERM is jax's."""
    if are_several():
        return {signal.SIGINT: ask_all_to_stop}
    return {signal.SIGINT: stop_soon, signal.SIGTERM: stop_soon}


def joined() -> bool:
    """Whether `join` has made this one of several processes."""
    return jax.distributed.is_initialized()
