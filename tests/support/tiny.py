"""Tiny models, prompts and PPO setups for the tests. What is compiled here is compiled once."""

import collections
import functools
import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.algorithms import experience, ppo
from ppo_jax.algorithms.update import ppo_update
from ppo_jax.core.network import Network, merge_params
from ppo_jax.core.types import FrozenParams, Hyperparameters, Optimizer, Params, Prompts
from ppo_jax.models.build import policy_network, reward_network, trunk_network, value_network
from ppo_jax.models.config import Experts, LayerKind, ModelConfig
from ppo_jax.models.partition import split_params, start_layer
from ppo_jax.models.rope import RopeScaling
from ppo_jax.rollout.rollout import rollout
from ppo_jax.rollout.sampling import Sampling

VOCAB = 50
EOS = (1, 2, 3, 4)  # four of fifty: within 8 tokens, half of the random responses stop
BATCH, PROMPT_LENGTH, RESPONSE_LENGTH = 8, 5, 8

SHAPES = {
    "gpt2": dict(
        num_kv_heads=4,
        positions="learned",
        norm="layernorm",
        mlp="gelu",
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
    ),
    "llama": dict(
        rope_scaling=RopeScaling(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_length=16
        )
    ),
    "qk_norm": dict(qk_norm="head", head_dim=16, qkv_bias=True, tie_embeddings=False),
    "scanned": dict(scan_layers=True, num_layers=3),
    "experts": dict(
        num_layers=3,
        layer_kinds=(LayerKind(), LayerKind(dense=True), LayerKind()),
        experts=Experts(num_experts=5, num_chosen=2, dim=12, normalized=True),
    ),
}


def model_config(**changes) -> ModelConfig:
    base = dict(
        vocab_size=VOCAB,
        num_layers=2,
        embed_dim=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=48,
        max_length=32,
    )
    return ModelConfig(**base | changes)


def random_params(network: Network, seed: int = 0, std: float = 0.2) -> Params:
    """Parameters far from their start: no norm is 1, no bias 0, no distribution flat."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return (mean + std * rng.normal(size=leaf.shape)).astype(leaf.dtype)

    shapes = jax.eval_shape(network.init, jax.random.key(0))
    return jax.tree.map(jnp.asarray, jax.tree_util.tree_map_with_path(draw, shapes))


def tokens_and_mask(seed, batch_size, length, *, least=1, side="left"):
    """Random ids and a mask of rows with `least` .. `length` real tokens; padding holds ids too."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, VOCAB, size=(batch_size, length)).astype(np.int32)
    lengths = rng.integers(least, length + 1, size=batch_size)
    lengths[0] = length
    mask = np.arange(length)[None] < lengths[:, None]
    return jnp.asarray(tokens), jnp.asarray(mask[:, ::-1] if side == "left" else mask)


def prompts(seed=0, batch_size=BATCH, length=PROMPT_LENGTH) -> Prompts:
    tokens, mask = tokens_and_mask(seed, batch_size, length)
    return Prompts(tokens=tokens, mask=mask)


def sampling(**changes) -> Sampling:
    return Sampling(**dict(response_length=RESPONSE_LENGTH, eos_ids=EOS) | changes)


def options(**changes) -> experience.PPOOptions:
    base = dict(sampling=sampling(), num_epochs=2, num_minibatches=2)
    return experience.PPOOptions(**base | changes)


def hyperparameters(**changes) -> Hyperparameters:
    optimizer = dict(learning_rate=1e-3, eps=1e-5) | changes.pop("optimizer", {})
    base = dict(optimizer=Optimizer(**optimizer), value_learning_rate=2e-3, entropy_coef=0.01)
    return jax.tree.map(jnp.float32, Hyperparameters(**base | changes))


class Setup(NamedTuple):
    """A run without its numbers: the reference is not where the policy starts, so that the KL
    is not 0."""

    networks: experience.PPONetworks
    frozen: FrozenParams
    policy_params: Params
    value_params: Params

    def start(self, numbers: Hyperparameters, ref_policy: bool = False):
        policy_params = self.frozen.ref_policy if ref_policy else self.policy_params
        return ppo.init_ppo(policy_params, self.value_params, numbers)


