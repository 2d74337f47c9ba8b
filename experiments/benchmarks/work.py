"""Random models of one size, timed: what the subcommands of `ppo` and `skewed` share."""

import functools
import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.profile import print_profile
from ppo_jax.algorithms.experience import PPONetworks, PPOOptions
from ppo_jax.algorithms.ppo import init_ppo
from ppo_jax.core.types import FrozenParams, Hyperparameters, Optimizer, Prompts
from ppo_jax.models.build import policy_network, reward_network, value_network
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.families import read_config
from ppo_jax.planner import flops
from ppo_jax.rollout.sampling import Sampling

FLAGS = flags.FLAGS
flags.DEFINE_enum("family", "gpt2", ["gpt2", "llama", "qwen2"], "What the models compute.")
SIZES = {
    "hidden": (256, "Width of the models."),
    "layers": (4, "Layers of each model."),
    "heads": (4, "Heads of each layer."),
    "vocab": (8192, "Tokens of the vocabulary."),
    "batch": (16, "Responses of an iteration."),
    "prompt_len": (32, "Tokens of a prompt."),
    "response_len": (64, "Tokens of a response."),
    "num_epochs": (4, "Passes over a rollout."),
    "num_minibatches": (1, "Optimizer steps a pass."),
    "num_micro_batches": (1, "Pieces of a minibatch, one after the other."),
    "threads": (1, "Cores to run on."),
    "repeats": (5, "Timed runs, after one that is not."),
}
flags.DEFINE_integer(
    "refill", 0, "Free slots that prompts wait for; 0 is a quarter.", lower_bound=0
)
flags.DEFINE_bool("scan_layers", False, "One scanned body instead of layers one after the other.")
flags.DEFINE_bool("profile", False, "Print the operations that the time of a program goes to.")
flags.DEFINE_string("lengths", "fixed", "Of responses: fixed, or geometric:MEAN.")
flags.DEFINE_integer("num_prompts", 128, "Of a rollout with geometric lengths.", lower_bound=1)
flags.DEFINE_alias("num-prompts", "num_prompts")
flags.DEFINE_alias("scan-layers", "scan_layers")
for name, (default, told) in SIZES.items():
    flags.DEFINE_integer(name, default, told, lower_bound=1)
    if "_" in name:
        flags.DEFINE_alias(name.replace("_", "-"), name)


class Timed(NamedTuple):
    """Seconds of some runs of a program, and of its compilation."""

    cpu: list[float]  # of all threads
    wall: list[float]
    compile: float  # wall

    def figures(self, prefix: str = "") -> dict[str, float]:
        """Median and least."""
        return {
            f"{prefix}cpu_seconds": statistics.median(self.cpu),
            f"{prefix}cpu_seconds_min": min(self.cpu),
            f"{prefix}wall_seconds": statistics.median(self.wall),
            f"{prefix}wall_seconds_min": min(self.wall),
        }


class Work:
    """The models of random weights, one batch of prompts, and the programs over them."""

    def __init__(self):
        cores = sorted(os.sched_getaffinity(0))
        if FLAGS.threads > len(cores):
            raise ValueError(f"--threads must be at most {len(cores)}, got {FLAGS.threads}")
        pieces = FLAGS.num_minibatches * FLAGS.num_micro_batches
        if FLAGS.batch % pieces:
            raise ValueError(
                "--batch must be a multiple of --num-minibatches x --num-micro-batches "
                f"({pieces}), got {FLAGS.batch}"
            )
        os.sched_setaffinity(0, cores[: FLAGS.threads])  # before jax starts its threads
        self.config = config = model_config()
        self.networks = PPONetworks(
            policy=policy_network(config),
            value=value_network(config),
            reward=reward_network(config),
        )
        sampling = Sampling(response_length=FLAGS.response_len, eos_ids=())
        self.options = PPOOptions(
            sampling=sampling,
            num_epochs=FLAGS.num_epochs,
            num_minibatches=FLAGS.num_minibatches,
            num_micro_batches=FLAGS.num_micro_batches,
        )
        self.numbers = jax.device_put(
            Hyperparameters(optimizer=Optimizer(learning_rate=3e-6), temperature=0.7)
        )
        inits = (self.networks.policy, self.networks.value, self.networks.reward)
        policy, value, reward = (
            jax.jit(network.init)(jax.random.key(i)) for i, network in enumerate(inits)
        )
        self.frozen = FrozenParams(ref_policy=policy, reward=reward)
        self.state = jax.jit(init_ppo)(policy, value, self.numbers)
        self.prompts = random_prompts(FLAGS.batch)
        self.key = jax.random.key(4)

    def compile(
        self, function: Callable, *args: Any, **options: Any
    ) -> tuple[functools.partial, float]:
        """(the compiled function, bound to the frozen parameters; wall seconds to compile it)."""
        parts = dict(networks=self.networks, options=self.options)
        began = time.perf_counter()
        lowered = jax.jit(functools.partial(function, **parts), **options).lower(
            *args, frozen=self.frozen
        )
        compiled = lowered.compile()
        return functools.partial(compiled, frozen=self.frozen), time.perf_counter() - began

    def flops(self) -> dict[str, float]:
        """Of each phase, by the models' shape."""
        c = self.config
        where = dict(
            sequences=FLAGS.batch,
            prompt_length=FLAGS.prompt_len,
            response_length=FLAGS.response_len,
        )
        return {
            "rollout": flops.rollout_flops(c, **where),
            "score": flops.scoring_flops(c, c, c, **where),
            "update": flops.update_flops(c, c, num_epochs=FLAGS.num_epochs, **where),
        }


