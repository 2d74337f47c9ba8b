"""What benchmarks on random models share: their shape, CPU time, and the peak of the machine.

On an accelerator seconds are those of the wall, as a process waits there most of its time.
"""

import functools
import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks.profile import print_profile
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.families import read_config

FLAGS = flags.FLAGS


def define_numbers(numbers: dict[str, tuple[int, str]], lower_bound: int):
    """Flags of whole numbers, {name: (default, what it is)}, with - or _ in their names."""
    for name, (default, description) in numbers.items():
        flags.DEFINE_integer(name, default, description, lower_bound=lower_bound)
        if "_" in name:
            flags.DEFINE_alias(name.replace("_", "-"), name)


flags.DEFINE_enum("family", "gpt2", ["gpt2", "llama", "qwen2"], "Family of the models.")
SIZES = {
    "hidden": (256, "Width of the models."),
    "layers": (4, "Layers of each model."),
    "heads": (4, "Heads of each layer."),
    "vocab": (8192, "Tokens of the vocabulary."),
}
define_numbers(SIZES, 1)
OPTIONAL_SIZES = {
    "kv_heads": (0, "Heads of keys and values; 0 is as many as --heads."),
    "mlp": (0, "Width of the feed-forward layers; 0 is four times --hidden."),
}
define_numbers(OPTIONAL_SIZES, 0)
define_numbers(
    {
        "batch": (16, "Responses of an iteration, or texts of a step."),
        "num_micro_batches": (1, "Micro-batches per optimizer step, one after the other."),
        "threads": (1, "Cores to run on."),
        "repeats": (5, "Timed runs, after one that is not."),
    },
    1,
)
flags.DEFINE_string(
    "lengths", "fixed", "Of responses or texts: fixed, geometric:MEAN or lognormal:MEDIAN."
)
flags.DEFINE_bool("tie_embeddings", None, "The head is the token table; by default the family's.")
flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Of activations, and of what is not trained."
)
flags.DEFINE_bool("scan_layers", False, "One scanned body instead of unrolled layers.")
flags.DEFINE_bool("profile", False, "Print the operations that take the most time.")
flags.DEFINE_alias("tie-embeddings", "tie_embeddings")
flags.DEFINE_alias("scan-layers", "scan_layers")
SHAPE = ("family", *SIZES, *OPTIONAL_SIZES, "tie_embeddings", "dtype", "scan_layers")


def model_config(max_length: int) -> ModelConfig:
    """The config of the flags, by the keys of a config.json.

    Raises:
        ValueError: the heads do not fit.
    """
    groups, mlp = FLAGS.kv_heads or FLAGS.heads, FLAGS.mlp or 4 * FLAGS.hidden
    if FLAGS.hidden % FLAGS.heads:
        raise ValueError(
            f"--hidden must be a multiple of --heads ({FLAGS.heads}), got {FLAGS.hidden}"
        )
    if FLAGS.family == "gpt2" and groups != FLAGS.heads:
        raise ValueError(f"--kv-heads must be 0 with --family=gpt2, got {groups}")
    if FLAGS.heads % groups:
        raise ValueError(f"--heads must be a multiple of --kv-heads ({groups}), got {FLAGS.heads}")
    if FLAGS.family != "gpt2" and FLAGS.hidden // FLAGS.heads % 2:
        raise ValueError(
            f"--hidden must be an even multiple of --heads with --family={FLAGS.family}, "
            f"got {FLAGS.hidden} and {FLAGS.heads}"
        )
    tie = FLAGS.family == "gpt2" if FLAGS.tie_embeddings is None else FLAGS.tie_embeddings
    raw = {
        "model_type": FLAGS.family,
        "vocab_size": FLAGS.vocab,
        "n_embd": FLAGS.hidden,
        "n_layer": FLAGS.layers,
        "n_head": FLAGS.heads,
        "n_inner": mlp,
        "n_positions": max_length,
        "hidden_size": FLAGS.hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": FLAGS.layers,
        "num_attention_heads": FLAGS.heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": max_length,
        "tie_word_embeddings": tie,
    }
    return read_config(raw, scan_layers=FLAGS.scan_layers, dtype=FLAGS.dtype)


def pin_threads():
    """Keep the process on `--threads` cores; before jax starts its threads.

    Raises:
        ValueError: there are not as many.
    """
    cores = sorted(os.sched_getaffinity(0))
    if FLAGS.threads > len(cores):
        raise ValueError(f"--threads must be at most {len(cores)}, got {FLAGS.threads}")
    os.sched_setaffinity(0, cores[: FLAGS.threads])