@functools.cache
def setup(trainable="all", on_trunk=False, num_bins=0) -> Setup:
    """Policy, reference, critic and reward model; the same numbers with and without a trunk.

    With frozen layers all four share them, and a trunk may compute them once for all.
    """
    config = model_config()
    first = start_layer(config, trainable)
    start = first if on_trunk else None
    whole = policy_network(config)
    policy = split_params(config, random_params(whole, 0), trainable, start)
    ref_policy = split_params(config, random_params(whole, 1), trainable, start)
    shared = merge_params(policy.trunk, policy.frozen)

    def above(seed, num_bins=0):
        """The parameters of a scalar network on the layers that the policy does not train."""
        params = random_params(value_network(config, num_bins=num_bins), seed)
        own = split_params(config, params, trainable, first)
        return split_params(config, merge_params(own.trunk, shared, own.trained), trainable, start)

    value, reward = above(2, num_bins), above(3)
    return Setup(
        networks=experience.PPONetworks(
            policy=policy_network(config, start_layer=start),
            value=value_network(config, start_layer=start, num_bins=num_bins),
            reward=reward_network(config, start_layer=start),
            trunk=None if start is None else trunk_network(config, end_layer=start),
            value_on_trunk=on_trunk,
            reward_on_trunk=on_trunk,
        ),
        frozen=FrozenParams(
            ref_policy=ref_policy.trained,
            reward=merge_params(reward.frozen, reward.trained),
            trunk=policy.trunk if on_trunk else None,
            policy=policy.frozen,
            value=value.frozen,
        ),
        policy_params=policy.trained,
        value_params=value.trained,
    )


TRACES = collections.Counter()


def program(function):
    """Jitted, with what is code as static arguments; counts its traces by name."""

    @functools.wraps(function)
    def counted(*args, **kwargs):
        TRACES[function.__name__] += 1
        return function(*args, **kwargs)

    static = ("networks", "options", "policy", "trunk", "sampling", "num_micro_batches", "network")
    static += ("eos_id", "samples_per_prompt")
    names = inspect.signature(function).parameters
    return jax.jit(counted, static_argnames=[name for name in static if name in names])


sample = program(rollout)
sample_responses = program(experience.sample_responses)
response_scores = program(experience.response_scores)
make_experience = program(experience.make_experience)
update = program(ppo_update)
update_from_rollout = program(ppo.update_from_rollout)
iterate = program(ppo.ppo_iteration)


RUN_KEY = jax.random.key(3)
SETUPS = {"whole": ("all", False), "frozen": (1, False), "trunk": (1, True)}
BINS = {"whole of bins": ("all", False, 6), "trunk of bins": (1, True, 6)}  # of the critic


class Run:
    """One setup at its start, with the pieces of an iteration as methods."""

    def __init__(self, kind, chosen=None, ref_policy=False, **numbers):
        self.setup = setup(*(SETUPS | BINS)[kind])
        self.numbers = hyperparameters(**numbers)
        self.state = self.setup.start(self.numbers, ref_policy)
        self.parts = dict(
            frozen=self.setup.frozen,
            networks=self.setup.networks,
            options=chosen or options(),
        )

    def rollout(self, key=RUN_KEY):
        return sample_responses(self.state, self.numbers, prompts(), key, **self.parts)

    def scores(self, rollout):
        return response_scores(rollout, frozen=self.setup.frozen, networks=self.setup.networks)

    def experience(self, rollout, scores=None):
        scores = self.scores(rollout) if scores is None else scores
        return make_experience(rollout, scores, self.state, self.numbers, **self.parts)

    def update(self, experience):
        return update(self.state, experience, self.numbers, RUN_KEY, **self.parts)

    def update_from_rollout(self, rollout, scores):
        return update_from_rollout(self.state, self.numbers, rollout, scores, RUN_KEY, **self.parts)

    def iterate(self, key=RUN_KEY):
        return iterate(self.state, self.numbers, prompts(), key, **self.parts)


def leaves_close(got, expected, **tolerance):
    """Two trees of the same structure, leaf by leaf; the message names the leaf."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    paths = jax.tree_util.tree_leaves_with_path(expected)
    for (path, y), x in zip(paths, jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(x, y, err_msg=jax.tree_util.keystr(path), **tolerance)


def leaves_differ(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return any(not np.array_equal(x, y) for x, y in pairs)
