r"""A sweep as one program beside its lanes one by one, in CPU seconds of an iteration.

    python experiments/benchmark.py lanes --shape=tiny --lanes=8
    python experiments/benchmark.py lanes --shape=lora --lanes=4 --repeats=2

The shapes are those of configs/quickstart.py: `tiny`, trained whole, `lora`, SmolLM2-135M with a
kept vocabulary and adapters of rank 8 for policy and critic; `test` is the smallest. Lanes have one
seed, or with --own_seeds prompts and keys of their own. The last line is a JSON object:
`times_the_lanes_per_cpu_second` is what one program does of what one by one does, without the start
of a process and compilation, of which one program needs one. `argument_mb` is all that is held
between iterations, and `mb_a_lane` what a lane adds.
"""

import os
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks.measure import FLAGS, pin_threads
from benchmarks.report import print_json
from ppo_jax.algorithms.options import PPONetworks, PPOOptions
from ppo_jax.algorithms.ppo import init_ppo, ppo_iteration
from ppo_jax.algorithms.sweep import LaneAxes, stack_lanes, sweep_iteration
from ppo_jax.core.network import merge_params
from ppo_jax.core.types import FrozenParams, Hyperparameters, Optimizer, Prompts
from ppo_jax.models.build import policy_network, reward_network, value_network
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.lora import TARGETS, init_lora
from ppo_jax.models.partition import split_params
from ppo_jax.rollout.sampling import Sampling

flags.DEFINE_enum("shape", "tiny", ["tiny", "lora", "test"], "Of the models.")
flags.DEFINE_integer("lanes", 8, "How many.", lower_bound=1)
flags.DEFINE_integer("at_once", None, "How many side by side; by default all.", lower_bound=1)
flags.DEFINE_bool("own_seeds", False, "Lanes have prompts and keys of their own.")

SIZES = {  # vocabulary, layers, width, heads, key and value heads, head size, MLP
    "tiny": (2048, 4, 128, 4, 4, 32, 384),
    "lora": (8192, 30, 576, 9, 3, 64, 1536),
    "test": (320, 2, 32, 2, 2, 16, 48),
}
BATCHES = {"tiny": (64, 32, 24, 4), "lora": (16, 24, 24, 4), "test": (8, 16, 8, 2)}


class Setup:
    """One lane, and what all lanes share."""

    def __init__(self):
        vocab, layers, width, heads, groups, head_dim, mlp = SIZES[FLAGS.shape]
        lora = FLAGS.shape == "lora"
        self.config = ModelConfig(
            vocab_size=vocab,
            num_layers=layers,
            embed_dim=width,
            num_heads=heads,
            num_kv_heads=groups,
            head_dim=head_dim,
            mlp_dim=mlp,
            max_length=128,
            scan_layers=lora,  # compiles in seconds
            lora_alpha=16.0 if lora else 0.0,
        )
        c = self.config
        self.networks = PPONetworks(
            policy=policy_network(c), value=value_network(c), reward=reward_network(c)
        )
        size, prompt, response, minibatches = BATCHES[FLAGS.shape]
        sampling = Sampling(response_length=response, eos_ids=(1,))
        self.options = PPOOptions(sampling=sampling, num_epochs=1, num_minibatches=minibatches)
        optimizer = Optimizer(learning_rate=5e-4)
        self.numbers = jax.tree.map(jnp.float32, Hyperparameters(optimizer=optimizer))
        tokens = jax.random.randint(jax.random.key(3), (size, prompt), 2, vocab, jnp.int32)
        self.prompts = Prompts(tokens=tokens, mask=jnp.ones((size, prompt), bool))
        self.state, self.frozen = self.start(lora)

    def start(self, lora: bool):
        """(state, frozen parameters), the reward model and a base that policy and critic share."""
        networks = self.networks
        policy, value, reward = (
            network.init(jax.random.key(i))
            for i, network in enumerate((networks.policy, networks.value, networks.reward))
        )
        if not lora:
            state = init_ppo(policy, value, self.numbers)
            return state, FrozenParams(ref_policy=policy, reward=reward)
        value = {**policy, "head": value["head"]}
        parts = [
            split_params(self.config, merge_params(params, self.adapters(params)), "lora", None)
            for params in (policy, value)
        ]
        state = init_ppo(parts[0].trained, parts[1].trained, self.numbers)
        frozen = {"policy": parts[0].frozen, "value": parts[1].frozen}
        return state, FrozenParams(ref_policy={}, reward=reward, **frozen)

    def adapters(self, params):
        return init_lora(jax.random.key(9), self.config, params, targets=TARGETS, rank=8)

    def one(self):
        """(program, its arguments) of a lane by itself."""
        parts = dict(networks=self.networks, options=self.options)

        def iteration(state, numbers, prompts, key, frozen):
            return ppo_iteration(state, numbers, prompts, key, frozen=frozen, **parts)

        return iteration, (self.numbers, self.prompts, jax.random.key(4), self.frozen)

    def lanes(self):
        """The same of all lanes."""
        axes = LaneAxes(inputs=0 if FLAGS.own_seeds else None, at_once=FLAGS.at_once)
        parts = dict(networks=self.networks, options=self.options, axes=axes)

        def iteration(states, numbers, prompts, key, frozen):
            return sweep_iteration(states, numbers, prompts, key, frozen=frozen, **parts)

        numbers = stack_lanes([self.numbers] * FLAGS.lanes)
        prompts, key = self.prompts, jax.random.key(4)
        if FLAGS.own_seeds:
            prompts = stack_lanes([prompts] * FLAGS.lanes)
            key = jax.random.split(key, FLAGS.lanes)
        return iteration, (numbers, prompts, key, self.frozen)


def main():
    pin_threads()
    setup = Setup()
    alone = measure(setup.state, *setup.one())
    together = measure(stack_lanes([setup.state] * FLAGS.lanes), *setup.lanes())
    lanes, megabytes = FLAGS.lanes, together["argument_mb"]
    print_json(
        {
            "benchmark": "lanes",
            "arguments": {
                name: getattr(FLAGS, name) for name in ("shape", "lanes", "at_once", "own_seeds")
            },
            **{f"one_{name}": x for name, x in alone.items()},
            **{f"lanes_{name}": x for name, x in together.items()},
            "times_the_lanes_per_cpu_second": lanes
            * alone["cpu_seconds"]
            / together["cpu_seconds"],
            "mb_a_lane": (megabytes - alone["argument_mb"]) / max(lanes - 1, 1),
            "load_average": os.getloadavg()[0],
            "jax": jax.__version__,
        }
    )


def measure(state: Any, function: Any, args: tuple) -> dict[str, float]:
    """CPU seconds of an iteration, and the memory of its program."""
    began = time.process_time()
    compiled = jax.jit(function, donate_argnums=0).lower(state, *args).compile()
    seconds = time.process_time() - began
    memory, times = compiled.memory_analysis(), []
    state = jax.tree.map(jnp.copy, state)
    for repeat in range(1 + FLAGS.repeats):
        began = time.process_time()
        state, metrics = compiled(state, *args)
        jax.block_until_ready((state, metrics))
        if repeat:
            times.append(time.process_time() - began)
    return {
        "cpu_seconds": statistics.median(times),
        "cpu_seconds_min": min(times),
        "compile_cpu_seconds": seconds,
        "argument_mb": memory.argument_size_in_bytes / 1e6,
        "temporary_mb": memory.temp_size_in_bytes / 1e6,
    }
