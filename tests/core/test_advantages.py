import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.core.advantages import gae, length_adaptive_lambda, whiten


def gae_loop(rewards, values, mask, *, gamma, gae_lambda, bootstrap):
    """The definition, as a sum over the future: no recursion, no carry.

    A_t = Σ_l (γλ)^l δ_{t+l}, over the steps that are left when the masked ones are cut out.
    """
    rewards, values, gamma = (np.asarray(x, np.float64) for x in (rewards, values, gamma))
    advantages = np.zeros(mask.shape)
    for b in range(len(mask)):
        steps = np.flatnonzero(mask[b])
        next_values = np.append(values[b, steps[1:]], bootstrap[b])
        deltas = rewards[b, steps] + gamma[b, steps] * next_values - values[b, steps]
        for i, t in enumerate(steps):
            weight = 1.0
            for j in range(i, len(steps)):
                advantages[b, t] += weight * deltas[j]
                weight *= gamma[b, steps[j]] * gae_lambda
    return advantages, np.where(mask, advantages + values, 0.0)


def random_inputs(seed, shape=(6, 7), keep=0.6):
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=(2, *shape)).astype(np.float32)
    return rewards, values, rng.random(shape) < keep


def assert_gae(inputs, *, gamma, gae_lambda, bootstrap):
    rewards, values, mask = inputs
    got = gae(
        *map(jnp.asarray, inputs),
        gamma=gamma,
        gae_lambda=gae_lambda,
        bootstrap_values=bootstrap,
    )
    gamma = np.broadcast_to(gamma, mask.shape)
    bootstrap = np.broadcast_to(bootstrap, mask.shape[:1])
    expected = gae_loop(
        rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda, bootstrap=bootstrap
    )
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
def test_gae_equals_the_textbook_sum(gamma, gae_lambda):
    rewards, values, _ = random_inputs(0)
    lengths = np.array([7, 6, 3, 1, 0, 7])
    mask = np.arange(7)[None] < lengths[:, None]
    assert_gae((rewards, values, mask), gamma=gamma, gae_lambda=gae_lambda, bootstrap=0.0)


def test_gae_with_holes_is_gae_of_the_steps_that_are_left():
    assert_gae(random_inputs(1), gamma=0.9, gae_lambda=0.8, bootstrap=0.0)


def test_gae_takes_a_discount_per_step_and_a_bootstrap_per_row():
    rng = np.random.default_rng(2)
    gamma = rng.random((6, 7)).astype(np.float32)
    bootstrap = rng.normal(size=6).astype(np.float32)
    assert_gae(random_inputs(3), gamma=gamma, gae_lambda=0.8, bootstrap=bootstrap)
    assert_gae(random_inputs(4, keep=1.0), gamma=gamma, gae_lambda=0.8, bootstrap=2.0)


def test_a_discount_of_zero_parts_two_episodes_in_one_row():
    rewards, values, _ = random_inputs(5, shape=(1, 6))
    mask = np.ones((1, 6), bool)
    discounts = np.full((1, 6), 0.9, np.float32)
    discounts[0, 2] = 0.0
    joined, _ = gae(*map(jnp.asarray, (rewards, values, mask)), gamma=jnp.asarray(discounts))
    first, _ = gae(*(jnp.asarray(x[:, :3]) for x in (rewards, values, mask)), gamma=0.9)
    second, _ = gae(*(jnp.asarray(x[:, 3:]) for x in (rewards, values, mask)), gamma=0.9)
    np.testing.assert_allclose(joined, jnp.concatenate([first, second], axis=1), rtol=1e-6)


def test_gae_by_hand():
    # Last token: δ = 1 - 0.4 = 0.6.  First: δ = 0 + 0.9 x 0.4 - 0.2 = 0.16, and
    # A = 0.16 + 0.9 x 0.5 x 0.6 = 0.43. Returns: 0.43 + 0.2 and 0.6 + 0.4.
    advantages, returns = gae(
        jnp.array([[0.0, 1.0]]),
        jnp.array([[0.2, 0.4]]),
        jnp.ones((1, 2), bool),
        gamma=0.9,
        gae_lambda=0.5,
    )
    np.testing.assert_allclose(advantages, [[0.43, 0.6]], rtol=1e-6)
    np.testing.assert_allclose(returns, [[0.63, 1.0]], rtol=1e-6)


