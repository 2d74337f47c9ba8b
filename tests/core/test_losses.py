import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.core.losses import next_token_loss, ppo_loss, preference_loss
from ppo_jax.core.policy_losses import clipped_policy_loss
from ppo_jax.core.value_losses import clipped_value_loss

MASK = jnp.ones((1, 1), bool)


def random_inputs(seed, num=3, scale=1.0):
    rng = np.random.default_rng(seed)
    arrays = scale * rng.normal(size=(num, 6, 5))
    return (*arrays.astype(np.float32), rng.random((6, 5)) < 0.6)


def scalar(x):
    return jnp.full((1, 1), x, jnp.float32)


def test_constants_of_the_losses_get_no_gradient():
    logprobs, old, other, mask = map(jnp.asarray, random_inputs(4))
    policy = jax.grad(lambda old, a: clipped_policy_loss(logprobs, old, a, mask)[0], (0, 1))
    value = jax.grad(lambda old, r: clipped_value_loss(logprobs, old, r, mask)[0], (0, 1))
    for grad in (*policy(old, other), *value(old, other)):
        assert (grad == 0.0).all()


def test_metrics_carry_no_gradient():
    inputs = list(map(jnp.asarray, random_inputs(5)))

    def sum_of_metrics(loss, x, *rest):
        return sum(loss(x, *rest)[1].values())

    scores = [inputs[0][0], inputs[1][0]]
    cases = [
        (clipped_policy_loss, inputs),
        (clipped_value_loss, inputs),
        (next_token_loss, [inputs[0], inputs[-1]]),
        (preference_loss, scores),
    ]
    for loss, arrays in cases:
        grad = jax.grad(sum_of_metrics, argnums=1)(loss, *arrays)
        assert (grad == 0.0).all(), loss.__name__


def ppo_inputs(seed):
    logprobs, values, entropies, old_logprobs, old_values, advantages, returns, mask = map(
        jnp.asarray, random_inputs(seed, num=7)
    )
    constants = dict(
        old_logprobs=old_logprobs, old_values=old_values, advantages=advantages, returns=returns
    )
    return (logprobs, values, entropies, mask), constants


def test_the_ppo_loss_is_the_weighted_sum_of_its_parts():
    (logprobs, values, entropies, mask), c = ppo_inputs(6)
    loss, metrics = ppo_loss(
        logprobs,
        values,
        entropies,
        mask,
        **c,
        clip_range=0.1,
        clip_range_high=0.3,
        value_clip_range=0.4,
        vf_coef=0.5,
        entropy_coef=0.25,
    )
    policy, policy_metrics = clipped_policy_loss(
        logprobs, c["old_logprobs"], c["advantages"], mask, clip_range=0.1, clip_range_high=0.3
    )
    value, value_metrics = clipped_value_loss(
        values, c["old_values"], c["returns"], mask, value_clip_range=0.4
    )
    mean_entropy = np.asarray(entropies)[np.asarray(mask)].mean()
    np.testing.assert_allclose(loss, policy + 0.5 * value - 0.25 * mean_entropy, rtol=1e-6)
    np.testing.assert_allclose(metrics.pop("ppo/loss"), loss)
    np.testing.assert_allclose(metrics.pop("policy/entropy"), mean_entropy, rtol=1e-6)
    assert metrics == policy_metrics | value_metrics


