"""Several reward models in one iteration, against each of them alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.algorithms.ensembles import RewardEnsemble, combine_scores, ensemble_params
from ppo_jax.algorithms.experience import response_scores
from ppo_jax.algorithms.ppo import ppo_iteration
from ppo_jax.algorithms.sweep import LaneAxes, stack_frozen, stack_lanes, sweep_iteration
from ppo_jax.core.network import Network
from ppo_jax.models.build import reward_network
from tests.support import tiny

RULES = {
    "mean": lambda x: x.mean(axis=0),
    "min": lambda x: x.min(axis=0),
    "mean_minus_std": lambda x: x.mean(axis=0) - 0.5 * x.std(axis=0),
    "mean_minus_var": lambda x: x.mean(axis=0) - 0.5 * x.var(axis=0),
}


@functools.cache
def members(num_layers=2):
    """(network, parameters of three reward models of it)."""
    network = reward_network(tiny.model_config(num_layers=num_layers))
    return network, [tiny.random_params(network, seed) for seed in (3, 11, 12)]


def with_models(run, rule, stacked=True):
    """The run with three models; those of two shapes are one after another."""
    network, params = members()
    networks = (network,)
    if not stacked:
        other, others = members(1)
        networks, params = (network, other, network), [params[0], others[1], params[2]]
    ensemble = RewardEnsemble(networks, rule, 0.5)
    frozen = run.setup.frozen.replace(reward=ensemble_params(params, stacked=stacked))
    run.parts |= dict(networks=run.parts["networks"]._replace(reward=ensemble), frozen=frozen)
    return list(zip(networks * 3 if stacked else networks, params, strict=True))


def scores_alone(run, pairs, rollout):
    """[K, B], by a run with each model alone."""
    scores = [
        response_scores(
            rollout,
            frozen=run.setup.frozen.replace(reward=params),
            networks=run.setup.networks._replace(reward=network),
        )
        for network, params in pairs
    ]
    return np.asarray(scores, np.float64)


@pytest.mark.parametrize("stacked", [True, False])
def test_the_score_of_safety_counts_where_it_is_below_the_threshold(stacked):
    run = tiny.Run("whole", kl_coef=0.0)
    pairs = with_models(run, "threshold", stacked)[:2]
    helpful, safe = scores_alone(run, pairs, iterated_rollout(run))
    threshold = float(np.median(safe)) + 1e-3
    networks = tuple(network for network, _ in pairs[: 1 if stacked else 2])
    ensemble = RewardEnsemble(networks, "threshold", threshold=threshold)
    params = ensemble_params([own for _, own in pairs], stacked=stacked)
    run.parts["frozen"] = run.setup.frozen.replace(reward=params)
    run.parts["networks"] = run.parts["networks"]._replace(reward=ensemble)
    expected = np.where(safe < threshold, safe, helpful)
    assert 0 < (safe < threshold).sum() < len(safe) and abs(safe - helpful).min() > 1e-3
    parts = dict(frozen=run.parts["frozen"], networks=run.parts["networks"])
    got = response_scores(iterated_rollout(run), **parts)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    _, metrics = run.iterate()
    assert metrics["reward/score_mean"] == pytest.approx(expected.mean(), abs=1e-4)
    assert metrics["reward/score_0"] == pytest.approx(helpful.mean(), abs=1e-4)
    assert metrics["reward/score_1"] == pytest.approx(safe.mean(), abs=1e-4)
    assert metrics["reward/safety_fraction"] == pytest.approx((safe < threshold).mean())
    assert "reward/disagreement" not in metrics


def test_the_score_of_safety_counts_for_prompts_of_safety():
    scores, flags = jnp.array([[5.0, 6.0, 7.0], [-3.0, 2.0, 1.0]]), jnp.array([False, True, False])
    rule = RewardEnsemble((None,), "threshold", threshold=-1.73)
    got, metrics = combine_scores(rule, scores, flags)
    assert got.tolist() == [-3.0, 2.0, 7.0]
    assert metrics["reward/safety_fraction"].tolist() == [1, 1, 0]


@pytest.mark.parametrize("max_concurrent", [0, 4])
def test_a_response_has_the_flag_of_its_prompt(max_concurrent):
    sampling = tiny.sampling(samples_per_prompt=2, max_concurrent=max_concurrent)
    run = tiny.Run("whole", tiny.options(sampling=sampling))
    flags = jnp.array([True, False, False, True] * 2)
    prompts = tiny.prompts().replace(is_safety=flags)
    given = (run.state, run.numbers, prompts, tiny.RUN_KEY)
    rollout = tiny.sample_responses(*given, **run.parts)
    np.testing.assert_array_equal(rollout.is_safety, np.repeat(flags, 2))
    plain = run.rollout()
    assert plain.is_safety is None
    np.testing.assert_array_equal(rollout.response_tokens, plain.response_tokens)


def test_the_rule_of_two_models_is_one_of_two():
    run = tiny.Run("whole")
    with_models(run, "threshold")
    with pytest.raises(ValueError, match="'threshold' is one of 2 reward models, got 3"):
        run.iterate()


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_a_score_is_that_of_the_rule_over_the_models_alone(rule, stacked):
    run = tiny.Run("whole", kl_coef=0.0)
    rollout = run.rollout()
    each = scores_alone(run, with_models(run, rule, stacked), rollout)
    assert each.std(axis=0).mean() > 0.1
    parts = dict(frozen=run.parts["frozen"], networks=run.parts["networks"])
    got = response_scores(rollout, **parts)
    np.testing.assert_allclose(got, RULES[rule](each), rtol=1e-4, atol=1e-5)
    _, metrics = run.iterate()  # samples the same responses by itself
    each = scores_alone(run, with_models(run, rule, stacked), iterated_rollout(run))
    assert metrics["reward/score_mean"] == pytest.approx(RULES[rule](each).mean(), abs=1e-4)
    for number in range(3):
        assert metrics[f"reward/score_{number}"] == pytest.approx(each[number].mean(), abs=1e-4)
    apart = each.std(axis=0).mean()
    assert metrics["reward/disagreement"] == pytest.approx(apart, abs=1e-4)


def iterated_rollout(run):
    """The responses of `run.iterate()`."""
    return run.rollout(jax.random.split(tiny.RUN_KEY)[0])


def test_models_of_networks_that_cannot_pack_are_read_at_their_last_tokens_too():
    """A user's own, whose apply takes no positions."""
    run = tiny.Run("whole")
    rollout = run.rollout()

    def apply(params, inputs, mask):
        return params["scale"] * jnp.where(mask, inputs, 0).astype(jnp.float32)

    params = [{"scale": jnp.float32(x)} for x in (1.0, 3.0)]
    ensemble = RewardEnsemble((Network(None, apply),), "mean")
    got = response_scores(
        rollout,
        frozen=run.setup.frozen.replace(reward=ensemble_params(params, stacked=True)),
        networks=run.setup.networks._replace(reward=ensemble),
    )
    last = np.asarray(rollout.response_mask).sum(axis=1) - 1
    tokens = np.asarray(rollout.response_tokens)[np.arange(len(last)), last]
    np.testing.assert_allclose(got, 2.0 * tokens, rtol=1e-6)


