"""Tokens that a loss treats apart are those of a whole minibatch, however it is split."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.algorithms.token_choice import choose_tokens, make_choice, split_keys
from ppo_jax.algorithms.update import experience_loss, trained_params
from ppo_jax.core.covariance import clip_cov_policy_loss, kl_cov_policy_loss
from ppo_jax.core.optimizer import apply_gradients
from ppo_jax.core.policy_losses import clipped_policy_loss
from tests.support import tiny

KL_COV = dict(covariance_fraction=0.2, penalty_coef=0.5)
CLIP_COV = dict(covariance_fraction=1.0, covariance_low=0.05, covariance_high=1.5)  # all of these
METHODS = {"kl_cov": (kl_cov_policy_loss, KL_COV), "clip_cov": (clip_cov_policy_loss, CLIP_COV)}


def by_hand(experience, numbers):
    """The tokens of each choice, from numpy."""
    e = jax.device_get(experience)
    mask = np.asarray(e.response_mask)
    logprobs, advantages = np.float64(e.logprobs), np.float64(e.advantages)
    products = (logprobs - logprobs[mask].mean()) * (advantages - advantages[mask].mean())
    products = np.where(mask, products, -np.inf)
    count = max(1, int(np.floor(numbers.covariance_fraction * mask.sum())))
    top = np.sort(products.ravel())[::-1][count - 1]
    inside = (products > numbers.covariance_low) & (products < numbers.covariance_high)
    return {"penalty_mask": products >= top, "dropped_mask": mask & inside}


def run_of(name, **options):
    loss, numbers = METHODS[name]
    return tiny.Run("whole", tiny.options(loss=loss, **options), clip_range=0.05, **numbers)


def disturbed(run):
    """Experience of a policy a little off: at a log-ratio of 0 the penalty has the sign of its
    rounding."""
    experience, _ = run.experience(run.rollout())
    noise = jax.random.uniform(jax.random.key(9), experience.logprobs.shape, minval=0.01)
    shifted = experience.logprobs + 0.1 * noise
    return experience.replace(logprobs=jnp.where(experience.response_mask, shifted, 0.0))


@pytest.mark.parametrize("name", METHODS)
def test_an_update_is_that_of_steps_with_the_tokens_chosen_by_hand(name):
    run = run_of(name, num_epochs=3, num_minibatches=1)
    experience = disturbed(run)
    field = {"kl_cov": "penalty_mask", "clip_cov": "dropped_mask"}[name]
    chosen = by_hand(experience, run.numbers)[field]
    assert 2 < chosen.sum() < experience.response_mask.sum() - 2
    given = dataclasses.replace(experience, **{field: jnp.asarray(chosen)})
    params = trained_params(run.state.policy_params, run.state.value_params)
    opt_state, numbers, losses = run.state.opt_state, run.numbers, []
    rates = {"policy": numbers.optimizer.learning_rate, "value": numbers.value_learning_rate}
    for _ in range(3):
        gradient = jax.grad(experience_loss, has_aux=True)
        grads, metrics = gradient(params, given, numbers, **run.parts)
        params, opt_state, _ = apply_gradients(numbers.optimizer, grads, opt_state, params, rates)
        losses.append(metrics["policy/loss"])
    state, got = run.update(experience)
    np.testing.assert_allclose(got["policy/loss"], np.stack(losses), atol=1e-5)
    tiny.leaves_close(state.policy_params, params["policy"], atol=3e-5)
    plain = tiny.Run("whole", tiny.options(num_epochs=3, num_minibatches=1), clip_range=0.05)
    assert tiny.leaves_differ(plain.update(experience)[0].policy_params, state.policy_params)
    if name == "clip_cov":
        share = chosen.sum() / experience.response_mask.sum()
        np.testing.assert_allclose(got["policy/dropped_fraction"], share, rtol=1e-5)


@pytest.mark.parametrize("parts", [{}, {"packing": True}], ids=["padded", "packed"])
@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_and_packing_add_up_to_the_minibatch(name, parts):
    whole = run_of(name, num_epochs=2, num_minibatches=2)
    experience = disturbed(whole)
    split = run_of(name, num_epochs=2, num_minibatches=2, num_micro_batches=2, **parts)
    (expected, first), (got, second) = whole.update(experience), split.update(experience)
    tiny.leaves_close(got.policy_params, expected.policy_params, atol=3e-5)
    for metric in ("policy/loss", "policy/clip_fraction"):
        np.testing.assert_allclose(second[metric], first[metric], atol=1e-5)


def test_clip_cov_draws_other_tokens_at_each_step():
    loss, numbers = clip_cov_policy_loss, CLIP_COV | dict(covariance_fraction=1e-3)
    run = tiny.Run("whole", tiny.options(loss=loss), **numbers)
    experience, _ = run.experience(run.rollout())
    keys = split_keys(jax.random.split(jax.random.key(1), 3), 8)[1]
    assert keys.shape == (24,)
    drawn = set()
    for key in keys:
        chosen = choose_tokens(experience, key, loss=loss, hyperparameters=run.numbers)
        assert chosen.dropped_mask.sum() == 1 and chosen.penalty_mask is None
        drawn.add(int(chosen.dropped_mask.argmax()))
    candidates = np.asarray(by_hand(experience, run.numbers)["dropped_mask"]).ravel()
    assert len(drawn) > 3 and candidates[list(drawn)].all()


def test_a_loss_without_a_choice_keeps_its_shuffles():
    assert make_choice(clipped_policy_loss, tiny.hyperparameters()) is None
