"""A prompt that stands once: the outputs and gradients of rows in which it stands each time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.core.network import last_outputs, merge_params, shared_prompt
from ppo_jax.models.attention import AttentionFn, attend, causal_mask
from ppo_jax.models.build import policy_network, reward_network, value_network
from ppo_jax.models.config import LayerKind
from ppo_jax.models.kernels import make_attention
from ppo_jax.models.lora import init_lora
from ppo_jax.models.shared_prompts import share_prompts
from ppo_jax.rollout.decode import response_outputs, response_statistics
from tests.models.test_kernels import interpreted, on  # noqa: F401
from tests.support import tiny
from tests.support.meshes import WIDE, layout_of

P, T, SAMPLES = tiny.PROMPT_LENGTH, tiny.RESPONSE_LENGTH, 4
LENGTHS = np.array([8, 1, 3, 5, 2, 8, 8, 1, 4, 6, 1, 7])
PROMPTS = np.repeat([5, 1, 3], SAMPLES)
KINDS = {
    "gpt2": {},
    "llama": {},
    "qk_norm": {},
    "scanned": {},
    "windows": dict(
        num_layers=3,
        layer_kinds=(LayerKind(window=4, rope_theta=100.0), LayerKind(window=7), LayerKind()),
    ),
    "experts": {},
    "experts, remat": dict(remat="dots"),
    "gpt2, remat": dict(remat="full"),
    "qk_norm, remat": dict(remat="dots"),
    "scanned, remat": dict(remat="full"),
    "adapters": dict(lora_alpha=8.0),
    "in chunks": {},
    "on a trunk": {},
}


def rows(kind="llama"):
    """(inputs [N, L], mask, response mask): prompts padded on the left, where padding holds what
    must not matter."""
    rng = np.random.default_rng(0)
    response_mask = np.arange(T) < LENGTHS[:, None]
    mask = np.concatenate([np.arange(P)[::-1] < PROMPTS[:, None], response_mask], axis=1)
    inputs = rng.integers(5, tiny.VOCAB, size=mask.shape).astype(np.int32)
    if kind == "on a trunk":
        inputs = np.where(mask[:, :, None], rng.normal(size=(*mask.shape, 32)), np.nan)
        inputs = inputs.astype(np.float32)
    inputs[:, :P] = np.repeat(inputs[::SAMPLES, :P], SAMPLES, axis=0)
    return jnp.asarray(inputs), jnp.asarray(mask), jnp.asarray(response_mask)


def network_of(make, kind, **more):
    """(network, what is trained, what is not)"""
    config = tiny.model_config(**tiny.SHAPES.get(kind.split(",")[0], {}) | KINDS[kind])
    start = 1 if kind == "on a trunk" else None
    network = make(config, start_layer=start, **more)
    params = tiny.random_params(make(config, start_layer=start))
    if kind != "adapters":
        return network, params, {}
    adapters = init_lora(jax.random.key(0), config, params, targets=("query", "value"), rank=4)
    return network, jax.tree.map(lambda x: x + 0.1, adapters), params


def both(function, params):
    """Values and gradients of one and of several responses in a row; gradients as one vector."""

    def run(samples):
        def weighted(params):
            out = function(params, samples)
            weights = [np.random.default_rng(1).normal(size=x.shape) for x in out]
            return sum((x * w).sum() for x, w in zip(out, weights, strict=True)), out

        gradients, out = jax.grad(weighted, has_aux=True)(params)
        return out, jnp.concatenate([x.ravel() for x in jax.tree.leaves(gradients)])

    return jax.jit(functools.partial(run, 1))(), jax.jit(functools.partial(run, SAMPLES))()


def assert_equal(apart, joined):
    for x, y in zip(joined[0], apart[0], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * float(jnp.abs(y).max()))
    largest = float(jnp.abs(apart[1]).max())
    np.testing.assert_allclose(joined[1], apart[1], rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_and_their_gradient_are_those_of_rows_apart(kind):
    inputs, mask, response_mask = rows(kind)
    chunk = dict(logits_chunk=3) if kind == "in chunks" else {}
    network, params, frozen = network_of(policy_network, kind, **chunk)
    tokens = jnp.asarray(np.random.default_rng(2).integers(5, tiny.VOCAB, size=(12, T)))

    def statistics(params, samples):
        of = (network, merge_params(frozen, params), inputs, mask, tokens)
        found = response_statistics(*of, temperature=0.8, samples_per_prompt=samples)
        return [jnp.where(response_mask, x, 0.0) for x in found]

    assert_equal(*both(statistics, params))


@pytest.mark.parametrize("kind", ["gpt2", "scanned, remat", "on a trunk"])
def test_values_and_scores_are_those_of_rows_apart(kind):
    inputs, mask, response_mask = rows(kind)
    value, params, _ = network_of(value_network, kind)
    reward = network_of(reward_network, kind)[0]

    def outputs(params, samples):
        how = dict(response_length=T, samples_per_prompt=samples)
        values = response_outputs(value, params, inputs, mask, **how)
        shared = shared_prompt(reward, len(mask), prompt_length=P, samples=samples)
        assert (shared is None) == (samples == 1)
        scores = last_outputs(reward, params, inputs, mask, shared)
        return [jnp.where(response_mask, values, 0.0), scores]

    assert_equal(*both(outputs, params))


def test_a_response_sees_no_other():
    """Its logits have no gradient to the tokens of others, nor to what comes later."""
    inputs, mask, _ = rows("on a trunk")
    network, params, _ = network_of(policy_network, "on a trunk")
    how = dict(response_length=T, samples_per_prompt=SAMPLES)

    def logits(inputs):
        return response_outputs(network, params, inputs, mask, **how)[6, 5].sum()

    gradient = jax.jit(jax.grad(logits))(jnp.where(mask[..., None], inputs, 0.0))
    seen = np.abs(gradient).sum(axis=2) > 0
    expected = np.zeros_like(seen)
    expected[6, P : P + 5] = True  # its own before token 5
    expected[4, :P] = mask[4, :P]  # and the prompt, which stands in the first row of its group
    np.testing.assert_array_equal(seen, expected)


def test_as_long_as_a_row_apart_is_what_a_model_must_have_positions_for():
    config = tiny.model_config(**tiny.SHAPES["gpt2"], max_length=P + T - 1)
    network = policy_network(config)
    inputs, mask, _ = rows()
    how = dict(response_length=T, samples_per_prompt=SAMPLES)
    args = tiny.random_params(network), inputs, mask
    assert response_outputs(network, *args, **how).shape == (12, T, tiny.VOCAB)
    short = policy_network(tiny.model_config(**tiny.SHAPES["gpt2"], max_length=P + T - 2))
    with pytest.raises(ValueError, match="12 positions, but the model has 11"):
        response_outputs(short, *args, **how)


def test_rows_hold_several_texts_or_a_shared_prompt():
    network, params, _ = network_of(policy_network, "llama")
    inputs, mask, _ = rows()
    shared = shared_prompt(network, 12, prompt_length=P, samples=SAMPLES)
    args = params, shared.join(inputs), shared.join(mask)
    segments = jnp.ones(args[1].shape, jnp.int32)
    with pytest.raises(ValueError, match="one of the two must be None"):
        network.apply(*args, segment_ids=segments, shared_prompt=shared)


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 8)])
def test_a_mesh_has_as_many_prompts_for_each_device(shape):
    """A prompt is on one device: with fewer than devices, some would have no work."""
    constrain = layout_of(shape).constrain
    supports = policy_network(tiny.model_config(**WIDE), constrain=constrain)
    shards = shape[0] * shape[1]
    for count in (1, 2, 3, 4, 6, 8):
        got = supports.supports_shared_prompts(count, 4)
        assert got == (count % shards == 0), count


def test_a_fused_kernel_has_the_rows_apart(interpreted, on):  # noqa: F811
    """And gives what plain attention gives, of prompts and of responses."""
    on("tpu")
    length, prompt, groups = 140, 130, 2
    rng = np.random.default_rng(0)
    mask = np.ones((2 * groups, length), bool)
    mask[:2, :30] = False
    mask[1, -4:] = False
    config = tiny.model_config(num_heads=4, num_kv_heads=2, head_dim=16)
    network = policy_network(config)
    shared = shared_prompt(network, 2 * groups, prompt_length=prompt, samples=2)
    joined = shared.join(jnp.asarray(mask))
    width = joined.shape[1]
    arrays = [
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((groups, width, 4, 16), (groups, 2, width, 16), (groups, 2, width, 16))
    ]
    constrain = layout_of((1, 1, 1)).constrain
    fused = make_attention(config, constrain, joined, None, shared)
    plain = share_prompts(AttentionFn(causal_mask(jnp.asarray(mask), None), attend), joined, shared)
    assert plain.takes_some_queries and not fused.takes_some_queries
    got, expected = (
        np.where(joined[..., None, None], jax.jit(f.__call__)(*arrays), 0) for f in (fused, plain)
    )
    np.testing.assert_allclose(got, expected, atol=1e-5)