def test_monte_carlo_returns_do_not_depend_on_the_values():
    rewards, values, mask = map(jnp.asarray, random_inputs(6))
    _, returns = gae(rewards, values, mask, gae_lambda=1.0)
    _, other = gae(rewards, jnp.zeros_like(values), mask, gae_lambda=1.0)
    np.testing.assert_allclose(returns, other, atol=1e-5)


def test_a_discount_per_position_alone_is_refused():
    rewards, values, mask = map(jnp.asarray, random_inputs(7))
    with pytest.raises(AssertionError):
        gae(rewards, values, mask, gamma=jnp.ones(7))


def test_whiten_gives_mean_zero_and_population_variance_one():
    x, _, mask = random_inputs(8)
    got = np.asarray(whiten(jnp.asarray(x), jnp.asarray(mask)))
    np.testing.assert_allclose(got[mask].mean(), 0.0, atol=1e-6)
    np.testing.assert_allclose(got[mask].var(ddof=0), 1.0, rtol=1e-5)
    assert (got[~mask] == 0.0).all()


def test_whiten_without_shift_scales_around_the_mean():
    x, _, mask = random_inputs(9)
    x = x + 3.0
    got = np.asarray(whiten(jnp.asarray(x), jnp.asarray(mask), shift_mean=False))
    mean, var = x[mask].mean(dtype=np.float64), x[mask].var(dtype=np.float64)
    expected = np.where(mask, (x - mean) / np.sqrt(var + 1e-8) + mean, 0.0)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_whiten_by_hand():
    # Mean 2, variance (1 + 1 + 4 + 4) / 4 = 2.5.
    x = jnp.array([[1.0, 3.0], [0.0, 4.0]])
    expected = np.array([[-1.0, 1.0], [-2.0, 2.0]]) / np.sqrt(2.5)
    np.testing.assert_allclose(whiten(x, jnp.ones((2, 2), bool)), expected, rtol=1e-6)


def test_whiten_is_over_the_whole_array_not_row_by_row():
    x = jnp.array([[0.0, 0.0], [4.0, 4.0]])
    assert whiten(x, jnp.ones((2, 2), bool)).tolist() == [[-1.0, -1.0], [1.0, 1.0]]


def test_whiten_of_equal_numbers_or_of_none_is_zero():
    x = jnp.full((2, 2), 3.0)
    assert (whiten(x, jnp.ones((2, 2), bool)) == 0.0).all()
    assert (whiten(x, jnp.zeros((2, 2), bool)) == 0.0).all()


def test_a_lambda_for_each_response_by_its_length():
    rng = np.random.default_rng(10)
    mask = rng.random((5, 60)) < np.array([[0.9], [0.5], [0.1], [0.0], [1.0]])
    got = length_adaptive_lambda(jnp.asarray(mask), alpha=0.1)
    expected = [[max(0.0, 1 - 1 / (0.1 * max(row.sum(), 1)))] for row in mask]
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert got[2, 0] == got[3, 0] == 0.0 and got.shape == (5, 1)
    # VAPO's alpha by hand: 1 - 1 / (0.05 x 60) = 2 / 3, and below 20 tokens nothing is traced.
    assert round(length_adaptive_lambda(jnp.asarray(mask), alpha=0.05)[4, 0].item(), 6) == 0.666667
    assert length_adaptive_lambda(jnp.ones((1, 19), bool), alpha=0.05).item() == 0.0


def test_gae_takes_a_lambda_for_each_row_as_a_column_too():
    rewards, values, mask = map(jnp.asarray, random_inputs(11))
    lambdas = length_adaptive_lambda(mask, alpha=0.5)
    got = gae(rewards, values, mask, gae_lambda=lambdas)
    for i, gae_lambda in enumerate(lambdas[:, 0]):
        alone = gae(*(x[i : i + 1] for x in (rewards, values, mask)), gae_lambda=gae_lambda)
        for x, y in zip(got, alone, strict=True):
            np.testing.assert_allclose(x[i], y[0], rtol=1e-6)
