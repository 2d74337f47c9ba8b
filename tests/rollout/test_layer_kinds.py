"""Layers that differ, in windows and experts: the responses are those of the plain rollout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.core.network import merge_params
from ppo_jax.models.build import policy_network, trunk_network
from ppo_jax.models.config import Experts, LayerKind
from ppo_jax.models.partition import split_params
from ppo_jax.rollout.rollout import rollout
from tests.support import tiny

# Both windows are shorter than prompts and responses together, one is than most prompts.
LAYERS = dict(
    num_layers=3,
    layer_kinds=(
        LayerKind(window=4, rope_theta=100.0),
        LayerKind(window=7, dense=True),
        LayerKind(rotary=False),
    ),
    experts=Experts(num_experts=4, num_chosen=2, dim=16, normalized=True),
)
NUM_ROWS, LENGTH, KEY = 12, 14, jax.random.key(5)
SLOTS = dict(max_concurrent=4, min_free_slots=2)


def sampling(**changes):
    return tiny.sampling(response_length=LENGTH, **changes)


@functools.cache
def model():
    config = tiny.model_config(**LAYERS)
    return config, policy_network(config)


@functools.cache
def plain(seed=0):
    network = model()[1]
    prompts = tiny.prompts(batch_size=NUM_ROWS)
    params = tiny.random_params(network, seed)
    return tiny.sample(network, params, prompts, KEY, sampling=sampling())


def assert_same(got, expected):
    for name in ("response_tokens", "response_mask", "has_eos"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), name)
    np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-5)
    lengths = np.asarray(expected.response_mask).sum(axis=1)
    assert lengths.min() < 7 < lengths.max()


def test_slots_above_a_trunk_have_the_responses_of_the_whole_model():
    """And the trunk's states of all positions, from caches that are rings."""
    config, whole = model()
    parts = split_params(config, tiny.random_params(whole), 2, 1)
    trunk = trunk_network(config, end_layer=1)
    got = tiny.sample(
        policy=policy_network(config, start_layer=1),
        params=merge_params(parts.frozen, parts.trained),
        trunk=trunk,
        trunk_params=parts.trunk,
        prompts=tiny.prompts(batch_size=NUM_ROWS),
        key=KEY,
        sampling=sampling(**SLOTS),
    )
    assert_same(got, plain())
    tokens = jnp.concatenate([got.prompt_tokens, got.response_tokens], axis=1)
    states, real = jax.jit(trunk.apply)(parts.trunk, tokens, got.mask), np.asarray(got.mask)
    np.testing.assert_allclose(got.hidden_states[real], states[real], atol=1e-4)


def test_lanes_in_slots_have_the_responses_of_each_alone():
    network, seeds = model()[1], (0, 1)
    prompts = tiny.prompts(batch_size=NUM_ROWS)
    params = [tiny.random_params(network, seed) for seed in seeds]
    of_lane = functools.partial(rollout, network, sampling=sampling(**SLOTS))
    got = jax.jit(jax.vmap(of_lane, in_axes=(0, None, None)))(
        jax.tree.map(lambda *x: jnp.stack(x), *params), prompts, KEY
    )
    for i, seed in enumerate(seeds):
        assert_same(jax.tree.map(lambda x, i=i: x[i], got), plain(seed))


def test_gradients_of_lanes_are_those_of_each_alone():
    network = model()[1]
    tokens, mask = tiny.tokens_and_mask(0, 4, 20)
    params = [tiny.random_params(network, seed) for seed in (0, 1)]

    def loss(params):
        return (jnp.where(mask[..., None], network.apply(params, tokens, mask), 0) ** 2).mean()

    both = jax.jit(jax.vmap(jax.grad(loss)))(jax.tree.map(lambda *x: jnp.stack(x), *params))
    alone = jax.jit(jax.grad(loss))
    for i, one in enumerate(params):
        expected = alone(one)
        assert min(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected)) > 1e-6
        largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
        tiny.leaves_close(jax.tree.map(lambda x, i=i: x[i], both), expected, atol=1e-5 * largest)
