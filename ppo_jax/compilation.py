"""Compiled programs that outlive a process, and the seconds that compiling takes."""

import hashlib
import logging
import platform
from pathlib import Path

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

LEAST_SECONDS = 0.5  # a program that compiles faster is not kept
MOST_BYTES = 4 * 2**30  # of the folder; what was used longest ago goes first
EVENT = "/jax/core/compile/backend_compile_duration"


def keep_programs(folder: Path):
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


def keep_nothing():
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
