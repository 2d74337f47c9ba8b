"""Low-rank adapters: what they compute, what of a network with them is trained, and what is not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.config.stages import LoRASettings
from ppo_jax.core.network import merge_params
from ppo_jax.models.build import policy_network, reward_network
from ppo_jax.models.lora import TARGETS, check_targets, init_lora, merge_lora, split_lora
from ppo_jax.models.partition import split_params, stack_layers, start_layer, unstack_layers
from ppo_jax.pipeline.preflight import check_part
from ppo_jax.planner.hlo.cost import cost_analysis
from tests.support import tiny

ALPHA, RANK = 6.0, 4
MLP_OF_GPT2 = ("up", "down")


def targets_of(config):
    if config.experts is not None:
        return ("query", "value", "output")
    return TARGETS if config.mlp == "gated_silu" else ("query", "key", "output", *MLP_OF_GPT2)


def adapted(network=policy_network, targets=None, fresh=False, **changes):
    """(config, parameters with adapters); B is drawn as well, unless the adapters are fresh."""
    config = tiny.model_config(lora_alpha=ALPHA, **changes)
    params = tiny.random_params(network(config))
    chosen = targets or targets_of(config)
    adapters = init_lora(jax.random.key(0), config, params, targets=chosen, rank=RANK)
    if not fresh:
        rng = np.random.default_rng(1)
        adapters = jax.tree.map(
            lambda x: x + rng.normal(size=x.shape).astype(np.float32) / 5, adapters
        )
    return config, merge_params(params, adapters)


def logits(config, params):
    tokens, mask = tiny.tokens_and_mask(0, 4, 10)
    return jax.jit(policy_network(config).apply)(params, tokens, mask)


# --- what they compute ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.SHAPES)
def test_a_network_with_new_adapters_is_the_network_without_bit_for_bit(family):
    config, params = adapted(fresh=True, **tiny.SHAPES[family])
    base, adapters = split_lora(params)
    np.testing.assert_array_equal(logits(config, params), logits(config, base))
    assert {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(adapters)} == {
        "lora_a",
        "lora_b",
    }


@pytest.mark.parametrize("family", tiny.SHAPES)
def test_adapters_in_the_weights_give_the_logits_of_adapters_beside_them(family):
    config, params = adapted(**tiny.SHAPES[family])
    merged = merge_lora(config, params)
    plain = dataclasses.replace(config, lora_alpha=0.0)
    expected = jax.eval_shape(policy_network(plain).init, jax.random.key(0))
    assert jax.tree.structure(merged) == jax.tree.structure(expected)
    with_them = logits(config, params)
    np.testing.assert_allclose(logits(plain, merged), with_them, atol=2e-5)
    assert np.abs(with_them - logits(config, split_lora(params)[0])).max() > 0.1


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_merged_kernels_are_those_of_plain_matrices(family):
    config, params = adapted(**tiny.SHAPES[family])
    merged = merge_lora(config, params)
    changed = 0
    for number, layer in params["layers"].items():
        for part in ("attention", "mlp"):
            for name, leaves in layer[part].items():
                kernel = np.asarray(leaves["kernel"], np.float64) if "kernel" in leaves else None
                if "lora_a" in leaves:
                    num_in = 2 if name == "output" else 1
                    inputs = int(np.prod(kernel.shape[:num_in]))
                    a = np.asarray(leaves["lora_a"], np.float64).reshape(inputs, RANK)
                    b = np.asarray(leaves["lora_b"], np.float64).reshape(RANK, -1)
                    kernel = kernel + (ALPHA / RANK * a @ b).reshape(kernel.shape)
                    changed += 1
                if kernel is not None:
                    found = merged["layers"][number][part][name]["kernel"]
                    np.testing.assert_allclose(found, kernel, atol=1e-6)
    assert changed == config.num_layers * len(targets_of(config))
    assert merged["embed"]["tokens"] is params["embed"]["tokens"]


def test_new_adapters_are_drawn_as_peft_draws_them():
    """kaiming_uniform_(a=sqrt(5)) of a matrix with I inputs is uniform in ±1 / sqrt(I)."""
    config = tiny.model_config(num_layers=1, lora_alpha=ALPHA)
    params = tiny.random_params(policy_network(config))
    found = init_lora(jax.random.key(0), config, params, targets=TARGETS, rank=64)["layers"]["0"]
    for name, inputs in {"query": (32,), "output": (4, 8), "down": (48,)}.items():
        pair = found["mlp" if name == "down" else "attention"][name]
        assert pair["lora_a"].shape == (*inputs, 64) and not pair["lora_b"].any()
        a, bound = np.asarray(pair["lora_a"]), 1 / np.sqrt(np.prod(inputs))
        assert 0.95 * bound < np.abs(a).max() <= bound
        assert a.std() == pytest.approx(bound / np.sqrt(3), rel=0.05)
    assert found["attention"]["key"]["lora_b"].shape == (64, 2, 8)


def test_the_numbers_depend_on_layer_and_target_alone():
    shape = dict(num_layers=3, lora_alpha=ALPHA)
    config, scanned = (tiny.model_config(scan_layers=scan, **shape) for scan in (False, True))
    params = tiny.random_params(policy_network(config))
    init = functools.partial(init_lora, jax.random.key(0), rank=RANK)
    every = init(config, params, targets=TARGETS)
    stacked = init(scanned, stack_layers(params), targets=TARGETS)
    tiny.leaves_close(unstack_layers(stacked), every, rtol=0.0)
    few = init(config, params, targets=("up", "query"))
    for number in "012":
        for part, name in (("mlp", "up"), ("attention", "query")):
            found = few["layers"][number][part][name]["lora_a"]
            np.testing.assert_array_equal(found, every["layers"][number][part][name]["lora_a"])
    drawn = [np.asarray(layer["attention"]["query"]["lora_a"]) for layer in few["layers"].values()]
    assert not np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[1], drawn[2])


def test_a_target_that_the_model_lacks_is_refused():
    config = tiny.model_config(**tiny.SHAPES["gpt2"])
    params = tiny.random_params(policy_network(config))
    for target in ("gate", "head", "c_attn"):
        with pytest.raises(ValueError) as error:
            init_lora(jax.random.key(0), config, params, targets=("query", target), rank=2)
        assert str(error.value) == (
            "targets must be among ['query', 'key', 'value', 'output', 'up', 'down'] for this "
            f"model, got {target!r}"
        )


@pytest.mark.parametrize("target", ["up", "gate", "down"])
def test_experts_are_refused_as_targets(target):
    config = tiny.model_config(**tiny.SHAPES["experts"])
    known = r"\['query', 'key', 'value', 'output'\]"
    with pytest.raises(ValueError, match=f"^targets must be among {known} for .*, got '{target}'$"):
        check_targets(config, ("query", target))


def test_a_run_is_told_of_targets_that_its_models_lack():
    gpt2 = tiny.model_config(**tiny.SHAPES["gpt2"])
    lora = LoRASettings(targets=("query", "gate"))
    with pytest.raises(ValueError, match=r"^ppo.lora.targets must be among .* got 'gate'$"):
        check_part("ppo.value_trainable", "lora", lora, gpt2)
    check_part("ppo.value_trainable", "all", lora, gpt2)
    check_part("ppo.value_trainable", "lora", lora, tiny.model_config())


def test_adapters_without_a_weight_are_refused_rather_than_ignored():
    config, params = adapted()
    config = dataclasses.replace(config, lora_alpha=0.0)
    for use in (logits, merge_lora):
        with pytest.raises(ValueError, match="have adapters, but the model's lora_alpha is 0"):
            use(config, params)
    with pytest.raises(ValueError, match=r"model.lora_alpha must be >= 0, got -1.0"):
        tiny.model_config(lora_alpha=-1.0)


# --- what is trained ------------------------------------------------------------------------------


@pytest.mark.parametrize("scan_layers", [False, True])
def test_adapters_alone_are_trained_and_the_rest_is_what_was_given(scan_layers):
    config, params = adapted(scan_layers=scan_layers)
    assert start_layer(config, "lora") is None
    parts = split_params(config, params, "lora", None)
    base, adapters = split_lora(params)
    assert parts.trunk == {} and not any("head" in part for part in (parts.frozen, parts.trained))
    assert jax.tree.structure(parts.trained) == jax.tree.structure(adapters)
    given = [id(leaf) for leaf in jax.tree.leaves(base)]
    assert [id(leaf) for leaf in jax.tree.leaves(parts.frozen)] == given
    tiny.leaves_close(merge_params(*parts), params, rtol=0.0)


def test_a_head_of_logits_is_not_trained_with_adapters_and_one_of_scores_is():
    for network, trained in ((policy_network, False), (reward_network, True)):
        config, params = adapted(network, tie_embeddings=False)
        parts = split_params(config, params, "lora", None)
        assert ("head" in parts.trained, "head" in parts.frozen) == (trained, not trained)
        tiny.leaves_close(merge_params(*parts), params, rtol=0.0)


def test_what_cannot_be_split_is_refused():
    config, params = adapted()
    with pytest.raises(ValueError, match="'lora' is not above layer 1"):
        split_params(config, params, "lora", 1)
    with pytest.raises(ValueError, match="trainable='lora' needs adapters in the parameters"):
        split_params(config, split_lora(params)[0], "lora", None)


@pytest.mark.parametrize("remat", ["none", "dots"])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_no_gradient_of_a_frozen_kernel_is_computed(scan_layers, remat):
    """A third of the products of an update are gradients of kernels; those of rank 4 are few."""
    how = dict(scan_layers=scan_layers, remat=remat, embed_dim=64, mlp_dim=128, head_dim=16)
    config, params = adapted(targets=("query", "value"), **how)
    tokens, mask = tiny.tokens_and_mask(0, 4, 12)
    apply = policy_network(config).apply

    def flops(trainable):
        parts = split_params(config, params, trainable, None)

        def loss(trained, frozen):
            return (apply(merge_params(frozen, trained), tokens, mask, first_output=6) ** 2).sum()

        compiled = jax.jit(jax.grad(loss)).lower(parts.trained, parts.frozen).compile()
        return cost_analysis(compiled).flops

    assert flops("lora") < 0.72 * flops("all")


def test_gradients_are_those_of_the_merged_kernels():
    """dL/dA = alpha / r dL/dW B' and dL/dB = alpha / r A' dL/dW."""
    config, params = adapted(targets=("query",), num_layers=1)
    base, adapters = split_lora(params)
    tokens, mask = tiny.tokens_and_mask(0, 4, 10)

    def loss(params):
        return jnp.where(mask[:, :, None], policy_network(config).apply(params, tokens, mask), 0.0)

    def of_adapters(adapters):
        return (loss(merge_params(base, adapters)) ** 2).mean()

    def of_merged(merged):
        return (loss(merged) ** 2).mean()

    def place(tree):
        return tree["layers"]["0"]["attention"]["query"]

    got = place(jax.jit(jax.grad(of_adapters))(adapters))
    kernel = place(jax.jit(jax.grad(of_merged))(merge_lora(config, params)))["kernel"]
    kernel = np.asarray(kernel).reshape(32, 32)
    a, b = (np.asarray(place(adapters)[name]) for name in ("lora_a", "lora_b"))
    expected = {"lora_a": kernel @ b.reshape(RANK, 32).T, "lora_b": a.T @ kernel}
    for name, value in expected.items():
        found = np.asarray(got[name]).reshape(value.shape)
        np.testing.assert_allclose(found, ALPHA / RANK * value, rtol=1e-3, atol=1e-6)
        assert np.abs(value).max() > 1e-3
