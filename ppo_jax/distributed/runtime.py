"""The compilation cache, compile times, and memory that malloc keeps."""

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

MIN_COMPILE_SECONDS = 0.5  # a program that compiles faster is not cached
MAX_CACHE_BYTES = 4 * 2**30  # the least recently used program is evicted first
EVENT = "/jax/core/compile/backend_compile_duration"


def enable_compilation_cache(folder: Path):
    """Cache compiled programs on disk: the second start of a run begins in seconds.

    jax's own settings take precedence: JAX_COMPILATION_CACHE_DIR names another folder,
    JAX_ENABLE_COMPILATION_CACHE=false disables it. Machines may share `folder`: each kind of
    processor has a subfolder.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder / processor()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    jax.config.update("jax_compilation_cache_max_size", MAX_CACHE_BYTES)


def disable_compilation_cache():
    """Cache nothing from here on: a program for devices that are only described could be written,
    but there is no client to read it again."""
    jax.config.update("jax_enable_compilation_cache", False)
    logging.getLogger("jax._src.compilation_cache").setLevel(logging.WARNING)  # it logs the reset
    reset_cache()  # jax reads its setting once


def processor() -> str:
    """A short name of this machine's CPU features, which compiled programs depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else [platform.processor()]
    features = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


_durations: list[float] = []  # jax reports each compilation once
_retains: list[bool] = []  # not empty after `retain_freed_memory`


def _on_event(event: str, seconds: float, **_):
    if event == EVENT:
        _durations.append(seconds)
        if _retains and seconds > MIN_COMPILE_SECONDS:
            ctypes.CDLL(None).malloc_trim(0)
            use_huge_pages()


jax.monitoring.register_event_duration_secs_listener(_on_event)


def compile_seconds() -> float:
    """The seconds that this process has spent compiling; a cached program takes few."""
    return sum(_durations)


# From glibc's malloc.h: (parameter, value, the environment variable that sets it)
MALLOC_SETTINGS = (
    (-8, 1, "MALLOC_ARENA_MAX"),
    (-4, 0, "MALLOC_MMAP_MAX_"),
    (-1, -1, "MALLOC_TRIM_THRESHOLD_"),  # -1: nothing is given back
)
MADV_HUGEPAGE = 14  # from Linux's mman.h
HUGE_PAGE = 2**21  # bytes


def retain_freed_memory():
    """Keep freed memory in the process. Call it before jax has a device.

    A program's temporary buffers are one block of up to gigabytes, allocated at each call. glibc
    takes such a block from Linux and returns it after the call, so that every step maps and zeroes
    all its pages again: 1.5 of 9 seconds in an update of two models of 29 million parameters. The
    process then holds its peak usage from there on, or some blocks more: glibc may use
    the few bytes beside an aligned block for others, and the next one does not fit between.

    What is free when a program has been compiled is given back all the same: XLA has used hundreds
    of megabytes in pieces, between which no such block fits. Pages are huge where Linux has them to
    give, see `use_huge_pages`.

    All threads share one arena: only that one can hold large blocks. Nothing changes with
    accelerators (large buffers are not on the host), where the user has set malloc, or without
    glibc.
    """
    if sys.platform != "linux" or accelerators_may_be_used():
        return
    libc, variables = ctypes.CDLL(None), [name for _, _, name in MALLOC_SETTINGS]
    if not hasattr(libc, "gnu_get_libc_version") or any(name in os.environ for name in variables):
        return
    for parameter, value, _ in MALLOC_SETTINGS:
        libc.mallopt(parameter, value)
    _retains.append(True)
    use_huge_pages()


def use_huge_pages():
    """Have memory that malloc takes from here on in pages of 2 MB, in place of 4 kB, which are so
    many that a processor keeps looking up where they are: an update takes 0.9 of the time.

    Linux gives them to addresses that ask for them (`transparent_hugepage/enabled` is `madvise`),
    and malloc has those of a block that was freed for the next ones. So one as large as half of
    the machine's memory asks, and is freed; its pages are not touched. Where the addresses of a
    process are limited nothing changes.
    """
    import resource  # of Unix alone

    limits = (resource.getrlimit(x)[0] for x in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    if any(limit != resource.RLIM_INFINITY for limit in limits):
        return
    libc, size = ctypes.CDLL(None), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(size)
    if block is None:
        return
    begin = -(-block // HUGE_PAGE) * HUGE_PAGE
    libc.madvise(begin, (block + size - begin) // HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE)
    libc.free(block)


def accelerators_may_be_used() -> bool:
    """Whether jax would look for other devices than the CPU; asking jax would start it."""
    if platforms := jax.config.jax_platforms:
        return platforms != "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return bool(plugins) or importlib.util.find_spec("libtpu") is not None
