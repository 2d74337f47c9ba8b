import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.core.kl import (
    ESTIMATORS,
    LOSS_ESTIMATORS,
    REWARD_ESTIMATORS,
    adaptive_kl_coef,
    adaptive_penalty_coef,
    kl_estimate,
    kl_loss,
)


@pytest.mark.parametrize(
    ("estimator", "formula"),
    [
        ("k1", lambda d: d),
        ("k2", lambda d: d * d / 2),
        ("k3", lambda d: np.exp(-d) - 1 + d),
    ],
)
def test_each_estimate_equals_its_formula(estimator, formula):
    rng = np.random.default_rng(0)
    logprobs, ref_logprobs = rng.normal(size=(2, 4, 5)).astype(np.float32)
    got = kl_estimate(jnp.asarray(logprobs), jnp.asarray(ref_logprobs), estimator=estimator)
    d = logprobs.astype(np.float64) - ref_logprobs
    np.testing.assert_allclose(got, formula(d), rtol=1e-5, atol=1e-6)


def test_all_kinds_are_zero_for_equal_policies():
    logprobs = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3)), jnp.float32)
    for estimator in ESTIMATORS:
        assert (kl_estimate(logprobs, logprobs, estimator=estimator) == 0.0).all()


def test_k1_and_k3_are_unbiased_and_k2_is_close_for_close_policies():
    # The expectation over all tokens of a small vocabulary is exact, no sampling needed.
    logits = np.random.default_rng(2).normal(size=6)
    ref_logits = logits + 0.1 * np.random.default_rng(3).normal(size=6)
    logprobs, ref_logprobs = (z - np.log(np.exp(z).sum()) for z in (logits, ref_logits))
    true_kl = (np.exp(logprobs) * (logprobs - ref_logprobs)).sum()

    def expectation(estimator):
        estimates = kl_estimate(
            jnp.asarray(logprobs, jnp.float32),
            jnp.asarray(ref_logprobs, jnp.float32),
            estimator=estimator,
        )
        return (np.exp(logprobs) * np.asarray(estimates, np.float64)).sum()

    np.testing.assert_allclose(expectation("k1"), true_kl, atol=1e-7)
    np.testing.assert_allclose(expectation("k3"), true_kl, atol=1e-7)
    np.testing.assert_allclose(expectation("k2"), true_kl, rtol=0.1)


def test_k3_is_never_negative_and_exact_near_zero():
    size = np.logspace(-12, 1.5, 20_001, dtype=np.float32)
    d = jnp.asarray(np.concatenate([size, -size]))
    k3 = kl_estimate(d, jnp.zeros_like(d), estimator="k3")
    assert (k3 >= 0.0).all()
    # At d = 2^-10 the plain form loses all but the first digit or two: d²/2 = 4.77e-7.
    small = jnp.float32(2.0**-10)
    got = kl_estimate(small, jnp.zeros(()), estimator="k3")
    np.testing.assert_allclose(got, np.expm1(-(2.0**-10)) + 2.0**-10, rtol=1e-3)


def test_the_gradient_of_k3_is_one_minus_the_inverse_ratio():
    grad = jax.grad(lambda logprob: kl_estimate(logprob, jnp.float32(-1.0), estimator="k3"))
    np.testing.assert_allclose(grad(jnp.float32(-0.3)), 1 - np.exp(-0.7), rtol=1e-6)


def test_an_unknown_kind_is_refused_with_the_choices():
    with pytest.raises(
        ValueError, match=r"estimator must be one of \['k1', 'k2', 'k3'\], got 'k4'"
    ):
        kl_estimate(jnp.zeros((1, 1)), jnp.zeros((1, 1)), estimator="k4")


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        # 0.15 (1 + clip(kl / 6 - 1, -0.2, 0.2) 512 / 10000)
        (6.0, 0.15),
        (6.6, 0.15 * (1 + 0.1 * 0.0512)),
        (60.0, 0.15 * (1 + 0.2 * 0.0512)),
        (5.4, 0.15 * (1 - 0.1 * 0.0512)),
        (0.0, 0.15 * (1 - 0.2 * 0.0512)),
    ],
)
def test_the_coefficient_follows_the_closed_form(kl, expected):
    got = adaptive_kl_coef(0.15, kl, target_kl=6.0, horizon=10_000, batch_size=512)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_the_controller_holds_a_kl_that_falls_with_its_coefficient():
    coef = jnp.float32(0.15)
    for _ in range(400):
        coef = adaptive_kl_coef(coef, 1.2 / coef, target_kl=6.0, horizon=10_000, batch_size=512)
    np.testing.assert_allclose(coef, 0.2, rtol=1e-2)  # 1.2 / 0.2 = 6


def ends_at(estimator):
    """Where a policy over four arms ends whose only reward is the penalty, by exact gradients.

    The gradient of E[r] with r held constant is π (r - E r); the reference is uniform.
    """
    ref_logprobs = jnp.log(jnp.full(4, 0.25))

    def step(logits, _):
        logprobs = jax.nn.log_softmax(logits)
        probs = jnp.exp(logprobs)
        rewards = -kl_estimate(logprobs, ref_logprobs, estimator=estimator)
        return logits + probs * (rewards - jnp.sum(probs * rewards)), None

    logits = jnp.array([0.3, 0.1, -0.1, -0.3])
    return jax.nn.softmax(jax.lax.scan(step, logits, length=20_000)[0])