def random_prompts(count: int) -> Prompts:
    shape = (count, FLAGS.prompt_len)
    tokens = jax.random.randint(jax.random.key(3), shape, 2, FLAGS.vocab, jnp.int32)
    return Prompts(tokens=tokens, mask=jnp.ones(shape, bool))


def model_config() -> ModelConfig:
    """The shape that the flags describe, as a config.json says it."""
    length = FLAGS.prompt_len + FLAGS.response_len
    raw = {
        "model_type": FLAGS.family,
        "vocab_size": FLAGS.vocab,
        "n_embd": FLAGS.hidden,
        "n_layer": FLAGS.layers,
        "n_head": FLAGS.heads,
        "n_positions": length,
        "hidden_size": FLAGS.hidden,
        "intermediate_size": 4 * FLAGS.hidden,
        "num_hidden_layers": FLAGS.layers,
        "num_attention_heads": FLAGS.heads,
        "max_position_embeddings": length,
        "tie_word_embeddings": FLAGS.family == "gpt2",
    }
    return read_config(raw, scan_layers=FLAGS.scan_layers)


# --- seconds and figures --------------------------------------------------------------------------


def time_calls(
    program: jax.stages.Compiled, call: Callable, compiled_in: float, repeats: int | None
) -> tuple[Timed, Any]:
    """(seconds of each call of a program but the first, what the last one gave)."""
    cpu, wall = [], []
    result = jax.block_until_ready(call())
    for _ in range(FLAGS.repeats if repeats is None else repeats):
        began = time.process_time(), time.perf_counter()
        result = jax.block_until_ready(call())
        cpu.append(time.process_time() - began[0])
        wall.append(time.perf_counter() - began[1])
    if FLAGS.profile and wall:
        print_profile(program, call)
    return Timed(cpu, wall, compiled_in), result


def response_tokens() -> int:
    return FLAGS.batch * FLAGS.response_len


def rates(name: str, tokens: float, timed: Timed) -> dict[str, float]:
    """Tokens per second, of the processor and of the clock."""
    return {
        f"{name}_per_cpu_second": tokens / statistics.median(timed.cpu),
        f"{name}_per_second": tokens / statistics.median(timed.wall),
    }


@functools.cache
def matmul_peak(config: ModelConfig, positions: int, outputs: int) -> float:
    """Flops a CPU second of the models' own products alone, of one layer and the head together.

    Args:
        config: the model.
        positions: rows of the products of a layer.
        outputs: rows of the product of the head.
    """
    c = config
    width, heads = c.embed_dim, c.num_heads * c.head_dim
    gates = 2 if c.mlp == "gated_silu" else 1
    layer = [(positions, width, heads)] * 4
    layer += [(positions, width, c.mlp_dim)] * gates + [(positions, c.mlp_dim, width)]
    products = layer * c.num_layers + [(outputs, width, c.vocab_size)]
    seconds = {shape: product_seconds(*shape) for shape in set(products)}
    return sum(2 * n * k * m for n, k, m in products) / sum(seconds[shape] for shape in products)


def product_seconds(n: int, k: int, m: int) -> float:
    """CPU seconds of a product [n, k] x [k, m], the least of some runs."""
    x, w = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(n, k), (k, m)]))
    product = jax.jit(jnp.dot)
    times = []
    for _ in range(8):
        began = time.process_time()
        jax.block_until_ready(product(x, w))
        times.append(time.process_time() - began)
    return min(times)


def peak(work: Work) -> float:
    rows = FLAGS.batch // FLAGS.num_minibatches
    length = FLAGS.prompt_len + FLAGS.response_len - 1
    return matmul_peak(work.config, rows * length, rows * FLAGS.response_len)


def utilisation(work: Work, phase: str, timed: Timed) -> float:
    """Model flops / CPU second, over what the products reach alone."""
    return work.flops()[phase] / statistics.median(timed.cpu) / peak(work)


def tell(work: Work, timed: Timed, name: str, **more: float):
    """All figures as one line of JSON."""
    counted = work.flops()
    model_flops = counted[name] if name in counted else sum(counted.values())
    found = {
        "benchmark": name,
        "arguments": arguments(),
        **timed.figures(),
        **more,
        "model_flops": model_flops,
        "matmul_peak_flops": peak(work),
        "utilisation": model_flops / statistics.median(timed.cpu) / peak(work),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "compile_seconds": timed.compile,
        "load_average": os.getloadavg()[0],
        "jax": jax.__version__,
    }
    print(json.dumps(rounded(found)))


def arguments() -> dict[str, Any]:
    return {k: getattr(FLAGS, k) for k in ("family", "scan_layers", *SIZES)}


def rounded(found: dict[str, Any]) -> dict[str, Any]:
    """Four digits of every number."""
    return {
        k: float(np.format_float_positional(v, 4, fractional=False)) if isinstance(v, float) else v
        for k, v in found.items()
    }
