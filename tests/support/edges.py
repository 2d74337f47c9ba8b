"""Arrays and functions of the tables of edges: functions at the limits of what they are given.

An edge is refused, with a message that names the argument, or has the value of the formula. Values
of the right-hand side are worked out by hand or by numpy in float64.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax import core

B, T = 4, 4  # equal, so that an array of one row or column broadcasts without a word
ONES, MASK = jnp.ones((B, T)), jnp.ones((B, T), bool)
ROW, COLUMN = jnp.ones(B), jnp.ones((B, 1))
LOGITS, TOKENS = jnp.zeros((B, T, 8)), jnp.zeros((B, T), jnp.int32)
RIGHT_PADDED = jnp.arange(5)[None] < jnp.array([5, 3, 5, 5, 5, 5, 5, 5])[:, None]
KEY = jax.random.key(0)
ADAM = core.Optimizer(learning_rate=0.1)
RANK = "is one number"
HUGE = math.exp(20)


def same(value):
    return jnp.full((64, 24), value, jnp.float32)


EVERY = jnp.ones((64, 24), bool)
# One of them is the next number of float32.
NEARLY = same(1000.1).at[0, 0].set(np.nextafter(np.float32(1000.1), np.float32(np.inf)))


def cases(edges):
    """Parametrizes a test over a table of (function, edge, call, what is refused: a part of the
    message, or the value)."""
    return pytest.mark.parametrize(
        "call, expected",
        [case[2:] for case in edges],
        ids=[f"{function.__name__}: {edge}" for function, edge, *_ in edges],
    )


def assert_edge(call, expected):
    if isinstance(expected, str):
        with pytest.raises((ValueError, AssertionError), match=expected):
            call()
    elif expected is None:
        assert call() is None
    else:
        got = call()
        np.testing.assert_allclose(got, np.broadcast_to(expected, np.shape(got)), rtol=2e-6)
