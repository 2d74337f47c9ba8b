"""Real processes that run a script as one program, on the CPU.

python -m tests.two_processes '{"model": ...}' WORKDIR COORDINATOR NUM_PROCESSES PROCESS_ID
"""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax

ROOT = pathlib.Path(__file__).resolve().parents[1]
NUM_DEVICES = 8


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def start(settings, workdir, num_processes=2, only=None):
    """The processes, NUM_DEVICES / num_processes devices each."""
    address = f"localhost:{free_port()}"
    count = NUM_DEVICES // num_processes
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={count} "
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or "",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'experiments'}",
    }
    what = [json.dumps(settings), str(workdir), address, str(num_processes)]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.two_processes", *what, str(i), *(only or [])],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(num_processes)
    ]


def finish(processes, seconds=400):
    """[(exit code, output)] of the processes."""
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, out) for process, out in zip(processes, outputs, strict=True)]


def main(settings, workdir, coordinator, num_processes, process_id, *only):
    from ppo_jax import cli, pipeline, processes
    from ppo_jax.config import STAGES

    def run():
        processes.join(coordinator, int(num_processes), int(process_id))
        pipeline.run(json.loads(settings), workdir, only or STAGES)

    cli.call(run)


if __name__ == "__main__":
    main(*sys.argv[1:])
