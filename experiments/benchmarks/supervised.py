r"""Steps of SFT and of reward training on random models and texts, in seconds of process CPU time.

    python experiments/benchmark.py sft --lengths=lognormal:40 --max-length=256 --packing
    python experiments/benchmark.py reward --lengths=geometric:24 --max-length=128

The steps, batches and packing are those of a run: a batch is as wide as its longest text, and with
--packing texts share rows of --max-length tokens. An SFT step then has so many rows that it learns
about as many texts as one without; of reward training it has the same pairs. An epoch over --texts
texts, in their order, is timed --repeats times, after one that is not; a program is compiled for
each width, and batches are made before. The last line of the output is one JSON object. Its tokens
are those of the texts; utilisation is of the positions that are computed, padding and all.
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from benchmarks.measure import (
    FLAGS,
    SHAPE,
    Product,
    Timing,
    define_numbers,
    flag_values,
    layer_products,
    memory_figures,
    model_config,
    peak_flops,
    pin_threads,
    rates,
    run_figures,
    utilisation_figures,
)
from benchmarks.peers.lengths import draw_texts
from benchmarks.profile import print_profile
from benchmarks.report import print_json
from ppo_jax.algorithms.supervised import reward_step, sft_step
from ppo_jax.config.stages import OptimizerSettings, RewardSettings
from ppo_jax.core.network import Network
from ppo_jax.data.comparisons import RewardData
from ppo_jax.data.encode import ComparisonGroups, TokenizedTexts, batch_indices, pad_right
from ppo_jax.data.hidden_states import make_inputs
from ppo_jax.data.packing import pack
from ppo_jax.distributed.layout import Layout, init_sharded, one_device
from ppo_jax.models.build import policy_network, reward_network
from ppo_jax.models.config import ModelConfig
from ppo_jax.planner.flops import training_flops
from ppo_jax.training.common import init_train_state, make_optimizer
from ppo_jax.training.reward import preference_batch
from ppo_jax.training.sft import as_text_batch

TEXTS = {
    "texts": (128, "Texts of an epoch."),
    "max_length": (128, "Tokens of the longest text, and of a row with --packing."),
}
define_numbers(TEXTS, 1)
flags.DEFINE_bool("packing", False, "Texts share rows.")

TEXT_FLAGS = ("batch", "num_micro_batches", "lengths", *TEXTS, "packing", "threads", "repeats")


class Stage(NamedTuple):
    """What a stage trains, and on what."""

    name: str
    network: Network
    step: Callable  # (state, batch, optimizer) -> (state, metrics)
    batches: Sequence[Any]  # of an epoch, on the device
    flops: Callable[[Any], float]  # of a batch
    products: Callable[[Any], list[Product]]  # of matrices, of a batch


def sft():
    """Every token of a text but its first is learned."""
    config, layout = start()
    texts = random_texts()
    rows_a_step = FLAGS.batch
    if FLAGS.packing:
        packed = pack(texts, max_length=FLAGS.max_length)
        rows_a_step = max(1, round(FLAGS.batch * len(packed.mask) / len(texts.mask)))
        rows_a_step = -(-rows_a_step // FLAGS.num_micro_batches) * FLAGS.num_micro_batches
        texts = packed
    inputs, num_rows = make_inputs(texts, None, None, cache_gb=0.0), len(texts.mask)

    def batch(step: int):
        rows = np.arange(step * rows_a_step, (step + 1) * rows_a_step) % num_rows
        return layout.shard_batch(as_text_batch(texts, inputs, rows))

    def flops(batch):
        rows, positions = batch.inputs.shape[0], batch.inputs.shape[1] - 1
        sizes = dict(sequences=rows, positions=positions, outputs=positions)
        return training_flops(config, head="logits", **sizes)

    def products(batch):
        positions = batch.inputs.shape[0] * (batch.inputs.shape[1] - 1)
        head = (positions, config.embed_dim, config.vocab_size)
        return [*layer_products(config, positions), head]

    batches = [batch(i) for i in range(math.ceil(num_rows / rows_a_step))]
    network = policy_network(config, constrain=layout.constrain)
    report(Stage("sft", network, sft_step, batches, flops, products), layout)


def reward():
    """Half of the texts are preferred to the other half."""
    for name in ("batch", "texts"):
        if (got := getattr(FLAGS, name)) % 2:
            raise ValueError(f"--{name} must be even, two texts a pair, got {got}")
    config, layout = start()
    settings = RewardSettings(
        data="random",
        optimizer=OptimizerSettings(learning_rate=1e-5),
        batch_size=FLAGS.batch,
        max_length=FLAGS.max_length,
        num_micro_batches=FLAGS.num_micro_batches,
        packing=FLAGS.packing,
    )
    texts, count = random_texts(), FLAGS.texts // 2
    pairs = np.tile(np.array([[[0, 1]]], np.int32), (count, 1, 1))
    rows = np.zeros((count, 2), np.int32)
    order = batch_indices(0, 0, num_examples=count, batch_size=count)
    rows[order] = np.arange(FLAGS.texts).reshape(count, 2)  # the first epoch is in the texts' order
    groups = ComparisonGroups(rows=rows, pairs=pairs, valid=np.ones((count, 1), bool))
    data = RewardData(texts=texts, groups=groups)
    inputs = make_inputs(texts, None, None, cache_gb=0.0)

    def flops(batch):
        rows, positions = batch.inputs.shape
        outputs = 1 if batch.ends is None else batch.ends.shape[1]
        sizes = dict(sequences=rows, positions=positions, outputs=outputs)
        return training_flops(config, head="scalar", **sizes)

    def products(batch):
        return layer_products(config, math.prod(batch.inputs.shape))

    batches = [
        preference_batch(data, inputs, 0, i, settings, layout, config.max_length)
        for i in range(math.ceil(FLAGS.texts / FLAGS.batch))
    ]
    network = reward_network(config, constrain=layout.constrain)
    report(Stage("reward", network, reward_step, batches, flops, products), layout)


def start() -> tuple[ModelConfig, Layout]:
    """(config, layout).

    Raises:
        ValueError: the flags do not go together.
    """
    if FLAGS.batch % FLAGS.num_micro_batches:
        raise ValueError(
            f"--batch must be a multiple of --num-micro-batches ({FLAGS.num_micro_batches}), "
            f"got {FLAGS.batch}"
        )
    if FLAGS.texts % FLAGS.batch:
        raise ValueError(
            f"--texts must be a multiple of --batch ({FLAGS.batch}), got {FLAGS.texts}"
        )
    pin_threads()
    return model_config(FLAGS.max_length), one_device()


def random_texts() -> TokenizedTexts:
    rows = draw_texts(FLAGS.lengths, FLAGS.texts, FLAGS.max_length, FLAGS.vocab)
    tokens, mask = pad_right(rows, FLAGS.max_length)
    learned = mask & (np.arange(mask.shape[1]) >= 1)
    return TokenizedTexts(tokens, mask, learned, np.arange(len(rows)))


def report(stage: Stage, layout: Layout):
    """Time the epochs and print all figures as one line of JSON."""
    optimizer = layout.replicate(make_optimizer(OptimizerSettings(learning_rate=1e-5), 100))
    params = init_sharded(layout, stage.network.init, jax.random.key(0))
    state = init_sharded(layout, init_train_state, params, optimizer)
    del params
    timing, num_programs = time_epochs(stage, state, optimizer)
    steps = len(stage.batches)
    tokens = sum(int(batch.mask.sum()) for batch in stage.batches)
    positions = sum(math.prod(batch.mask.shape) for batch in stage.batches)
    products = [product for batch in stage.batches for product in stage.products(batch)]
    model_flops = sum(map(stage.flops, stage.batches)) / steps
    print_json(
        {
            "benchmark": stage.name,
            "arguments": flag_values(*SHAPE, *TEXT_FLAGS),
            **timing.figures(),
            "cpu_seconds_per_step": timing.cpu_seconds,
            "steps": steps,
            "tokens_per_step": tokens / steps,
            "share_of_positions_with_tokens": tokens / positions,
            **rates("tokens", tokens / steps, timing),
            **utilisation_figures(model_flops, timing, peak_flops(products, FLAGS.dtype)),
            **run_figures(timing),
            "programs": num_programs,
        }
    )


def time_epochs(stage: Stage, state: Any, optimizer: Any) -> tuple[Timing, int]:
    """(seconds of a step, on average over each epoch; how many programs were compiled)."""
    bound = dict(network=stage.network, frozen={}, num_micro_batches=FLAGS.num_micro_batches)
    step = jax.jit(functools.partial(stage.step, **bound), donate_argnums=0)
    programs, began = {}, time.perf_counter()
    for batch in stage.batches:
        if batch.inputs.shape not in programs:
            programs[batch.inputs.shape] = step.lower(state, batch, optimizer).compile()
    compile_seconds = time.perf_counter() - began
    cpu, wall = [], []
    for _ in range(1 + FLAGS.repeats):
        start = time.process_time(), time.perf_counter()
        for batch in stage.batches:
            state, metrics = programs[batch.inputs.shape](state, batch, optimizer)
            jax.block_until_ready((state, metrics))
        cpu.append((time.process_time() - start[0]) / len(stage.batches))
        wall.append((time.perf_counter() - start[1]) / len(stage.batches))
    widest = max(programs, key=math.prod)
    if FLAGS.profile:
        (batch, *_) = (x for x in stage.batches if x.inputs.shape == widest)
        held = [state]  # it is donated

        def call():
            held[0], metrics = programs[widest](held[0], batch, optimizer)
            return metrics

        print_profile(programs[widest], call)
    timing = Timing(cpu[1:], wall[1:], compile_seconds, memory_figures(programs[widest]))
    return timing, len(programs)
