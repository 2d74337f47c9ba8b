"""Weights of real model families: parity with torch, and back again without a difference."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

from ppo_jax.io import huggingface as hf
from ppo_jax.models.build import policy_apply
from ppo_jax.models.config import computation
from ppo_jax.models.families import FAMILIES, read_config, write_config
from tests.support.tiny_hf import (
    LENGTH,
    LLAMA3_ROPE,
    MIXED_LAYERS,
    SMALL,
    SMALL_GPT2,
    TINY_MODELS,
    VOCAB,
    assert_same_tree,
    edit_config,
    edit_weights,
    saver,
    torch,
    torch_model,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saver(tmp_path_factory.mktemp)


def torch_logits(model, tokens, mask):
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    with torch.no_grad():
        return model(
            input_ids=torch.tensor(tokens),
            attention_mask=torch.tensor(mask.astype(np.int64)),
            position_ids=torch.tensor(positions),
        ).logits.numpy()


def random_batch(*, padding):
    tokens = np.random.default_rng(0).integers(0, VOCAB, (len(padding), LENGTH))
    mask = np.arange(LENGTH)[None] >= np.array(padding)[:, None]
    return tokens, mask


@pytest.mark.parametrize("name", TINY_MODELS)
def test_logits_equal_those_of_torch_with_and_without_left_padding(saved, name):
    model, folder = saved(name)
    config, params = hf.load_policy(folder)
    for padding in ([0, 0], [7, 2]):
        tokens, mask = random_batch(padding=padding)
        theirs = torch_logits(model, tokens, mask)
        ours = policy_apply(config, params, jnp.asarray(tokens, jnp.int32), jnp.asarray(mask))
        assert np.abs(np.asarray(ours) - theirs)[mask].max() <= 1e-4
        assert np.abs(theirs).max() > 1.0  # or the tolerance would say nothing


@pytest.mark.parametrize("name", TINY_MODELS)
def test_saving_and_loading_are_inverse_for_both_layouts_of_layers(saved, name):
    _, folder = saved(name)
    on_disk = load_file(folder / "model.safetensors")
    for scan_layers in (False,) if name in MIXED_LAYERS else (False, True):
        config, params = hf.load_policy(folder, scan_layers=scan_layers)
        assert config == hf.load_config(folder, scan_layers=scan_layers)
        again = hf.params_to_hf(config, TINY_MODELS[name][0], params)
        assert again.keys() == on_disk.keys()
        for key, tensor in again.items():
            np.testing.assert_array_equal(tensor, on_disk[key], err_msg=key)


def test_scanned_layers_are_the_unrolled_ones_stacked(saved):
    _, folder = saved("llama-biases")
    _, unrolled = hf.load_policy(folder)
    _, scanned = hf.load_policy(folder, scan_layers=True)
    stacked = jax.tree.map(lambda *x: np.stack(x), *unrolled["layers"].values())
    assert_same_tree(scanned, {**unrolled, "layers": {"stack": stacked}})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_shards_in_half_precision_are_read_as_float32(saved, tmp_path, dtype):
    model, _ = saved("qwen3")
    dtype = getattr(torch, dtype)
    half = torch_model("qwen3").to(dtype)
    half.save_pretrained(tmp_path, max_shard_size="10KB")
    assert not (tmp_path / "model.safetensors").exists()
    _, params = hf.load_policy(tmp_path)
    expected = model.model.layers[1].mlp.up_proj.weight.detach().to(dtype).float().numpy().T
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(params["layers"]["1"]["mlp"]["up"]["kernel"], expected)


def test_dtype_is_that_of_the_computation(saved):
    _, folder = saved("llama")
    config, params = hf.load_policy(folder, dtype="bfloat16")
    assert config.dtype == "bfloat16"
    assert params["embed"]["tokens"].dtype == np.float32
    for dtype in (jnp.bfloat16, jnp.dtype("bfloat16"), ml_dtypes.bfloat16):
        assert hf.load_policy(folder, dtype=dtype)[0] == config
    for dtype in ("int8", jnp.int8, float, None, 16):
        with pytest.raises(ValueError, match=r"model\.dtype must be one of .*bfloat16"):
            hf.load_policy(folder, dtype=dtype)


def test_old_and_new_forms_of_rope_settings_are_the_same(saved, tmp_path):
    _, folder = saved("llama-3")
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    old = edit_config(
        folder, tmp_path, rope_parameters=None, rope_theta=500.0, rope_scaling=scaling
    )
    config = hf.load_config(folder)
    assert config.rope_theta == 500.0 and config.rope_scaling.factor == 8.0
    assert hf.load_config(old) == config


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_what_a_config_leaves_out_is_as_in_transformers(family):
    """Head sizes, biases, tied heads and the rest: each family has defaults of its own."""
    sizes = SMALL_GPT2 if family == "gpt2" else SMALL
    sizes = {key: x for key, x in sizes.items() if "eps" not in key}
    theirs = transformers.AutoConfig.for_model(family, **sizes).to_json_string(use_diff=False)
    assert read_config({"model_type": family, **sizes}) == read_config(json.loads(theirs))


@pytest.mark.parametrize("name", TINY_MODELS)
def test_writing_and_reading_a_config_are_inverse(saved, name):
    scanned = name not in MIXED_LAYERS
    choices = dict(dtype="bfloat16", scan_layers=scanned, remat="dots", attention="plain")
    config = hf.load_config(saved(name)[1], **choices)
    raw = json.loads(json.dumps(write_config(config)))
    assert raw["model_type"] == config.family == TINY_MODELS[name][0]
    assert read_config(raw, **choices) == config
    assert computation(config) == choices


@pytest.mark.parametrize("name", ["mistral", "seed_oss", "phi3"])
def test_a_model_has_the_name_that_it_had_as_long_as_that_family_has_its_shape(saved, name):
    """Others hold these, too: the first of them is named where the name is not known or not fit."""
    config = hf.load_config(saved(name)[1])
    first = "qwen2" if name == "seed_oss" else "llama"
    assert write_config(replace(config, vocab_size=70))["model_type"] == name
    unknown = replace(config, family="")
    assert write_config(unknown)["model_type"] == first
    assert unknown == config and hash(unknown) == hash(config)  # the same programs
    assert write_config(replace(config, family="gpt2"))["model_type"] == first


def test_layers_with_and_without_experts_are_not_scanned(saved):
    with pytest.raises(ValueError, match="scan_layers must be false where some layers"):
        hf.load_config(saved("qwen3_moe-dense")[1], scan_layers=True)


def test_a_shape_of_no_family_has_no_config(saved):
    llama, gpt2 = (hf.load_config(saved(name)[1]) for name in ("llama", "gpt2"))
    for config in (replace(llama, mlp="gelu"), replace(gpt2, num_kv_heads=2)):
        with pytest.raises(ValueError, match="none of .*'gpt2', .*'llama', 'mistral'.* has a"):
            write_config(config)


def test_a_checkpoint_without_the_base_prefix_loads_the_same(saved, tmp_path):
    _, folder = saved("gpt2")

    def strip(tensors):
        for key in list(tensors):
            tensors[key.removeprefix("transformer.")] = tensors.pop(key)
        tensors["h.0.attn.bias"] = np.ones((1, 1, 64, 64), np.float32)  # a causal mask

    assert_same_tree(
        hf.load_policy(edit_weights(folder, tmp_path, strip))[1], hf.load_policy(folder)[1]
    )


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france():
    from ppo_jax.io.tokenizers import load_tokenizer

    name = "package:smollm2-135m-instruct"
    tokenizer = load_tokenizer(name)
    config, params = hf.load_policy(name)
    tokens = jnp.asarray([tokenizer("The capital of France is")["input_ids"]], jnp.int32)
    for _ in range(2):
        logits = policy_apply(config, params, tokens, jnp.ones(tokens.shape, bool))
        tokens = jnp.concatenate([tokens, logits[:, -1:].argmax(-1).astype(jnp.int32)], axis=1)
    assert tokenizer.decode(tokens[0, 5:]) == " Paris."
