"""SFT, reward training and the grid of random shapes; no figure of theirs is judged here."""

import json
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
from benchmarks import shapes
from benchmarks.peers.lengths import SHORTEST, draw_lengths, draw_texts

from ppo_jax.data.packing import best_fit
from tests.experiments.test_benchmarks import benchmark, last_line
from tests.support.command_line import ROOT, run_script

# --- texts ----------------------------------------------------------------------------------------

MODEL = ["--hidden=16", "--layers=1", "--heads=2", "--vocab=64", "--repeats=2"]
TEXTS = ["--batch=4", "--texts=16", "--max-length=32", "--lengths=lognormal:10"]


@pytest.mark.parametrize("kind", ["fixed", "geometric:20", "lognormal:20"])
def test_lengths_are_a_function_of_the_seed_and_have_their_mean_or_median(kind):
    lengths = draw_lengths(kind, 4000, 200, seed=3)
    np.testing.assert_array_equal(lengths, draw_lengths(kind, 4000, 200, seed=3))
    assert SHORTEST <= lengths.min() and lengths.max() <= 200
    middle = np.median(lengths) if kind.startswith("log") else lengths.mean()
    assert middle == pytest.approx(200 if kind == "fixed" else 20, rel=0.06)
    assert [len(text) for text in draw_texts(kind, 9, 200, 64)] == draw_lengths(
        kind, 9, 200
    ).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_stage_learns_the_same_tokens_with_fewer_positions_where_texts_share_rows(stage):
    single = last_line(benchmark(stage, *MODEL, *TEXTS))
    packed = last_line(benchmark(stage, *MODEL, *TEXTS, "--packing"))
    promised = (
        "cpu_seconds_per_step tokens_per_cpu_second utilisation peak_rss_mb compile_seconds "
        "model_flops matmul_peak_flops planned_mb"
    )
    assert all(x[name] > 0 for x in (single, packed) for name in promised.split())
    lengths = draw_lengths("lognormal:10", 16, 32)
    assert single["tokens_per_step"] * single["steps"] == lengths.sum()
    if stage == "reward":
        assert packed["tokens_per_step"] == single["tokens_per_step"]
        assert packed["programs"] <= single["programs"]
        return
    a_step = round(4 * len(best_fit(lengths, 32)) / 16)
    assert packed["steps"] == -(-len(best_fit(lengths, 32)) // a_step)
    shares = [x["share_of_positions_with_tokens"] for x in (packed, single)]
    assert shares[0] > 1.3 * shares[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sft", "--lengths=normal:3"], "geometric:MEAN or lognormal:MEDIAN, got 'normal:3'"),
        (["sft", "--lengths=geometric:32"], "above 4 and below the longest text's, 32"),
        (["sft", "--texts=18"], "--texts must be a multiple of --batch (4), got 18"),
        (["sft", "--num-micro-batches=3"], "a multiple of --num-micro-batches (3), got 4"),
        (["reward", "--batch=5", "--texts=15"], "--batch must be even, two texts a pair, got 5"),
        (["sft", "--family=llama", "--heads=16"], "an even multiple of --heads"),
        (["sft", "--prompt-len=3"], "Unknown command line flag 'prompt-len'"),
        (["grid", "--hidden=3"], "Unknown command line flag 'hidden'"),
        (["grid", "--peer=trl"], "--peer-python is missing"),
        (["grid", "--peer-python=/bin/true"], "--peer is missing"),
        (["grid", "--peer=tunix", "--stage=sft", "--peer-python=/bin/true"], "['ppo'] with"),
        (["grid", "--peer=trl", "--peer-python=no/python"], "an interpreter, got 'no/python'"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, message):
    of_stage = [] if arguments[0] == "grid" else [*MODEL, *TEXTS]
    ended = run_script("benchmark", arguments[0], *of_stage, *arguments[1:])
    assert ended.code == 2 and message in ended.err and "Traceback" not in ended.err


# --- shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", shapes.STAGES)
def test_shapes_are_a_function_of_the_seed_within_their_limits(stage):
    drawn = shapes.draw_shapes(7, stage, 30)
    assert drawn[:8] == shapes.draw_shapes(7, stage, 8) != shapes.draw_shapes(8, stage, 8)
    for shape in drawn:
        flops = shapes.estimate_flops(shape, stage)
        assert shapes.LEAST * shapes.MOST_FLOPS <= flops <= shapes.MOST_FLOPS
        assert shapes.estimate_bytes(shape, stage) <= shapes.MOST_BYTES
        assert shape["hidden"] % shape["heads"] == 0
        assert shape["heads"] % (shape["kv_heads"] or shape["heads"]) == 0
        if stage == "ppo":
            assert shape["batch"] % shape["num_minibatches"] == 0
        else:
            assert shape["texts"] % shape["batch"] == 0 == shape["batch"] % 2
    widths = [shape["hidden"] for shape in drawn]
    assert any(width & (width - 1) for width in widths)
    assert any(shape["heads"] % 2 for shape in drawn)
    assert {shape["family"] for shape in drawn} == set(shapes.FAMILIES)


def test_a_peer_of_one_family_has_shapes_of_it():
    drawn = shapes.draw_shapes(0, "ppo", 8, families=["qwen2"])
    assert {shape["family"] for shape in drawn} == {"qwen2"}


# --- the grid -------------------------------------------------------------------------------------

real_run = subprocess.run


def run_grid(*arguments, seconds=2.0):
    """A grid whose runs of ours take so long, and hold 100 MB, by their own account."""

    def run(command, **how):
        if command[0] != sys.executable:
            return real_run(command, **how)
        ours = {"cpu_seconds_per_iter": seconds, "cpu_seconds_per_step": seconds}
        ours |= {"tokens_per_step": 10.0, "utilisation": 0.5, "peak_rss_mb": 100.0}
        return subprocess.CompletedProcess(command, 0, f"some words\n{json.dumps(ours)}\n", "")

    with mock.patch("subprocess.run", run):
        return run_script("benchmark", "grid", "--shapes=2", *arguments)


def fake_peer(folder, code):
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\n{code}\n")
    path.chmod(0o755)
    return f"--peer-python={path}"


def report_of(ended):
    assert ended.code == 0, ended.err
    return json.loads(ended.out.splitlines()[-1])


def test_a_grid_without_a_peer_tells_the_utilisation_of_ours():
    ended = run_grid("--seed=3", "--stage=sft")
    report = report_of(ended)
    assert [row["shape"] for row in report["rows"]] == shapes.draw_shapes(3, "sft", 2)
    assert report["worst_utilisation"] == 0.5 and report["worst_row"] == 1
    assert report["failed"] == 0 and "worst_times" not in report
    assert [line[:4] for line in ended.out.splitlines()[:2]] == ["1/2 ", "2/2 "]


def test_a_grid_tells_the_ratio_to_the_peer_for_the_same_tokens(tmp_path):
    """The peer's steps of twice as many tokens take four times as long."""
    code = """import json, pathlib, sys
name = pathlib.Path(sys.argv[1]).name
assert name == "bench_trl_reward.py" and pathlib.Path(sys.argv[1]).is_file(), name
assert "--packing" not in sys.argv, "it does not pack"
print(json.dumps(dict(cpu_seconds_per_step=8.0, tokens_per_step=20.0, peak_rss_mb=50.0)))"""
    ended = run_grid("--seed=1", "--stage=reward", "--peer=trl", fake_peer(tmp_path, code))
    report = report_of(ended)
    assert [row["times"] for row in report["rows"]] == [2.0, 2.0]
    assert (report["worst_times"], report["worst_times_the_memory"]) == (2.0, 0.5)
    assert "| **1** |" in ended.out and "2.00 times" in ended.out


def test_a_peer_that_fails_is_shown_with_its_last_line(tmp_path):
    code = 'import sys; sys.exit("Traceback\\nValueError: no such shape\\n")'
    ended = run_grid("--stage=ppo", "--peer=trl", fake_peer(tmp_path, code))
    report = report_of(ended)
    assert [row["peer"]["error"] for row in report["rows"]] == ["ValueError: no such shape"] * 2
    assert report["failed"] == 2 and report["worst_row"] is None
    assert ended.out.count("failed: ValueError: no such shape") == 4  # two lines, two rows


def test_a_peer_that_does_not_end_is_shown(tmp_path):
    code = "import time; time.sleep(60)"
    ended = run_grid("--peer=trl", "--timeout-s=1", fake_peer(tmp_path, code))
    assert report_of(ended)["rows"][0]["peer"] == {"error": "no end after 1 s"}


def test_a_peer_that_says_nothing_is_shown(tmp_path):
    report = report_of(run_grid("--peer=trl", fake_peer(tmp_path, "pass")))
    assert report["rows"][0]["peer"] == {"error": "exit code 0, without a word"}


@pytest.mark.slow
def test_a_grid_runs_ours():
    report = last_line(benchmark("grid", "--shapes=1", "--repeats=1", "--most-flops=1e8"))
    assert report["failed"] == 0, report["rows"][0]["ours"]["error"]
    assert report["rows"][0]["ours"]["cpu_seconds_per_iter"] > 0 < report["worst_utilisation"]


@pytest.mark.slow
def test_a_script_of_a_peer_runs_by_itself():
    """The one whose packages the tests have."""
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    script = ROOT / "experiments" / "benchmarks" / "peers" / "bench_hf_generate.py"
    sizes = [*MODEL, "--batch=2", "--prompt-len=4", "--response-len=6", "--family=llama"]
    done = real_run([sys.executable, script, *sizes], capture_output=True, text=True, check=False)
    report = last_line(done)
    assert report["rollout_tokens_per_cpu_second"] > 0 and report["arguments"]["hidden"] == 16
