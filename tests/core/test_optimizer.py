import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.core.optimizer import apply_gradients, init_optimizer, schedule
from ppo_jax.core.types import Optimizer

PARAMS = {"policy": {"w": jnp.array([1.0, -2.0])}, "value": {"w": jnp.array([3.0])}}
GRADIENTS = [
    {"policy": {"w": jnp.array([0.5, -1e-5])}, "value": {"w": jnp.array([2.0])}},
    {"policy": {"w": jnp.array([-0.25, 2e-5])}, "value": {"w": jnp.array([1.0])}},
]


def factors(steps, **settings):
    settings = Optimizer(learning_rate=1.0, **settings)
    return [float(schedule(settings, step)) for step in steps]


def test_constant_rises_from_a_tenth_over_the_warm_up():
    got = factors([0, 1, 5, 9, 10, 11, 500], schedule="constant", warmup_steps=10, total_steps=20)
    np.testing.assert_allclose(got, [0.1, 0.19, 0.55, 0.91, 1.0, 1.0, 1.0], rtol=1e-6)


def test_linear_falls_to_its_final_fraction_and_stays():
    got = factors([0, 5, 10, 15], schedule="linear", total_steps=10, final_fraction=0.2)
    np.testing.assert_allclose(got, [1.0, 0.6, 0.2, 0.2], rtol=1e-6)
    got = factors([0, 2, 4, 6], schedule="linear", warmup_steps=2, total_steps=6)
    np.testing.assert_allclose(got, [0.1, 1.0, 0.5, 0.0], atol=1e-7)


def test_cosine_falls_along_half_a_wave():
    got = factors([0, 2.5, 5, 10, 12], schedule="cosine", total_steps=10, final_fraction=0.1)
    # 0.1 + 0.9 (1 + cos(pi t / 10)) / 2; at a quarter of the way (1 + sqrt(1/2)) / 2.
    quarter = 0.1 + 0.9 * (1 + np.sqrt(0.5)) / 2
    np.testing.assert_allclose(got, [1.0, quarter, 0.55, 0.1, 0.1], rtol=1e-6)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="unknown schedule 'exponential'; choose from .*'cosine'"):
        schedule(Optimizer(learning_rate=1.0, schedule="exponential"), 0)


def take_steps(settings, rates, gradients=GRADIENTS):
    params, opt_state, norms = PARAMS, init_optimizer(settings, PARAMS), []
    for gradient in gradients:
        params, opt_state, norm = apply_gradients(settings, gradient, opt_state, params, rates)
        norms.append(float(norm))
    return jax.tree.map(np.asarray, params), norms


def adam_by_hand(w, gradients, *, rate, b1, b2, eps, weight_decay=0.0):
    w, m, v = float(w), 0.0, 0.0
    for t, g in enumerate(map(float, gradients), start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        direction = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        w -= rate * (direction + weight_decay * w)
    return w


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_two_steps_of_adam_equal_the_formula(weight_decay):
    # Eps 1e-5 is as large as the second gradient: it halves its step.
    numbers = dict(b1=0.8, b2=0.95, eps=1e-5, weight_decay=weight_decay)
    settings = Optimizer(learning_rate=1.0, max_grad_norm=jnp.inf, **numbers)
    params, _ = take_steps(settings, {"policy": 0.1, "value": 0.01})
    for part, index, rate in [("policy", 0, 0.1), ("policy", 1, 0.1), ("value", 0, 0.01)]:
        gradients = [g[part]["w"][index] for g in GRADIENTS]
        expected = adam_by_hand(PARAMS[part]["w"][index], gradients, rate=rate, **numbers)
        np.testing.assert_allclose(params[part]["w"][index], expected, rtol=1e-5)


def test_one_rate_serves_all_parts():
    settings = Optimizer(learning_rate=1.0)
    one, _ = take_steps(settings, 0.1)
    each, _ = take_steps(settings, {"policy": 0.1, "value": 0.1})
    chex.assert_trees_all_equal(one, each)
    still, _ = take_steps(settings, {"policy": 0.1, "value": 0.0})
    np.testing.assert_array_equal(still["value"]["w"], PARAMS["value"]["w"])
    np.testing.assert_array_equal(still["policy"]["w"], one["policy"]["w"])


def test_gradients_are_limited_by_the_norm_of_all_parts_together():
    gradients = [{"policy": {"w": jnp.array([3.0, 0.0])}, "value": {"w": jnp.array([4.0])}}]
    # Norm 5, limit 1: a fifth of each. A large eps makes Adam's step show the size: -g / eps.
    settings = Optimizer(learning_rate=1.0, max_grad_norm=1.0, eps=1e6)
    params, norms = take_steps(settings, 1e6, gradients)
    assert norms == [5.0]  # before the limit
    np.testing.assert_allclose(params["policy"]["w"], [1.0 - 0.6, -2.0], rtol=1e-5)
    np.testing.assert_allclose(params["value"]["w"], [3.0 - 0.8], rtol=1e-5)
    unlimited, _ = take_steps(settings.replace(max_grad_norm=10.0), 1e6, gradients)
    np.testing.assert_allclose(unlimited["value"]["w"], [3.0 - 4.0], rtol=1e-4)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_numbers_may_be_traced_and_never_recompile(kind):
    chex.clear_trace_counter()  # it goes by the name of the function

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(settings, count, params):
        rate = settings.learning_rate * schedule(settings, count)
        opt_state = init_optimizer(settings, params)
        return apply_gradients(settings, GRADIENTS[0], opt_state, params, rate)[0]

    numbers = dict(weight_decay=0.1, warmup_steps=3.0, total_steps=9.0, final_fraction=0.2)
    first = Optimizer(learning_rate=0.1, schedule=kind, **numbers)
    for i, name in enumerate(f for f in first.__dataclass_fields__ if f != "schedule"):
        changed = first.replace(**{name: 0.9 * getattr(first, name)})
        got = step(changed, jnp.int32(i), PARAMS)
        rate = changed.learning_rate * schedule(changed, i)
        opt_state = init_optimizer(changed, PARAMS)
        expected = apply_gradients(changed, GRADIENTS[0], opt_state, PARAMS, rate)[0]
        chex.assert_trees_all_close(got, expected, rtol=1e-5)
