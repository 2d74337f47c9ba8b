"""What routers do, next to the outputs of a network; and the same experts once more."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.core.router import load_balancing_loss
from ppo_jax.models.build import policy_network, trunk_network
from ppo_jax.models.config import Experts
from ppo_jax.models.partition import split_params
from tests.support import tiny
from tests.support.meshes import WIDE, layout_of

MIXED = tiny.model_config(**tiny.SHAPES["experts"])
EVERY = dataclasses.replace(MIXED, layer_kinds=(), num_layers=2)
CONFIGS = {
    "mixed": MIXED,
    "remat": dataclasses.replace(MIXED, remat="full"),
    "scanned": dataclasses.replace(EVERY, scan_layers=True, remat="dots"),
}
ROWS, LENGTH, PROMPT = 3, 9, 4


def problem(config, std=0.3):
    network = policy_network(config)
    tokens, mask = tiny.tokens_and_mask(0, ROWS, LENGTH)
    return network, tiny.random_params(network, std=std), tokens, mask


def decoded(network, params, tokens, mask):
    """Experts [B, L, M, k] of a prefill of the prompt and one token after the other."""
    cache = network.init_cache(ROWS, LENGTH)
    decode = jax.jit(network.routed.decode, static_argnames="first_output")
    prompt = tokens[:, :PROMPT], mask[:, :PROMPT]
    _, cache, chosen = decode(params, *prompt, cache, first_output=PROMPT - 1)
    parts = [chosen]
    for t in range(PROMPT, LENGTH):
        _, cache, chosen = decode(params, tokens[:, t : t + 1], mask[:, t : t + 1], cache)
        parts.append(chosen)
    return jnp.concatenate(parts, axis=1)


def moved(params, seed=1):
    """The same, but for other routers."""
    rng = np.random.default_rng(seed)

    def other(path, x):
        if not any(getattr(key, "key", None) == "router" for key in path):
            return x
        return x + jnp.asarray(rng.normal(size=x.shape), x.dtype)

    return jax.tree_util.tree_map_with_path(other, params)


@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_chooses_what_a_forward_pass_does_and_replays(name):
    """Outputs and gradients stay; with other routers the experts stay and their weights move."""
    network, params, tokens, mask = problem(CONFIGS[name])
    chosen = decoded(network, params, tokens, mask)
    layers = sum(CONFIGS[name].has_experts(i) for i in range(CONFIGS[name].num_layers))
    assert chosen.shape == (ROWS, LENGTH, layers, 2) and chosen.dtype == jnp.uint8
    where = dict(first_output=PROMPT - 1)  # what the last layer computes in a prefill

    def loss(params, replay):
        how = dict(chosen=chosen, replay=replay, **where)
        logits, statistics = network.routed.apply(params, tokens, mask, **how)
        return jnp.where(mask[:, PROMPT - 1 :, None], logits**2, 0.0).mean(), statistics

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (expected, statistics), gradient = run(params, False)
    (got, replayed), replayed_gradient = run(params, True)
    assert not statistics.changed.any() and not replayed.changed.any()
    np.testing.assert_array_equal(statistics.chosen, replayed.chosen)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    tiny.leaves_close(replayed_gradient, gradient, atol=1e-6, rtol=1e-4)
    real = mask.sum() if CONFIGS[name].scan_layers else mask[:, PROMPT - 1 :].sum()
    assert statistics.tokens[-1] == real and statistics.tokens[0] == mask.sum()
    np.testing.assert_allclose(statistics.chosen.sum(-1), 2 * statistics.tokens)
    np.testing.assert_allclose(statistics.probs.sum(-1), statistics.tokens, rtol=1e-5)

    other = moved(params)
    (_, statistics), _ = run(other, False)
    (_, replayed), gradient = run(other, True)
    assert statistics.changed.min() > 0
    # Of the first layer, whose inputs are as before, they are those of the rollout one by one.
    first, again = (run(x, True)[0][1].chosen[0] for x in (params, other))
    np.testing.assert_array_equal(first, again)
    routers = [
        x
        for path, x in jax.tree_util.tree_leaves_with_path(gradient)
        if any(getattr(key, "key", None) == "router" for key in path)
    ]
    assert all(np.abs(x).max() > 0 for x in routers)


def test_above_a_trunk_the_layers_are_those_that_are_run():
    _, params, tokens, mask = problem(MIXED)
    parts = split_params(MIXED, params, 2, 1)
    hidden = trunk_network(MIXED, end_layer=1).apply(parts.trunk, tokens, mask)
    network = policy_network(MIXED, start_layer=1)
    trained = parts.frozen | parts.trained
    _, statistics = network.routed.apply(trained, hidden, mask)
    _, whole = policy_network(MIXED).routed.apply(params, tokens, mask)
    tiny.leaves_close(statistics, jax.tree.map(lambda x: x[1:], whole), atol=1e-4)
    assert policy_network(MIXED, start_layer=3).routed is None
    assert policy_network(tiny.model_config()).routed is None


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 8)])
def test_a_mesh_has_the_same_loss_and_replays_the_same(shape):
    experts = Experts(num_experts=8, num_chosen=2, dim=24, normalized=True)
    config = tiny.model_config(**WIDE | dict(experts=experts))
    tokens, mask = tiny.tokens_and_mask(0, 8, 10)
    layout = layout_of(shape)
    params = tiny.random_params(policy_network(config))
    chosen = jnp.asarray(np.random.default_rng(0).integers(0, 8, (8, 10, 2, 2)), jnp.uint8)

    def run(params, network):
        def loss(params):
            _, plain = network.routed.apply(params, tokens, mask, chosen=chosen)
            how = dict(chosen=chosen, replay=True)
            logits, _ = network.routed.apply(params, tokens, mask, **how)
            replayed = jnp.where(mask[..., None], logits, 0.0)
            return load_balancing_loss(plain) + (replayed**2).mean(), plain

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    one = run(params, policy_network(config))
    many = run(layout.shard_params(params), policy_network(config, constrain=layout.constrain))
    assert one[0][1].changed.min() > 0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(b, a, atol=1e-5 * max(1.0, np.abs(a).max())),
        one,
        many,
    )


def test_what_does_not_fit_is_refused():
    network, params, tokens, mask = problem(EVERY)
    with pytest.raises(ValueError, match="replay needs the experts"):
        network.routed.apply(params, tokens, mask, replay=True)
    with pytest.raises(AssertionError):
        network.routed.apply(params, tokens, mask, chosen=jnp.zeros((ROWS, LENGTH, 1, 2), int))
