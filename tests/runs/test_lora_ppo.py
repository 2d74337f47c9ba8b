"""PPO on adapters: one copy of the weights, a policy that learns, the same numbers on any mesh."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from ppo_jax.algorithms.ppo import init_ppo
from ppo_jax.config.mesh import ROLLOUT_RULES
from ppo_jax.config.stages import LoRASettings
from ppo_jax.core.network import merge_params
from ppo_jax.distributed.layout import fetch, init_sharded
from ppo_jax.distributed.trees import named_leaves
from ppo_jax.planner.hlo.cost import cost_analysis
from ppo_jax.rollout.decode import response_statistics
from ppo_jax.training.common import with_adapters
from ppo_jax.training.ppo_setup import make_critic, make_setup
from tests.support import tiny
from tests.support.meshes import WIDE, layout_of
from tests.training.test_ppo_setup import LAYERS, model, ppo_settings

LORA = LoRASettings(rank=4, alpha=8.0, targets=("query", "value", "output", "down"))
BOTH = dict(trainable="lora", value_trainable="lora", num_epochs=2, num_minibatches=2)
BY_FUNCTION = dict(reward_model="", reward_function="module:function")
KEY = jax.random.key(7)
BATCH = 16


class Run:
    """PPO at its start, with the pieces of an iteration; by default all on one device."""

    def __init__(self, mesh=(1, 1, 1), dtype="float32", with_reward=True, shape=(), **settings):
        settings = BOTH | ({} if with_reward else BY_FUNCTION) | settings
        settings = ppo_settings(rollout_batch_size=BATCH, **settings)
        layouts = layout_of(mesh), layout_of(mesh, ROLLOUT_RULES)
        self.layout = layouts[0]

        def on_mesh(kind, seed):
            found = model(kind, seed, **dict(shape))
            return dataclasses.replace(found, params=self.layout.shard_params(found.params))

        self.policy = on_mesh("policy", 0)
        reward = on_mesh("reward", 1) if with_reward else None
        critic = make_critic(settings, self.policy, reward)
        adapt = functools.partial(with_adapters, lora=LORA, seed=0, layout=self.layout)
        setup, *start = make_setup(
            settings,
            adapt(self.policy, settings.trainable),
            reward,
            adapt(critic, settings.value_trainable),
            layouts,
            dtype,
        )
        self.frozen, self.networks, self.numbers = (
            setup.frozen,
            setup.networks,
            setup.hyperparameters,
        )
        self.parts = dict(networks=setup.networks, options=setup.options)
        self.state = init_sharded(self.layout, init_ppo, *start, self.numbers)

    def rollout(self, key=KEY):
        prompts = self.layout.shard_batch(fetch(tiny.prompts(batch_size=BATCH)))
        key = self.layout.replicate(key)
        args = (self.state, self.numbers, prompts, key)
        return tiny.sample_responses(*args, frozen=self.frozen, **self.parts)

    def update_from_rollout(self, rollout, key=KEY):
        """The score of a response is the number of its tokens below 20."""
        low = (rollout.response_tokens < 20) & rollout.response_mask
        scores, key = low.sum(axis=1).astype(np.float32), self.layout.replicate(key)
        args = (self.state, self.numbers, rollout, scores, key)
        self.state, metrics = tiny.update_from_rollout(*args, frozen=self.frozen, **self.parts)
        return fetch(metrics)

    def iterate(self, count):
        keys = (jax.random.fold_in(KEY, step) for step in range(count))
        return [self.update_from_rollout(self.rollout(key), key) for key in keys]


def buffers(tree):
    return {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)}


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# --- one copy of the weights ----------------------------------------------------------------------


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("source", ["policy", "reward_model"])
def test_policy_reference_and_critic_read_one_copy_of_the_weights(source, scan_layers):
    run = Run(critic_init_from=source, shape=dict(scan_layers=scan_layers))
    assert run.frozen.ref_policy == {} and run.frozen.trunk is None
    assert buffers(run.frozen.policy) == buffers(run.policy.params)  # as they were read
    owner = run.frozen.policy if source == "policy" else run.frozen.reward
    body = {name: part for name, part in owner.items() if name != "head"}
    assert buffers(run.frozen.value) == buffers(body)
    assert size(run.state.policy_params) < 0.3 * size(run.policy.params)
    moments = run.state.opt_state[1].mu
    assert size(moments) == size((run.state.policy_params, run.state.value_params))
    assert run.state.value_params.keys() == {"layers", "head"}


def test_the_critic_of_a_policy_that_is_trained_whole_shares_the_reference():
    run = Run(with_reward=False, trainable="all")
    assert buffers(run.frozen.value) == buffers(run.frozen.ref_policy)
    assert size(run.state.policy_params) == size(run.policy.params)


def test_leaves_that_are_cast_are_cast_once():
    run = Run(with_reward=False, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(run.frozen)} == {"bfloat16"}
    assert buffers(run.frozen.value) == buffers(run.frozen.policy)
    trained = jax.tree.leaves((run.state.policy_params, run.state.value_params))
    assert {leaf.dtype.name for leaf in trained} == {"float32"}


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan_layers", [False, True])
def test_the_policy_begins_as_the_reference_and_learns(scan_layers):
    run = Run(shape=dict(scan_layers=scan_layers), **{"optimizer.learning_rate": 2e-2})
    before = fetch((run.state.policy_params, run.state.value_params, run.frozen))
    metrics = run.iterate(12)
    assert abs(metrics[0]["kl/ref"]) < 1e-4 < 0.1 < metrics[-1]["kl/ref"]
    assert metrics[-1]["reward/score_mean"] > metrics[0]["reward/score_mean"] + 0.5
    *trained, frozen = fetch((run.state.policy_params, run.state.value_params, run.frozen))
    tiny.leaves_close(frozen, before[-1], rtol=0.0)
    for old, new in zip(before, trained, strict=False):
        for name, leaf in named_leaves(old).items():
            assert np.abs(leaf - named_leaves(new)[name]).max() > 1e-4, name


@pytest.mark.parametrize("scan_layers", [False, True])
def test_sampled_logprobs_are_those_of_the_update(scan_layers):
    """The rollout has the adapters in its weights, the update beside them."""
    run = Run(shape=dict(scan_layers=scan_layers))
    run.iterate(3)
    rollout = run.rollout()
    logprobs, _ = jax.jit(functools.partial(response_statistics, run.networks.policy))(
        merge_params(run.frozen.policy, run.state.policy_params),
        rollout.tokens,
        rollout.mask,
        rollout.response_tokens,
        temperature=run.numbers.temperature,
    )
    mask = np.asarray(rollout.response_mask)
    np.testing.assert_allclose(logprobs[mask], rollout.logprobs[mask], atol=1e-5)
    np.testing.assert_allclose(run.update_from_rollout(rollout)["policy/ratio_max"], 1.0, atol=0.2)


def test_one_step_is_that_of_passes_apart():
    run = Run(num_epochs=1, num_minibatches=1, old_logprobs="recompute")
    rollout, scores = run.rollout(), np.arange(BATCH, dtype=np.float32) % 3
    parts, start = dict(frozen=run.frozen, **run.parts), run.state
    experience, _ = tiny.make_experience(rollout, scores, start, run.numbers, **parts)
    plain, _ = tiny.update(start, experience, run.numbers, KEY, **parts)
    state, metrics = tiny.update_from_rollout(start, run.numbers, rollout, scores, KEY, **parts)
    assert metrics["policy/ratio_max"] == 1
    tiny.leaves_close(state.opt_state, plain.opt_state, rtol=1e-3, atol=1e-6)
    tiny.leaves_close(state.policy_params, plain.policy_params, atol=3e-5)
    tiny.leaves_close(state.value_params, plain.value_params, atol=3e-5)


def test_a_token_costs_what_it_costs_without_adapters():
    """The rollout pays for them once: 2 r I O a kernel."""

    def flops(trainable):
        run = Run(trainable=trainable)
        args = (run.state, run.numbers, tiny.prompts(batch_size=BATCH), KEY)
        program = tiny.sample_responses.lower(*args, frozen=run.frozen, **run.parts).compile()
        return cost_analysis(program, max_trip_counts=tiny.RESPONSE_LENGTH - 1).flops

    kernels = [
        leaf.size
        for name, leaf in named_leaves(model().params).items()
        if name.endswith(tuple(f"{target}/kernel" for target in LORA.targets))
    ]
    assert len(kernels) == 4 * LAYERS
    assert flops("lora") - flops("all") == 2 * LORA.rank * sum(kernels)


# --- meshes ---------------------------------------------------------------------------------------


@functools.cache
def measured(mesh, scan_layers=False):
    run = Run(mesh, shape=tuple(WIDE.items()) + (("scan_layers", scan_layers),))
    start = fetch(run.state.policy_params)
    rollout = fetch(run.rollout())
    return rollout, run.iterate(3), fetch(run.state), start


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "scan_layers"), [((1, 2, 4), False), ((2, 2, 2), False), ((2, 2, 2), True)]
)
def test_three_iterations_are_those_of_one_device(mesh, scan_layers):
    rollout, metrics, state, _ = measured(mesh, scan_layers)
    one_rollout, one_metrics, one_state, start = measured((1, 1, 1), scan_layers)
    np.testing.assert_array_equal(rollout.response_tokens, one_rollout.response_tokens)
    np.testing.assert_allclose(rollout.logprobs, one_rollout.logprobs, atol=1e-5, rtol=1e-5)
    found, before = named_leaves(state), named_leaves(start)
    for name, leaf in named_leaves(one_state).items():
        if "params" in name:
            np.testing.assert_allclose(found[name], leaf, atol=1e-4, rtol=0, err_msg=name)
    for mine, one in zip(metrics, one_metrics, strict=True):
        for name in ("policy/loss", "value/loss", "kl/ref"):
            np.testing.assert_allclose(mine[name], one[name], rtol=1e-4, atol=1e-5)
    after = named_leaves(one_state.policy_params)
    assert min(np.abs(after[name] - before[name]).max() for name in before) > 1e-3


def test_adapters_are_cut_as_their_kernels_are():
    layout = layout_of((1, 2, 4))
    run = Run((1, 2, 4), shape=WIDE)
    found = named_leaves(run.state.policy_params)
    for name, shape in {
        "layers/0/attention/query/lora_a": (32, 4),
        "layers/0/attention/query/lora_b": (4, 2, 8),
        "layers/0/attention/output/lora_a": (2, 8, 4),
        "layers/0/attention/output/lora_b": (4, 32),
        "layers/0/mlp/down/lora_a": (16, 4),
    }.items():
        leaf = found[name]
        assert leaf.sharding.shard_shape(leaf.shape) == shape, name
    assert layout.mesh == run.layout.mesh
