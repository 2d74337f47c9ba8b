"""Real processes that run a config, or a function of a folder, as one program, on the CPU.

python -m tests.support.two_processes '{"model": ...}' WORKDIR COORDINATOR NUM_PROCESSES PROCESS_ID
python -m tests.support.two_processes tests.module:function FOLDER COORDINATOR NUM_PROCESSES ID
"""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax

ROOT = pathlib.Path(__file__).resolve().parents[2]
NUM_DEVICES = 8


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def start(what, workdir, num_processes=2, only=None):
    """The processes, NUM_DEVICES / num_processes devices each.

    Args:
        what: a config, or "module:function".
        workdir: the run's folder, or what the function is called with.
        num_processes: of the run.
        only: stages.
    """
    address = f"localhost:{free_port()}"
    count = NUM_DEVICES // num_processes
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={count} "
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or "",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'experiments'}",
    }
    what = what if isinstance(what, str) else json.dumps(what)
    common = [what, str(workdir), address, str(num_processes)]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.two_processes", *common, str(i), *(only or [])],
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


def main(what, workdir, coordinator, num_processes, process_id, *only):
    from ppo_jax import cli
    from ppo_jax.config.parsing import load_function
    from ppo_jax.config.run import STAGES
    from ppo_jax.distributed import processes
    from ppo_jax.pipeline import run as pipeline

    def run():
        processes.initialize(coordinator, int(num_processes), int(process_id))
        if what.startswith("{"):
            pipeline.run(json.loads(what), workdir, only or STAGES)
        else:
            load_function(what, "what")(pathlib.Path(workdir))

    cli.call(run)


if __name__ == "__main__":
    main(*sys.argv[1:])
