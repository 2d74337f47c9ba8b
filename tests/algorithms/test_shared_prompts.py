"""An iteration in which prompts are computed once, against one in which each response has its own:
every setting that reads or orders responses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ppo_jax.algorithms import ppo, sweep
from ppo_jax.algorithms.ensembles import RewardEnsemble
from ppo_jax.core.covariance import clip_cov_policy_loss
from ppo_jax.core.network import Network
from ppo_jax.core.types import Optimizer
from tests.algorithms.test_ensembles import with_models
from tests.algorithms.test_shared_critic import shared_run
from tests.distributed.test_meshes import Run as MeshRun
from tests.support import tiny

SAMPLES = 4
NETWORKS = ("policy", "value", "reward", "trunk")


def options(**changes):
    sampling = tiny.sampling(samples_per_prompt=SAMPLES)
    return tiny.options(**dict(sampling=sampling, num_epochs=1, num_minibatches=1) | changes)


def map_networks(networks, change):
    """The networks of a run, each as `change` makes it; the rollout's stay as they are."""

    def changed(name):
        network = getattr(networks, name)
        if isinstance(network, RewardEnsemble):
            return network._replace(networks=tuple(change(name, x) for x in network.networks))
        return network and change(name, network)

    return networks._replace(**{name: changed(name) for name in NETWORKS})


def apart(networks):
    """Networks as a user's own: they share no prompts."""
    return map_networks(networks, lambda _, x: x._replace(supports_shared_prompts=None))


def watched(networks):
    """(networks, {name: how many responses had one prompt, in each of its calls})"""
    seen = {}

    def watch(name, network: Network) -> Network:
        def record(function):
            def recorded(*args, shared_prompt=None, **how):
                seen.setdefault(name, set()).add(shared_prompt.samples if shared_prompt else 1)
                more = dict(shared_prompt=shared_prompt) if shared_prompt else {}
                return function(*args, **how, **more)

            return recorded

        statistics = network.token_statistics
        statistics = None if statistics is None else record(statistics)
        return network._replace(apply=record(network.apply), token_statistics=statistics)

    return map_networks(networks, watch), seen


def of_setup(kind, chosen=None, **numbers):
    return lambda: tiny.Run(kind, options(**(chosen or {})), **numbers)


def several_models():
    run = tiny.Run("whole", options())
    with_models(run, "mean")
    return run


ALL = {SAMPLES}
KL = dict(kl_loss_coef=0.1, penalty_target_kl=0.1)
OWN = dict(value_optimizer=Optimizer(learning_rate=1e-3))
CASES = {  # a run, and which of its networks share prompts in which calls
    "a reference and a critic": (of_setup("whole", **KL), {}),
    "recomputed, in two parts": (
        of_setup("frozen", dict(num_micro_batches=2, old_logprobs="recompute")),
        {},
    ),
    "on a trunk, the best and worst kept": (
        of_setup("trunk", dict(keep_samples=2)),
        dict(policy={2, 4}, value={2, 4}),
    ),
    "on a trunk, scored at an EOS": (of_setup("trunk", dict(score_eos=1)), dict(trunk=ALL)),
    "a choice of tokens": (
        of_setup("whole", dict(loss=clip_cov_policy_loss), covariance_fraction=0.2, stop_kl=1e9),
        {},
    ),
    "a critic with steps of its own": (
        of_setup("whole", dict(num_minibatches=2, value_num_minibatches=1), **OWN),
        dict(policy={1, 4}),
    ),
    "two minibatches": (
        of_setup("whole", dict(num_minibatches=2)),
        dict(policy={1, 4}, value={1, 4}),
    ),
    "packed": (
        of_setup("whole", dict(packing=True, num_micro_batches=2)),
        dict(policy={1, 4}, value={1, 4}),
    ),
    "bins": (of_setup("whole of bins", value_range=[-3.0, 2.0]), {}),
    "three reward models": (several_models, {}),
    "responses of the reference": (
        of_setup("whole", dict(reference_responses=2)),
        dict(reward={2, 4}),
    ),
    "a critic on the policy": (
        lambda: shared_run("in chunks", vars(options())),
        {},
    ),
}
SLOW = ("bins", "a critic on the policy", "packed", "recomputed, in two parts", "two minibatches")


