"""The benchmarks run, and tell what they promise; no figure of theirs is judged here."""

import json
import subprocess
import sys

import pytest

from tests.command_line import ROOT


def benchmark(*arguments):
    command = [sys.executable, "experiments/benchmark.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("arguments", "told"), [((), "got none"), (("roll",), "got 'roll'")])
def test_an_unknown_subcommand_is_told_the_known_ones(arguments, told):
    done = benchmark(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.strip().endswith(told) and "'scaling'" in done.stderr


@pytest.mark.slow
def test_flops_a_chip_are_the_same_on_more_chips(tmp_path):
    """With libtpu, in a process of its own."""
    pytest.importorskip("libtpu")
    path = tmp_path / "figures.json"
    scratch = ["--config=configs/pod.py:smollm2_135m", "--fast", "--chips=4,16", "--rows=4"]
    done = benchmark("scaling", *scratch, f"--json={path}", f"--plot={tmp_path / 'plot.png'}")
    assert (done.returncode, done.stderr) == (0, "")
    few, many = json.loads(path.read_text())
    assert (few["devices"], many["devices"]) == (4, 16)
    flops = [plan["iteration"]["flops_per_chip"] for plan in (few, many)]
    assert flops[0] == pytest.approx(flops[1], rel=0.05)
    assert "4 responses a chip: flops a chip within 0." in done.stdout
    assert (tmp_path / "plot.png").stat().st_size > 10_000
