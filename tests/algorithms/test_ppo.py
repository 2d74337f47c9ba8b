import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.algorithms.ppo import init_ppo
from ppo_jax.algorithms.scores import adjust_scores
from ppo_jax.algorithms.supervised import text_scores
from ppo_jax.core.kl import adaptive_kl_coef
from tests.support import tiny


@pytest.mark.parametrize("kind", ["whole", "trunk"])
def test_an_iteration_is_its_pieces_one_after_the_other(kind):
    run = tiny.Run(kind)
    state, metrics = run.iterate()
    rollout_key, shuffle_key = jax.random.split(tiny.RUN_KEY)
    rollout = run.rollout(rollout_key)
    expected, expected_metrics = tiny.update_from_rollout(
        run.state, run.numbers, rollout, run.scores(rollout), shuffle_key, **run.parts
    )
    tiny.leaves_close(metrics, expected_metrics, rtol=1e-4, atol=1e-5)
    tiny.leaves_close(state.policy_params, expected.policy_params, atol=1e-4)
    tiny.leaves_close(state.value_params, expected.value_params, atol=2e-4)
    assert tiny.leaves_differ(state.policy_params, run.state.policy_params)
    assert tiny.leaves_differ(state.value_params, run.state.value_params)


@pytest.mark.parametrize("kind", tiny.SETUPS)
def test_a_response_is_scored_like_a_text_that_ends_with_it(kind):
    run, whole = tiny.Run(kind), tiny.Run("whole")
    rollout = run.rollout()
    got = run.scores(rollout)
    if kind == "whole":
        reward = run.setup.frozen.reward
    else:
        reward = tiny.Run("frozen").setup.frozen.reward
    network = whole.setup.networks.reward
    expected = jax.jit(functools.partial(text_scores, network))(
        reward, rollout.tokens, rollout.mask
    )
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("kind", tiny.SETUPS)
def test_a_score_is_read_at_an_eos_behind_other_stop_tokens(kind):
    """Text by text: those that stopped at 1 or were cut off as they are, the others with 1."""
    run, reward = tiny.Run(kind), tiny.Run("whole" if kind == "whole" else "frozen")
    rollout = run.rollout()
    how = dict(frozen=run.setup.frozen, networks=run.setup.networks)
    network = tiny.setup().networks.reward
    expected, changed = [], []
    for prompt, prompt_mask, response, mask, stopped in zip(
        *(rollout.prompt_tokens, rollout.prompt_mask),
        *(rollout.response_tokens, rollout.response_mask, rollout.has_eos),
        strict=True,
    ):
        ids = [*prompt[prompt_mask].tolist(), *response[mask].tolist()]
        changed.append(bool(stopped) and ids[-1] != 1)
        ids = jnp.array([[*ids, 1] if changed[-1] else ids])
        parameters = reward.setup.frozen.reward
        expected.append(text_scores(network, parameters, ids, jnp.ones_like(ids, bool))[0])
    got = tiny.response_scores(rollout, **how, eos_id=1)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    plain = tiny.response_scores(rollout, **how)
    np.testing.assert_array_equal(np.abs(got - plain) > 1e-5, changed)
    assert 0 < sum(changed) < len(changed)


def test_an_iteration_reads_its_scores_where_its_options_say():
    run = tiny.Run("trunk", tiny.options(score_eos=1))
    rollout = run.rollout(jax.random.split(tiny.RUN_KEY)[0])
    how = dict(frozen=run.setup.frozen, networks=run.setup.networks)
    expected = tiny.response_scores(rollout, **how, eos_id=1).mean()
    score = run.iterate()[1]["reward/score_mean"]
    np.testing.assert_allclose(score, expected, atol=1e-5)
    assert abs(score - run.scores(rollout).mean()) > 1e-3


def test_with_learning_rate_0_two_iterations_sample_different_responses():
    run = tiny.Run("trunk", optimizer=dict(learning_rate=0.0), value_learning_rate=0.0)
    root = jax.random.key(0)
    responses = []
    for step in range(2):
        assert run.state.step == step
        key = jax.random.fold_in(root, run.state.step)
        responses.append(np.asarray(run.rollout(key).response_tokens))
        run.state, _ = run.iterate(key)
    assert not tiny.leaves_differ(run.state.policy_params, run.setup.policy_params)
    assert not tiny.leaves_differ(run.state.value_params, run.setup.value_params)
    assert (responses[0] != responses[1]).any(axis=1).all()


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("keep", [1.0, 2.0]), ("replace", [1.0, -3.0]), ("penalty", [1.0, 5.0])],
)
def test_the_rule_for_responses_without_a_stop_token(rule, expected):
    got = adjust_scores(
        jnp.array([1.0, 2.0]),
        jnp.array([True, False]),
        tiny.hyperparameters(missing_eos_score=-3.0),
        missing_eos=rule,
    )
    assert got.tolist() == expected


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="unknown missing_eos 'drop'; choose from .*'replace'"):
        tiny.options(missing_eos="drop")


