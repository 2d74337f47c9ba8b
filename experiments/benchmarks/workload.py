"""PPO on random models of one size, timed: what the subcommands of `ppo` and `skewed` share."""

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
from absl import flags

from benchmarks.profile import print_profile
from ppo_jax.algorithms.options import PPONetworks, PPOOptions
from ppo_jax.algorithms.passes import passes_in_common
from ppo_jax.algorithms.ppo import init_ppo
from ppo_jax.core.types import FrozenParams, Hyperparameters, Optimizer, Prompts
from ppo_jax.models.build import policy_network, reward_network, value_network
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.families import read_config
from ppo_jax.planner import flops
from ppo_jax.rollout.sampling import Sampling

FLAGS = flags.FLAGS
flags.DEFINE_enum("family", "gpt2", ["gpt2", "llama", "qwen2"], "Family of the models.")
SIZES = {
    "hidden": (256, "Width of the models."),
    "layers": (4, "Layers of each model."),
    "heads": (4, "Heads of each layer."),
    "vocab": (8192, "Tokens of the vocabulary."),
    "batch": (16, "Responses of an iteration."),
    "prompt_len": (32, "Tokens of a prompt."),
    "response_len": (64, "Tokens of a response."),
    "num_epochs": (4, "Passes over a rollout."),
    "num_minibatches": (1, "Optimizer steps per pass."),
    "num_micro_batches": (1, "Micro-batches per minibatch, one after the other."),
    "threads": (1, "Cores to run on."),
    "repeats": (5, "Timed runs, after one that is not."),
}
flags.DEFINE_integer(
    "min_free_slots", 0, "Free slots that prompts wait for; 0 is a quarter.", lower_bound=0
)
flags.DEFINE_bool("scan_layers", False, "One scanned body instead of unrolled layers.")
flags.DEFINE_bool("profile", False, "Print the operations that take the most time.")
flags.DEFINE_string("lengths", "fixed", "Of responses: fixed, or geometric:MEAN.")
flags.DEFINE_integer("num_prompts", 128, "Of a rollout with geometric lengths.", lower_bound=1)
flags.DEFINE_alias("num-prompts", "num_prompts")
flags.DEFINE_alias("min-free-slots", "min_free_slots")
flags.DEFINE_alias("scan-layers", "scan_layers")
for name, (default, description) in SIZES.items():
    flags.DEFINE_integer(name, default, description, lower_bound=1)
    if "_" in name:
        flags.DEFINE_alias(name.replace("_", "-"), name)


class Timing(NamedTuple):
    """Seconds of some runs of a program, and of its compilation."""

    cpu: list[float]  # of all threads
    wall: list[float]
    compile_seconds: float  # wall

    @property
    def cpu_seconds(self) -> float:
        """The median."""
        return statistics.median(self.cpu)

    def figures(self, prefix: str = "") -> dict[str, float]:
        """Median and minimum."""
        return {
            f"{prefix}cpu_seconds": self.cpu_seconds,
            f"{prefix}cpu_seconds_min": min(self.cpu),
            f"{prefix}wall_seconds": statistics.median(self.wall),
            f"{prefix}wall_seconds_min": min(self.wall),
        }


