"""What the ratio starts from: the log-probs of the sampling, or those of a pass of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.algorithms.options import PPONetworks, Sampler
from ppo_jax.config.mesh import MeshSettings
from ppo_jax.core.off_policy_losses import decoupled_policy_loss
from ppo_jax.distributed.layout import make_layouts
from ppo_jax.models.build import policy_network, reward_network, value_network
from ppo_jax.training.ppo import make_iteration
from ppo_jax.training.ppo_setup import Setup
from tests.support import tiny

RECOMPUTE = tiny.options(num_epochs=1, num_minibatches=1, old_logprobs="recompute")


def disturbed(rollout):
    """The rollout of a policy whose numbers are others: log-probs off by up to half a nat."""
    noise = jax.random.uniform(jax.random.key(9), rollout.logprobs.shape, minval=-0.5, maxval=0.5)
    return rollout.replace(logprobs=jnp.where(rollout.response_mask, rollout.logprobs + noise, 0))


@pytest.mark.parametrize("kind", ["whole", "trunk"])
def test_recomputed_log_probs_forget_those_of_the_sampling(kind):
    run = tiny.Run(kind, RECOMPUTE, temperature=0.7)
    rollout = run.rollout()
    scores = run.scores(rollout)
    expected, expected_metrics = tiny.Run(kind, temperature=0.7).experience(rollout, scores)
    got, metrics = run.experience(disturbed(rollout), scores)
    tiny.leaves_close(got, expected, atol=5e-5)
    tiny.leaves_close({k: metrics[k] for k in expected_metrics}, expected_metrics, atol=1e-5)
    _, updates = run.update(got)
    np.testing.assert_allclose(updates["policy/ratio_max"], 1.0, atol=1e-5)
    assert not np.asarray(got.logprobs)[~np.asarray(got.response_mask)].any()


@pytest.mark.parametrize("limits", [(0.0, 2.0), (0.9, 1.2), (1.0, 1.0)])
def test_advantages_are_times_the_weights_within_their_limits(limits):
    low, high = limits
    run = tiny.Run("whole", RECOMPUTE, tis_clip_low=low, tis_clip_high=high)
    rollout = run.rollout()
    scores, other = run.scores(rollout), disturbed(rollout)
    mask = np.asarray(rollout.response_mask)
    plain, _ = tiny.Run("whole").experience(rollout, scores)
    got, metrics = run.experience(other, scores)
    difference = np.asarray(rollout.logprobs, np.float64) - np.asarray(other.logprobs)
    weights = np.clip(np.exp(difference), low, high)
    np.testing.assert_allclose(got.advantages, plain.advantages * weights, atol=5e-5)
    size = np.abs(difference)[mask]
    np.testing.assert_allclose(metrics["policy/rollout_logprob_error"], size.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["policy/rollout_logprob_error_max"], size.max(), rtol=1e-4)
    np.testing.assert_allclose(metrics["policy/importance_weight"], weights[mask].mean(), rtol=1e-4)


@pytest.mark.parametrize("importance", ["token", "sequence", "sequence_mean", "icepop"])
def test_the_weights_are_of_tokens_or_of_responses_and_truncated_or_dropped(importance):
    low, high = 0.7, 1.3
    chosen = tiny.options(old_logprobs="recompute", importance=importance)
    run = tiny.Run("whole", chosen, tis_clip_low=low, tis_clip_high=high)
    rollout = run.rollout()
    scores, other = run.scores(rollout), disturbed(rollout)
    plain, _ = tiny.Run("whole").experience(rollout, scores)
    got, metrics = run.experience(other, scores)
    mask = np.asarray(rollout.response_mask)
    expected = np.asarray(plain.advantages, np.float64)
    kept = np.ones(mask.shape)
    for i, t in np.argwhere(mask):
        difference = (np.asarray(rollout.logprobs) - np.asarray(other.logprobs))[i, mask[i]]
        log_weight = {
            "token": difference[t],
            "icepop": difference[t],
            "sequence": difference.sum(),
            "sequence_mean": difference.mean(),
        }[importance]
        inside = low <= np.exp(log_weight) <= high
        kept[i, t] = np.exp(log_weight) if inside else min(max(np.exp(log_weight), low), high)
        if importance == "icepop" and not inside:
            kept[i, t] = 0.0
    np.testing.assert_allclose(got.advantages, expected * kept, atol=5e-5)
    np.testing.assert_allclose(metrics["policy/importance_weight"], kept[mask].mean(), rtol=1e-4)
    assert (kept[mask] == 0).any() == (importance == "icepop")


@pytest.mark.parametrize("parts", [{}, {"num_micro_batches": 2, "packing": True}])
def test_decoupled_ppo_weighs_by_the_old_policy_over_the_one_that_sampled(parts):
    """Its loss is linear in the advantages: weights of tokens from 0 to the limit do the same."""
    how = dict(old_logprobs="recompute", **parts)
    run = tiny.Run(
        "whole", tiny.options(loss=decoupled_policy_loss, **how), behavior_weight_limit=1.2
    )
    other = tiny.Run("whole", tiny.options(**how), tis_clip_low=0.0, tis_clip_high=1.2)
    rollout = run.rollout()
    scores, sampled = run.scores(rollout), disturbed(rollout)
    experience, _ = run.experience(sampled, scores)
    np.testing.assert_array_equal(experience.behavior_logprobs, sampled.logprobs)
    np.testing.assert_allclose(experience.logprobs, rollout.logprobs, atol=5e-5)
    weighted, _ = other.experience(sampled, scores)
    assert weighted.behavior_logprobs is None
    (state, metrics), (expected, _) = run.update(experience), other.update(weighted)
    tiny.leaves_close(state.policy_params, expected.policy_params, atol=2e-5)
    mask = np.asarray(rollout.response_mask)
    ratio = np.exp(np.asarray(rollout.logprobs) - np.asarray(sampled.logprobs))[mask]
    mean = metrics["policy/behavior_weight"][:2].mean()  # of the first pass; halves of like sizes
    np.testing.assert_allclose(mean, np.minimum(ratio, 1.2).mean(), rtol=0.02)
    unweighted, _ = tiny.Run("whole", tiny.options(**how)).update(experience)
    assert tiny.leaves_differ(state.policy_params, unweighted.policy_params)


def test_decoupled_ppo_without_two_policies_is_refused():
    with pytest.raises(ValueError, match='decoupled_policy_loss needs old_logprobs="recompute"'):
        tiny.options(loss=decoupled_policy_loss)


def test_in_bfloat16_the_two_differ_and_recomputed_ones_begin_at_a_ratio_of_1():
    config = tiny.model_config(dtype="bfloat16")
    # A rollout that rounds otherwise than the update, wherever the compiler puts its roundings.
    sampler = Sampler(policy_network(tiny.model_config()), None, reshard=lambda params: params)
    networks = PPONetworks(
        policy_network(config), value_network(config), reward_network(config), sampler=sampler
    )
    largest = {}
    for choice in ("rollout", "recompute"):
        options = tiny.options(num_epochs=1, num_minibatches=1, old_logprobs=choice)
        run = tiny.Run("whole", options)
        run.parts["networks"] = networks
        experience, metrics = run.experience(run.rollout())
        largest[choice] = abs(run.update(experience)[1]["policy/ratio_max"][0] - 1)
    assert 1e-4 < metrics["policy/rollout_logprob_error"] < 0.1
    assert largest["recompute"] < 1e-5 < 1e-3 < largest["rollout"]


@pytest.mark.parametrize("choice", ["old_logprobs", "kl_control"])
def test_an_unknown_choice_is_refused(choice):
    with pytest.raises(ValueError, match=f"unknown {choice} 'sampled'; choose from"):
        tiny.options(**{choice: "sampled"})


def test_a_run_recomputes_with_the_rounding_of_its_sampling_and_its_update():
    """XLA may keep more bits than bfloat16 has, here and there; programs of a run that recompute
    must not, or the ratio of the first update is not 1."""
    config = tiny.model_config(dtype="bfloat16")
    networks = PPONetworks(policy_network(config), value_network(config), reward_network(config))
    layout = make_layouts(MeshSettings())[0]
    run = tiny.Run("whole", RECOMPUTE)
    numbers = layout.replicate(run.numbers)
    setup = Setup(
        networks=networks, options=RECOMPUTE, hyperparameters=numbers, frozen=run.setup.frozen
    )
    state = jax.device_put(run.state, layout.replicated)
    iterate = make_iteration(setup, state, None, layout)
    prompts, key = jax.device_put((tiny.prompts(), jax.random.key(0)), layout.replicated)
    _, metrics = iterate(state, None, prompts, key)
    assert metrics["policy/ratio_max"] == 1.0
    assert metrics["policy/rollout_logprob_error_max"] < 1e-5