def test_integer_scores_are_refused():
    run = tiny.Run("trunk")
    scores = jnp.ones(tiny.BATCH, jnp.int32)
    with pytest.raises(AssertionError, match="type"):
        run.experience(run.rollout(), scores)


def test_adaptive_control_moves_the_coefficient_by_its_formula():
    numbers = dict(kl_coef=0.3, target_kl=4.0, kl_horizon=100.0)
    run = tiny.Run("trunk", tiny.options(kl_control="adaptive"), **numbers)
    state, metrics = run.iterate()
    expected = adaptive_kl_coef(
        0.3, metrics["kl/ref"], target_kl=4.0, horizon=100.0, batch_size=tiny.BATCH
    )
    np.testing.assert_allclose(state.kl_coef, expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["kl/coef"], 0.3, rtol=1e-6)
    assert state.kl_coef != run.state.kl_coef
    run.state = state
    _, metrics = run.iterate()
    assert metrics["kl/coef"] == state.kl_coef  # the state's, from then on


def test_fixed_control_takes_the_coefficient_from_the_hyperparameters():
    run = tiny.Run("trunk", kl_coef=0.3)
    state, metrics = run.iterate()
    assert metrics["kl/coef"] == run.numbers.kl_coef and state.kl_coef == run.state.kl_coef


def test_iterations_and_episodes_are_counted():
    run = tiny.Run("trunk")
    for i in (1, 2):
        run.state, metrics = run.iterate()
        assert run.state.step == i and run.state.episodes == i * tiny.BATCH
        assert metrics["reward/episodes"] == i * tiny.BATCH


def test_the_schedule_goes_by_iterations_with_a_rate_for_each_part():
    optimizer = dict(learning_rate=0.1, schedule="linear", total_steps=4.0)
    run = tiny.Run("trunk", optimizer=optimizer, value_learning_rate=0.2)
    e, _ = run.experience(run.rollout())
    for step, factor in [(0, 1.0), (1, 0.75), (3, 0.25)]:
        run.state = run.state.replace(step=jnp.int32(step))
        _, metrics = run.update(e)
        np.testing.assert_allclose(metrics["policy/learning_rate"], [0.1 * factor] * 4, rtol=1e-6)
        np.testing.assert_allclose(metrics["value/learning_rate"], [0.2 * factor] * 4, rtol=1e-6)


def test_the_state_shares_no_buffer_with_anything():
    # The critic is the reward model here, and the reference is where the policy starts.
    setup, numbers = tiny.setup(), tiny.hyperparameters()
    frozen = setup.frozen
    state = init_ppo(frozen.ref_policy, frozen.reward, numbers)
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(set(buffers)) == len(buffers)
    others = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((frozen, numbers))}
    assert others.isdisjoint(buffers)
    donated = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf + 1, x), donate_argnums=0)(state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((frozen, numbers)))
    assert tiny.leaves_differ(donated.value_params, frozen.reward)


def test_ppo_learns_to_say_a_token():
    # The share of the token among all ends above 0.98 with any of eight keys that were tried.
    wanted, prompts, shares = 7, tiny.prompts(batch_size=64), []
    run = tiny.Run("trunk", optimizer=dict(learning_rate=1e-2), kl_coef=0.0)
    for i in range(40):
        key = jax.random.fold_in(tiny.RUN_KEY, i)
        rollout = tiny.sample_responses(run.state, run.numbers, prompts, key, **run.parts)
        mask = np.asarray(rollout.response_mask)
        hits = (np.asarray(rollout.response_tokens) == wanted) & mask
        shares.append(hits.sum() / mask.sum())
        run.state, _ = run.update_from_rollout(rollout, jnp.asarray(hits.sum(axis=1), jnp.float32))
    assert np.mean(shares[:3]) < 0.1
    assert np.mean(shares[-3:]) > 0.9
