"""PPO on random models of one size, timed: what the subcommands of `ppo` and `skewed` share.

Networks, options and numbers are made of the settings of a run by the functions of a run.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.measure import (
    FLAGS,
    SHAPE,
    Timing,
    define_numbers,
    flag_values,
    layer_products,
    model_config,
    peak_flops,
    pin_threads,
    run_figures,
    time_calls,
    utilisation_figures,
)
from benchmarks.report import print_json
from ppo_jax.algorithms.passes import passes_in_common
from ppo_jax.algorithms.ppo import init_ppo
from ppo_jax.config.ppo import PPOSettings
from ppo_jax.config.stages import LoRASettings, OptimizerSettings
from ppo_jax.core.types import Prompts
from ppo_jax.distributed.layout import Layout, init_sharded, one_device
from ppo_jax.io.stage_folder import Model
from ppo_jax.models.build import policy_network, reward_network
from ppo_jax.planner.iteration import analytic_flops
from ppo_jax.planner.models import Models
from ppo_jax.rollout.sampling import Sampling
from ppo_jax.training.common import freeze, with_adapters
from ppo_jax.training.ppo_setup import (
    make_hyperparameters,
    make_networks,
    make_options,
    split_models,
)

BATCH = {
    "samples_per_prompt": (1, "Of them to each prompt."),
    "prompt_len": (32, "Tokens of a prompt."),
    "response_len": (64, "Tokens of a response."),
    "num_epochs": (4, "Passes over a rollout."),
    "num_minibatches": (1, "Optimizer steps per pass."),
}
define_numbers(BATCH, 1)
NUMBERS = {
    "lora": (0, "Rank of adapters, which alone are trained, of policy and critic; 0 trains all."),
    "logits_chunk": (0, "Response positions whose logits are held at a time; 0 is as many as fit."),
    "min_free_slots": (0, "Free slots that prompts wait for; 0 is a quarter."),
}
define_numbers(NUMBERS, 0)
define_numbers({"num_prompts": (128, "Of a rollout with geometric lengths.")}, 1)

NO_TRUNK = (None, None, None)  # every network reads tokens


class Workload:
    """Models of random weights, one batch of prompts, and timed programs over them."""

    def __init__(self):
        self.settings = ppo_settings()
        pin_threads()
        layout, c = one_device(), model_config(FLAGS.prompt_len + FLAGS.response_len)
        parts = {"policy": policy_network(c), "reward": reward_network(c)}
        policy, reward, critic = (
            random_model(kind, c, parts[kind].init, seed, layout)
            for seed, kind in enumerate(("policy", "reward", "reward"))
        )
        lora, how = self.settings.lora, dict(seed=3, layout=layout)
        policy = with_adapters(policy, self.settings.trainable, lora, **how)
        critic = with_adapters(critic, self.settings.value_trainable, lora, **how)
        self.config, self.models = c, Models(policy=c, critic=c, reward=c)
        configs = policy.config, critic.config, reward.config
        layouts = (layout, layout)
        self.networks = make_networks(*configs, NO_TRUNK, layouts, FLAGS.logits_chunk)
        sampling = Sampling(response_length=FLAGS.response_len, eos_ids=())
        self.options = make_options(self.settings, sampling, eos_id=0)
        self.hyperparameters = layout.replicate(make_hyperparameters(self.settings))
        frozen, *trained = split_models(self.settings, policy, reward, critic, NO_TRUNK)
        self.frozen = freeze(frozen, layout, FLAGS.dtype)
        self.state = init_sharded(layout, init_ppo, *trained, self.hyperparameters)
        self.prompts = layout.shard_batch(random_prompts(FLAGS.batch // FLAGS.samples_per_prompt))
        self.key = layout.replicate(jax.random.key(4))

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

    def flops(self) -> dict[str, float]:
        """Analytic flops of each phase, without what is computed again."""
        found = analytic_flops(self.settings, self.models, again=False)
        return {"score" if name == "scoring" else name: flops for name, flops in found.items()}

    @functools.cached_property
    def peak_flops(self) -> float:
        """Flops a second of the matrix products of a minibatch alone."""
        c, rows = self.config, FLAGS.batch // FLAGS.num_minibatches
        products = layer_products(c, rows * (FLAGS.prompt_len + FLAGS.response_len - 1))
        head = (rows * FLAGS.response_len, c.embed_dim, c.vocab_size)
        return peak_flops([*products, head], FLAGS.dtype)

    def utilisation(self, model_flops: float, timing: Timing) -> float:
        """Model flops a second, over what the same products reach alone."""
        return utilisation_figures(model_flops, timing, self.peak_flops)["utilisation"]


def ppo_settings() -> PPOSettings:
    """Those of the flags; all else is as a run has it.

    Raises:
        ValueError: the batch does not fall into its parts.
    """
    num_micro_batches = FLAGS.num_minibatches * FLAGS.num_micro_batches
    if FLAGS.batch % num_micro_batches:
        raise ValueError(
            "--batch must be a multiple of --num-minibatches x --num-micro-batches "
            f"({num_micro_batches}), got {FLAGS.batch}"
        )
    if FLAGS.batch % FLAGS.samples_per_prompt:
        raise ValueError(
            f"--batch must be a multiple of --samples-per-prompt ({FLAGS.samples_per_prompt}), "
            f"got {FLAGS.batch}"
        )
    trained, lora = "all", {}
    if FLAGS.lora:
        trained, lora = "lora", {"lora": LoRASettings(rank=FLAGS.lora)}
    same = ("samples_per_prompt", "num_epochs", "num_minibatches", "num_micro_batches")
    return PPOSettings(
        prompts="random",
        optimizer=OptimizerSettings(learning_rate=3e-6),
        value_learning_rate=3e-6,
        rollout_batch_size=FLAGS.batch,
        max_prompt_length=FLAGS.prompt_len,
        response_length=FLAGS.response_len,
        temperature=0.7,
        score_at="last",  # there is no EOS
        trainable=trained,
        value_trainable=trained,
        logits_chunk=FLAGS.logits_chunk,
        **flag_values(*same),
        **lora,
    )


def random_model(kind: str, config, init: Callable, seed: int, layout: Layout) -> Model:
    params = init_sharded(layout, init, jax.random.key(seed))
    return Model(kind=kind, config=config, params=params, tokenizer=None)


def random_prompts(count: int) -> Prompts:
    shape = (count, FLAGS.prompt_len)
    tokens = jax.random.randint(jax.random.key(3), shape, 2, FLAGS.vocab, jnp.int32)
    return Prompts(tokens=tokens, mask=jnp.ones(shape, bool))


# --- the report -----------------------------------------------------------------------------------


def response_tokens() -> int:
    return FLAGS.batch * FLAGS.response_len


def print_report(work: Workload, timing: Timing, name: str, **figures: float):
    """All figures as one line of JSON."""
    flops = work.flops()
    model_flops = flops[name] if name in flops else sum(flops.values())
    print_json(
        {
            "benchmark": name,
            "arguments": arguments(),
            **timing.figures(),
            **figures,
            **utilisation_figures(model_flops, timing, work.peak_flops),
            **run_figures(timing),
        }
    )


def arguments(*names: str) -> dict[str, Any]:
    common = ("batch", "num_micro_batches", "threads", "repeats")
    return flag_values(*SHAPE, *BATCH, *NUMBERS, *common, *names)
