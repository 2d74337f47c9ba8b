"""Parameters of several networks as those of one."""

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.core.network import average_params
from ppo_jax.models.build import reward_network
from tests.support import tiny


def test_parameters_are_averaged_by_their_weights_in_float32():
    rng = np.random.default_rng(0)
    trees = [{"a": {"w": rng.normal(size=(2, 3))}, "b": rng.normal(size=4)} for _ in range(3)]
    weights = np.array([1.0, 0.0, 3.0])
    got = jax.jit(lambda *trees: average_params(trees, weights))(*trees)
    for leaf, *leaves in zip(*map(jax.tree.leaves, (got, *trees)), strict=True):
        np.testing.assert_allclose(leaf, np.average(leaves, axis=0, weights=weights), rtol=1e-5)
    half = [jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tree) for tree in trees]
    exact = np.mean([np.float32(tree["b"]) for tree in half], axis=0)
    mean = average_params(half)["b"]
    assert mean.dtype == jnp.bfloat16
    np.testing.assert_array_equal(mean, jnp.asarray(exact, jnp.bfloat16))


def test_the_average_of_heads_gives_the_average_of_scores():
    """Where only the linear head differs, WARM and the mean of an ensemble are the same."""
    network = reward_network(tiny.model_config())
    params = tiny.random_params(network)
    other = {**params, "head": jax.tree.map(lambda x: 2 - x, params["head"])}
    tokens, mask = tiny.tokens_and_mask(3, 2, 6, least=3, side="right")
    apply = jax.jit(network.apply)
    mean = (apply(params, tokens, mask) + apply(other, tokens, mask)) / 2
    got = apply(average_params([params, other]), tokens, mask)
    np.testing.assert_allclose(got, mean, atol=1e-5)
