"""What an iteration logs of its critic, and critics that give logits of bins."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.algorithms import make_experience, sweep
from ppo_jax.algorithms.critics import critic_loss, critic_metrics, values_from
from ppo_jax.core import Optimizer
from tests.support import tiny

RANGE = dict(value_range=[-3.0, 2.0])


def by_hand(values, returns, mask):
    """Token by token, in float64."""
    tokens = []
    for v, r, m in zip(values, returns, mask, strict=True):
        kept = np.flatnonzero(m)
        tokens += [(v[t], r[t], 4 * i // len(kept)) for i, t in enumerate(kept)]
    v, r, quarter = np.array(tokens, np.float64).T
    found = {"value/mean": v.mean(), "value/return": r.mean(), "value/bias": v.mean() - r.mean()}

    def explained(v, r):
        return 1 - np.square(r - v).mean() / r.var()

    found["value/explained_variance"] = explained(v, r)
    for i in range(4):
        name = f"value/explained_variance_quarter{i + 1}"
        found[name] = explained(v[quarter == i], r[quarter == i])
    order, ranks = np.argsort(v), np.arange(len(v))
    for i in range(5):
        of_fifth = order[5 * ranks // len(v) == i]
        found[f"value/mean_fifth{i + 1}"] = v[of_fifth].mean()
        found[f"value/return_fifth{i + 1}"] = r[of_fifth].mean()
    return found


def test_the_metrics_of_a_critic_are_those_by_hand():
    draw = np.random.default_rng(0)
    mask = np.arange(12) < draw.integers(5, 13, 16)[:, None]
    values, returns = draw.normal(size=(2, 16, 12))
    padded = [jnp.asarray(np.where(mask, x, np.nan), jnp.float32) for x in (values, returns)]
    got = critic_metrics(*padded, jnp.asarray(mask))
    expected = by_hand(values, returns, mask)
    assert got.keys() == expected.keys()
    tiny.leaves_close(got, {k: np.float32(x) for k, x in expected.items()}, rtol=1e-4, atol=1e-5)


def test_they_are_of_the_values_before_the_update():
    run = tiny.Run("whole")
    rollout = run.rollout()
    experience, metrics = make_experience(
        rollout, run.scores(rollout), run.state, run.numbers, **run.parts
    )
    expected = critic_metrics(experience.values, experience.returns, experience.response_mask)
    tiny.leaves_close({name: metrics[name] for name in expected}, expected, rtol=1e-6)


# --- logits of bins -------------------------------------------------------------------------------


def test_the_values_and_the_loss_of_bins_by_hand():
    """Of two bins, -3 to 1 and 1 to 5, with targets from erf."""
    numbers = tiny.hyperparameters(value_range=[-3.0, 5.0])
    logits, mask = jnp.log(jnp.array([[[1.0, 3.0], [1.0, 1.0]]])), jnp.array([[True, False]])
    np.testing.assert_allclose(values_from(logits, numbers), [[-0.25 + 0.75 * 3, 1.0]], rtol=1e-6)
    returns = jnp.array([[2.0, jnp.nan]])
    phi = [jax.scipy.stats.norm.cdf((edge - 2.0) / (0.75 * 4.0)) for edge in (-3.0, 1.0, 5.0)]
    upper = (phi[2] - phi[1]) / (phi[2] - phi[0])
    loss, metrics = critic_loss(logits, returns, returns, mask, numbers)
    expected = -(1 - upper) * np.log(0.25) - upper * np.log(0.75)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert metrics["value/outside_bins"] == 0
    _, metrics = critic_loss(logits, returns, returns + 4, mask, numbers)
    assert metrics["value/outside_bins"] == 1


@pytest.mark.parametrize(("kind", "numbers"), [("whole", RANGE), ("whole of bins", {})])
def test_a_critic_that_gives_something_else_is_refused(kind, numbers):
    run = tiny.Run(kind, **numbers)
    with pytest.raises(ValueError, match=r"networks.value must give \[B, T"):
        run.iterate()


def test_a_new_critic_with_bins_begins_in_the_middle_of_its_range():
    run = tiny.Run("whole of bins", **RANGE)
    params = run.setup.networks.value.init(jax.random.key(0))
    assert params["head"]["kernel"].shape[-1] == params["head"]["bias"].shape[-1] == 6
    outputs = run.setup.networks.value.apply(params, *tiny.tokens_and_mask(0, 2, 5))
    np.testing.assert_allclose(values_from(outputs, run.numbers), -0.5, rtol=1e-6)


OWN = dict(value_optimizer=Optimizer(learning_rate=2e-3))


@pytest.mark.parametrize("own", [{}, OWN], ids=["joint", "apart"])
@pytest.mark.parametrize("kind", tiny.BINS)
def test_micro_batches_and_packed_rows_give_the_same_update(kind, own):
    numbers = RANGE | own | dict(optimizer=dict(eps=1e-2))
    whole = tiny.Run(kind, tiny.options(num_minibatches=1), **numbers)
    experience, metrics = whole.experience(whole.rollout())
    assert -3 < metrics["value/mean"] < 2
    expected, metrics = whole.update(experience)
    assert tiny.leaves_differ(expected.value_params, whole.state.value_params)
    parts = tiny.options(num_minibatches=1, num_micro_batches=2, packing=True)
    got, found = tiny.Run(kind, parts, **numbers).update(experience)
    for name in ("policy_params", "value_params"):
        tiny.leaves_close(getattr(got, name), getattr(expected, name), atol=2e-5)
    for name in ("value/loss", "value/outside_bins", "policy/loss"):
        np.testing.assert_allclose(found[name], metrics[name], rtol=1e-4, atol=1e-6)
    assert "value/clip_fraction" not in found


def test_the_loss_of_policy_and_critic_is_their_weighted_sum():
    run = tiny.Run("whole of bins", **RANGE, vf_coef=0.3, entropy_coef=0.0, kl_loss_coef=0.2)
    _, metrics = run.update(run.experience(run.rollout())[0])
    terms = metrics["policy/loss"] + 0.3 * metrics["value/loss"] + 0.2 * metrics["kl/loss"]
    np.testing.assert_allclose(metrics["ppo/loss"], terms, rtol=1e-5)


def test_a_critic_with_bins_learns_its_returns():
    """Explained variance of the same responses, before and after."""
    run = tiny.Run("whole of bins", tiny.options(num_epochs=30), **RANGE, value_learning_rate=1e-2)
    rollout = run.rollout()
    experience, before = run.experience(rollout)
    run.state, _ = run.update(experience)
    after = run.experience(rollout)[0]
    last = critic_metrics(after.values, experience.returns, experience.response_mask)
    names = "value/explained_variance", "value/bias"
    assert before[names[0]] < 0.3 < 0.8 < last[names[0]]
    assert abs(last[names[1]]) < 0.1


def test_lanes_may_have_ranges_of_their_own():
    run = tiny.Run("trunk of bins", **RANGE)
    lanes = [tiny.hyperparameters(value_range=ends) for ends in ([-3.0, 2.0], [-1.0, 8.0])]
    states = sweep.stack_lanes([run.setup.start(lane) for lane in lanes])
    parts = dict(networks=run.setup.networks, options=tiny.options(), axes=sweep.LaneAxes())
    iterate = jax.jit(functools.partial(sweep.sweep_iteration, **parts))
    got, metrics = iterate(
        states,
        sweep.stack_lanes(lanes),
        tiny.prompts(),
        tiny.RUN_KEY,
        frozen=run.setup.frozen,
    )
    for i, lane in enumerate(lanes):
        run.numbers = lane
        expected, alone = run.iterate()
        tiny.leaves_close(sweep.take_lane(metrics, i), alone, rtol=1e-3, atol=1e-4)
        own = sweep.take_lane(got.value_params, i)
        tiny.leaves_close(own, expected.value_params, atol=1e-4)
    assert metrics["value/mean"][0] != metrics["value/mean"][1]


# --- several --------------------------------------------------------------------------------------


def run_of_two(chosen=None, **numbers):
    """Two critics that differ in all of their leaves."""
    options = dict(num_critics=2, sampling=tiny.sampling(samples_per_prompt=2)) | (chosen or {})
    run = tiny.Run("whole", tiny.options(**options), **numbers)
    both = [tiny.random_params(run.setup.networks.value, seed) for seed in (2, 9)]
    run.setup = run.setup._replace(value_params=sweep.stack_lanes(both))
    run.state = run.setup.start(run.numbers)
    return run, both


def test_the_value_of_several_critics_is_their_mean_and_each_has_its_prompts():
    run, both = run_of_two(agreed_fraction=0.4)
    rollout = run.rollout()
    mask = rollout.response_mask
    experience, metrics = run.experience(rollout)
    alone = []
    for params in both:
        one = tiny.Run("whole", tiny.options(sampling=run.parts["options"].sampling))
        one.state = run.state.replace(value_params=params)
        alone.append(one.experience(rollout, run.scores(rollout))[0].values)
    own = np.arange(len(mask)) // 2 % 2
    chosen = np.stack(alone)[own, np.arange(len(mask))]
    np.testing.assert_allclose(experience.values, chosen, atol=1e-5)
    assert np.array_equal(experience.critics, np.where(mask, own[:, None], 0))
    mean, spread = (alone[0] + alone[1]) / 2, abs(alone[0] - alone[1]) / 2
    np.testing.assert_allclose(metrics["value/mean"], mean[mask].mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["value/disagreement"], spread[mask].mean(), rtol=1e-4)
    # The advantages are those of the mean, and 0 where the two agree most.
    run.numbers = run.numbers.replace(agreed_fraction=None)
    every = run.experience(rollout)[0].advantages
    least = np.sort(spread[mask])[: round(0.4 * int(mask.sum()))]
    agreed = mask & (spread <= least[-1])
    assert 0 < agreed.sum() < mask.sum()
    np.testing.assert_allclose(experience.advantages, np.where(agreed, 0.0, every), atol=1e-5)


def test_the_tokens_on_which_they_disagree_most_have_no_entropy_bonus():
    run, _ = run_of_two(disputed_fraction=0.3)
    rollout = run.rollout()
    experience, metrics = run.experience(rollout)
    mask, swapped = np.asarray(rollout.response_mask), run_of_two()[0]
    swapped.state = run.state.replace(
        value_params=jax.tree.map(lambda x: x[::-1], run.state.value_params)
    )
    apart = abs(experience.values - swapped.experience(rollout)[0].values)
    most = np.sort(apart[mask])[::-1][: round(0.3 * int(mask.sum()))]
    np.testing.assert_array_equal(experience.disputed_mask, mask & (apart >= most[-1]))
    np.testing.assert_allclose(metrics["value/disputed_fraction"], len(most) / mask.sum())
    # The update has it from there: without the bonus of the others it is one without a bonus.
    every = experience.replace(disputed_mask=rollout.response_mask)
    run.numbers = run.numbers.replace(entropy_coef=jnp.float32(0.5))
    (got, _), (some, _) = run.update(every), run.update(experience)
    run.numbers = run.numbers.replace(entropy_coef=jnp.float32(0.0))
    expected, _ = run.update(experience)
    tiny.leaves_close(got.policy_params, expected.policy_params, atol=1e-6)
    assert tiny.leaves_differ(some.policy_params, got.policy_params)
    experience, metrics = run_of_two()[0].experience(rollout)
    assert experience.disputed_mask is None and "value/disputed_fraction" not in metrics


def test_each_critic_learns_its_own_responses_alone():
    """As it would alone, with the others' tokens left out: Adam divides their number out."""
    adam = dict(learning_rate=2e-3, eps=1e-20, max_grad_norm=np.inf)
    numbers = dict(value_optimizer=Optimizer(**adam))
    run, both = run_of_two(dict(num_minibatches=1), **numbers)
    experience, _ = run.experience(run.rollout())
    got, _ = run.update(experience)
    for k, params in enumerate(both):
        alone = tiny.Run("whole", tiny.options(num_minibatches=1), **numbers)
        alone.setup = alone.setup._replace(value_params=params)
        alone.state = alone.setup.start(alone.numbers)
        mine = experience.response_mask & (experience.critics == k)
        expected, _ = alone.update(experience.replace(critics=None, response_mask=mine))
        own = sweep.take_lane(got.value_params, k)
        assert tiny.leaves_differ(own, params)
        tiny.leaves_close(own, expected.value_params, atol=1e-4)


def test_micro_batches_and_packed_rows_of_several_critics_give_the_same_update():
    numbers = dict(optimizer=dict(eps=1e-2), agreed_fraction=0.2)
    numbers |= dict(disputed_fraction=0.3, entropy_coef=0.3)
    whole, _ = run_of_two(dict(num_minibatches=1), **numbers)
    experience, _ = whole.experience(whole.rollout())
    expected, _ = whole.update(experience)
    parts = dict(num_minibatches=1, num_micro_batches=2, packing=True)
    got, _ = run_of_two(parts, **numbers)[0].update(experience)
    for name in ("policy_params", "value_params"):
        tiny.leaves_close(getattr(got, name), getattr(expected, name), atol=2e-5)