# --- timing ---------------------------------------------------------------------------------------


class Timing(NamedTuple):
    """Seconds of some runs of a program, of its compilation, and its memory."""

    cpu: list[float]  # of all threads
    wall: list[float]
    compile_seconds: float  # wall
    memory: dict[str, float]  # MB, see `memory_figures`

    @property
    def cpu_seconds(self) -> float:
        """The median."""
        return statistics.median(self.cpu)

    @property
    def seconds(self) -> float:
        """The median of what this platform is measured by."""
        return self.cpu_seconds if on_cpu() else statistics.median(self.wall)

    def figures(self, prefix: str = "") -> dict[str, float]:
        """Median and minimum."""
        return {
            f"{prefix}cpu_seconds": self.cpu_seconds,
            f"{prefix}cpu_seconds_min": min(self.cpu),
            f"{prefix}wall_seconds": statistics.median(self.wall),
            f"{prefix}wall_seconds_min": min(self.wall),
        }


def on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def time_calls(
    program: jax.stages.Compiled, call: Callable, compile_seconds: float, repeats: int | None = None
) -> tuple[Timing, Any]:
    """(seconds of each call of a program but the first, the result of the last)."""
    cpu, wall = [], []
    result = jax.block_until_ready(call())
    for _ in range(FLAGS.repeats if repeats is None else repeats):
        start = time.process_time(), time.perf_counter()
        result = jax.block_until_ready(call())
        cpu.append(time.process_time() - start[0])
        wall.append(time.perf_counter() - start[1])
    if FLAGS.profile and wall:
        print_profile(program, call)
    return Timing(cpu, wall, compile_seconds, memory_figures(program)), result


def memory_figures(program: jax.stages.Compiled) -> dict[str, float]:
    """MB: the most that the process has held so far, what the compiler plans for this program, and
    the most that an accelerator has held."""
    plan = program.memory_analysis()
    planned = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    figures = {
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "planned_mb": (planned - plan.alias_size_in_bytes) / 2**20,
    }
    if peak := (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"):
        figures["peak_device_mb"] = peak / 2**20
    return figures


Product = tuple[int, int, int]  # [n, k] x [k, m]


def layer_products(config: ModelConfig, positions: int) -> list[Product]:
    """The products with parameters of all layers."""
    c, width = config, config.embed_dim
    sizes = [c.num_heads * c.head_dim] * 2 + [c.num_kv_heads * c.head_dim] * 2
    layer = [(positions, width, size) for size in sizes] + [(positions, c.mlp_dim, width)]
    layer += [(positions, width, c.mlp_dim)] * (2 if c.gated else 1)
    return layer * c.num_layers


def peak_flops(products: Sequence[Product], dtype: str) -> float:
    """Flops a second that some products of matrices reach alone."""
    seconds = {shape: matmul_seconds(*shape, dtype) for shape in set(products)}
    return sum(2 * n * k * m for n, k, m in products) / sum(map(seconds.get, products))


@functools.cache
def matmul_seconds(n: int, k: int, m: int, dtype: str) -> float:
    """Seconds of a product [n, k] x [k, m], the minimum of some runs."""
    x, w = (jax.random.normal(jax.random.key(i), s, dtype) for i, s in enumerate([(n, k), (k, m)]))
    product, times = jax.jit(jnp.dot), []
    clock, calls = (time.process_time, 1) if on_cpu() else (time.perf_counter, 16)
    for _ in range(8):
        start = clock()
        jax.block_until_ready([product(x, w) for _ in range(calls)])
        times.append((clock() - start) / calls)
    return min(times)


# --- the report -----------------------------------------------------------------------------------


def rates(name: str, tokens: float, timing: Timing) -> dict[str, float]:
    """Tokens per second, of CPU time and of wall time."""
    return {
        f"{name}_per_cpu_second": tokens / timing.cpu_seconds,
        f"{name}_per_second": tokens / statistics.median(timing.wall),
    }


def utilisation_figures(model_flops: float, timing: Timing, peak: float) -> dict[str, float]:
    """Model flops a second, over what the same products reach alone."""
    return {
        "model_flops": model_flops,
        "matmul_peak_flops": peak,
        "utilisation": model_flops / timing.seconds / peak,
    }


def run_figures(timing: Timing) -> dict[str, Any]:
    """Memory, compilation, and where it ran."""
    return {
        **timing.memory,
        "compile_seconds": timing.compile_seconds,
        "load_average": os.getloadavg()[0],
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }


def flag_values(*names: str) -> dict[str, Any]:
    return {name: getattr(FLAGS, name) for name in names}