class Workload:
    """Models of random weights, one batch of prompts, and timed programs over them."""

    def __init__(self):
        cores = sorted(os.sched_getaffinity(0))
        if FLAGS.threads > len(cores):
            raise ValueError(f"--threads must be at most {len(cores)}, got {FLAGS.threads}")
        num_micro_batches = FLAGS.num_minibatches * FLAGS.num_micro_batches
        if FLAGS.batch % num_micro_batches:
            raise ValueError(
                "--batch must be a multiple of --num-minibatches x --num-micro-batches "
                f"({num_micro_batches}), got {FLAGS.batch}"
            )
        os.sched_setaffinity(0, cores[: FLAGS.threads])  # before jax starts its threads
        self.config = c = model_config()
        self.networks = networks = PPONetworks(
            policy=policy_network(c), value=value_network(c), reward=reward_network(c)
        )
        self.options = PPOOptions(
            sampling=Sampling(response_length=FLAGS.response_len, eos_ids=()),
            num_epochs=FLAGS.num_epochs,
            num_minibatches=FLAGS.num_minibatches,
            num_micro_batches=FLAGS.num_micro_batches,
        )
        self.hyperparameters = jax.device_put(
            Hyperparameters(optimizer=Optimizer(learning_rate=3e-6), temperature=0.7)
        )
        policy, value, reward = (
            jax.jit(network.init)(jax.random.key(i))
            for i, network in enumerate((networks.policy, networks.value, networks.reward))
        )
        self.frozen = FrozenParams(ref_policy=policy, reward=reward)
        self.state = jax.jit(init_ppo)(policy, value, self.hyperparameters)
        self.prompts = random_prompts(FLAGS.batch)
        self.key = jax.random.key(4)

    def time(
        self, function: Callable, *args: Any, repeats: int | None = None
    ) -> tuple[Timing, Any]:
        """(timing, result) of a function of the state and `args`."""
        compiled, compile_seconds = self.compile(function, *args)
        call = functools.partial(compiled, self.state, *args, frozen=self.frozen)
        return time_calls(compiled, call, compile_seconds, repeats)

    def time_steps(self, function: Callable, *args: Any) -> Timing:
        """Timing of a function that takes the state and returns the next one."""
        compiled, compile_seconds = self.compile(function, *args, donate_argnums=0)

        def call():
            self.state, metrics = compiled(self.state, *args, frozen=self.frozen)
            return metrics

        return time_calls(compiled, call, compile_seconds)[0]

    def compile(
        self, function: Callable, *args: Any, **options: Any
    ) -> tuple[jax.stages.Compiled, float]:
        """(compiled function of the state and `args`, wall seconds to compile it)."""
        bound = functools.partial(function, networks=self.networks, options=self.options)
        start = time.perf_counter()
        compiled = jax.jit(bound, **options).lower(self.state, *args, frozen=self.frozen).compile()
        return compiled, time.perf_counter() - start

    @property
    def one_pass(self) -> bool:
        """Whether the update makes the critic's pass of scoring, see `passes_in_common`."""
        return bool(passes_in_common(self.options, has_critic=True, own_optimizer=False))

    def flops(self, *, iteration: bool = False) -> dict[str, float]:
        """Analytic flops of each phase, by itself or as it is in an iteration."""
        c = self.config
        critic = None if iteration and self.one_pass else c
        sizes = dict(prompt_length=FLAGS.prompt_len, response_length=FLAGS.response_len)
        sizes["sequences"] = FLAGS.batch
        return {
            "rollout": flops.rollout_flops(c, **sizes),
            "score": flops.scoring_flops(c, critic, c, **sizes),
            "update": flops.update_flops(c, c, num_epochs=FLAGS.num_epochs, **sizes),
        }

    @functools.cached_property
    def peak_flops(self) -> float:
        """Flops per CPU second of the matrix products of a minibatch alone."""
        c, rows = self.config, FLAGS.batch // FLAGS.num_minibatches
        positions = rows * (FLAGS.prompt_len + FLAGS.response_len - 1)
        width, heads = c.embed_dim, c.num_heads * c.head_dim
        layer = [(positions, width, heads)] * 4 + [(positions, c.mlp_dim, width)]
        layer += [(positions, width, c.mlp_dim)] * (2 if c.mlp == "gated_silu" else 1)
        products = layer * c.num_layers + [(rows * FLAGS.response_len, width, c.vocab_size)]
        seconds = {shape: matmul_seconds(*shape) for shape in set(products)}
        return sum(2 * n * k * m for n, k, m in products) / sum(map(seconds.get, products))

    def utilisation(self, model_flops: float, timing: Timing) -> float:
        """Model flops per CPU second, over what the same products reach alone."""
        return model_flops / timing.cpu_seconds / self.peak_flops


def random_prompts(count: int) -> Prompts:
    shape = (count, FLAGS.prompt_len)
    tokens = jax.random.randint(jax.random.key(3), shape, 2, FLAGS.vocab, jnp.int32)
    return Prompts(tokens=tokens, mask=jnp.ones(shape, bool))


def model_config() -> ModelConfig:
    """The config of the flags, by the keys of a config.json."""
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


# --- timing ---------------------------------------------------------------------------------------


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
    return Timing(cpu, wall, compile_seconds), result


def matmul_seconds(n: int, k: int, m: int) -> float:
    """CPU seconds of a product [n, k] x [k, m], the minimum of some runs."""
    x, w = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(n, k), (k, m)]))
    product = jax.jit(jnp.dot)
    times = []
    for _ in range(8):
        start = time.process_time()
        jax.block_until_ready(product(x, w))
        times.append(time.process_time() - start)
    return min(times)


# --- the report -----------------------------------------------------------------------------------


def response_tokens() -> int:
    return FLAGS.batch * FLAGS.response_len


def rates(name: str, tokens: float, timing: Timing) -> dict[str, float]:
    """Tokens per second, of CPU time and of wall time."""
    return {
        f"{name}_per_cpu_second": tokens / timing.cpu_seconds,
        f"{name}_per_second": tokens / statistics.median(timing.wall),
    }


def print_report(work: Workload, timing: Timing, name: str, **figures: float):
    """All figures as one line of JSON."""
    flops = work.flops(iteration=name == "iteration")
    model_flops = flops[name] if name in flops else sum(flops.values())
    print_json(
        {
            "benchmark": name,
            "arguments": arguments(),
            **timing.figures(),
            **figures,
            "model_flops": model_flops,
            "matmul_peak_flops": work.peak_flops,
            "utilisation": work.utilisation(model_flops, timing),
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "compile_seconds": timing.compile_seconds,
            "load_average": os.getloadavg()[0],
            "jax": jax.__version__,
        }
    )


def arguments(*names: str) -> dict[str, Any]:
    return {k: getattr(FLAGS, k) for k in ("family", "scan_layers", *SIZES, *names)}


def print_json(figures: dict[str, Any]):
    """One line; floats with four digits."""
    rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in figures.items()}
    print(json.dumps(rounded))
