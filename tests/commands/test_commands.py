"""`ppo-jax COMMAND` does what the script of experiments/ does: same flags, same exit codes."""

import os
import pathlib
import subprocess
import sys
import tomllib
from unittest import mock

import pytest

from ppo_jax import commands
from ppo_jax.pipeline import run as pipeline
from tests.support.command_line import ROOT, run_command, run_script

CONFIG = """
from ml_collections import config_dict


def get_config():
    return config_dict.ConfigDict({"ppo": {"num_iterations": 3}})
"""
SCRIPTS = {
    "rlhf": "rlhf",
    "sft": "train_sft",
    "reward": "train_reward",
    "ppo": "train_ppo",
    "generate": "generate",
    "evaluate": "evaluate",
    "frontier": "frontier",
    "export": "export_hf",
    "sweep": "sweep",
    "plan": "plan",
}


def test_every_command_is_listed():
    for arguments in ([], ["--help"]):
        ended = run_command(*arguments)
        assert (ended.code, ended.err) == (0, "")
        listed = [line.split()[0] for line in ended.out.splitlines() if line.startswith("  ")]
        assert listed == list(commands.COMMANDS) == list(SCRIPTS)


def test_an_unknown_command_is_refused_with_a_suggestion():
    ended = run_command("evalute")
    assert ended.code == 2 and ended.out == "" and ended.err.count("\n") == 1
    assert run_command("genrate").err.endswith("got 'genrate'; did you mean 'generate'?\n")


@pytest.mark.parametrize("name", ["rlhf", "sft", "reward", "ppo"])
@pytest.mark.parametrize("start", ["run", "dry_run"])
def test_a_config_of_the_working_folder_reaches_the_stages(tmp_path, monkeypatch, name, start):
    (tmp_path / "mine.py").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    flags = ["--config=mine.py", "--workdir=run", "--config.ppo.num_iterations=5"]
    calls = []
    for run, what in ((run_command, name), (run_script, SCRIPTS[name])):
        with mock.patch.object(pipeline, start) as called:
            ended = run(what, *flags, *(["--dry_run"] if start == "dry_run" else []))
        assert (ended.code, ended.out, ended.err) == (0, "", "")
        (config, workdir), options = called.call_args
        calls.append((config.to_json(), workdir, tuple(options["only"])))
        assert config.ppo.num_iterations == 5
    assert calls[0] == calls[1]


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("rlhf", ["--workdir=run"]),
        ("ppo", ["--config=absent.py", "--workdir=run"]),
        ("generate", ["--model=absent"]),
        ("export", ["--workdir=run", "--stage=critic", "--out=out"]),
        ("export", ["--workdir=run", "--stage=ppo", "--out=out"]),
        ("plan", ["--fastt"]),
        ("evaluate", ["--run=absent", "--workdir=out"]),
    ],
)
def test_a_mistake_ends_with_the_scripts_line_and_code(tmp_path, monkeypatch, name, flags):
    monkeypatch.chdir(tmp_path)
    command, script = run_command(name, *flags), run_script(SCRIPTS[name], *flags)
    assert command.code == script.code == 2 and command.out == script.out == ""
    assert command.err.count("\n") == 1
    # What is said of the flags, behind the name of the program.
    assert command.err.partition(": ")[::2] == ("ppo-jax", script.err.partition(": ")[2])


def test_the_entry_point_of_the_package_is_the_command_and_a_mistake_is_code_2(tmp_path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, function = project["scripts"]["ppo-jax"].split(":")
    code = f"import sys; from {module} import {function}; sys.exit({function}())"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def start(*arguments):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout, done.stderr

    status, out, _ = start("export", "--help")
    assert status == 0 and "a finished stage as a Hugging Face folder" in out
    assert all(
        f"--{flag}:" in out or f"--[no]{flag}" in out for flag in ("workdir", "stage", "out")
    )
    status, out, err = start("generate", "--prompt=")
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert not list(pathlib.Path(tmp_path).iterdir())
