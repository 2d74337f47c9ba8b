"""Every mistake of a user ends with one line that helps, exit code 2, and nothing half-written."""

import re
import subprocess
import sys
from typing import NamedTuple
from unittest import mock

import pytest

from ppo_jax.cli import one_line
from ppo_jax.pipeline import run as pipeline
from tests.support import broken, mistakes
from tests.support import mistakes_in_files as in_files
from tests.support.command_line import ROOT, Ended, run_script


class Mistake(NamedTuple):
    """A command, what is wrong besides its flags, and what is said of it."""

    command: str
    what: str
    message: str
    leaves: tuple[str, ...]  # whole files that the start had made before it could know

    def flags(self, places: broken.Places) -> tuple[str, list[str]]:
        """(script, its flags)"""
        script, *more = self.command.split()
        if more[:1] == ["without"]:
            return script, places.flags(script, *more[2:], without=more[1])
        return script, places.flags(script, *more)


def read(table: str, leaves: tuple[str, ...] = ()) -> dict[str, Mistake]:
    """Two lines for each mistake."""
    rows = table.strip().splitlines()
    found = {}
    for head, message in zip(rows[::2], rows[1::2], strict=True):
        command, _, what = head.partition(" # ")
        found[head] = Mistake(command, what, message.strip(), leaves)
    assert len(found) == len(rows) / 2
    return found


EARLY = (mistakes.FLAGS, mistakes.SETTINGS, mistakes.CONFIGS)
EARLY += (in_files.DATA, in_files.MODELS, in_files.WORKDIRS)
MISTAKES = read("".join(EARLY).replace("\n\n", "\n"))
MISTAKES |= read(in_files.LATE, leaves=("run", "run/config.json", "run/results.json"))
# Some of them are told by a process of its own too.
OF_PROCESSES = (mistakes.FLAGS, in_files.DATA, in_files.MODELS, in_files.WORKDIRS)
AS_PROCESSES = [list(read(table))[3] for table in OF_PROCESSES]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, data and two finished stages; nothing may change them."""
    folder = tmp_path_factory.mktemp("world")
    broken.make_world(folder)
    return folder


@pytest.fixture
def places(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PPO_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return broken.Places(world, tmp_path)


def check_told(ended: Ended, mistake: Mistake, places: broken.Places):
    script, message = mistake.command.split()[0], places.fill_in(mistake.message)
    line = ".*".join(re.escape(part) for part in message.split("..."))
    assert re.fullmatch(rf"{script}\.py: {line}\n", ended.err), ended.err
    assert ended.code == 2 and "Traceback" not in ended.out


def test_there_are_enough_mistakes():
    assert len(MISTAKES) >= 100


@pytest.mark.parametrize("row", MISTAKES)
def test_a_mistake_is_told_in_one_line_and_leaves_nothing(places, row):
    mistake = MISTAKES[row]
    broken.make(places, mistake.what)
    before, world_before = broken.tree(places.tmp), broken.dates(places.world)
    script, flags = mistake.flags(places)
    check_told(run_script(script, *flags), mistake, places)
    after = broken.tree(places.tmp)
    assert {name: after[name] for name in after if name not in mistake.leaves} == before
    assert broken.dates(places.world) == world_before


def test_an_error_of_several_lines_is_one():
    error = ValueError("none of the checkpoints can be read:\n  6: a.\n  3: b.\nMend one.")
    assert one_line(error) == "none of the checkpoints can be read: 6: a; 3: b; Mend one."


@pytest.mark.parametrize("row", AS_PROCESSES)
def test_a_process_ends_with_code_2_and_one_line(places, row):
    mistake = MISTAKES[row]
    broken.make(places, mistake.what)
    script, flags = mistake.flags(places)
    command = [sys.executable, str(ROOT / "experiments" / f"{script}.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    check_told(Ended(done.returncode, done.stdout, done.stderr), mistake, places)


@pytest.mark.parametrize(
    ("name", "told", "traced"),
    [
        ("stumbles:fail", "prepare stumbles:fail raised ZeroDivisionError: division by zero", True),
        ("stumbles:idle", "prepare stumbles:idle wrote no file into the folder that", False),
        ("json:loads", "prepare json:loads raised TypeError: the JSON object must be str,", False),
    ],
)
def test_a_prepare_that_fails_is_named_and_leaves_no_half_data(places, name, told, traced):
    """With its own lines, if it has any."""
    code = (
        "def fail(folder):\n    (folder / 'half').touch()\n    1 / 0\n\ndef idle(folder):\n    0\n"
    )
    (places.tmp / "stumbles.py").write_text(code)
    broken.write_config(places, {"prepare": name})
    ended = run_script("rlhf", *places.flags("rlhf"))
    *trace, line = ended.err.splitlines()
    assert ended.code == 1 and line.startswith(f"rlhf.py: {told}")
    assert any("stumbles.py" in x for x in trace) == traced == bool(trace)
    assert [path.name for path in (places.tmp / "run").iterdir()] == ["config.json"]


def test_flags_in_a_file_are_checked_as_those_on_the_command_line(places):
    (places.tmp / "flags").write_text("--config.sft.batch_size=many\n")
    flags = [*places.flags("train_sft"), f"--flagfile={places.tmp}/flags"]
    told = "sft.batch_size must be a whole number, got 'many'"
    assert told in run_script("train_sft", *flags).err


class Begun(Exception):
    """The checks are over."""


@pytest.mark.parametrize("script", broken.GOOD)
def test_without_a_mistake_the_same_flags_go_through(places, script):
    """What the tables say is due to the mistake alone."""
    broken.write_config(places, {})
    flags = places.flags(script)
    if script == "generate":
        assert run_script(script, *flags).out.startswith("the film is|")
        return
    with mock.patch.object(pipeline, "run_stage", side_effect=Begun), pytest.raises(Begun):
        run_script(script, *flags)
