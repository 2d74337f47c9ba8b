"""Mixtures of experts: what a token's experts give, and the same on any mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.core.network import merge_params
from ppo_jax.models.build import policy_network, trunk_network
from ppo_jax.models.config import Experts
from ppo_jax.models.families import read_config
from ppo_jax.models.lora import init_lora
from ppo_jax.models.moe import mixture, route
from ppo_jax.models.partition import split_params
from tests.support import tiny
from tests.support.meshes import RULES, WIDE, layout_of

QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
}
ROWS, LENGTH, EMBED, WIDTH, NUM = 3, 7, 6, 5, 5


def experts_of(**changes):
    return Experts(**dict(num_experts=NUM, num_chosen=2, dim=WIDTH) | changes)


def problem(seed=0, *, favourite=None):
    """(x, real, router logits, gate, up, down); all tokens choose the favourite expert first."""
    rng = np.random.default_rng(seed)
    up, down = (NUM, EMBED, WIDTH), (NUM, WIDTH, EMBED)
    shapes = [(ROWS, LENGTH, EMBED), (ROWS, LENGTH, NUM), up, up, down]
    x, logits, *kernels = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    if favourite is not None:
        logits[..., favourite] = 9.0
    real = rng.random((ROWS, LENGTH)) < 0.7
    return jax.tree.map(jnp.asarray, (x, real, logits, *kernels))


def silu(x):
    return x / (1 + np.exp(-x))


def oracle(experts, x, real, logits, gate, up, down, given=None):
    """Token by token in float64; with the experts that are given, or those of the router."""
    x, logits, gate, up, down = (np.asarray(a, np.float64) for a in (x, logits, gate, up, down))
    output = np.zeros_like(x)
    for place in np.argwhere(np.asarray(real)):
        b, s = place
        probs = np.exp(logits[b, s]) / np.exp(logits[b, s]).sum()
        chosen = np.argsort(-probs)[: experts.num_chosen] if given is None else given[b, s]
        total = probs[chosen].sum() if experts.normalized else 1.0
        for e in chosen:
            hidden = silu(x[b, s] @ gate[e]) * (x[b, s] @ up[e])
            output[b, s] += probs[e] / total * (hidden @ down[e])
    return output


def all_experts(experts, x, real, logits, gate, up, down):
    """The same as products of all tokens with all experts, for autodiff."""
    weights, chosen = route(logits, experts)
    shares = (jax.nn.one_hot(chosen, NUM) * weights[..., None]).sum(-2) * real[..., None]
    each = [jax.nn.silu(x @ gate[e]) * (x @ up[e]) @ down[e] for e in range(NUM)]
    return (jnp.stack(each, -2) * shares[..., None]).sum(-2)


@pytest.mark.parametrize("favourite", [None, 3])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("num_chosen", [1, 2, NUM])
def test_outputs_are_those_token_by_token(num_chosen, normalized, favourite):
    """Also where one expert has all tokens: none is dropped."""
    experts = experts_of(num_chosen=num_chosen, normalized=normalized)
    arrays = problem(favourite=favourite)
    ours = jax.jit(lambda *x: mixture(experts, jax.nn.silu, (), *x)[0])(*arrays)
    np.testing.assert_allclose(ours, oracle(experts, *arrays), atol=1e-5)
    assert not np.asarray(ours)[~np.asarray(arrays[1])].any()


@pytest.mark.parametrize("normalized", [False, True])
def test_experts_that_are_given_have_the_weights_of_the_router(normalized):
    """Whatever their order, and though it would choose others."""
    experts, arrays = experts_of(normalized=normalized), problem()
    given = np.argsort(np.random.default_rng(2).random((ROWS, LENGTH, NUM)))[..., :2]
    run = jax.jit(lambda *x: mixture(experts, jax.nn.silu, (), *x))
    ours, chosen = run(*arrays, jnp.asarray(given, jnp.uint8))
    np.testing.assert_array_equal(chosen, given)
    np.testing.assert_allclose(ours, oracle(experts, *arrays, given), atol=1e-5)
    assert np.abs(ours - run(*arrays)[0]).max() > 1e-2
    np.testing.assert_allclose(run(*arrays, jnp.asarray(given[..., ::-1]))[0], ours, atol=1e-6)


@pytest.mark.parametrize("normalized", [False, True])
def test_gradients_are_those_of_products_with_all_experts(normalized):
    """Of tokens, router and kernels."""
    experts, arrays = experts_of(normalized=normalized), problem(favourite=1)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=arrays[0].shape), jnp.float32)

    def gradients(compute):
        loss = lambda *x: (compute(*x) * weights).sum()  # noqa: E731
        return jax.jit(jax.grad(loss, (0, 2, 3, 4, 5)))(*arrays)

    ours = gradients(lambda *x: mixture(experts, jax.nn.silu, (), *x)[0])
    theirs = gradients(lambda *x: all_experts(experts, *x))
    for own, expected in zip(ours, theirs, strict=True):
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(own, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("shape", "over", "num_experts", "parts"),
    [
        ((2, 2, 2), "model", 8, 2),
        ((1, 1, 8), "model", 5, 1),
        ((2, 2, 2), "fsdp", 8, 2),
    ],
)
def test_a_mesh_computes_the_same(shape, over, num_experts, parts):
    """The experts are sharded where the mesh divides them, else whole on every device."""
    experts = experts_of(num_experts=num_experts, dim=24, normalized=True)
    config = tiny.model_config(**WIDE | dict(experts=experts))
    tokens, mask = tiny.tokens_and_mask(0, 8, 10)
    layout = layout_of(shape, dataclasses.replace(RULES, expert=(over,)))
    params = tiny.random_params(policy_network(config))
    sharded = layout.shard_params(params)
    kernel = sharded["layers"]["0"]["experts"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape[0] == num_experts // parts

    def run(params, network):
        def loss(params):
            return (jnp.where(mask[..., None], network.apply(params, tokens, mask), 0) ** 2).mean()

        return jax.jit(jax.value_and_grad(loss))(params)

    one = run(params, policy_network(config))
    many = run(sharded, policy_network(config, constrain=layout.constrain))

    def assert_close(a, b):
        np.testing.assert_allclose(b, a, atol=1e-5 * max(1.0, float(np.abs(a).max())))

    jax.tree.map(assert_close, one, many)


@pytest.mark.parametrize("over", ["model", "fsdp"])
def test_adapters_of_attention_have_the_gradients_of_one_device(over):
    """Beside experts that nobody trains."""
    experts = experts_of(num_experts=4, dim=16, normalized=True)
    config = tiny.model_config(**WIDE | dict(experts=experts, num_layers=1, lora_alpha=8.0))
    base = tiny.random_params(policy_network(config))
    new = init_lora(jax.random.key(0), config, base, targets=("query", "output"), rank=2)
    adapters = jax.tree.map(lambda x: x + 0.1, new)
    tokens, mask = tiny.tokens_and_mask(0, 8, 10)
    layout = layout_of((2, 2, 2), dataclasses.replace(RULES, expert=(over,)))

    def gradients(network, put):
        def loss(adapters, base):
            logits = network.apply(merge_params(base, adapters), tokens, mask)
            return (jnp.where(mask[..., None], logits, 0) ** 2).mean()

        return jax.jit(jax.grad(loss))(put(adapters), put(base))

    found = gradients(policy_network(config, constrain=layout.constrain), layout.shard_params)
    expected = gradients(policy_network(config), lambda x: x)
    assert min(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected)) > 1e-2
    tiny.leaves_close(found, expected, rtol=1e-4, atol=1e-5)


def test_of_dense_layers_alone_there_are_no_experts():
    config = tiny.model_config(**tiny.SHAPES["experts"])
    dense = tuple(dataclasses.replace(kind, dense=True) for kind in config.layer_kinds)
    assert dataclasses.replace(config, layer_kinds=dense).experts is None
    raw = {**QWEN3_MOE, "num_experts": 0}
    assert read_config(raw).experts is None and not read_config(raw).kinds[0].dense
    assert read_config({**QWEN3_MOE, "mlp_only_layers": [0, 1]}) == read_config(raw)


def test_a_trunk_and_the_layers_above_it_are_the_whole():
    config = tiny.model_config(**tiny.SHAPES["experts"])
    params = tiny.random_params(policy_network(config))
    tokens, mask = tiny.tokens_and_mask(0, 4, 10)
    trunk, frozen, trained = split_params(config, params, 2, 1)
    hidden = trunk_network(config, end_layer=1).apply(trunk, tokens, mask)
    above = policy_network(config, start_layer=1).apply(frozen | trained, hidden, mask)
    whole = policy_network(config).apply(params, tokens, mask)
    real = np.asarray(mask)
    np.testing.assert_allclose(np.asarray(above)[real], np.asarray(whole)[real], atol=1e-5)


REFUSED = {
    "num_chosen must be at most num_experts": lambda: tiny.model_config(
        experts=experts_of(num_chosen=6)
    ),
    "num_experts must be a positive integer": lambda: tiny.model_config(
        experts=experts_of(num_experts=0)
    ),
    "aux_coef must be >= 0": lambda: tiny.model_config(experts=experts_of(aux_coef=-1.0)),
    "mlp must be gated": lambda: tiny.model_config(experts=experts_of(), mlp="gelu"),
    "mlp_bias must be false": lambda: tiny.model_config(experts=experts_of(), mlp_bias=True),
    "dense layers are of a model with experts": lambda: tiny.model_config(
        **tiny.SHAPES["experts"] | {"experts": None}
    ),
    "scan_layers must be false": lambda: tiny.model_config(
        **tiny.SHAPES["experts"], scan_layers=True
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_experts_that_cannot_be_are_refused_in_one_line(message):
    with pytest.raises(ValueError, match=message) as error:
        REFUSED[message]()
    assert "\n" not in str(error.value)
