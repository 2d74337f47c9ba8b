"""The lanes of a sweep: each is the run alone, and what they share is there once."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.algorithms import sweep
from ppo_jax.algorithms.ppo import init_ppo
from ppo_jax.core.types import FrozenParams
from ppo_jax.rollout.continuous_batching import narrow_width
from tests.support import tiny

LEARNING_RATES = (1e-3, 3e-3, 5e-4)
LANES = tuple(
    tiny.hyperparameters(
        kl_coef=kl_coef,
        temperature=temperature,
        stop_kl=stop_kl,
        optimizer=dict(learning_rate=rate),
    )
    for rate, kl_coef, temperature, stop_kl in zip(
        LEARNING_RATES, (0.0, 0.2, 0.05), (1.0, 0.7, 1.3), (1e9, 1e9, 1e-4), strict=True
    )
)
SEEDS = (3, 4, 5)

# Nothing is shared but the key; rows are packed; rows wait for slots, above a trunk; one by one.
CASES = (
    ("whole", {}, (3, 3, 3), None),
    ("frozen", dict(packing=True, num_micro_batches=2), (3, 3, 3), None),
    ("trunk", dict(sampling=tiny.sampling(max_concurrent=4, min_free_slots=2)), SEEDS, None),
    ("trunk", dict(packing=True), SEEDS, 1),
)


def key_of(seed, i):
    return jax.random.fold_in(jax.random.key(seed), i)


def alone(kind, options, lane, seed, frozen=None, iterations=3):
    """(state, metrics of each iteration) of one lane as a run of its own."""
    run = tiny.Run(kind, options)
    parts = run.parts | ({} if frozen is None else dict(frozen=frozen))
    state, every = run.setup.start(lane), []
    for i in range(iterations):
        state, metrics = tiny.iterate(state, lane, tiny.prompts(), key_of(seed, i), **parts)
        every.append(metrics)
    return jax.tree.map(np.asarray, (state, sweep.stack_lanes(every)))


def together(kind, options, seeds, frozen=None, axes=None, at_once=None, iterations=3):
    run = tiny.Run(kind, options)
    own_keys = seeds != (seeds[0],) * len(seeds)
    axes = axes or sweep.LaneAxes(inputs=0 if own_keys else None, at_once=at_once)
    parts = dict(networks=run.setup.networks, options=options, axes=axes)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def iterate(*args, frozen):
        return sweep.sweep_iteration(*args, frozen=frozen, **parts)

    numbers = sweep.stack_lanes(LANES)
    states = sweep.stack_lanes([run.setup.start(lane) for lane in LANES])
    prompts, every = tiny.prompts(), []
    if own_keys:
        prompts = sweep.stack_lanes([prompts] * len(LANES))
    for i in range(iterations):
        keys = [key_of(seed, i) for seed in seeds]
        key = jnp.stack(keys) if own_keys else keys[0]
        states, metrics = iterate(
            states, numbers, prompts, key, frozen=run.setup.frozen if frozen is None else frozen
        )
        every.append(metrics)
    every = jax.tree.map(lambda *x: jnp.stack(x, axis=1), *every)
    return [sweep.take_lane(jax.tree.map(np.asarray, (states, every)), i) for i in range(3)]


def assert_equal_lanes(got, expected, rates=LEARNING_RATES):
    """Parameters to a tenth of the learning rate, metrics to what that makes of them."""
    for (state, metrics), (alone, its_own), rate in zip(got, expected, rates, strict=True):
        # A token that differs would change these by more than rounding.
        for name in ("response/length", "response/eos_fraction", "reward/episodes"):
            assert np.array_equal(metrics[name], its_own[name])
        tiny.leaves_close(metrics, its_own, rtol=2e-3, atol=2e-4)
        for name in ("policy_params", "value_params"):
            leaves = (getattr(x, name) for x in (state, alone))
            tiny.leaves_close(*leaves, atol=0.1 * rate)


@pytest.mark.parametrize("kind, changes, seeds, at_once", CASES)
def test_each_lane_is_the_run_alone(kind, changes, seeds, at_once):
    options = tiny.options(**changes)
    got = together(kind, options, seeds, at_once=at_once)
    expected = [alone(kind, options, *lane) for lane in zip(LANES, seeds, strict=True)]
    assert_equal_lanes(got, expected)
    # The third lane has braked and the others have not.
    taken = [metrics["ppo/updates"].sum() for _, metrics in got]
    assert taken[2] < taken[0] == taken[1] == 3 * 4


@pytest.mark.parametrize("at_once", [1, 2, 3, 6])
def test_lanes_in_turns_are_lanes_at_once(at_once):
    """With shared arguments, parts that are not there, and keys."""

    def function(frozen, x, y, key):
        noise = jax.random.normal(key, x["a"].shape)
        return {"sum": x["a"] * frozen["w"] + frozen["b"] + noise, "y": y}

    x = {"a": jnp.arange(12.0).reshape(6, 2), "none": None}
    frozen = {"w": jnp.arange(6.0), "b": jnp.float32(0.5), "none": None}
    args = frozen, x, jnp.int32(7), jax.random.split(jax.random.key(0), 6)
    in_axes = ({"w": 0, "b": None, "none": None}, 0, None, 0)
    expected = jax.vmap(function, in_axes)(*args)
    one = function if at_once == 1 else jax.vmap(function, in_axes)
    got = jax.jit(sweep.in_turns(one, in_axes, at_once))(*args)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"at_once \(4\) must divide the 6 lanes"):
        sweep.in_turns(one, in_axes, 4)(*args)


def test_the_two_halves_are_those_of_the_run_alone():
    """The tokens too, with numbers, prompts and keys that differ."""
    run, options, axes = tiny.Run("trunk"), tiny.options(), sweep.LaneAxes(inputs=0)
    parts = dict(frozen=run.setup.frozen, networks=run.setup.networks, options=options)
    starts, numbers = [run.setup.start(lane) for lane in LANES], sweep.stack_lanes(LANES)
    states = sweep.stack_lanes(starts)
    prompts, keys = [tiny.prompts(seed) for seed in SEEDS], jnp.stack([key_of(s, 0) for s in SEEDS])
    sample = jax.jit(functools.partial(sweep.sweep_responses, axes=axes, **parts))
    both = sample(states, numbers, sweep.stack_lanes(prompts), keys)
    scores = jnp.linspace(-1.0, 1.0, len(LANES) * tiny.BATCH)
    update = jax.jit(functools.partial(sweep.sweep_update, axes=axes, **parts))
    got = update(states, numbers, both, scores, keys)
    for i, lane in enumerate(LANES):
        rows = slice(i * tiny.BATCH, (i + 1) * tiny.BATCH)
        one = tiny.sample_responses(starts[i], lane, prompts[i], keys[i], **parts)
        for name in ("prompt_tokens", "response_tokens", "response_mask", "has_eos"):
            assert (getattr(both, name)[rows] == getattr(one, name)).all()
        state, metrics = tiny.update_from_rollout(
            starts[i], lane, one, scores[rows], keys[i], **parts
        )
        found = jax.tree.map(np.asarray, sweep.take_lane(got, i))
        assert_equal_lanes([found], [(state, metrics)], [LEARNING_RATES[i]])
    assert (both.response_tokens[:8] != both.response_tokens[8:16]).any()


def test_lanes_of_other_seeds_have_models_of_their_own():
    """Those leaves alone are stacked that differ."""
    frozen = tiny.Run("frozen").setup.frozen
    heads = [jax.tree.map(jnp.asarray(s).__mul__, frozen.reward["head"]) for s in (1.0, 2.0, -1.0)]
    lanes = [
        dataclasses.replace(
            frozen,
            reward={**frozen.reward, "head": head},
            # Equal numbers in arrays of their own.
            policy=jax.tree.map(jnp.copy, frozen.policy),
        )
        for head in heads
    ]
    stacked, axes = sweep.stack_frozen(lanes)
    has_axis = {
        jax.tree_util.keystr(path): axis is not None
        for path, axis in jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda x: x is None)
        if not isinstance(axis, dict)
    }
    assert {name for name, stacks in has_axis.items() if stacks} == {
        ".reward['head']['bias']",
        ".reward['head']['kernel']",
    }
    assert stacked.reward["head"]["kernel"].shape == (3, 32, 1)
    chex.assert_trees_all_equal(stacked.policy, frozen.policy)
    options = tiny.options()
    got = together(
        "frozen", options, SEEDS, stacked, sweep.LaneAxes(inputs=0, frozen=axes), iterations=1
    )
    expected = [
        alone("frozen", options, lane, seed, own, iterations=1)
        for lane, seed, own in zip(LANES, SEEDS, lanes, strict=True)
    ]
    assert_equal_lanes(got, expected)
    with pytest.raises(ValueError, match="lane 1 has frozen parameters of other shapes"):
        sweep.stack_frozen([frozen, FrozenParams(ref_policy=frozen.ref_policy)])


def operations(jaxpr):
    """All equations of a jaxpr, those of inner ones too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from operations(inner)


