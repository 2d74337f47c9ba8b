"""Compiled programs that outlive a process, and the seconds that compiling takes."""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import sys
from pathlib import Path

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

LEAST_SECONDS = 0.5  # a program that compiles faster is not kept
MOST_BYTES = 4 * 2**30  # of the folder; what was used longest ago goes first
EVENT = "/jax/core/compile/backend_compile_duration"


def enable_compilation_cache(folder: Path):
    """Compile each program once for all processes: a second start of a run begins in seconds.

    jax's own settings go first: JAX_COMPILATION_CACHE_DIR names another folder,
    JAX_ENABLE_COMPILATION_CACHE=false keeps nothing.

    Args:
        folder: what machines share may be a home; programs for other processors lie apart in it.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder / processor()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)


def disable_compilation_cache():
    """From here on, whatever was kept: what is compiled for devices that are not there could be
    written, but no client is there to read it again."""
    jax.config.update("jax_enable_compilation_cache", False)
    logging.getLogger("jax._src.compilation_cache").setLevel(logging.WARNING)  # it tells of this:
    reset_cache()  # jax asks its setting once


def processor() -> str:
    """A short name of what programs for this machine's CPU may use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else [platform.processor()]
    told = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
    return f"{platform.machine()}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"


TOTAL = {"seconds": 0.0}  # jax tells its listeners, and tells nobody afterwards


def hear(event: str, seconds: float, **_):
    if event == EVENT:
        TOTAL["seconds"] += seconds


jax.monitoring.register_event_duration_secs_listener(hear)


def compile_seconds() -> float:
    """The seconds that this process has compiled so far; a program that was kept takes few."""
    return TOTAL["seconds"]


# Of glibc's malloc.h: (parameter, value, the variable by which a user sets it)
SETTINGS = (
    (-8, 1, "MALLOC_ARENA_MAX"),
    (-4, 0, "MALLOC_MMAP_MAX_"),
    (-1, -1, "MALLOC_TRIM_THRESHOLD_"),  # -1: nothing is given back
)


def retain_freed_memory():
    """Leave what malloc frees with the process. Call it before jax has a device.

    A program's temporary buffers are one block of up to gigabytes, asked for at each call. glibc
    takes such a block from Linux and gives it back after the call, so that each step has each of
    its pages mapped and zeroed again: of an update of two models of 29 million parameters that is
    1.5 of 9 seconds. What a process holds is then at least the most that it has used at once.

    All threads share one arena: only that one can hold large blocks. With accelerators nothing is
    changed, large buffers are not on the host there; nor where the user has set malloc, nor with
    another C library than glibc.
    """
    if sys.platform != "linux" or accelerators_may_be_used():
        return
    libc, users = ctypes.CDLL(None), [variable for _, _, variable in SETTINGS]
    if not hasattr(libc, "gnu_get_libc_version") or any(name in os.environ for name in users):
        return
    for parameter, value, _ in SETTINGS:
        libc.mallopt(parameter, value)


def accelerators_may_be_used() -> bool:
    """Whether jax would look for devices beside the CPU; asking jax itself would start it."""
    if platforms := jax.config.jax_platforms:
        return platforms != "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return bool(plugins) or importlib.util.find_spec("libtpu") is not None
