"""Real processes that run a config, or a function of a folder, as one program, on the CPU.

python -m tests.support.two_processes '{"model": ...}' WORKDIR COORDINATOR NUM_PROCESSES PROCESS_ID
python -m tests.support.two_processes tests.module:function FOLDER COORDINATOR NUM_PROCESSES ID
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax._src import compiler, distributed

from ppo_jax.distributed.trees import named_leaves
from ppo_jax.io.checkpoints import load_checkpoint_item
from ppo_jax.training.stages import find_stage
from tests.support import tiny_run, xla_flags

ROOT = pathlib.Path(__file__).resolve().parents[2]
NUM_DEVICES = 8
# The tokenizer of these runs has 317 tokens.
WHOLE = {"rules": {"vocab": ()}, "rollout_rules": {"vocab": ()}}
CUBE = {"data": 2, "fsdp": 2, "model": 2, **WHOLE}
# Each row lies on all eight devices, and so on both processes.
WHOLE_ROWS = {"vocab": (), "heads": (), "kv_heads": ()}
ACROSS = {"data": 1, "model": 8, "rules": WHOLE_ROWS, "rollout_rules": WHOLE_ROWS}
PATIENCE = 300  # seconds
NOTICE_S = 5  # jax looks for SIGTERM once a second


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def start(what, workdir, num_processes=2, only=None, num_devices=NUM_DEVICES):
    """The processes, num_devices / num_processes devices each.

    Args:
        what: a config, or "module:function".
        workdir: the run's folder, or what the function is called with.
        num_processes: of the run.
        only: stages.
        num_devices: of all together.
    """
    address = f"localhost:{free_port()}"
    count = num_devices // num_processes
    environment = os.environ | {
        "XLA_FLAGS": xla_flags.with_devices(count),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or "",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",  # for the next start
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


def settings(mesh=CUBE, **ppo):
    config = tiny_run.config()
    config["mesh"] = mesh
    config["ppo"] |= {"rollout_batch_size": 16, **ppo}
    config["ppo"]["optimizer"]["schedule"] = "constant"
    config["prepare"] = "tests.support.users_code:prepare"
    config["evaluate"]["judges"] = "tests.support.users_code:judges"
    return config


def by_function(name, **ppo):
    """PPO alone, from the base model, with a reward function of `users_code`."""
    config = settings(init_from="base", reward_model="", **ppo)
    config["ppo"]["reward_function"] = f"tests.support.users_code:{name}"
    return {name: config[name] for name in ("prepare", "model", "mesh", "ppo")}


def rows(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def assert_same_numbers(folder, other, stages=("sft", "reward", "ppo")):
    for stage in stages:
        field = find_stage(stage).trained_field
        mine, theirs = (
            named_leaves(load_checkpoint_item(x / stage / "checkpoints", field))
            for x in (folder, other)
        )
        assert mine.keys() == theirs.keys()
        for name, leaf in mine.items():
            np.testing.assert_allclose(theirs[name], leaf, atol=1e-3, err_msg=f"{stage} {name}")
    losses = [
        [(r["stage"], r["step"], {k: v for k, v in r.items() if k.endswith("loss")}) for r in found]
        for found in (rows(folder, "metrics.jsonl"), rows(other, "metrics.jsonl"))
    ]
    for (stage, step, mine), (*place, theirs) in zip(*losses, strict=True):
        assert [stage, step] == place and mine.keys() == theirs.keys()
        for name in mine:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), (stage, step)


def begun(folder, step):
    path = folder / "metrics.jsonl"
    return path.exists() and any(
        r["stage"] == "ppo" and r["step"] >= step for r in rows_so_far(path)
    )


def rows_so_far(path):
    return [
        json.loads(line)
        for line in path.read_text().splitlines(keepends=True)
        if line.endswith("\n")
    ]


def wait_until(ready, processes):
    end = time.monotonic() + PATIENCE
    while not ready():
        assert all(p.poll() is None for p in processes), finish(processes, 10)
        assert time.monotonic() < end, "the processes did not come so far"
        time.sleep(0.05)


def assert_stopped(processes, told):
    ended = finish(processes)
    assert [code for code, _ in ended] == [143, 143], ended
    assert told() in ended[0][1], ended


def stop_at_the_next_place(processes, asked, folder, told="nothing is lost"):
    """SIGTERM to a process; the one that waits goes on when all know of it."""
    processes[asked].send_signal(signal.SIGTERM)
    time.sleep(NOTICE_S)
    (folder / "go_on").touch()
    assert_stopped(processes, lambda: f"stopped by SIGTERM, {told}")


def as_process_0(function):
    """The function, during whose calls jax takes this process for process 0."""

    def call(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distributed.global_state, "process_id", 0)
            return function(*args)

    return call


def main(what, workdir, coordinator, num_processes, process_id, *only):
    sys.modules["torch"] = None  # tensorboardX would import it, a second and a half a process
    from ppo_jax import cli
    from ppo_jax.config.parsing import load_function
    from ppo_jax.config.run import STAGE_NAMES
    from ppo_jax.distributed import processes
    from ppo_jax.pipeline import run as pipeline

    # jax lets process 0 alone write its cache, but on CPUs every process has keys of its own.
    compiler._cache_write = as_process_0(compiler._cache_write)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background job

    def run():
        processes.initialize(coordinator, int(num_processes), int(process_id))
        if what.startswith("{"):
            pipeline.run(json.loads(what), workdir, only or STAGE_NAMES)
        else:
            load_function(what, "what")(pathlib.Path(workdir))

    cli.call(run)


if __name__ == "__main__":
    main(*sys.argv[1:])
