"""A CPU's memory between steps: page faults are counted, no clock is read."""

import importlib.metadata
import platform
import subprocess
import sys

import jax
import pytest

from ppo_jax import host_memory

# Page faults of a call whose temporary buffers are 64 MB, after calls that made the process grow.
FAULTS = """
import resource, sys
import jax, jax.numpy as jnp
from ppo_jax.host_memory import keep_pages

if sys.argv[1] == "keep":
    keep_pages()
step = jax.jit(lambda x: jnp.sort(jnp.sin(x)).sum())
x = jnp.arange(2.0**24)
for _ in range(3):
    step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(what: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, what], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's malloc")
def test_a_step_is_served_by_the_pages_of_the_step_before():
    assert faults("keep") < 100  # pages of 4 KiB: 64 MB are 16,384
    # What the call would be without, so that the test notices when it is no longer of use.
    assert faults("plain") > 1000


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
