"""What one GPU does, as JSON: experiments/launch/gpu_report.sh starts it.

    python experiments/benchmark.py gpu_report --report=runs/gpu
    python experiments/benchmark.py gpu_report --table=runs/gpu/report.json

Each part is a process with a limit of its own, 15 minutes in all; one that fails is told with its
last line, and the others go on. One JSON object a line, the last line is the whole. --tiny runs all
parts on the CPU, in sizes that tell nothing but that they run.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from benchmarks.report import print_json
from ppo_jax import cli

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "report", "runs/gpu_report", "Folder of the report and of what its parts print."
)
flags.DEFINE_bool("tiny", False, "All parts on the CPU, in tiny sizes.")
flags.DEFINE_string("table", "", "A report to print as a table, in place of a new one.")

ROOT = Path(__file__).resolve().parents[2]
MOST_SECONDS = 900
PATIENCE = 6  # times the limits of parts that run on a CPU, which others may keep busy
BENCHMARK = (sys.executable, "experiments/benchmark.py")
TESTS = ["core", "rollout/test_decode.py", "rollout/test_continuous_batching.py"]
TESTS += ["algorithms/test_oracle.py", "algorithms/test_update.py", "models/test_kernels.py"]
SMOLLM2 = "--family=llama --hidden=576 --mlp=1536 --layers=30 --heads=9 --kv-heads=3 --vocab=49152"
LLAMA_1B = "--family=llama --hidden=2048 --mlp=8192 --layers=16 --heads=32 --kv-heads=8"
LLAMA_1B += " --vocab=128256"
BF16 = "--dtype=bfloat16 --scan-layers --tie-embeddings --num-epochs=1 --repeats=3"
TEXTS = "--batch=64 --prompt-len=128 --response-len=128 --num-micro-batches=4"
TINY = "--family=llama --hidden=16 --mlp=32 --layers=1 --heads=4 --kv-heads=2 --vocab=64 --batch=4"
TINY += " --prompt-len=4 --response-len=8 --num-epochs=1 --repeats=1 --dtype=bfloat16"


class Part(NamedTuple):
    """One process of the report."""

    command: tuple[str, ...]
    seconds: int  # its limit
    environment: dict[str, str] = {}


def parts(tiny: bool) -> dict[str, Part]:
    """All parts in their order; their limits are 15 minutes together."""
    threads = f"--threads={len(os.sched_getaffinity(0))}"

    def benchmark(seconds: int, name: str, sizes: str, tiny_sizes: str = TINY) -> Part:
        given = (tiny_sizes if tiny else sizes).split()
        return Part((*BENCHMARK, *name.split(), *given, threads), seconds)

    one_test = ["core/test_masking.py"]
    files = [f"tests/{path}" for path in (one_test if tiny else TESTS)]
    pytest = (sys.executable, "-m", "pytest", "-n", "0", "-m", "not slow")
    one_device = ("-k", "not mesh and not devices and not shape")
    exact = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    lengths = f"{SMOLLM2} {BF16} --batch=64 --prompt-len=128 --response-len=256"
    return {
        "devices": benchmark(40, "gpu_part --part=devices", "--matmul=8192", "--matmul=64"),
        "tests": Part((*pytest, *one_device, *files), 240, exact),
        "kernels": benchmark(
            110,
            "gpu_part --part=kernels",
            "--hidden=576 --heads=9 --kv-heads=3 --batch=16 --length=1024",
            "--hidden=16 --heads=4 --kv-heads=2 --batch=2 --length=16",
        ),
        "smollm2_135m": benchmark(150, "iteration", f"{SMOLLM2} {BF16} {TEXTS}"),
        "llama_1b_lora": benchmark(
            160, "iteration", f"{LLAMA_1B} {BF16} {TEXTS} --lora=16", f"{TINY} --lora=2"
        ),
        "rollout": benchmark(
            110,
            "rollout",
            f"{lengths} --lengths=geometric:64 --num-prompts=512",
            f"{TINY} --lengths=geometric:4 --num-prompts=12",
        ),
        "trace": benchmark(90, "gpu_part --part=trace", f"{SMOLLM2} {BF16} {TEXTS}"),
    }


def main():
    if FLAGS.table:
        print("\n".join(table(json.loads(Path(FLAGS.table).read_text()))))
        return
    if not FLAGS.tiny:
        check_gpu()
    out, begin = Path(FLAGS.report), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    for name, part in parts(FLAGS.tiny).items():
        times = PATIENCE if FLAGS.tiny else 1
        left = times * MOST_SECONDS - (time.monotonic() - begin)
        part = part._replace(seconds=times * part.seconds)
        found[name] = run_part(name, part, left, out, FLAGS.tiny)
        print_json({"part": name, **found[name]})
    report = {
        "report": "gpu",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": git_commit(),
        "tiny": FLAGS.tiny,
        "seconds": time.monotonic() - begin,
        "parts": with_utilisation(found),
    }
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print_json(report)


def check_gpu():
    """Stop where jax sees none; asked in another process, as this one must not hold a GPU."""
    program = "import jax; print(jax.default_backend())"
    command = (sys.executable, "-c", program)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    platform = (done.stdout or done.stderr).strip().rpartition("\n")[2]
    if platform not in ("gpu", "cuda"):
        message = f"needs an NVIDIA GPU that jax sees, or --tiny; got {platform!r}"
        cli.stop(message, cli.USER_MISTAKE)


def run_part(name: str, part: Part, left: float, out: Path, tiny: bool) -> dict[str, Any]:
    """How a part has ended, and its figures: every line of JSON that it has printed."""
    environment = os.environ | part.environment | ({"JAX_PLATFORMS": "cpu"} if tiny else {})
    if not tiny and name == "tests":
        environment["JAX_PLATFORMS"] = "cuda,cpu"  # the tests' own default is the CPU
    begin, log = time.monotonic(), out / f"{name}.log"
    limit, error = max(1.0, min(part.seconds, left)), ""
    with log.open("w") as file:
        try:
            how = dict(stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
            code = subprocess.run(part.command, check=False, timeout=limit, **how).returncode
        except subprocess.TimeoutExpired:
            code, error = 124, f"took longer than {limit:.0f} s"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    figures = [json.loads(line) for line in lines if line.startswith("{")]
    if name == "tests" and lines:
        figures = [{"result": lines[-1]}]
    ended = {
        "ok": code == 0,
        "seconds": round(time.monotonic() - begin, 1),
        "command": shlex.join(["python", *part.command[1:]]),
        "figures": figures,
    }
    return ended if code == 0 else ended | {"error": error or (lines or ["no output"])[-1]}


def with_utilisation(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The model flops a second of scoring and update over those of the large product."""
    peak = next((f["bfloat16_flops"] for f in found["devices"]["figures"]), None)
    for part in found.values():
        for figures in part["figures"]:
            for phase in ("score", "update"):
                if peak and f"{phase}_model_flops" in figures:
                    rate = figures[f"{phase}_model_flops"] / figures[f"{phase}_wall_seconds"]
                    figures[f"{phase}_model_flops_utilisation"] = rate / peak
    return found


