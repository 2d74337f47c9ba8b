"""The launch scripts start the commands that they tell of; nothing is launched."""

import os
import shlex
import subprocess

import pytest

from ppo_jax.commands import sweep
from tests.support.command_line import ROOT

LAUNCH = ROOT / "experiments" / "launch"
FLAGS = ["--config=configs/quickstart.py:tiny", "--grid=ppo.kl_coef=0,0.1; seed=0:3"]


@pytest.mark.parametrize("path", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_a_script_is_bash_that_can_be_read(path):
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def launch(tmp_path, name, program, **environment):
    """What a script starts `program` with, call by call: a stand-in takes its place."""
    stand_in = tmp_path / program
    stand_in.write_text(
        '#!/usr/bin/env bash\nprintf "%s\\0" "$@" end >> "$CALLS"\nexit "${CODE:-0}"\n'
    )
    stand_in.chmod(0o755)
    calls = tmp_path / "calls"
    known = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls)}
    command = ["bash", str(LAUNCH / name), *FLAGS]
    done = subprocess.run(command, env=os.environ | known | environment, check=False)
    parts = calls.read_text().split("\0end\0")[:-1]
    return done.returncode, [part.split("\0") for part in parts]


def test_a_task_of_an_array_runs_the_sweep(tmp_path):
    code, calls = launch(tmp_path, "sweep_array.sbatch", "python", CODE="3")
    assert (code, calls) == (3, [["experiments/sweep.py", *FLAGS]])


def test_a_task_of_an_array_takes_its_shard(monkeypatch):
    points = list(range(10))
    assert points[sweep.find_shard(None)] == points
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")  # of no array that says how large it is
    assert points[sweep.find_shard(None)] == points
    array = {"ID": "7", "MIN": "3", "STEP": "2", "COUNT": "4"}  # --array=3-9:2
    for name, value in array.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert points[sweep.find_shard(None)] == [2, 6]
    assert points[sweep.find_shard("0/3")] == [0, 3, 6, 9]  # what is given comes first
    taken = []
    for i in range(3, 10, 2):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(i))
        taken += points[sweep.find_shard(None)]
    assert sorted(taken) == points


def test_each_slice_has_a_shard_and_a_failure_is_told(tmp_path):
    environment = {"TPUS": "a b", "ZONE": "z", "WORKDIR": "runs/kl"}
    code, calls = launch(tmp_path, "sweep_pods.sh", "gcloud", **environment)
    assert code == 0 and len(calls) == 2
    commands = {call[4]: shlex.split(call[-1].split("=", 1)[1]) for call in calls}
    for number, name in enumerate("ab"):
        assert commands[name][3:] == [
            "../venv/bin/python",
            "experiments/sweep.py",
            "--multihost",
            f"--shard={number}/2",
            "--workdir=runs/kl",
            *FLAGS,
        ]
    assert launch(tmp_path, "sweep_pods.sh", "gcloud", CODE="5", **environment)[0] == 5
