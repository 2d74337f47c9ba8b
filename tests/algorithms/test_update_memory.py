"""Policy and critic take their gradients in turn: the same numbers, one's activations at a time."""

import functools

import jax
import numpy as np
import pytest

from ppo_jax.algorithms.options import PPONetworks
from ppo_jax.algorithms.passes import forward, gradients_in_turn
from ppo_jax.algorithms.ppo import init_ppo, update_from_rollout
from ppo_jax.algorithms.update import loss_of_outputs, trained_params
from ppo_jax.core.types import FrozenParams
from ppo_jax.models.build import policy_network, value_network
from tests.support import tiny


def both_ways(*, options, **parts):
    """(gradients in turn, those of one loss), as functions of (params, experience, numbers)."""

    def gradients(params, experience, numbers, *, apart):
        outputs = functools.partial(forward, hyperparameters=numbers, **parts)
        loss = functools.partial(loss_of_outputs, hyperparameters=numbers, options=options)
        return gradients_in_turn(params, experience, outputs, loss, apart=apart)

    return [functools.partial(gradients, apart=apart) for apart in (True, False)]


@pytest.mark.parametrize("kl_loss_coef", [None, 0.1])
@pytest.mark.parametrize("kind", ["whole", "trunk", "trunk of bins"])
def test_gradients_in_turn_are_those_of_the_one_loss(kind, kl_loss_coef):
    bins = dict(value_range=np.float32([-5.0, 5.0])) if "bins" in kind else {}
    changes = dict(temperature=0.7, entropy_coef=0.1, kl_loss_coef=kl_loss_coef) | bins
    run = tiny.Run(kind, **changes)
    e, _ = run.experience(run.rollout())
    e = e.replace(logprobs=e.logprobs - 0.1, advantages=e.advantages + 1.0)
    params = trained_params(run.state.policy_params, run.state.value_params)
    parts = dict(frozen=run.setup.frozen, networks=run.setup.networks, options=tiny.options())
    (got, metrics), (expected, of_one) = (
        jax.jit(f)(params, e, run.numbers) for f in both_ways(**parts)
    )
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(expected))
    tiny.leaves_close(got, expected, rtol=1e-5, atol=1e-7)
    tiny.leaves_close(metrics, of_one, rtol=1e-6, atol=1e-7)


@pytest.fixture(scope="module")
def deep():
    """(networks, their parameters, more responses): activations are most of the memory."""
    config = tiny.model_config(num_layers=4, embed_dim=64, mlp_dim=256)
    networks = PPONetworks(policy=policy_network(config), value=value_network(config), reward=None)
    params = dict(
        policy=tiny.random_params(networks.policy), value=tiny.random_params(networks.value)
    )
    rollout = jax.tree.map(lambda x: np.repeat(x, 8, axis=0), tiny.Run("whole").rollout())
    return networks, params, rollout


def temporaries(function, *args):
    """Bytes."""
    return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes


def test_the_activations_of_one_network_at_a_time_are_in_memory(deep):
    networks, params, _ = deep
    e = tiny.Run("whole").experience(tiny.Run("whole").rollout())[0]
    e = jax.tree.map(lambda x: np.repeat(x, 8, axis=0), e)
    frozen = FrozenParams(ref_policy={})
    parts = dict(frozen=frozen, networks=networks, options=tiny.options())
    given = (params, e, tiny.hyperparameters())
    in_turn, of_one = (temporaries(f, *given) for f in both_ways(**parts))
    assert in_turn < 0.7 * of_one


def test_a_pass_in_common_with_scoring_is_held_alone(deep):
    networks, params, rollout = deep
    numbers = tiny.hyperparameters()
    state = init_ppo(params["policy"], params["value"], numbers)
    scores = np.zeros(len(rollout.mask), np.float32)

    def step(num_epochs):
        options = tiny.options(num_epochs=num_epochs, num_minibatches=1)
        parts = dict(networks=networks, options=options)
        parts |= dict(frozen=FrozenParams(ref_policy=params["policy"]))
        update = functools.partial(update_from_rollout, **parts)
        return temporaries(update, state, numbers, rollout, scores, tiny.RUN_KEY)

    assert step(1) < 1.1 * step(2)
