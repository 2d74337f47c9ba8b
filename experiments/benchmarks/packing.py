"""An epoch of SFT with `sft.packing` and without, with as many learned tokens per step.

    python experiments/benchmark.py packing

Two minutes on two cores; the ratio of CPU times is 0.3.
"""

import math
import time

import jax
import numpy as np

from ppo_jax.algorithms.supervised import sft_step
from ppo_jax.config.stages import OptimizerSettings
from ppo_jax.data.encode import TokenizedTexts, batch_indices
from ppo_jax.data.hidden_states import make_inputs
from ppo_jax.data.packing import describe_packing, pack
from ppo_jax.distributed.layout import init_sharded, one_device
from ppo_jax.models.build import policy_network
from ppo_jax.models.config import ModelConfig
from ppo_jax.training.common import compile_step, init_train_state, make_optimizer
from ppo_jax.training.sft import as_text_batch

MAX_LENGTH = 256  # tokens
SIZES = dict(num_layers=4, embed_dim=128, num_heads=4, num_kv_heads=4, head_dim=32, mlp_dim=384)
MODEL = ModelConfig(vocab_size=4096, max_length=MAX_LENGTH, **SIZES)
REPEATS = 2  # timed epochs; the fastest counts


def main():
    texts = random_texts(256)
    packed = pack(texts, max_length=MAX_LENGTH)
    per_row = len(texts.mask) / len(packed.mask)
    single, together = epoch_time(texts, 32), epoch_time(packed, round(32 / per_row))
    print(f"packed: {describe_packing(packed)}")
    print(f"CPU time an epoch: {together:.2f} s packed, {single:.2f} s with one text a row")
    print(f"ratio: {together / single:.2f}")


def random_texts(count: int) -> TokenizedTexts:
    """Log-normal lengths, as those of paragraphs, with a median of 40 tokens."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(math.log(40), 0.7, size=count).astype(int).clip(4, MAX_LENGTH)
    mask = np.arange(MAX_LENGTH) < lengths[:, None]
    tokens = np.where(mask, rng.integers(5, MODEL.vocab_size, size=mask.shape, dtype=np.int32), 0)
    return TokenizedTexts(tokens, mask, mask & (np.arange(MAX_LENGTH) >= 1), np.arange(count))


def epoch_time(texts: TokenizedTexts, batch_size: int) -> float:
    """CPU seconds, over all threads, of a pass over the data, without compilation."""
    network, num_rows = policy_network(MODEL), len(texts.mask)
    layout = one_device()
    params = init_sharded(layout, network.init, jax.random.key(0))
    optimizer = layout.replicate(make_optimizer(OptimizerSettings(learning_rate=1e-3), 100))
    state = init_sharded(layout, init_train_state, params, optimizer)
    step = compile_step(sft_step, state, layout, network=network)
    inputs = make_inputs(texts, None, None, cache_gb=0.0)
    num_steps, times = math.ceil(num_rows / batch_size), []
    for _ in range(1 + REPEATS):  # the first compiles
        start = time.process_time()
        for i in range(num_steps):
            rows = batch_indices(0, i, num_examples=num_rows, batch_size=batch_size)
            batch = layout.shard_batch(as_text_batch(texts, inputs, rows))
            state, _ = step(state, batch, optimizer, frozen={})
        jax.block_until_ready(state)
        times.append(time.process_time() - start)
    return min(times[1:]) * num_rows / (num_steps * batch_size)  # the last batch wraps around
