"""What moves from iteration to iteration, against what it is by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.algorithms import init_ppo, policy_logprobs
from ppo_jax.algorithms.adaptation import next_reference
from ppo_jax.core.critic_free import reinforce_advantages
from ppo_jax.core.policy_losses import kl_penalty_policy_loss
from tests.support import tiny

PENALTY = tiny.options(loss=kl_penalty_policy_loss)
logprobs_of = jax.jit(policy_logprobs, static_argnames="networks")


def iterations(run, count):
    """(states, the first one included; metrics of each) of so many iterations."""
    states, metrics = [run.state], []
    for i in range(count):
        state, measured = tiny.iterate(
            states[-1], run.numbers, tiny.prompts(), jax.random.key(i), **run.parts
        )
        states.append(state)
        metrics.append(measured)
    return states, metrics


def test_without_a_target_nothing_is_in_the_state():
    state = tiny.Run("whole").state
    assert state.adaptive == {} and state.ref_params is None
    assert not any("coef" in name for name in tiny.Run("whole").iterate()[1] if "policy/" in name)


def test_the_penalty_is_doubled_far_from_the_old_policy_and_halved_near_it():
    for target, factor in ((1e-7, 2.0), (10.0, 0.5)):
        run = tiny.Run("whole", PENALTY, penalty_coef=0.75, penalty_target_kl=target)
        states, metrics = iterations(run, 2)
        coefs = [float(state.adaptive["penalty_coef"]) for state in states]
        assert coefs == [0.75, 0.75 * factor, 0.75 * factor**2]
        assert [float(m["policy/penalty_coef"]) for m in metrics] == coefs[:2]


def test_the_penalty_follows_the_divergence_after_the_update():
    """Not the mean of `policy/penalty_kl`, whose first step has not moved yet."""
    run = tiny.Run("whole", PENALTY, penalty_target_kl=1e-4)
    rollout = run.rollout()
    state, metrics = run.update_from_rollout(rollout, run.scores(rollout))
    how = dict(policy_inputs=rollout.tokens, frozen=run.setup.frozen, networks=run.setup.networks)
    new = logprobs_of(rollout, state.policy_params, run.numbers, **how)
    difference = np.asarray(new - rollout.logprobs, np.float64)[rollout.response_mask]
    expected = (np.exp(difference) - 1 - difference).mean()
    np.testing.assert_allclose(metrics["policy/old_kl"], expected, rtol=1e-3)
    assert expected > 1.2 * metrics["policy/penalty_kl"]


@pytest.mark.parametrize(
    ("target", "name", "start"),
    [("penalty_target_kl", "penalty_coef", 0.75), ("target_entropy", "entropy_coef", 0.3)],
)
def test_the_loss_has_the_coefficient_of_its_iteration(target, name, start):
    """As a run that has had it as a number from the start."""
    own = tiny.Run("whole", PENALTY, **{target: 1e-3, name: start})
    states, _ = iterations(own, 1)
    coef = states[1].adaptive[name]
    assert abs(coef - start) > 1e-3
    fixed = tiny.Run("whole", PENALTY, **{name: coef})
    args = tiny.prompts(), jax.random.key(9)
    got, _ = tiny.iterate(states[1], own.numbers, *args, **own.parts)
    bare = dataclasses.replace(states[1], adaptive={})
    expected, _ = tiny.iterate(bare, fixed.numbers, *args, **fixed.parts)
    tiny.leaves_close(got.policy_params, expected.policy_params, atol=1e-6)
    stale, _ = tiny.iterate(
        bare, tiny.Run("whole", PENALTY, **{name: start}).numbers, *args, **own.parts
    )
    assert tiny.leaves_differ(got.policy_params, stale.policy_params)


def test_the_entropy_bonus_rises_below_its_target_and_falls_above_it():
    for target, expected in ((100.0, [0.25, 0.375, 0.5]), (1e-6, [0.25, 0.125, 0.0])):
        run = tiny.Run("whole", entropy_coef=0.25, target_entropy=target, entropy_coef_step=0.125)
        states, _ = iterations(run, 2)
        assert [float(state.adaptive["entropy_coef"]) for state in states] == expected


def test_the_warm_up_ends_once_the_explained_variance_has_settled():
    """With a critic that does not learn, and any tolerance, after five iterations."""
    still = dict(critic_warmup=10, value_learning_rate=0.0)
    for tolerance, moves in ((10.0, [0, 0, 0, 0, 0, 1]), (1e-9, [0] * 6)):
        run = tiny.Run("whole", **still, critic_warmup_tolerance=tolerance)
        states, metrics = iterations(run, 6)
        assert [float(m["policy/learning_rate"]) > 0 for m in metrics] == moves
        assert tiny.leaves_differ(states[0].policy_params, states[6].policy_params) == moves[5]


def test_a_policy_that_stays_moves_no_coefficient():
    numbers = dict(critic_warmup=1, penalty_coef=0.75, penalty_target_kl=10.0)
    run = tiny.Run("whole", PENALTY, **numbers, entropy_coef=0.25, target_entropy=100.0)
    states, _ = iterations(run, 2)
    penalties, bonuses = (
        [round(float(state.adaptive[name]), 6) for state in states]
        for name in ("penalty_coef", "entropy_coef")
    )
    assert penalties == [0.75, 0.75, 0.375] and bonuses == [0.25, 0.25, 0.255]


def without_critic(run):
    """The same run, whose advantages need none."""
    networks = run.setup.networks._replace(value=None)
    run.parts["networks"] = networks
    run.state = init_ppo(run.setup.policy_params, None, run.numbers)
    return run


def test_reinforce_takes_off_the_mean_of_the_iterations_before():
    options = tiny.options(advantage=reinforce_advantages)
    run = without_critic(tiny.Run("whole", options, baseline_decay=0.75, gamma=0.9))
    states, metrics = iterations(run, 3)
    totals = [float(m["reward/total_mean"]) for m in metrics]
    kept = [totals[0], 0.75 * totals[0] + 0.25 * totals[1]]
    got = [float(state.adaptive["baseline"]) for state in states]
    assert np.isnan(got[0])
    np.testing.assert_allclose(got[1:3], kept, rtol=1e-5)
    baselines = [float(m["reward/baseline"]) for m in metrics]
    np.testing.assert_allclose(baselines, [totals[0], *kept], rtol=1e-5)

    run.state = states[2]
    rollout = run.rollout()
    experience, _ = run.experience(rollout)
    run.state = dataclasses.replace(states[2], adaptive={"baseline": jnp.float32(0.0)})
    plain, _ = run.experience(rollout)
    difference = np.asarray(plain.advantages - experience.advantages)[rollout.response_mask]
    np.testing.assert_allclose(difference, kept[1], rtol=1e-4)


def test_the_mean_of_reference_and_policy_is_the_closed_form():
    run = tiny.Run("whole", ref_policy=True, ref_ema_decay=0.75)
    states, metrics = iterations(run, 3)
    expected = states[0].policy_params
    for state in states[1:]:
        mix = functools.partial(jax.tree.map, lambda r, p: 0.75 * r + 0.25 * p)
        expected = mix(expected, state.policy_params)
    tiny.leaves_close(states[-1].ref_params, expected, atol=1e-6)
    # The KL of an iteration is from the reference that it begins with.
    fixed = tiny.Run("whole", ref_policy=True)
    fixed.parts["frozen"] = dataclasses.replace(fixed.setup.frozen, ref_policy=states[2].ref_params)
    bare = dataclasses.replace(states[2], ref_params=None)
    args = fixed.numbers, tiny.prompts(), jax.random.key(2)
    _, measured = tiny.iterate(bare, *args, **fixed.parts)
    np.testing.assert_allclose(metrics[2]["kl/ref"], measured["kl/ref"], rtol=1e-4)
    _, still = tiny.iterate(bare, *args, **tiny.Run("whole").parts)
    assert abs(metrics[2]["kl/ref"] / still["kl/ref"] - 1) > 0.05


def test_the_policy_becomes_the_reference_every_so_many_iterations():
    run = tiny.Run("whole", ref_policy=True, ref_reset_every=2)
    states, metrics = iterations(run, 4)
    started = states[0].policy_params
    for number, taken in enumerate([0, 0, 2, 2, 4]):
        expected = started if taken == 0 else states[taken].policy_params
        tiny.leaves_close(states[number].ref_params, expected, atol=0)
    assert abs(float(metrics[2]["kl/ref"])) < 1e-4 < abs(float(metrics[1]["kl/ref"]))


@pytest.mark.parametrize("numbers", [{"ref_ema_decay": 1.5}, {"ref_reset_every": 0}], ids=str)
def test_a_reference_that_cannot_move_so_is_refused(numbers):
    one = {"w": jnp.ones(2)}
    numbers = dataclasses.replace(tiny.hyperparameters(), **numbers)
    with pytest.raises(ValueError, match="ref_"):
        next_reference(one, one, 1, numbers)


def test_a_reference_in_bfloat16_stays_so():
    one, two = {"w": jnp.ones(2, jnp.bfloat16)}, {"w": 2 * jnp.ones(2, jnp.bfloat16)}
    numbers = tiny.hyperparameters(ref_ema_decay=0.5)
    got = next_reference(one, two, jnp.int32(1), numbers)["w"]
    assert got.dtype == jnp.bfloat16 and got.tolist() == [1.5, 1.5]
