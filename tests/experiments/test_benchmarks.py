"""The benchmarks run, and tell what they promise; no figure of theirs is judged here."""

import json
import re
import subprocess
import sys

import pytest

from tests.support.command_line import ROOT, run_script


def benchmark(*arguments):
    """In a process of its own: it sets up threads and memory for what it measures."""
    command = [sys.executable, "experiments/benchmark.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("arguments", "message"), [((), "got none"), (("roll",), "got 'roll'")])
def test_an_unknown_subcommand_lists_the_known_ones(arguments, message):
    ended = run_script("benchmark", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.strip().endswith(message) and "'scaling'" in ended.err


TINY = ["--hidden=16", "--layers=1", "--heads=2", "--vocab=64", "--batch=4", "--prompt-len=4"]
TINY += ["--response-len=8", "--num-epochs=2", "--num-minibatches=2", "--repeats=2"]


def last_line(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [(), ("--num-epochs=1", "--num-minibatches=1")], ids=["epochs", "one step"]
)
def test_an_iteration_tells_all_of_its_figures(more):
    report = last_line(benchmark("iteration", "--family=llama", "--scan-layers", *TINY, *more))
    promised = (
        "cpu_seconds_per_iter wall_seconds_per_iter rollout_cpu_seconds score_cpu_seconds "
        "update_cpu_seconds rollout_tokens_per_cpu_second update_matmul_utilisation peak_rss_mb "
        "compile_seconds model_flops matmul_peak_flops utilisation"
    )
    assert all(report[name] > 0 for name in promised.split())
    given = {name: report["arguments"][name] for name in ("family", "response_len", "scan_layers")}
    assert given == {"family": "llama", "response_len": 8, "scan_layers": True}


GROUPED = ["--family=llama", "--heads=4", "--kv-heads=2", "--mlp=24", "--tie-embeddings"]


@pytest.mark.slow
def test_an_iteration_of_adapters_alone_is_of_fewer_flops():
    """In bfloat16, with fewer heads of keys, several samples a prompt and logits in parts."""
    options = ["--dtype=bfloat16", "--samples-per-prompt=2", "--logits-chunk=4", "--nophases"]
    whole, adapters = (
        last_line(benchmark("iteration", *TINY, *GROUPED, *options, f"--lora={rank}"))
        for rank in (0, 2)
    )
    assert 0 < adapters["model_flops"] < whole["model_flops"]
    assert 0 < adapters["planned_mb"] < whole["planned_mb"]
    assert adapters["cpu_seconds_per_iter"] > 0 and "rollout_cpu_seconds" not in adapters
    given = {name: adapters["arguments"][name] for name in ("lora", "kv_heads", "mlp", "dtype")}
    assert given == {"lora": 2, "kv_heads": 2, "mlp": 24, "dtype": "bfloat16"}


@pytest.mark.slow
def test_a_profile_tells_the_share_of_matrix_products():
    done = benchmark("update", "--profile", *TINY)
    assert last_line(done)["cpu_seconds"] > 0
    (head,) = re.findall(r"jit_ppo_update: \S+ s in operations, (\S+) in products", done.stdout)
    assert 0 < float(head) < 1
    assert len(re.findall(r" ms +\d+ x +\w+\[[\d, ]*\] +\S+\n", done.stdout)) == 12


@pytest.mark.slow
def test_slots_stand_beside_static_batches():
    report = last_line(benchmark("rollout", "--lengths=geometric:4", "--num-prompts=12", *TINY))
    assert 12 <= report["useful_tokens"] <= 12 * 8 and report["cpu_seconds"] > 0
    assert 3 < report["decode_steps_of_static_batches"] <= 3 * 8
    assert report["times_the_useful_tokens_of_static_batches"] > 0


@pytest.mark.slow
def test_packed_rows_stand_beside_single_ones():
    report = last_line(benchmark("update", "--lengths=geometric:3", "--num-micro-batches=2", *TINY))
    assert 4 <= report["useful_tokens"] <= 4 * 8 and report["single_cpu_seconds"] > 0
    assert report["times_the_cpu_seconds_of_single_rows"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths=normal:3"], "below --vocab (64), got 'normal:3'"),
        (["--lengths=geometric:64"], "below --vocab (64), got 'geometric:64'"),
        (["--lengths=geometric:4", "--num-prompts=5"], "a multiple of --batch (4), got 5"),
        (["--min-free-slots=2"], "--min-free-slots must be 0 with --lengths=fixed, got 2"),
        (["--batch=4", "--num-minibatches=3"], "--num-micro-batches (3), got 4"),
        (["--batch=4", "--samples-per-prompt=3"], "of --samples-per-prompt (3), got 4"),
        (["--heads=3"], "--hidden must be a multiple of --heads (3), got 16"),
        (["--kv-heads=1"], "--kv-heads must be 0 with --family=gpt2, got 1"),
        (["--family=llama", "--heads=4", "--kv-heads=3"], "a multiple of --kv-heads (3), got 4"),
        (["--family=llama", "--heads=16"], "an even multiple of --heads with --family=llama"),
        (["--lengths=geometric:4", "--num-prompts=4", "--lora=2"], "--lora must be 0 with"),
        (["--threads=4096"], "--threads must be at most"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message):
    ended = run_script("benchmark", "rollout", *TINY, *arguments)
    assert ended.code == 2 and message in ended.err and "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("subcommand", "message"),
    [("iteration", "--lengths must be fixed"), ("update", "--num-micro-batches must be > 1")],
)
def test_lengths_that_cannot_be_measured_are_refused(subcommand, message):
    ended = run_script("benchmark", subcommand, *TINY, "--lengths=geometric:4")
    assert ended.code == 2 and message in ended.err and "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chips=5"], "--chips must be powers of two from 4 to 256, got '5'"),
        (["--chips="], "--chips must be powers of two"),
        (["--rows=0"], "--rows must be one to four numbers from 1 on, got '0'"),
        (["--plot=none/x.png"], "--plot must be in a folder that exists, got 'none/x.png'"),
    ],
)
def test_what_cannot_be_compiled_is_refused_at_once(arguments, message):
    ended = run_script("benchmark", "scaling", "--config=configs/pod.py", *arguments)
    assert ended.code == 2 and message in ended.err and "Traceback" not in ended.err


def test_attention_is_timed_in_blocks_and_with_all_pairs():
    report = last_line(benchmark("attention", "--case=3,90,4,2,8", "--repeats=1"))
    (figures,) = report["cases"]
    assert figures.pop("case") == "3,90,4,2,8"
    assert len(figures) == 4 and min(figures.values()) > 0


@pytest.mark.parametrize(
    ("case", "message"),
    [("3,90,4,2", "--case must be five integers"), ("3,90,4,3,8", "heads a multiple of kv heads")],
)
def test_attention_that_cannot_be_is_refused(case, message):
    ended = run_script("benchmark", "attention", f"--case={case}")
    assert ended.code == 2 and message in ended.err and "Traceback" not in ended.err


def test_every_subcommand_tells_its_flags():
    for name, flag in (("iteration", "--num_epochs"), ("scaling", "--rows")):
        assert flag in benchmark(name, "--help").stdout


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
