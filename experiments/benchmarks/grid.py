r"""A stage at random shapes, each beside what a user would take instead.

    python experiments/benchmark.py grid --seed=1
    python experiments/benchmark.py grid --seed=1 --stage=sft --peer=trl \
        --peer-python=$HOME/peers/trl/bin/python

The shapes are a function of --seed and --stage; most take some seconds of a core. For each, ours
and the peer run in turn on one core, as processes of their own, in float32. The ratio is the peer's
CPU time over ours, for the same tokens, of medians; memory is the most that a process has held,
for ours with compilation where the cache has no program. Without --peer ours is timed alone.
benchmarks/peers/README.md says how to make the peers' environments. The last line of the output is
one JSON object, with all shapes as flags of `benchmark.py`.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks.report import print_json
from benchmarks.shapes import FAMILIES, MOST_FLOPS, STAGES, Shape, draw_shapes

FLAGS = flags.FLAGS
PEERS = {  # name -> (stages, families)
    "trl": (STAGES, FAMILIES),
    "tunix": (("ppo",), ("qwen2",)),
}
flags.DEFINE_integer("seed", 0, "Of the shapes.", lower_bound=0)
flags.DEFINE_integer("shapes", 8, "How many.", lower_bound=1)
flags.DEFINE_enum("stage", "ppo", STAGES, "What is timed.")
flags.DEFINE_enum("peer", None, list(PEERS), "What stands beside ours.")
flags.DEFINE_string("peer_python", None, "The interpreter of the peer's environment.")
flags.DEFINE_integer("repeats", 3, "Timed runs of each, after one that is not.", lower_bound=1)
flags.DEFINE_float(
    "most_flops", MOST_FLOPS, "Of an iteration or a step, estimated.", lower_bound=1e8
)
flags.DEFINE_integer("timeout_s", 900, "Seconds that a process may take.", lower_bound=1)
flags.DEFINE_alias("peer-python", "peer_python")
flags.DEFINE_alias("most-flops", "most_flops")
flags.DEFINE_alias("timeout-s", "timeout_s")

HERE = Path(__file__).resolve().parent
OURS = {"ppo": ["iteration", "--nophases"], "sft": ["sft"], "reward": ["reward"]}
SECONDS = {"ppo": "cpu_seconds_per_iter", "sft": "cpu_seconds_per_step"}
SECONDS["reward"] = SECONDS["sft"]


def main():
    check_flags()
    families = PEERS[FLAGS.peer][1] if FLAGS.peer else FAMILIES
    rows = []
    with one_core():
        for shape in draw_shapes(FLAGS.seed, FLAGS.stage, FLAGS.shapes, families, FLAGS.most_flops):
            rows.append(measure(shape))
            print(f"{len(rows)}/{FLAGS.shapes} {words(shape)}: {outcome(rows[-1])}", flush=True)
    print_table(rows)
    print_json(summary(rows))


def check_flags():
    """Raise a ValueError where the flags do not go together."""
    if bool(FLAGS.peer) != bool(FLAGS.peer_python):
        missing = "--peer-python" if FLAGS.peer else "--peer"
        raise ValueError(f"--peer and --peer-python go together; {missing} is missing")
    if FLAGS.peer and FLAGS.stage not in PEERS[FLAGS.peer][0]:
        raise ValueError(
            f"--stage must be one of {list(PEERS[FLAGS.peer][0])} with --peer={FLAGS.peer}, "
            f"got {FLAGS.stage!r}"
        )
    if FLAGS.peer and not os.access(FLAGS.peer_python, os.X_OK):
        raise ValueError(f"--peer-python must be an interpreter, got {FLAGS.peer_python!r}")


@contextlib.contextmanager
def one_core():
    """This process, and those that it starts, on one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def measure(shape: Shape) -> dict[str, Any]:
    """A row of the table: ours, the peer, and what they have to do with one another."""
    given = [flag(name, x) for name, x in shape.items() if x is not False]
    given.append(f"--repeats={FLAGS.repeats}")
    script = str(HERE.parent / "benchmark.py")
    ours = run([sys.executable, script, *OURS[FLAGS.stage], *given])
    row = {"flags": " ".join(given), "shape": shape, "ours": ours}
    if FLAGS.peer:
        theirs = [x for x in given if x != "--packing" or FLAGS.stage == "sft"]  # TRL packs SFT
        script = str(HERE / "peers" / f"bench_{FLAGS.peer}_{FLAGS.stage}.py")
        row["peer"] = run([FLAGS.peer_python, script, *theirs])
    return row | ratios(row)


def flag(name: str, value: Any) -> str:
    name = name.replace("_", "-")
    return f"--{name}" if value is True else f"--{name}={value}"