@pytest.mark.parametrize("shared", [True, False])
def test_each_lane_has_the_scores_of_its_models(shared):
    run = tiny.Run("whole")
    with_models(run, "min")
    frozen = run.parts["frozen"]
    other = frozen if shared else frozen.replace(reward=jax.tree.map(lambda x: -x, frozen.reward))
    stacked, axes = stack_frozen([frozen, other])
    parts = {k: x for k, x in run.parts.items() if k != "frozen"}
    states, numbers = (stack_lanes([x, x]) for x in (run.state, run.numbers))
    _, got = jax.jit(functools.partial(sweep_iteration, axes=LaneAxes(frozen=axes), **parts))(
        states, numbers, tiny.prompts(), tiny.RUN_KEY, frozen=stacked
    )
    for lane, own in enumerate((frozen, other)):
        _, alone = ppo_iteration(
            run.state, run.numbers, tiny.prompts(), tiny.RUN_KEY, frozen=own, **parts
        )
        for name in ("reward/score_mean", "reward/score_2", "reward/disagreement"):
            assert got[name][lane] == pytest.approx(float(alone[name]), abs=1e-4)


def test_an_iteration_with_one_model_has_no_metrics_of_several():
    _, metrics = tiny.Run("whole").iterate()
    assert not {"reward/score_0", "reward/disagreement"} & metrics.keys()