def git_commit() -> str:
    command = ("git", "rev-parse", "--short", "HEAD")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


# --- the table ------------------------------------------------------------------------------------

COLUMNS = {  # part -> the figures that its row tells
    "devices": ("device", "jax", "bfloat16_flops", "float32_flops"),
    "tests": ("result",),
    "kernels": (
        "case",
        "kernel",
        "largest_difference_forward",
        "largest_difference_backward",
        "fused_ms",
        "plain_ms",
    ),
    "rollout": ("useful_tokens_per_second", "times_the_useful_tokens_of_static_batches"),
    "trace": ("operation", "ms", "share"),
}
ITERATION = (
    "wall_seconds_per_iter",
    "rollout_tokens_per_second",
    "score_wall_seconds",
    "score_model_flops_utilisation",
    "update_wall_seconds",
    "update_model_flops_utilisation",
    "peak_device_mb",
    "planned_mb",
    "compile_seconds",
)


def table(report: dict[str, Any]) -> list[str]:
    """A report as a table of Markdown."""
    rows = ["| part | figures | command |", "|---|---|---|"]
    for name, part in report["parts"].items():
        cells = list(cells_of(name, part))
        rows += [f"| {name} | {cell} | `{part['command']}` |" for cell in cells]
    return rows


def cells_of(name: str, part: dict[str, Any]) -> Iterable[str]:
    """One for each object of figures, and one that tells a failure."""
    for figures in part["figures"]:
        names = [n for n in COLUMNS.get(name, ITERATION) if n in figures]
        yield ", ".join(f"{n.replace('_', ' ')} {show(figures[n])}" for n in names)
    if not part["ok"]:
        yield f"failed: {part['error']}"


def show(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