def run(command: list[str]) -> dict[str, Any]:
    """The last line of a process's output, or {"error": the last line of its errors}."""
    environment = {k: x for k, x in os.environ.items() if k != "PYTHONPATH"}
    if command[0] == sys.executable:
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    began, how = time.perf_counter(), dict(capture_output=True, text=True, env=environment)
    try:
        done = subprocess.run(command, timeout=FLAGS.timeout_s, check=False, **how)
    except subprocess.TimeoutExpired:
        return {"error": f"no end after {FLAGS.timeout_s} s"}
    except OSError as error:
        return {"error": str(error)}
    lines = done.stdout.splitlines()
    try:
        if done.returncode == 0:
            return {**json.loads(lines[-1]), "process_seconds": time.perf_counter() - began}
    except (IndexError, ValueError):
        pass
    errors = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return {"error": errors[-1] if errors else f"exit code {done.returncode}, without a word"}


def ratios(row: dict[str, Any]) -> dict[str, Any]:
    """CPU time and memory, the peer's over ours; nothing where one of them has failed."""
    ours, peer = row["ours"], row.get("peer", {"error": ""})
    if "error" in ours or "error" in peer:
        return {}
    names = (SECONDS[FLAGS.stage], "tokens_per_step")
    (mine, my_tokens), (theirs, tokens) = ([x.get(k, 1.0) for k in names] for x in (ours, peer))
    return {
        "times": theirs / tokens / (mine / my_tokens),
        "times_the_memory": peer["peak_rss_mb"] / ours["peak_rss_mb"],
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """All rows, and the worst of each figure."""
    found = {name: [x[name] for x in rows if name in x] for name in ("times", "times_the_memory")}
    found["utilisation"] = [x["ours"]["utilisation"] for x in rows if "error" not in x["ours"]]
    return {
        "benchmark": "grid",
        "stage": FLAGS.stage,
        "seed": FLAGS.seed,
        "peer": FLAGS.peer,
        "rows": rows,
        **{f"worst_{name}": min(values) for name, values in found.items() if values},
        "worst_row": worst(rows),
        "failed": sum("error" in x["ours"] or "error" in x.get("peer", {}) for x in rows),
        "load_average": os.getloadavg()[0],
    }


def worst(rows: list[dict[str, Any]]) -> int | None:
    """The number, from 1 on, of the row of the least ratio, or without a peer utilisation."""
    values = {
        i: row.get("times") if FLAGS.peer else row["ours"].get("utilisation")
        for i, row in enumerate(rows, start=1)
    }
    values = {i: value for i, value in values.items() if value is not None}
    return min(values, key=values.get) if values else None


# --- what is read while it runs and at its end ----------------------------------------------------


def words(shape: Shape) -> str:
    """A shape in some words: width, layers, heads, vocabulary, batch."""
    s = shape
    heads = f"{s['heads']}/{s['kv_heads']}" if s["kv_heads"] else s["heads"]
    model = f"{s['family']} {s['hidden']}x{s['layers']} h{heads} mlp{s['mlp']} V{s['vocab']}"
    if "prompt_len" in s:
        batch = f"{s['batch']}x({s['prompt_len']}+{s['response_len']})"
        return f"{model} {batch} {s['num_epochs']}x{s['num_minibatches']}"
    packing = " packed" if s["packing"] else ""
    return f"{model} {s['batch']}x{s['max_length']} {s['lengths']}{packing}"


def outcome(row: dict[str, Any]) -> str:
    parts = [f"ours {short(row['ours'])}"]
    if FLAGS.peer:
        parts.append(f"{FLAGS.peer} {short(row['peer'])}")
    if "times" in row:
        parts.append(f"{row['times']:.2f} times")
    return ", ".join(parts)


def short(figures: dict[str, Any]) -> str:
    if "error" in figures:
        return f"failed: {figures['error']}"
    return f"{figures[SECONDS[FLAGS.stage]]:.3g} s"


def print_table(rows: list[dict[str, Any]]):
    """As Markdown, the worst row in bold."""
    peer = FLAGS.peer or "peer"
    heads = ("", "shape", "ours, s", f"{peer}, s", f"{peer} / ours", "ours, MB", f"{peer}, MB")
    lines = [(*heads, "utilisation"), ("---",) * 8]
    for number, row in enumerate(rows, start=1):
        ours, theirs = row["ours"], row.get("peer", {})
        seconds = [short(x).removesuffix(" s") if x else "" for x in (ours, theirs)]
        times = f"{row['times']:.2f}" if "times" in row else ""
        memory = [f"{x['peak_rss_mb']:.0f}" if "peak_rss_mb" in x else "" for x in (ours, theirs)]
        used = f"{ours['utilisation']:.2f}" if "utilisation" in ours else ""
        cells = (str(number), words(row["shape"]), *seconds, times, *memory, used)
        is_worst = number == worst(rows)
        lines.append(tuple(f"**{x}**" if is_worst and x else x for x in cells))
    for line in lines:
        print("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |")
