"""Memory of compiled training steps: linear in the length of rows, and not the logits' size."""

import functools

import jax
import jax.numpy as jnp
import pytest

from ppo_jax.algorithms.options import PPONetworks
from ppo_jax.algorithms.ppo import init_ppo
from ppo_jax.algorithms.supervised import sft_loss, sft_step
from ppo_jax.algorithms.update import ppo_update
from ppo_jax.core import distributions
from ppo_jax.core.optimizer import init_optimizer
from ppo_jax.core.types import Experience, FrozenParams, Optimizer, TextBatch, TrainState
from ppo_jax.models import build
from ppo_jax.models.build import policy_network, value_network
from tests.support import tiny

B = 2


def temporary_bytes(function, *args):
    compiled = jax.jit(function).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def shape(dtype, *dims):
    return jax.ShapeDtypeStruct(dims, dtype)


def shapes_of(network):
    return jax.eval_shape(network.init, jax.random.key(0))


def model(length, vocab):
    return tiny.model_config(vocab_size=vocab, max_length=length)


def update_bytes(length, vocab=tiny.VOCAB):
    """Of an update on rows that are half prompt, half response."""
    config, numbers = model(length, vocab), tiny.hyperparameters()
    networks = PPONetworks(policy=policy_network(config), value=value_network(config))
    state = jax.eval_shape(
        lambda *params: init_ppo(*params, numbers),
        shapes_of(networks.policy),
        shapes_of(networks.value),
    )
    floats = shape(jnp.float32, B, length // 2)
    experience = Experience(
        policy_inputs=shape(jnp.int32, B, length),
        value_inputs=shape(jnp.int32, B, length),
        mask=shape(bool, B, length),
        response_tokens=shape(jnp.int32, B, length // 2),
        response_mask=shape(bool, B, length // 2),
        logprobs=floats,
        values=floats,
        advantages=floats,
        returns=floats,
    )
    options = tiny.options(num_epochs=1, num_minibatches=1)
    parts = dict(networks=networks, frozen=FrozenParams(ref_policy={}), options=options)
    update = functools.partial(ppo_update, **parts)
    return temporary_bytes(update, state, experience, numbers, jax.random.key(0))


def sft_arguments(length, vocab):
    network = policy_network(model(length, vocab))
    optimizer = Optimizer(learning_rate=1e-3)
    params = shapes_of(network)
    moments = jax.eval_shape(lambda p: init_optimizer(optimizer, p), params)
    state = TrainState(step=shape(jnp.int32), params=params, opt_state=moments)
    tokens, mask = shape(jnp.int32, B, length), shape(bool, B, length)
    batch = TextBatch(inputs=tokens, tokens=tokens, mask=mask, loss_mask=mask)
    return network, state, batch, optimizer


def sft_bytes(length, vocab=tiny.VOCAB):
    network, *args = sft_arguments(length, vocab)
    return temporary_bytes(functools.partial(sft_step, network=network, frozen={}), *args)


def validation_bytes(length, vocab=tiny.VOCAB):
    network, state, batch, _ = sft_arguments(length, vocab)
    return temporary_bytes(functools.partial(sft_loss, network), state.params, batch)


@pytest.mark.parametrize("bytes_of", [update_bytes, sft_bytes, validation_bytes])
def test_rows_twice_as_long_need_twice_the_memory(bytes_of):
    assert bytes_of(1024) < 2.2 * bytes_of(512)


@pytest.mark.parametrize("bytes_of", [update_bytes, sft_bytes, validation_bytes])
def test_a_larger_vocabulary_needs_no_more_than_its_table_and_a_chunk(monkeypatch, bytes_of):
    chunk = 2**16  # numbers; all logits of the larger one have 2**22 or 2**23
    for module in (distributions, build):
        monkeypatch.setattr(module, "CHUNK_LOGITS", chunk)
    monkeypatch.setattr(distributions, "MOST_LOGITS", chunk)
    few, many = 4096, 16384
    table = (many - few) * model(256, few).embed_dim
    assert bytes_of(256, many) - bytes_of(256, few) < 4 * (table + chunk)
