"""Loops over layers of several kinds: the order of the layers, and what is compiled."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.models.build import policy_network
from ppo_jax.models.config import LayerKind
from ppo_jax.models.partition import stack_layers
from ppo_jax.models.stacks import scan_kinds
from tests.support import tiny

NEAR, FAR = LayerKind(window=3, rope_theta=50.0), LayerKind()
KINDS = {
    "two periods and a rest": [0, 0, 1] * 2 + [0],
    "as Gemma 3": [0] * 5 + [1] + [0] * 2,
    "alternating": [0, 1] * 2,
    "one after the other": [0, 1, 2],
    "one kind": [1, 1],
}


@pytest.mark.parametrize("name", KINDS)
def test_layers_follow_one_another_each_of_its_kind(name):
    kinds = KINDS[name]
    xs = jnp.arange(1.0, len(kinds) + 1)

    def step(carry, x, kind, alone):
        carry = (kind + 2) * carry + x
        return carry, (carry, jnp.full(2, kind))

    last, (carries, found) = jax.jit(lambda xs: scan_kinds(step, jnp.ones(()), xs, kinds))(xs)
    expected = [1.0]
    for kind, x in zip(kinds, xs, strict=True):
        expected.append((kind + 2) * expected[-1] + x)
    np.testing.assert_allclose(carries, expected[1:], rtol=1e-6)
    assert last == carries[-1]
    np.testing.assert_array_equal(found, np.repeat(kinds, 2).reshape(-1, 2))


def test_only_what_is_in_no_loop_stands_alone():
    seen = []

    def step(carry, x, kind, alone):
        seen.append((kind, alone))
        return carry, x

    for kinds in ([0, 0, 1, 0, 0, 1, 0], [0, 1, 1]):
        jax.eval_shape(lambda xs, kinds=kinds: scan_kinds(step, 0, xs, kinds), jnp.ones(len(kinds)))
    assert set(seen) == {(0, False), (1, False), (0, True)}


def test_kinds_that_do_not_repeat_are_in_no_loop_but_those_of_their_runs():
    def loops(kinds):
        xs = jnp.ones(len(kinds))
        scan = jax.make_jaxpr(lambda xs: scan_kinds(lambda c, x, *_: (c, x), 0, xs, kinds))
        return [e.params["length"] for e in scan(xs).eqns if e.primitive.name == "scan"]

    assert loops([0, 1, 1]) == [1, 2]
    assert loops([0, 1, 2, 0, 0]) == [1, 1, 1, 2]
    assert loops([0, 0, 1] * 2 + [0]) == [2, 1]


@pytest.mark.parametrize("length", [12, 200])
def test_a_layer_has_the_attention_of_its_own_kind_alone(length):
    """No branches, scores of windows alone where rows are long, and the tree of one kind."""
    config = tiny.model_config(num_layers=7, layer_kinds=(NEAR, NEAR, FAR) * 2 + (NEAR,))
    config = dataclasses.replace(config, max_length=length, scan_layers=True)
    network = policy_network(config)
    plain = policy_network(dataclasses.replace(config, layer_kinds=()))
    params = jax.eval_shape(network.init, jax.random.key(0))
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(
        lambda x: x.shape, jax.eval_shape(plain.init, jax.random.key(0))
    )
    tokens, mask = tiny.tokens_and_mask(0, 2, length)
    text = jax.jit(network.apply).lower(params, tokens, mask).as_text()
    assert "stablehlo.case" not in text and "stablehlo.if" not in text


@pytest.mark.parametrize("remat", ["none", "full"])
def test_stacked_layers_of_several_kinds_give_what_unrolled_ones_do(remat):
    kinds = (NEAR, NEAR, FAR) * 2 + (NEAR,)
    config = tiny.model_config(num_layers=7, layer_kinds=kinds, remat=remat)
    params = tiny.random_params(policy_network(config), std=0.1)
    tokens, mask = tiny.tokens_and_mask(0, 2, 9)

    def found(config, params):
        def loss(params):
            logits = policy_network(config).apply(params, tokens, mask)
            return jnp.where(mask[..., None], logits, 0).var()

        return jax.jit(jax.value_and_grad(loss))(params)

    value, gradient = found(config, params)
    scanned = dataclasses.replace(config, scan_layers=True)
    value_scanned, gradient_scanned = found(scanned, stack_layers(params))
    np.testing.assert_allclose(value_scanned, value, rtol=1e-5)
    tiny.leaves_close(gradient_scanned, stack_layers(gradient), atol=1e-5)


def test_decoding_copies_no_part_of_a_stack():
    """Each layer is read where it is: no array of several layers is made of the parameters."""
    config = tiny.model_config(num_layers=7, layer_kinds=(NEAR, NEAR, FAR) * 2 + (NEAR,))
    network = policy_network(dataclasses.replace(config, scan_layers=True))
    params = jax.eval_shape(network.init, jax.random.key(0))
    tokens, mask = tiny.tokens_and_mask(0, 2, 1)
    cache = jax.eval_shape(lambda: network.init_cache(2, 12))
    text = jax.jit(network.decode).lower(params, tokens, mask, cache).compile().as_text()
    made = re.findall(r"= f32\[(?:[2-6]|1),32,48\]\S* (\w[\w-]*)\(", text)
    assert not set(made) & {"slice", "reshape", "copy", "concatenate"}, made
