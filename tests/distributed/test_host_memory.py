"""A CPU's memory between steps: page faults are counted, no clock is read."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from ppo_jax.distributed import runtime as host_memory

# Page faults of a call whose temporary buffers are 64 MB, once the process has grown.
FAULTS = """
import resource, sys
import jax, jax.numpy as jnp
from ppo_jax.distributed.runtime import retain_freed_memory

if sys.argv[1] == "keep":
    retain_freed_memory()
step = jax.jit(lambda x: (jnp.sin(x) @ jnp.ones((2**12, 8))).sum())
x = jnp.arange(2.0**24).reshape(2**12, 2**12)
found = [0]
for _ in range(24):
    step(x).block_until_ready()
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
# The least: of the first calls several may grow the process, see `retain_freed_memory`.
print(min(after - before for before, after in zip(found[1:], found[2:])))
"""


# Bytes that the heap has grown by when a block of 3 GiB, of which no page is touched, is freed.
GROWN = """
import ctypes
from ppo_jax.distributed.runtime import retain_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.sbrk.restype = [ctypes.c_void_p], ctypes.c_void_p
before = libc.sbrk(0)
retain_freed_memory()
libc.free(libc.malloc(3 * 2**30))
print(libc.sbrk(0) - before)
"""
# Megabytes of freed pieces that are given back when jax reports a compilation of some seconds.
COMPILED = """
import sys
import jax
from ppo_jax.distributed import runtime

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

runtime.retain_freed_memory()
blocks = [bytearray(b"x") * 2**16 for _ in range(3000)]  # 188 MB, each other one is freed
del blocks[::2]
before = resident()
jax.monitoring.record_event_duration_secs(runtime.EVENT, float(sys.argv[1]))
print(int(before - resident()))
"""
# Whether blocks of 64 MB are where Linux is asked for huge pages: before, after, and when a program
# has been compiled.
ASKS = """
import ctypes
import jax
from ppo_jax.distributed import runtime

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]

def asks():
    address, inside = libc.malloc(2**26) + 2**25, False
    for line in open("/proc/self/smaps"):
        head = line.split()[0]
        if "-" in head:
            begin, end = (int(x, 16) for x in head.split("-"))
            inside = begin <= address < end
        elif inside and head == "VmFlags:":
            return "hg" in line.split()

print(asks(), end=" ")
runtime.retain_freed_memory()
print(asks(), end=" ")
jax.monitoring.record_event_duration_secs(runtime.EVENT, 9.0)
print(asks())
"""
GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's malloc")


def faults(what: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, what], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@GLIBC
def test_a_step_is_served_by_the_pages_of_the_step_before():
    kept = faults("keep")
    assert kept < 100  # pages of 4 KiB: 64 MB are 16,384
    # So that the test notices when there is nothing to keep any more.
    assert faults("plain") > kept


@GLIBC
@pytest.mark.parametrize(("variable", "keeps"), [("", True), ("MALLOC_ARENA_MAX", False)])
def test_blocks_of_gigabytes_are_kept_but_where_a_user_has_set_malloc(variable, keeps):
    environment = os.environ | ({variable: "8"} if variable else {})
    done = subprocess.run(
        [sys.executable, "-c", GROWN], capture_output=True, text=True, check=True, env=environment
    )
    assert (int(done.stdout) > 2**31) == keeps


@GLIBC
@pytest.mark.parametrize(("seconds", "given_back"), [("9", True), ("0.01", False)])
def test_what_a_compilation_has_freed_is_given_back(seconds, given_back):
    command = [sys.executable, "-c", COMPILED, seconds]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (int(done.stdout) > 40) == given_back


@GLIBC
@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without huge pages"
)
def test_memory_is_in_huge_pages():
    done = subprocess.run([sys.executable, "-c", ASKS], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True"]


@pytest.mark.parametrize(
    ("platforms", "plugin", "expected"),
    [
        (None, False, False),
        (None, True, True),
        ("cpu", True, False),
        ("cuda,cpu", False, True),
    ],
)
def test_accelerators_keep_the_usual_malloc(monkeypatch, platforms, plugin, expected):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: ["cuda"] * plugin)
    monkeypatch.setattr(host_memory.importlib.util, "find_spec", lambda name: None)
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", platforms)
    try:
        assert host_memory.accelerators_may_be_used() == expected
    finally:
        jax.config.update("jax_platforms", before)
