"""Rows that are joined and split again, and what is read of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.core.network import Network, shared_prompt
from ppo_jax.core.shared_prompts import SharedPrompt

G, N_SAMPLES, P, S = 2, 3, 4, 5
SHARED = SharedPrompt(P, N_SAMPLES)


def rows(*rest):
    """[G n, P + S, *rest], whose prompts are equal in each group."""
    x = np.random.default_rng(0).normal(size=(G, N_SAMPLES, P + S, *rest))
    x[:, :, :P] = x[:, :1, :P]
    return jnp.asarray(x.reshape(G * N_SAMPLES, P + S, *rest), jnp.float32)


@pytest.mark.parametrize("rest", [(), (2,), (2, 3)])
def test_joined_rows_hold_a_prompt_once_and_split_into_what_they_were(rest):
    apart = rows(*rest)
    joined = SHARED.join(apart)
    assert joined.shape == (G, P + N_SAMPLES * S, *rest)
    assert SHARED.response_length(joined.shape[1]) == S
    np.testing.assert_array_equal(joined[1, :P], apart[N_SAMPLES, :P])
    np.testing.assert_array_equal(joined[1, P + S : P + 2 * S], apart[N_SAMPLES + 1, P:])
    for first in range(P + S):
        np.testing.assert_array_equal(SHARED.split(joined, first), apart[:, first:])


@pytest.mark.parametrize("rest", [(), (2,)])
def test_positions_of_rows_apart_are_read_from_joined_ones(rest):
    apart = rows(*rest)
    positions = jnp.asarray(np.random.default_rng(1).integers(0, P + S, size=(G * N_SAMPLES, 4)))
    expected = apart[np.arange(len(apart))[:, None], positions]
    np.testing.assert_array_equal(SHARED.take(SHARED.join(apart), positions), expected)


def test_the_gradient_of_a_prompt_is_the_sum_over_its_responses():
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(G * N_SAMPLES, P + S)), jnp.float32)
    gradient = jax.grad(lambda x: (SHARED.split(x) * weights).sum())(SHARED.join(rows()))
    of_prompts = weights.reshape(G, N_SAMPLES, -1)[:, :, :P].sum(axis=1)
    np.testing.assert_allclose(gradient[:, :P], of_prompts, rtol=1e-6)
    np.testing.assert_array_equal(gradient[:, P:].reshape(-1, S), weights[:, P:])


def test_rows_are_joined_where_it_is_less_work():
    """By a network that says so, of prompts with several responses."""
    numbers = dict(prompt_length=P, samples=N_SAMPLES)
    some = Network(None, None, supports_shared_prompts=lambda count, samples: count == 2)
    assert shared_prompt(some, 6, **numbers) == SHARED
    assert shared_prompt(some, 9, **numbers) is None
    assert shared_prompt(some, 2, **numbers | dict(samples=1)) is None
    assert shared_prompt(Network(None, None), 6, **numbers) is None