@pytest.mark.parametrize("max_concurrent", [0, 4])
def test_a_cache_is_written_in_slices_and_never_selected(max_concurrent):
    """With a counter for each lane every token would copy the whole cache."""
    run = tiny.Run("whole")
    sampling = tiny.sampling(max_concurrent=max_concurrent)
    parts = dict(networks=run.setup.networks, options=tiny.options(sampling=sampling))
    states = sweep.stack_lanes([run.setup.start(lane) for lane in LANES])
    args = states, sweep.stack_lanes(LANES), tiny.prompts(), tiny.RUN_KEY
    sample = functools.partial(
        sweep.sweep_responses, frozen=run.setup.frozen, axes=sweep.LaneAxes(), **parts
    )
    found = list(operations(jax.make_jaxpr(sample)(*args).jaxpr))
    rows = (4, narrow_width(4, 1)) if max_concurrent else (tiny.BATCH,)
    capacity = tiny.PROMPT_LENGTH + tiny.RESPONSE_LENGTH
    caches = [(len(LANES), count, 2, capacity, 8) for count in rows]
    loops = [e for e in found if e.primitive.name == "while"]
    decoding = [e for e in loops if any(v.aval.shape in caches for v in e.outvars)]
    assert len(decoding) == (1 if max_concurrent == 0 else 3)
    for loop in decoding:
        carried = [v.aval for v in loop.outvars if v.aval.shape in ((), (len(LANES),))]
        assert carried and all(x.shape == () for x in carried)  # counters
        body = list(operations(loop.params["body_jaxpr"].jaxpr))
        if not any(e.primitive.name == "while" for e in body):  # else it admits prompts as well
            selects = [e for e in body if e.primitive.name == "select_n"]
            assert selects and all(e.outvars[0].aval.shape not in caches for e in selects)


def test_a_state_of_lanes_is_that_of_each():
    policy, value = tiny.setup().policy_params, tiny.setup().value_params
    stack = functools.partial(jax.tree.map, lambda x: jnp.stack([x, 2 * x, 3 * x]))
    states = jax.vmap(init_ppo)(stack(policy), stack(value), sweep.stack_lanes(LANES))
    second = init_ppo(*jax.tree.map(lambda x: 2 * x, (policy, value)), LANES[1])
    chex.assert_trees_all_equal(sweep.take_lane(states, 1), second)
