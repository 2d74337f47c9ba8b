import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.core.covariance import (
    adaptive_entropy_coef,
    clip_cov_weights,
    kl_cov_mask,
    kl_cov_policy_loss,
    token_covariances,
)
from tests.support.losses import random_tokens, value_and_gradient

NEW, OLD, ADVANTAGES, WEIGHTS, MASK = random_tokens(8, (8, 6))


def by_hand():
    new, advantages = np.float64(NEW), np.float64(ADVANTAGES)
    mask = np.asarray(MASK)
    product = (new - new[mask].mean()) * (advantages - advantages[mask].mean())
    return np.where(mask, product, -np.inf)


def test_covariances_equal_those_of_numpy():
    got = token_covariances(NEW, ADVANTAGES, MASK)
    np.testing.assert_allclose(got, np.where(MASK, by_hand(), 0.0), rtol=1e-4, atol=1e-6)
    expected = np.cov(np.float64(NEW)[MASK], np.float64(ADVANTAGES)[MASK], ddof=0)[0, 1]
    np.testing.assert_allclose(got.sum() / MASK.sum(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 1.0])
def test_clip_cov_leaves_out_so_many_of_the_candidates(fraction):
    low, high = 0.02, 0.1
    candidates = (by_hand() > low) & (by_hand() < high)
    num = min(max(1, int(fraction * MASK.sum())), candidates.sum())
    assert 3 < candidates.sum() and (by_hand() >= high).any() and (by_hand()[MASK] <= low).any()
    seen = np.zeros(MASK.shape, bool)
    how = dict(covariance_fraction=fraction, low=low, high=high)
    draw = jax.jit(lambda key: clip_cov_weights(key, NEW, ADVANTAGES, MASK, **how))
    for seed in range(40):
        weights = np.asarray(draw(jax.random.key(seed)))
        assert set(np.unique(weights)) <= {0.0, 1.0} and not weights[~MASK].any()
        left_out = np.asarray(MASK) & (weights == 0)
        assert left_out.sum() == num and not (left_out & ~candidates).any()
        seen |= left_out
    assert (seen == candidates).all()  # each has its chance


@pytest.mark.parametrize("fraction", [0.0, 0.2, 1.0])
def test_kl_cov_adds_a_penalty_to_the_top_tokens(fraction):
    order = np.argsort(-by_hand().ravel())[: max(1, int(fraction * MASK.sum()))]
    chosen = np.isin(np.arange(MASK.size), order).reshape(MASK.shape)
    d, a, w = (np.float64(x) for x in (NEW - OLD, ADVANTAGES, WEIGHTS))
    terms = w * (-a * np.exp(d) + 0.5 * np.abs(d) * chosen)
    slopes = w * (-a * np.exp(d) + 0.5 * np.sign(d) * chosen)
    how = dict(penalty_coef=0.5, covariance_fraction=fraction, weights=WEIGHTS)
    given = (NEW, OLD, ADVANTAGES, MASK)
    value, metrics, grad = value_and_gradient(kl_cov_policy_loss, *given, **how)
    np.testing.assert_allclose(value, terms[MASK].mean(), rtol=1e-4)
    np.testing.assert_allclose(grad, np.where(MASK, slopes, 0) / MASK.sum(), rtol=1e-4, atol=1e-7)
    mask = kl_cov_mask(NEW, ADVANTAGES, MASK, covariance_fraction=fraction)
    np.testing.assert_array_equal(mask, chosen)
    parts = [slice(0, 3), slice(3, 8)]  # as micro-batches, chosen of the whole
    total = sum(
        kl_cov_policy_loss(
            *(x[part] for x in given),
            penalty_coef=0.5,
            penalty_mask=mask[part],
            weights=WEIGHTS[part],
            normalizer=MASK.sum(),
        )[0]
        for part in parts
    )
    np.testing.assert_allclose(total, value, rtol=1e-5)
    share = len(order) / MASK.sum()
    np.testing.assert_allclose(metrics["policy/penalised_fraction"], share, rtol=1e-6)


def test_nothing_is_chosen_where_nothing_counts():
    weights = clip_cov_weights(jax.random.key(0), NEW, ADVANTAGES, MASK & False)
    assert not weights.any()
    how = dict(penalty_coef=0.5, covariance_fraction=0.1)
    value, _, grad = value_and_gradient(
        kl_cov_policy_loss, NEW, OLD, ADVANTAGES, MASK & False, **how
    )
    assert value == 0.0 and not jnp.any(grad)


def test_the_quota_is_that_of_verl():
    """verl, tests/trainer/ppo/test_kl_cov_mask_on_cpu.py: one of 8192, and one of each part."""
    advantages = jnp.linspace(-2, 3, 8192).reshape(64, 128)
    logprobs = 0.1 * jnp.square(advantages) - 4
    mask = jnp.ones(advantages.shape, bool)
    assert kl_cov_mask(logprobs, advantages, mask).sum() == 1
    parts = [
        kl_cov_mask(x, a, m)
        for x, a, m in zip(*(jnp.split(x, 8) for x in (logprobs, advantages, mask)), strict=True)
    ]
    assert sum(part.sum() for part in parts) == 8


def test_the_coefficient_follows_the_entropy_and_stays_above_0():
    coef = jnp.float32(0.0)
    path = []
    for entropy in (1.0, 1.0, 3.0, 2.0, 3.0, 3.0):
        coef = adaptive_entropy_coef(coef, entropy, target=2.0, step=0.25)
        path.append(coef.item())
    assert path == [0.25, 0.5, 0.25, 0.25, 0.0, 0.0]