def test_in_a_reward_k1_alone_leads_back_to_the_reference():
    np.testing.assert_allclose(ends_at("k1"), 0.25, atol=1e-3)
    assert REWARD_ESTIMATORS == ("k1",)
    for estimator in ("k2", "k3"):
        assert ends_at(estimator).min() < 0.01, estimator


@pytest.mark.parametrize("horizon", [1.0, 2.0, 12.0])
def test_no_horizon_turns_the_coefficient_negative(horizon):
    coefficient = 0.05
    for kl in (0.0, 20.0, 0.0, 0.0):
        numbers = dict(target_kl=6.0, horizon=horizon, batch_size=64)
        following = adaptive_kl_coef(coefficient, kl, **numbers).item()
        factor = max(0.1, 1 + (0.2 if kl > 6 else -0.2) * 64 / horizon)
        np.testing.assert_allclose(following, coefficient * factor, rtol=1e-5)
        coefficient = following
    assert coefficient > 0


def loss_inputs(seed):
    """logprobs, ref_logprobs, old_logprobs, weights, mask with a hole and an empty row"""
    arrays = np.random.default_rng(seed).normal(size=(4, 3, 5)).astype(np.float32)
    mask = np.arange(5) < np.array([5, 3, 0])[:, None]
    mask[1, 1] = False
    return *arrays, mask


@pytest.mark.parametrize("estimator", LOSS_ESTIMATORS)
@pytest.mark.parametrize("on_policy", [True, False])
def test_a_loss_and_its_gradient_equal_the_loop_over_tokens(estimator, on_policy):
    logprobs, reference, old, weights, mask = loss_inputs(0)
    loss, expected = 0.0, np.zeros(mask.shape)
    for b, t in np.argwhere(mask):
        d = float(logprobs[b, t]) - float(reference[b, t])
        w = weights[b, t] * (1.0 if on_policy else np.exp(float(logprobs[b, t] - old[b, t])))
        loss += w * (d**2 / 2 if estimator == "k2" else np.exp(-d) - 1 + d) / 11
        expected[b, t] = w * d / 11

    def call(logprobs):
        given = dict(estimator=estimator, weights=jnp.asarray(weights), normalizer=11)
        given |= {} if on_policy else dict(old_logprobs=jnp.asarray(old))
        return kl_loss(logprobs, jnp.asarray(reference), jnp.asarray(mask), **given)

    (got, metrics), gradient = jax.value_and_grad(call, has_aux=True)(jnp.asarray(logprobs))
    np.testing.assert_allclose(got, loss, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)
    assert metrics == {"kl/loss": got}


def test_the_gradient_of_k3_is_that_of_the_weighted_formula_through_the_weight():
    logprobs, reference, old, _, mask = map(jnp.asarray, loss_inputs(1))

    def formula(logprobs):
        d = logprobs - reference
        return jnp.sum(jnp.where(mask, jnp.exp(logprobs - old) * (jnp.exp(-d) - 1 + d), 0)) / 7

    def call(logprobs):
        return kl_loss(logprobs, reference, mask, estimator="k3", old_logprobs=old)[0]

    assert mask.sum() == 7
    got, expected = jax.value_and_grad(call)(logprobs), jax.value_and_grad(formula)(logprobs)
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("estimator", LOSS_ESTIMATORS)
def test_the_gradient_of_a_loss_is_right_where_the_policy_all_but_excludes_a_token(estimator):
    # OpenRLHF, tests/test_kl_estimator_gradient.py, test_k3_extreme_finite_log_probs_...: under a
    # reference of 0 the corrected gradient is the log-prob itself.
    d = jnp.array([[-100.0, -90.0, -11.0, -10.0, -3.0, -1.0, -0.1, 0.0]])

    def loss(logprobs):
        return kl_loss(logprobs, 0 * d, d <= 0, estimator=estimator, normalizer=1)[0]

    np.testing.assert_allclose(jax.grad(loss)(d), d, rtol=1e-6)


def test_a_loss_without_the_gradient_of_the_kl_is_refused():
    one = jnp.ones((1, 1))
    with pytest.raises(
        ValueError, match=r"one of \['k2', 'k3'\], got 'k1': its gradient in a loss"
    ):
        kl_loss(one, one, one > 0, estimator="k1")
    with pytest.raises(ValueError, match=r"one of \['k2', 'k3'\], got 'k4'$"):
        kl_loss(one, one, one > 0, estimator="k4")


@pytest.mark.parametrize(
    ("kl", "factor"),
    [(0.0, 0.5), (0.0066, 0.5), (0.0067, 1), (0.01, 1), (0.0149, 1), (0.0151, 2), (9.0, 2)],
)
def test_the_coefficient_of_the_penalty_is_doubled_or_halved(kl, factor):
    assert adaptive_penalty_coef(3.0, kl, target_kl=0.01).item() == 3 * factor