def iteration(run, networks):
    parts = run.parts | dict(networks=networks)
    prompts = tiny.prompts(batch_size=4)
    return tiny.iterate(run.state, run.numbers, prompts, tiny.RUN_KEY, **parts)


def assert_states_close(got, expected):
    """By the first moments: the gradients, and not Adam's quotient of them."""
    found = functools.partial(optax.tree_utils.tree_get_all_with_path, key="mu")
    got, expected = (
        jnp.concatenate(
            [x.ravel() for x in jax.tree.leaves([mu for _, mu in found(state.opt_state)])]
        )
        for state in (got, expected)
    )
    largest = float(jnp.abs(expected).max())
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize(
    "case", [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in CASES]
)
def test_an_iteration_is_that_of_rows_apart(case):
    make, differs = CASES[case]
    run = make()
    networks, seen = watched(run.parts["networks"])
    state, metrics = iteration(run, networks)
    calls = {name: ALL for name in NETWORKS[:3]} | differs
    assert seen == calls
    expected, expected_metrics = iteration(run, apart(run.parts["networks"]))
    assert_states_close(state, expected)
    tiny.leaves_close(metrics, expected_metrics, rtol=1e-4, atol=1e-5)


def test_lanes_share_prompts_and_are_the_runs_alone():
    run = tiny.Run("frozen", options(num_micro_batches=2))
    lanes = [tiny.hyperparameters(kl_coef=x) for x in (0.0, 0.2)]
    states, numbers = sweep.stack_lanes([run.state] * 2), sweep.stack_lanes(lanes)
    networks, seen = watched(run.setup.networks)
    how = dict(networks=networks, options=run.parts["options"], axes=sweep.LaneAxes(inputs=None))
    prompts = tiny.prompts(batch_size=4)
    step = jax.jit(functools.partial(sweep.sweep_iteration, **how))
    got, _ = step(states, numbers, prompts, tiny.RUN_KEY, frozen=run.setup.frozen)
    assert seen["policy"] == seen["value"] == seen["reward"] == ALL
    for i, lane in enumerate(lanes):
        parts = run.parts | dict(networks=apart(run.setup.networks))
        expected, _ = tiny.iterate(run.state, lane, prompts, tiny.RUN_KEY, **parts)
        assert_states_close(sweep.take_lane(got, i), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "scanned", "trunk"])
def test_a_mesh_shares_prompts_and_is_one_device_with_rows_apart(kind):
    """Eight prompts over four shards; with two micro-batches of four groups a shard has one."""

    def step(shape, change):
        run = MeshRun(shape, kind)
        run.options = options(num_micro_batches=2)
        run.networks, seen = change(run.networks)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, run.state), run.layout.replicated
        compiled = run.compile(ppo.ppo_iteration, out_shardings=shardings)
        prompts = run.layout.shard_batch(tiny.prompts(batch_size=8))
        args = (run.state, run.numbers, prompts, run.layout.key(0, 0))
        return *jax.device_get(compiled(*args, frozen=run.frozen)), seen

    mine, metrics, seen = step((2, 2, 2), watched)
    assert seen["policy"] == seen["value"] == ALL
    one, one_metrics, _ = step((1, 1, 1), lambda networks: (apart(networks), None))
    assert_states_close(mine, one)
    tiny.leaves_close(metrics, one_metrics, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_shards_with_less_than_a_group_have_rows_apart():
    """Two groups in a micro-batch, and four shards: the update shares none, and scoring does."""
    run = MeshRun((2, 2, 2))
    run.options = options(num_micro_batches=2)
    run.networks, seen = watched(run.networks)
    prompts = run.layout.shard_batch(tiny.prompts(batch_size=4))
    args = (run.state, run.numbers, prompts, run.layout.key(0, 0))
    jax.eval_shape(
        functools.partial(
            ppo.ppo_iteration, networks=run.networks, options=run.options, frozen=run.frozen
        ),
        *args,
    )
    assert seen["policy"] == seen["value"] == {1, 4} and seen["reward"] == ALL
