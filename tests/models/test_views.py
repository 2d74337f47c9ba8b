"""What layers of several kinds see, and that their kinds are those of the layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.models.axes import unconstrained
from ppo_jax.models.build import policy_network
from ppo_jax.models.config import LayerKind, ModelConfig
from ppo_jax.models.partition import keep_layers, stack_layers
from ppo_jax.models.rope import LongRopeScaling
from ppo_jax.models.views import row_views
from tests.support import tiny

LOCAL, STILL = LayerKind(window=3, rope_theta=50.0), LayerKind(rotary=False)
CONFIG = ModelConfig(
    vocab_size=11,
    num_layers=4,
    embed_dim=12,
    num_heads=2,
    num_kv_heads=1,
    head_dim=6,
    mlp_dim=16,
    max_length=32,
    layer_kinds=(LOCAL, LayerKind(), STILL, LOCAL),
)
MASK = np.arange(9)[None] >= np.array([0, 4])[:, None]
TOKENS = np.random.default_rng(0).integers(0, 11, MASK.shape)


def test_a_view_a_kind_in_the_order_of_the_layers():
    assert CONFIG.kinds == (LOCAL, LayerKind(), STILL)
    positions, views = row_views(CONFIG, unconstrained, jnp.asarray(MASK), None, None)
    np.testing.assert_array_equal(positions[1], [0, 0, 0, 0, 0, 1, 2, 3, 4])
    local, whole, still = views
    assert still.angles is None and (local.angles != whole.angles).any()
    assert still.attention_fn is whole.attention_fn  # one mask
    allowed = np.asarray(local.attention_fn.mask)[1]
    np.testing.assert_array_equal(allowed[7], [0, 0, 0, 0, 0, 1, 1, 1, 0])
    np.testing.assert_array_equal(allowed[5], [0, 0, 0, 0, 1, 1, 0, 0, 0])  # no padding
    assert np.asarray(whole.attention_fn.mask)[1, 7, 4:8].all()


def test_scanned_layers_have_the_kinds_of_unrolled_ones():
    params = policy_network(CONFIG).init(jax.random.key(0))
    rows = jnp.asarray(TOKENS, jnp.int32), jnp.asarray(MASK)

    def loss(config):
        network = policy_network(config)
        return lambda params: jnp.square(network.apply(params, *rows)[MASK]).sum()

    scanned = dataclasses.replace(CONFIG, scan_layers=True)
    value, gradient = jax.value_and_grad(loss(CONFIG))(params)
    value_scanned, gradient_scanned = jax.value_and_grad(loss(scanned))(stack_layers(params))
    np.testing.assert_allclose(value_scanned, value, rtol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4 * (1 + np.abs(y).max())),
        gradient_scanned,
        stack_layers(gradient),
    )


@pytest.mark.parametrize("scan_layers", [False, True])
def test_tokens_one_by_one_over_a_cache_see_what_they_see_in_a_row(scan_layers):
    config = dataclasses.replace(CONFIG, scan_layers=scan_layers, score_cap=0.5)
    network = policy_network(config)
    params = network.init(jax.random.key(1))
    expected = network.apply(params, jnp.asarray(TOKENS, jnp.int32), jnp.asarray(MASK))
    cache, step = network.init_cache(2, 9), jax.jit(network.decode)
    for begin, end in [(0, 5), *((i, i + 1) for i in range(5, 9))]:
        columns = slice(begin, end)
        tokens, mask = jnp.asarray(TOKENS[:, columns], jnp.int32), jnp.asarray(MASK[:, columns])
        logits, cache = step(params, tokens, mask, cache)
        np.testing.assert_allclose(
            logits[MASK[:, columns]], expected[:, columns][MASK[:, columns]], atol=1e-5
        )


FACTORS = dict(short_factor=(1.0,) * 3, long_factor=(1.0, 2.0, 4.0), original_max_length=6)


@pytest.mark.parametrize("length", [5, 9])
def test_longrope_turns_all_rows_as_the_longest(length):
    """A prompt that is short as its response is long, and short rows with much padding."""
    config = dataclasses.replace(CONFIG, rope_scaling=LongRopeScaling(**FACTORS))
    network, of_rows = policy_network(config), policy_network(config.for_rows(length))
    params = tiny.random_params(network)
    tokens = jnp.asarray(TOKENS[:1, :length], jnp.int32)
    mask = jnp.ones(tokens.shape, bool)
    expected = network.apply(params, tokens, mask)  # whose width is its length
    padding = ((0, 0), (8, 0))
    padded = of_rows.apply(params, jnp.pad(tokens, padding), jnp.pad(mask, padding))[:, 8:]
    np.testing.assert_allclose(padded, expected, atol=1e-5)
    cache = of_rows.init_cache(1, 20)
    first, cache = of_rows.decode(params, tokens[:, :4], mask[:, :4], cache)
    rest, _ = of_rows.decode(params, tokens[:, 4:], mask[:, 4:], cache)
    found = jnp.concatenate([first, rest], axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    other = policy_network(config.for_rows(14 - length)).apply(params, tokens, mask)
    assert np.abs(other - expected).max() > 1e-3


def test_a_network_of_fewer_layers_has_their_kinds():
    params = policy_network(CONFIG).init(jax.random.key(0))
    config, _ = keep_layers(CONFIG, params, 2)
    assert config.layer_kinds == (LOCAL, LayerKind())
    with pytest.raises(ValueError, match="layer_kinds must have one for each of 5 layers, got 4"):
        dataclasses.replace(CONFIG, num_layers=5)
