import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.models.build import (
    policy_apply,
    policy_network,
    reward_network,
    trunk_network,
    value_network,
)
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.partition import stack_layers, unstack_layers
from ppo_jax.models.rope import plain_frequencies
from tests.support import tiny


def make(shape, seed=0):
    config = tiny.model_config(**tiny.SHAPES[shape])
    network = policy_network(config)
    return network, tiny.random_params(network, seed)


@pytest.mark.parametrize("shape", tiny.SHAPES)
def test_prefill_and_decode_equal_the_full_forward(shape):
    network, params = make(shape)
    tokens, mask = tiny.tokens_and_mask(1, 3, 10)
    mask = mask.at[:, 6:].set(True)  # the prompt, in the first 6 positions, is padded

    @jax.jit
    def piecewise(params):
        cache = network.init_cache(3, 12)  # longer than needed: free slots are not seen
        outputs = []
        for begin, end in [(0, 6), (6, 7), (7, 8), (8, 10)]:
            chunk = slice(begin, end)
            logits, cache = network.decode(params, tokens[:, chunk], mask[:, chunk], cache)
            outputs.append(logits)
        return jnp.concatenate(outputs, axis=1), cache.index

    got, index = piecewise(params)
    expected = jax.jit(network.apply)(params, tokens, mask)
    assert index == 10
    np.testing.assert_allclose(got[mask], expected[mask], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_padding_is_invisible_on_either_side(shape):
    network, params = make(shape)
    text = np.random.default_rng(2).integers(0, tiny.VOCAB, size=(1, 6)).astype(np.int32)

    @jax.jit
    def run(params, tokens, mask):
        def loss(params):
            logits = jnp.where(mask[..., None], network.apply(params, tokens, mask), 0.0)
            return jnp.sin(logits).sum(), logits

        return jax.grad(loss, has_aux=True)(params)

    expected_gradient, expected = run(params, text, np.ones((1, 6), bool))
    # Ids that are no ids, too: id 0 is embedded under the mask.
    for left, pad_id in [(4, 0), (0, 0), (2, 7), (4, tiny.VOCAB + 9), (0, -3)]:
        tokens = np.full((1, 10), pad_id, np.int32)
        tokens[:, left : left + 6] = text
        mask = np.zeros((1, 10), bool)
        mask[:, left : left + 6] = True
        gradient, logits = run(params, tokens, mask)
        np.testing.assert_allclose(logits[:, left : left + 6], expected, atol=1e-5, rtol=1e-5)
        tiny.leaves_close(gradient, expected_gradient, atol=1e-4, rtol=1e-4)


def test_nan_in_padded_hidden_states_is_invisible():
    network = reward_network(tiny.model_config(), start_layer=1)
    params = tiny.random_params(network)
    _, mask = tiny.tokens_and_mask(3, 3, 7)
    hidden = jnp.asarray(np.random.default_rng(3).normal(size=(3, 7, 32)), jnp.float32)

    @jax.jit
    def run(params, hidden):
        def loss(params, hidden):
            return jnp.where(mask, network.apply(params, hidden, mask), 0.0).sum()

        return jax.value_and_grad(loss, argnums=(0, 1))(params, hidden)

    assert not mask.all()
    dirty = jnp.where(mask[..., None], hidden, jnp.nan)
    tiny.leaves_close(run(params, dirty), run(params, hidden), rtol=0.0)


def test_a_pad_id_with_a_broken_embedding_does_no_harm():
    # Id 0 stands under the mask: the embedding of a pad token is often never trained.
    network = value_network(tiny.model_config())
    params = tiny.random_params(network)
    tokens, mask = tiny.tokens_and_mask(11, 2, 6)
    table = jnp.where(jnp.arange(tiny.VOCAB)[:, None] == 4, jnp.nan, params["embed"]["tokens"])
    broken = params | {"embed": {"tokens": table}}
    apply = jax.jit(network.apply)
    got, expected = apply(broken, jnp.where(mask, tokens, 4), mask), apply(params, tokens, mask)
    np.testing.assert_array_equal(np.asarray(got)[mask], np.asarray(expected)[mask])


def test_positions_are_counted_from_the_mask():
    network, params = make("gpt2")
    mask = jnp.arange(10)[None] >= 4  # six real tokens after four of padding

    def loss(params):
        logits = network.apply(params, jnp.full((1, 10), 7), mask)
        return jnp.where(mask[..., None], jnp.sin(logits), 0.0).sum()

    used = (jax.jit(jax.grad(loss))(params)["embed"]["positions"] != 0.0).any(axis=1)
    assert used.tolist() == [True] * 6 + [False] * 26


@pytest.mark.parametrize("shape", ["llama", "scanned"])
def test_the_network_is_causal(shape):
    config = tiny.model_config(**tiny.SHAPES[shape])
    network = policy_network(config, start_layer=0)  # embeddings go in: they have gradients
    params = tiny.random_params(network)
    inputs = jnp.asarray(np.random.default_rng(4).normal(size=(1, 6, 32)), jnp.float32)

    def outputs(inputs):
        return network.apply(params, inputs, jnp.ones((1, 6), bool))[0, :, 3]

    reaches = (jax.jit(jax.jacobian(outputs))(inputs)[:, 0] != 0.0).any(axis=-1)
    np.testing.assert_array_equal(reaches, np.tril(np.ones((6, 6), bool)))


def test_scanned_layers_are_the_unrolled_ones():
    config = tiny.model_config(num_layers=3)
    params = tiny.random_params(policy_network(config))
    stacked = stack_layers(params)
    tiny.leaves_close(unstack_layers(stacked), params, rtol=0.0)
    tokens, mask = tiny.tokens_and_mask(5, 2, 8)

    def run(config, params):
        def loss(params):
            logits = policy_apply(config, params, tokens, mask)
            return jnp.where(mask[..., None], jnp.sin(logits), 0.0).sum(), logits

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    gradient, logits = run(dataclasses.replace(config, scan_layers=True), stacked)
    expected_gradient, expected = run(config, params)
    np.testing.assert_allclose(logits[mask], expected[mask], atol=1e-5)
    tiny.leaves_close(unstack_layers(gradient), expected_gradient, atol=1e-4, rtol=1e-4)


def test_grouped_queries_are_attention_with_repeated_keys():
    config = tiny.model_config()
    params = tiny.random_params(policy_network(config))
    repeated = jax.tree.map(lambda x: x, params)
    for layer in repeated["layers"].values():
        for name in ("key", "value"):
            kernel = layer["attention"][name]["kernel"]
            layer["attention"][name]["kernel"] = jnp.repeat(kernel, 2, axis=1)
    tokens, mask = tiny.tokens_and_mask(6, 2, 8)
    full = dataclasses.replace(config, num_kv_heads=4)
    got = jax.jit(policy_apply, static_argnums=0)(config, params, tokens, mask)
    expected = jax.jit(policy_apply, static_argnums=0)(full, repeated, tokens, mask)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("family", tiny.SHAPES)
def test_outputs_and_gradients_of_some_positions_are_theirs_among_all(family, remat):
    config = tiny.model_config(**tiny.SHAPES[family], remat=remat)
    network = policy_network(config)
    params = tiny.random_params(network)
    tokens, mask = tiny.tokens_and_mask(7, 2, 8)
    positions = jnp.array([[5, 2, 7], [6, 6, 4]])
    choices = {
        "first_output": (dict(first_output=5), lambda x: x[:, 5:]),
        "output_positions": (dict(output_positions=positions), lambda x: take(x, positions)),
    }

    def run(where, read):
        def loss(params):
            logits = read(network.apply(params, tokens, mask, **where))
            return (logits**2).mean(), logits

        (_, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return logits, gradients

    for where, read in choices.values():
        got = jax.jit(lambda where=where: run(where, lambda x: x))()
        expected = jax.jit(lambda read=read: run({}, read))()
        tiny.leaves_close(got, expected, atol=1e-5, rtol=1e-4)


def take(x, positions):
    return jnp.take_along_axis(x, positions[:, :, None], axis=1)


def test_the_last_layer_computes_nothing_at_positions_that_are_not_read():
    network, params = make("gpt2")
    tokens, mask = tiny.tokens_and_mask(7, 2, 8)
    run = jax.jit(network.apply, static_argnames="first_output")
    few, all_ = (
        run.lower(params, tokens, mask, first_output=n).compile().cost_analysis()["flops"]
        for n in (7, 0)
    )
    assert few < 0.7 * all_  # of two layers


def test_llama_3_stretches_long_waves_alone():
    # Head size 8, theta 10,000: frequencies 1, 0.1, 0.01, 0.001. In an original context of 16
    # they turn 2.55, 0.25, ... times. Under 1 turn: divided by 8. Between 1 and 4, a ramp:
    # (2.546 - 1) / 3 = 0.5155 keeps its frequency, the rest is divided by 8.
    config = tiny.model_config(**tiny.SHAPES["llama"])
    turns = 16 / (2 * np.pi)
    keep = (turns - 1) / 3
    expected = [keep + (1 - keep) / 8, 0.1 / 8, 0.01 / 8, 0.001 / 8]
    of_model = config.rope_theta, config.num_rotated
    found = config.rope_scaling.frequencies(*of_model, length=16)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(plain_frequencies(*of_model), [1.0, 0.1, 0.01, 0.001], rtol=1e-6)


def test_heads_start_as_they_should():
    config = tiny.model_config(num_layers=1, embed_dim=4096, mlp_dim=1)
    heads = jax.jit(lambda key: reward_network(config).init(key)["head"])(jax.random.key(0))
    assert heads["kernel"].shape == (4096, 1)
    np.testing.assert_allclose(heads["kernel"].std(), 1 / np.sqrt(4097), rtol=0.05)
    assert heads["bias"].tolist() == [0.0]
    heads = jax.jit(lambda key: value_network(config).init(key)["head"])(jax.random.key(0))
    assert not heads["kernel"].any() and not heads["bias"].any()


@pytest.mark.parametrize("shape", ["gpt2", "scanned"])
def test_policy_apply_takes_numpy_parameters_inside_a_jitted_function(shape):
    config = tiny.model_config(**tiny.SHAPES[shape])
    _, params = make(shape)
    tokens, mask = tiny.tokens_and_mask(8, 2, 6)
    numpy_params = jax.tree.map(np.asarray, params)
    got = jax.jit(lambda tokens: policy_apply(config, numpy_params, tokens, mask))(tokens)
    expected = jax.jit(policy_apply, static_argnums=0)(config, params, tokens, mask)
    assert got.shape == (2, 6, tiny.VOCAB) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_bfloat16_computes_short_and_gives_float32(tie_embeddings):
    config = tiny.model_config(tie_embeddings=tie_embeddings)
    params = tiny.random_params(policy_network(config))
    tokens, mask = tiny.tokens_and_mask(9, 2, 6)
    short_config = dataclasses.replace(config, dtype="bfloat16")
    short = jax.jit(policy_apply, static_argnums=0)(short_config, params, tokens, mask)
    exact = jax.jit(policy_apply, static_argnums=0)(config, params, tokens, mask)
    assert short.dtype == jnp.float32
    error = np.abs(short[mask] - exact[mask]).max()
    assert 1e-4 < error < 0.15
    values = reward_network(short_config)
    scores = jax.jit(values.apply)(tiny.random_params(values), tokens, mask)
    assert scores.dtype == jnp.float32
    hidden = jax.eval_shape(trunk_network(short_config, end_layer=1).apply, params, tokens, mask)
    assert hidden.dtype == jnp.bfloat16


@pytest.mark.parametrize("make", [policy_network, value_network, reward_network])
def test_no_network_draws_random_numbers(make):
    # No dropout anywhere: the same inputs give the same bits.
    network = make(tiny.model_config())
    tokens, mask = tiny.tokens_and_mask(10, 2, 6)
    program = jax.make_jaxpr(network.apply)(tiny.random_params(network), tokens, mask)
    assert not any(word in str(program) for word in ("random", "threefry", "rng"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(positions="alibi"), r"model.positions must be one of .*'alibi'"),
        (dict(norm="batch"), r"model.norm must be one of .*'batch'"),
        (dict(mlp="relu"), r"model.mlp must be one of .*'relu'"),
        (dict(dtype="int8"), r"model.dtype must be one of .*'int8'"),
        (dict(num_layers=0), "model.num_layers must be a positive integer, got 0"),
        (dict(vocab_size=-1), "model.vocab_size must be a positive integer, got -1"),
        (dict(mlp_dim=4.0), "model.mlp_dim must be a positive integer, got 4.0"),
        (dict(num_kv_heads=3), "num_heads .4. must be a multiple of .*num_kv_heads .3."),
        (dict(head_dim=7), "model.head_dim must be even"),
    ],
)
def test_a_model_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny.model_config(**changes)


def test_odd_heads_are_fine_without_rotary():
    assert tiny.model_config(head_dim=7, positions="learned").head_dim == 7


def test_a_misspelt_field_is_refused():
    with pytest.raises(TypeError, match="n_layers"):
        ModelConfig(n_layers=2)


def test_more_positions_than_the_table_has_are_refused():
    network, params = make("gpt2")
    with pytest.raises(ValueError, match=r"33 positions, but the model has 32 .model.max_length"):
        network.apply(params, jnp.zeros((1, 33), jnp.int32), jnp.ones((1, 33), bool))
