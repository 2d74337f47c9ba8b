"""On a CPU, the memory of one step serves the next."""

import ctypes
import importlib.metadata
import importlib.util
import os
import sys

import jax

# Of glibc's malloc.h: (parameter, value, the variable by which a user sets it)
SETTINGS = (
    (-8, 1, "MALLOC_ARENA_MAX"),
    (-4, 0, "MALLOC_MMAP_MAX_"),
    (-1, -1, "MALLOC_TRIM_THRESHOLD_"),  # -1: nothing is given back
)


def keep_pages():
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
