"""Losses of the policy against a loop over tokens in float64, and numbers of a peer's tests."""

import jax
import jax.numpy as jnp
import numpy as np


def random_tokens(seed, shape=(6, 5)):
    """(logprobs, old_logprobs, advantages, weights) float32 and a mask with holes."""
    rng = np.random.default_rng(seed)
    arrays = 0.5 * rng.normal(size=(4, *shape)) - np.array([2.0, 2.0, 0.0, -1.0])[:, None, None]
    return (*map(jnp.asarray, arrays.astype(np.float32)), jnp.asarray(rng.random(shape) < 0.7))


def value_and_gradient(loss, logprobs, *arrays, **how):
    """(loss, metrics, gradient of logprobs)"""

    def of(logprobs):
        return loss(logprobs, *arrays, **how)

    (value, metrics), gradient = jax.value_and_grad(of, has_aux=True)(logprobs)
    return value, metrics, gradient


def assert_equals_the_loop(loss, term, is_clipped, **numbers):
    """Loss, metrics and gradient; with and without weights and a normalizer.

    `term(logp, now, old, a)` of one token: `now` is logp where it counts as a constant. The
    gradient is a finite difference. `is_clipped(ratio, a, now, old)`.
    """
    new, old, advantages, weights, mask = random_tokens(0)
    places = list(zip(*np.nonzero(mask), strict=True))
    for given, normalizer in ((None, None), (weights, 40.0)):
        how = dict(weights=given, normalizer=normalizer) | numbers
        value, metrics, gradient = value_and_gradient(loss, new, old, advantages, mask, **how)
        count = normalizer or len(places)
        losses, clipped, log_ratios, expected = [], [], [], np.zeros(mask.shape)
        for b, t in places:
            x, o, a = (float(array[b, t]) for array in (new, old, advantages))
            w = 1.0 if given is None else float(given[b, t])
            losses.append(w * term(x, x, o, a))
            expected[b, t] = w * (term(x + 1e-6, x, o, a) - term(x - 1e-6, x, o, a)) / 2e-6 / count
            clipped.append(is_clipped(np.exp(x - o), a, x, o))
            log_ratios.append(x - o)
        np.testing.assert_allclose(value, sum(losses) / count, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)
        of_all = {
            "policy/loss": sum(losses) / count,
            "policy/clip_fraction": sum(clipped) / count,
            "policy/approx_kl": 0.5 * np.square(log_ratios).sum() / count,
            "policy/ratio_mean": np.exp(log_ratios).sum() / count,
            "policy/ratio_max": np.exp(log_ratios).max(),
        }
        for name, number in of_all.items():
            np.testing.assert_allclose(metrics[name], number, rtol=1e-4, atol=1e-6, err_msg=name)


class NeMo:
    """Numbers of NeMo-RL, tests/unit/algorithms/data/clipped_pg_loss_goldens.json: its inputs,
    where `before` is prev_logprobs and `sampled` generation_logprobs; clip 0.2."""

    new = jnp.array([[-1.6, -0.8, -1.1], [-0.7, -1.4, 0.0]])
    before = jnp.array([[-1.0, -1.1, -0.8], [-0.9, -1.0, 0.0]])
    before_dual = jnp.array([[-1.0, -3.0, -0.8], [-0.9, -1.0, 0.0]])
    sampled = jnp.array([[-1.2, -1.5, -0.7], [-1.4, -0.7, 0.0]])
    advantages = jnp.array([[1.2, -0.7, 0.4], [-1.1, 0.6, 1.5]])
    mask = jnp.array([[True, True, True], [True, True, False]])


def assert_golden(got, value, gradient):
    np.testing.assert_allclose(got[0], value, rtol=2e-6)
    np.testing.assert_allclose(got[2], gradient, rtol=2e-6, atol=1e-7)
