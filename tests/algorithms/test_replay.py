"""The experts of a rollout in the update: compared with its own, and had once more."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.algorithms import sweep
from ppo_jax.algorithms.options import PPONetworks
from ppo_jax.algorithms.passes import forward, without_outputs
from ppo_jax.algorithms.ppo import init_ppo, ppo_iteration
from ppo_jax.core.types import FrozenParams
from ppo_jax.models.build import policy_network, reward_network, trunk_network, value_network
from ppo_jax.models.config import Experts
from ppo_jax.models.partition import split_params
from ppo_jax.rollout.packing import pack_rows, packed_experience
from tests.distributed.test_meshes import Run
from tests.models.test_routed import moved
from tests.support import tiny
from tests.support.meshes import WIDE

CONFIG = tiny.model_config(**tiny.SHAPES["experts"])
NUMBERS = tiny.hyperparameters()
KEY = jax.random.key(4)
ROUTER = ("router_loss", "router_load_max", "router_entropy", "router_mismatch")


@functools.cache
def parts(*, trunk=False):
    """(networks, frozen, the policy's trained leaves, the critic's)."""
    policy = policy_network(CONFIG)
    params = tiny.random_params(policy)
    dense = tiny.model_config()
    value, reward = value_network(dense), reward_network(dense)
    critic, scorer = tiny.random_params(value, 1), tiny.random_params(reward, 2)
    if not trunk:
        networks = PPONetworks(policy=policy, value=value, reward=reward)
        return networks, FrozenParams(ref_policy=params, reward=scorer), params, critic
    split = split_params(CONFIG, params, 1, 1)
    networks = PPONetworks(
        policy=policy_network(CONFIG, start_layer=1),
        value=value,
        reward=reward,
        trunk=trunk_network(CONFIG, end_layer=1),
    )
    below = dict(trunk=split.trunk, policy=split.frozen)
    return (
        networks,
        FrozenParams(ref_policy=split.trained, reward=scorer, **below),
        split.trained,
        critic,
    )


def rollout_of(options, *, trunk=False):
    networks, frozen, params, critic = parts(trunk=trunk)
    state = init_ppo(params, critic, NUMBERS)
    given = (
        state,
        NUMBERS,
        tiny.prompts(batch_size=tiny.BATCH // options.sampling.samples_per_prompt),
        KEY,
    )
    return state, tiny.sample_responses(*given, frozen=frozen, networks=networks, options=options)


SHAPES = {
    "plain": {},
    "slots": dict(max_concurrent=3, min_free_slots=1),
    "samples": dict(samples_per_prompt=2),
    "samples in slots": dict(samples_per_prompt=2, max_concurrent=4),
}


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "trunk"),
    [
        ("samples in slots", False),
        ("slots", True),
        pytest.param("plain", False, marks=SLOW),
        pytest.param("samples", False, marks=SLOW),
        pytest.param("samples in slots", True, marks=SLOW),
    ],
)
def test_the_experts_of_a_rollout_are_those_of_one_pass_over_it(name, trunk):
    """At every position that predicts a token, in every layer; and at those of prompts."""
    options = tiny.options(sampling=tiny.sampling(**SHAPES[name]))
    state, rollout = rollout_of(options, trunk=trunk)
    layers = 1 if trunk else 2
    assert rollout.experts.shape == (tiny.BATCH, rollout.mask.shape[1], layers, 2)
    assert rollout.experts.dtype == jnp.uint8
    networks, frozen, _, _ = parts(trunk=trunk)
    samples = options.sampling.samples_per_prompt
    how = dict(frozen=frozen, networks=networks, samples_per_prompt=samples)
    inputs = without_outputs(rollout, networks, options)
    run = jax.jit(lambda p, e: forward({"policy": p}, e, NUMBERS, **how))
    router = run(state.policy_params, inputs).router
    predicting = rollout.response_mask.sum()  # by the last prompt token and all but the last
    prompts = rollout.prompt_mask[::samples].sum()
    first = prompts + predicting - tiny.BATCH
    np.testing.assert_array_equal(router.compared, 2 * np.array([first, predicting])[-layers:])
    assert not router.changed.any()

    replayed = dataclasses.replace(inputs, replays_experts=True)
    jitted = run(moved(state.policy_params), replayed), run(moved(state.policy_params), inputs)
    assert not jitted[0].router.changed.any() and jitted[1].router.changed.all()
    expected, got = run(state.policy_params, inputs), run(state.policy_params, replayed)
    mask = np.asarray(rollout.response_mask)
    np.testing.assert_allclose(got.logprobs[mask], expected.logprobs[mask], atol=1e-6)


def test_packed_rows_have_the_statistics_of_rows_apart():
    """Of short responses, so that a packed row has outputs that are of none of them."""
    options = tiny.options()
    state, rollout = rollout_of(options)
    short = rollout.response_mask & (jnp.arange(rollout.response_mask.shape[1])[None] < 3)
    rollout = dataclasses.replace(rollout, response_mask=short)
    networks, frozen, _, _ = parts()
    how = dict(frozen=frozen, networks=networks)
    apart = without_outputs(rollout, networks, options)
    packed = jax.jit(lambda e: packed_experience(e, pack_rows(e.mask, e.response_mask)[0]))(apart)
    run = jax.jit(lambda e: forward({"policy": state.policy_params}, e, NUMBERS, **how).router)
    last_of_packed, last_of_apart = (jax.tree.map(lambda x: x[-1], run(e)) for e in (packed, apart))
    assert last_of_apart.tokens == short.sum()
    tiny.leaves_close(last_of_packed, last_of_apart, rtol=1e-5)


def iteration(**changes):
    networks, frozen, params, critic = parts()
    state = init_ppo(params, critic, NUMBERS)
    options = tiny.options(**changes)
    count = tiny.BATCH // options.sampling.samples_per_prompt
    run = jax.jit(functools.partial(ppo_iteration, networks=networks, options=options))
    return run(state, NUMBERS, tiny.prompts(batch_size=count), KEY, frozen=frozen)


def test_an_iteration_logs_what_the_routers_do():
    """The same however the update is cut; before anything has moved replay changes nothing."""
    once = dict(num_epochs=1, num_minibatches=1)
    state, metrics = iteration(**once)
    assert metrics["policy/router_mismatch"] == 0.0
    assert 2.0 < metrics["policy/router_loss"] < 5.0  # of 2 of 5 experts
    assert 0.4 < metrics["policy/router_load_max"] <= 1.0
    assert 0.0 < metrics["policy/router_entropy"] < np.log(5)
    replayed, of_replay = iteration(**once, num_micro_batches=2, replay_experts=True)
    tiny.leaves_close(replayed.policy_params, state.policy_params, atol=1e-5)
    tiny.leaves_close(of_replay, metrics, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        dict(old_logprobs="recompute", num_epochs=1, num_minibatches=1),
        dict(packing=True),
        dict(packing=True, num_micro_batches=2),
        dict(sampling=tiny.sampling(samples_per_prompt=2)),
        dict(sampling=tiny.sampling(samples_per_prompt=2), num_minibatches=1, num_epochs=1),
        dict(sampling=tiny.sampling(samples_per_prompt=4), keep_samples=2),
    ],
    ids=str,
)
def test_replay_goes_with_packing_and_samples(changes):
    _, plain = iteration(**changes)
    assert all(jnp.isfinite(plain[f"policy/{name}"]) for name in ROUTER)
    state, replayed = iteration(**changes, replay_experts=True)
    assert replayed["policy/router_mismatch"] == 0.0
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(state.policy_params))


@pytest.mark.slow
def test_each_lane_replays_the_experts_of_its_own_rollout():
    networks, frozen, params, critic = parts()
    lanes = [
        tiny.hyperparameters(temperature=temperature, optimizer=dict(learning_rate=rate))
        for temperature, rate in ((1.0, 1e-3), (0.7, 3e-3))
    ]
    how = dict(networks=networks, options=tiny.options(replay_experts=True))
    alone = jax.jit(functools.partial(ppo_iteration, **how))
    together = functools.partial(sweep.sweep_iteration, axes=sweep.LaneAxes(), **how)
    states, given = [init_ppo(params, critic, lane) for lane in lanes], (tiny.prompts(), KEY)
    stacked = sweep.stack_lanes(states), sweep.stack_lanes(lanes)
    both = jax.jit(together)(*stacked, *given, frozen=frozen)
    assert (both[1]["policy/router_mismatch"] == 0.0).all()
    assert np.ptp(both[1]["policy/router_entropy"]) > 0
    for i, (state, lane) in enumerate(zip(states, lanes, strict=True)):
        expected, its_own = alone(state, lane, *given, frozen=frozen)
        got, metrics = sweep.take_lane(both, i)
        tiny.leaves_close(metrics, its_own, rtol=2e-3, atol=2e-4)
        rate = lane.optimizer.learning_rate
        tiny.leaves_close(got.policy_params, expected.policy_params, rtol=0, atol=0.1 * rate)


WIDE_EXPERTS = tiny.model_config(
    **WIDE, experts=Experts(num_experts=8, num_chosen=2, dim=24, normalized=True)
)


def on_mesh(shape, **how):
    """An iteration: its metrics, and the experts of its rollout."""
    run = Run(shape, **how)
    run.options = dataclasses.replace(run.options, replay_experts=True)
    rollout = run.rollout()
    (metrics,) = run.iterations(1)
    return jax.device_get((rollout.experts, run.state.policy_params, metrics))


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
def test_replay_on_a_mesh_is_that_of_one_device(shared):
    """Scanned layers with remat; also with a critic on the policy."""
    config = dataclasses.replace(WIDE_EXPERTS, scan_layers=True, remat="full")
    (chosen, params, metrics), (one_chosen, one_params, one_metrics) = (
        on_mesh(shape, config=config, shared=shared) for shape in ((2, 2, 2), (1, 1, 1))
    )
    np.testing.assert_array_equal(chosen, one_chosen)
    assert metrics["policy/router_mismatch"] == one_metrics["policy/router_mismatch"] == 0.0
    assert metrics["policy/router_loss"] > 2.0
    tiny.leaves_close(metrics, one_metrics, rtol=1e-3, atol=1e-4)
    tiny.leaves_close(params, one_params, rtol=0, atol=1e-4)


def test_a_policy_without_experts_has_nothing_to_log_or_to_replay():
    setup = tiny.setup()
    state = setup.start(NUMBERS)
    options = tiny.options(replay_experts=True)
    given = (state, NUMBERS, tiny.prompts(), KEY)
    how = dict(frozen=setup.frozen, networks=setup.networks)
    rollout = tiny.sample_responses(*given, options=options, **how)
    assert rollout.experts is None
    with pytest.raises(ValueError, match="replay_experts needs the experts of a rollout"):
        without_outputs(rollout, setup.networks, options)
