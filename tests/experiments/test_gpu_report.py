"""The report on a GPU: all parts on the CPU in tiny sizes; what fails is told, the others go on."""

import json
import os
import subprocess
import sys

import pytest
from benchmarks import gpu_report
from benchmarks.gpu_report import Part

from tests.support.command_line import ROOT, run_script

SCRIPT = ROOT / "experiments" / "launch" / "gpu_report.sh"


def python(program, seconds=60):
    return Part((sys.executable, "-c", program), seconds)


def test_limits_are_fifteen_minutes_together():
    for tiny in (False, True):
        named = gpu_report.parts(tiny)
        assert sum(part.seconds for part in named.values()) <= gpu_report.MOST_SECONDS
    assert gpu_report.parts(False).keys() == gpu_report.parts(True).keys()


def test_a_part_that_fails_is_told_by_its_last_line(tmp_path):
    program = "print('{\"a\": 1}'); print('noise'); raise ValueError('no memory')"
    found = gpu_report.run_part("x", python(program), 100, tmp_path, True)
    assert not found["ok"] and found["error"] == "ValueError: no memory"
    assert found["figures"] == [{"a": 1}]
    slow = python("import time; print('{\"a\": 2}', flush=True); time.sleep(60)", seconds=2)
    found = gpu_report.run_part("x", slow, 100, tmp_path, True)
    assert found["error"] == "took longer than 2 s" and found["figures"] == [{"a": 2}]
    fine = gpu_report.run_part("x", python("print('{}')"), 100, tmp_path, True)
    assert fine["ok"] and "error" not in fine


def test_utilisation_is_over_the_large_product_and_the_table_tells_failures():
    iteration = {"update_model_flops": 30.0, "update_wall_seconds": 2.0}
    parts = {
        "devices": dict(ok=True, command="d", figures=[{"bfloat16_flops": 60.0}]),
        "smollm2_135m": dict(ok=True, command="i", figures=[iteration]),
        "trace": dict(ok=False, command="t", figures=[], error="no trace"),
    }
    found = gpu_report.with_utilisation(parts)
    assert found["smollm2_135m"]["figures"][0]["update_model_flops_utilisation"] == 0.25
    rows = gpu_report.table({"parts": found})
    assert (
        "| smollm2_135m | update wall seconds 2, update model flops utilisation 0.25 | `i` |"
        in rows
    )
    assert rows[-1] == "| trace | failed: no trace | `t` |"


def test_without_a_gpu_it_stops_with_one_line(tmp_path):
    ended = run_script("benchmark", "gpu_report", f"--report={tmp_path / 'out'}")
    assert ended.code == 2 and len(ended.err.strip().splitlines()) == 1
    assert "needs an NVIDIA GPU that jax sees, or --tiny; got 'cpu'" in ended.err


@pytest.mark.slow
def test_every_part_runs_and_tells_its_figures(tmp_path):
    command = ["bash", str(SCRIPT), "--tiny", f"--report={tmp_path}"]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["part"] for line in lines[:-1]] == list(gpu_report.parts(True))
    assert (
        lines[-1]["parts"].keys()
        == json.loads((tmp_path / "report.json").read_text())["parts"].keys()
    )
    on_gpu_alone = {"peak_device_mb"}
    for name, part in lines[-1]["parts"].items():
        assert part["ok"], (name, part)
        promised = set(gpu_report.COLUMNS.get(name, gpu_report.ITERATION)) - on_gpu_alone
        assert part["figures"] and all(promised <= figures.keys() for figures in part["figures"])
    assert len(lines[-1]["parts"]["kernels"]["figures"]) == 12
    table = ["bash", str(SCRIPT), f"--table={tmp_path / 'report.json'}"]
    done = subprocess.run(table, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.count("\n") > 2 + len(lines[-1]["parts"])
