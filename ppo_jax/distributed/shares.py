"""The machine divided among processes that run side by side: cores, GPUs or TPU chips for each."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

import jax

from ppo_jax.distributed import layout
from ppo_jax.distributed.runtime import accelerators_may_be_used

ASK = "import jax, json; print(json.dumps([jax.default_backend(), jax.local_device_count()]))"
VISIBLE = {"gpu": "CUDA_VISIBLE_DEVICES", "tpu": "TPU_VISIBLE_CHIPS"}
# A process of some of a host's chips has to be told their arrangement.
TPU_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """What one of several processes is given."""

    cores: tuple[int, ...] = ()  # that its threads may use; () is all
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    num_devices: int = 1  # that jax will find


def find_devices() -> tuple[str, int]:
    """("cpu", "gpu" or "tpu"; the number of devices), found without taking one.

    Another process asks where there may be accelerators: one that has asked holds their memory, or
    the chips, until it ends. From here on this process has the CPU alone.
    """
    kind, count = "cpu", 0
    if accelerators_may_be_used():
        command = [sys.executable, "-c", ASK]
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
        if asked.returncode:
            last = (asked.stderr.strip().splitlines() or [f"exit code {asked.returncode}"])[-1]
            raise ValueError(f"jax finds no devices: {last}")
        kind, count = json.loads(asked.stdout.splitlines()[-1])
    jax.config.update("jax_platforms", "cpu")
    return (kind, len(layout.devices_of_run())) if kind == "cpu" else (kind, count)


def divide(kind: str, count: int, jobs: int) -> list[Share]:
    """Equal shares of the machine for so many processes.

    Args:
        kind: of the devices, as `find_devices` has it.
        count: of them.
        jobs: the number of processes.

    Raises:
        ValueError: there are more jobs than devices, or on CPUs than cores.
    """
    cores = available_cores()
    most, what = (len(cores), "cores") if kind == "cpu" else (count, f"{kind.upper()}s")
    if not 1 <= jobs <= most:
        raise ValueError(f"--jobs must be in [1, {most}], the {what} of this machine, got {jobs}")
    if jobs == 1:
        return [Share(num_devices=count)]
    each = count if kind == "cpu" else count // jobs
    return [
        Share(
            cores=tuple(cores[i::jobs]),
            environment={} if kind == "cpu" else visible(kind, range(i * each, (i + 1) * each)),
            num_devices=each,
        )
        for i in range(jobs)
    ]


def available_cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def visible(kind: str, indices: Sequence[int]) -> dict[str, str]:
    """The environment in which jax finds these devices alone, of those that it finds here."""
    name = VISIBLE[kind]
    known = os.environ.get(name, "").split(",") if os.environ.get(name) else None
    shown = {name: ",".join(known[i] if known else str(i) for i in indices)}
    if kind == "tpu":
        if len(indices) not in TPU_BOUNDS:
            got = len(indices)
            raise ValueError(f"--jobs must give each one of {list(TPU_BOUNDS)} chips, got {got}")
        shown |= {
            "TPU_CHIPS_PER_PROCESS_BOUNDS": TPU_BOUNDS[len(indices)],
            "TPU_PROCESS_BOUNDS": "1,1,1",
        }
    return shown


def keep_to(cores: Sequence[int]):
    """Have this process, and the threads that it will start, use these cores alone."""
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
