"""How XLA compiles in the tests and in the processes that they start. Imports no jax: the flags
are read once, when jax begins."""

import os
import subprocess
import sys

# What the tests do is compile: thousands of programs, each called once or twice. Without these
# passes of LLVM that takes a third of the time. Those over HLO all stay: a compiled program has the
# same operations, flops and bytes, and numbers that differ by rounding alone.
CHEAP = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",  # theirs is half of what the others leave
)
# A busy two-core machine may keep one of eight fake devices waiting for long.
PATIENT = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
DEVICES = "--xla_force_host_platform_device_count="
PROBE = "from jaxlib import xla_client; xla_client.CompileOptions().executable_build_options"


def accepts(*flags):
    """Whether this version of XLA has them; a process with one that it lacks is aborted."""
    environment = os.environ | {"XLA_FLAGS": " ".join(flags)}
    command = [sys.executable, "-c", PROBE]
    return subprocess.run(command, env=environment, capture_output=True).returncode == 0


def of_tests():
    """The flags of a process with eight fake devices; what $XLA_FLAGS says already stays."""
    given = os.environ.get("XLA_FLAGS", "")
    wanted = [flag for flag in CHEAP if flag.partition("=")[0] not in given]
    if wanted and not accepts(*wanted):
        wanted = [flag for flag in wanted if accepts(flag)]
    wanted += [flag for flag in (PATIENT, f"{DEVICES}8") if flag not in given]
    return " ".join([*given.split(), *wanted])


def with_devices(count):
    """The same for a child with `count` devices; of a flag that is twice there the last holds."""
    return f"{os.environ['XLA_FLAGS']} {DEVICES}{count}"