def test_weights_count_for_policy_and_entropy_and_hold_nothing_in_padding():
    (logprobs, values, entropies, mask), c = ppo_inputs(8)
    mask = mask & (jnp.arange(mask.shape[1]) < mask.shape[1] - 1)[None]
    weights = jnp.where(mask, 1.5, jnp.nan)

    def loss(logprobs, entropies, **how):
        return ppo_loss(logprobs, values, entropies, mask, **c, entropy_coef=0.25, **how)[0]

    def both(*arrays, **how):
        return jax.value_and_grad(loss, argnums=(0, 1))(*arrays, **how)

    entropies = jnp.where(mask, entropies, jnp.nan)
    found, gradients = both(logprobs, entropies, weights=weights)
    plain, expected = both(logprobs, jnp.where(mask, entropies, 0.0))
    value_loss = 0.1 * clipped_value_loss(values, c["old_values"], c["returns"], mask)[0]
    np.testing.assert_allclose(found - value_loss, 1.5 * (plain - value_loss), rtol=1e-5)
    for got, one in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(got, 1.5 * one, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("weight", [None, 1.5])
def test_disputed_tokens_have_no_entropy_bonus_and_count_in_its_mean(weight):
    (logprobs, values, entropies, mask), c = ppo_inputs(9)
    disputed = np.random.default_rng(0).uniform(size=mask.shape) < 0.4
    weights = None if weight is None else jnp.full(mask.shape, weight)

    def loss(entropies, **how):
        own = dict(weights=weights, **c, **how)
        return ppo_loss(logprobs, values, entropies, mask, **own)

    differentiate = jax.value_and_grad(loss, has_aux=True)
    numbers = dict(entropy_coef=0.25, disputed_mask=jnp.asarray(disputed))
    (found, metrics), gradient = differentiate(entropies, **numbers)
    (plain, _), _ = differentiate(entropies)
    kept = np.asarray(mask) & ~disputed
    share = np.where(kept, 0.25 * (weight or 1.0), 0.0) / mask.sum()
    np.testing.assert_allclose(found, plain - (share * entropies).sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient, -share, rtol=1e-5, atol=1e-8)
    mean_entropy = np.asarray(entropies)[np.asarray(mask)].mean()
    np.testing.assert_allclose(metrics["policy/entropy"], mean_entropy, rtol=1e-6)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_micro_batches_add_up_to_the_minibatch(parts):
    arrays, constants = ppo_inputs(7)
    count = arrays[-1].sum()

    def grads(rows):
        def loss(logprobs, values, entropies):
            return ppo_loss(
                logprobs,
                values,
                entropies,
                arrays[-1][rows],
                **{name: x[rows] for name, x in constants.items()},
                entropy_coef=0.1,
                normalizer=count,
            )

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*(x[rows] for x in arrays[:-1]))

    whole, whole_metrics = grads(slice(None))
    pieces = [grads(slice(i, i + 6 // parts)) for i in range(0, 6, 6 // parts)]
    joined = jax.tree.map(lambda *xs: jnp.concatenate(xs), *(grad for grad, _ in pieces))
    for x, y in zip(joined, whole, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
    for name, expected in whole_metrics.items():
        join = max if name == "policy/ratio_max" else sum
        got = join(metrics[name] for _, metrics in pieces)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7, err_msg=name)


def test_the_losses_serve_a_step_of_ordinary_reinforcement_learning():
    # One [T] column of transitions, no text: any shape goes that the mask has.
    x, mask = jnp.array([0.5, -0.5]), jnp.array([True, True])
    assert jnp.isfinite(clipped_policy_loss(x, x, x, mask)[0])
    assert jnp.isfinite(clipped_value_loss(x, x, x, mask)[0])


def test_next_token_loss_by_hand():
    logprobs = jnp.log(jnp.array([[0.5, 0.25, 0.1]]))
    loss, metrics = next_token_loss(logprobs, jnp.array([[True, True, False]]))
    np.testing.assert_allclose(loss, 1.5 * np.log(2.0), rtol=1e-6)
    assert metrics == {"sft/loss": loss}


@pytest.mark.parametrize("margin", [0.0, 0.5, [0.0, 0.5, 2.0]])
def test_the_preference_loss_equals_the_loop(margin):
    chosen, rejected = [1.0, 0.0, -2.0], [0.5, 0.0, 1.0]
    margins = np.broadcast_to(margin, 3)
    expected = [
        np.log1p(np.exp(-(c - r - m))) for c, r, m in zip(chosen, rejected, margins, strict=True)
    ]
    loss, metrics = preference_loss(
        jnp.array(chosen), jnp.array(rejected), margin=jnp.asarray(margin)
    )
    np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-6)
    np.testing.assert_allclose(metrics["reward_model/loss"], np.mean(expected), rtol=1e-6)
    np.testing.assert_allclose(metrics["reward_model/accuracy"], 0.5)  # right, tie, wrong
    np.testing.assert_allclose(metrics["reward_model/margin"], (0.5 + 0.0 - 3.0) / 3, rtol=1e-6)


def test_the_preference_loss_depends_on_the_difference_alone_and_is_stable():
    chosen, rejected = jnp.array([1e4]), jnp.array([-1e4])
    assert preference_loss(chosen, rejected)[0] == 0.0
    loss, grad = jax.value_and_grad(lambda c: preference_loss(c, chosen)[0])(rejected)
    assert loss == 2e4 and grad == -1.0
