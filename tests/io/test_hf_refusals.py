"""What a folder of weights lacks, has too much, or asks for in vain is refused by name."""

import json
import re

import numpy as np
import pytest

from ppo_jax.io import huggingface as hf
from tests.support.tiny_hf import assert_same_tree, edit_config, edit_weights, saver


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saver(tmp_path_factory.mktemp)


@pytest.mark.parametrize(
    ("name", "key", "value", "named"),
    [
        ("gpt2", "activation_function", "relu", "activation_function='relu'"),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", "reorder_and_upcast_attn", True, "reorder_and_upcast_attn"),
        ("gpt2", "scale_attn_weights", False, "scale_attn_weights=False"),
        ("gpt2", "add_cross_attention", True, "add_cross_attention"),
        ("llama", "hidden_act", "gelu", "hidden_act='gelu'"),
        ("llama", "pretraining_tp", 2, "pretraining_tp=2"),
        ("llama", "sliding_window", 128, "sliding_window=128"),
        ("llama", "num_local_experts", 8, "num_local_experts=8"),
        ("llama", "attn_logit_softcapping", 50.0, "attn_logit_softcapping"),
        ("llama", "embedding_multiplier", 12.0, "embedding_multiplier"),
        ("llama", "partial_rotary_factor", 0.5, "partial_rotary_factor"),
        ("llama", "quantization_config", {"bits": 4}, "quantization_config"),
        ("llama", "auto_map", {"AutoModel": "modeling.Model"}, "auto_map"),
        ("llama", "rope_parameters", {"rope_type": "yarn", "factor": 4.0}, "'yarn'"),
        ("llama", "rope_parameters", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", "rope_parameters", {"mrope_section": [2, 2, 2]}, "mrope_section"),
        ("llama", "rope_parameters", {"rope_type": "llama3"}, "'factor'"),
        ("qwen2", "use_sliding_window", True, "use_sliding_window"),
        ("qwen3", "layer_types", ["full_attention", "sliding_attention"], "sliding_attention"),
    ],
)
def test_an_option_that_changes_the_outputs_is_refused_by_name(
    saved, tmp_path, name, key, value, named
):
    folder = edit_config(saved(name)[1], tmp_path, **{key: value})
    with pytest.raises(ValueError, match=named):
        hf.load_config(folder)


def test_an_unsupported_family_is_told_the_supported_ones(saved, tmp_path):
    folder = edit_config(saved("llama")[1], tmp_path, model_type="mamba")
    with pytest.raises(ValueError, match=r"'mamba'.*\['gpt2', 'llama', 'qwen2', 'qwen3'\]"):
        hf.load_config(folder)


def test_a_missing_size_is_named(saved, tmp_path):
    folder = edit_config(saved("llama")[1], tmp_path, intermediate_size=None)
    with pytest.raises(ValueError, match="intermediate_size"):
        hf.load_config(folder)


def test_harmless_options_are_accepted(saved, tmp_path):
    extra = {"rope_interleaved": False, "num_experts": 0, "torch_dtype": "bfloat16", "my_note": 3}
    folder = edit_config(saved("llama")[1], tmp_path, **extra)
    assert hf.load_config(folder) == hf.load_config(saved("llama")[1])


def test_a_tensor_that_is_not_used_is_named(saved, tmp_path):
    def add(tensors):
        tensors["score.weight"] = np.zeros((1, 32), np.float32)

    with pytest.raises(ValueError, match=r"hold 1 tensors .* model\.score\.weight"):
        hf.load_policy(edit_weights(saved("llama")[1], tmp_path, add))


def test_a_bias_that_the_config_denies_is_named(saved, tmp_path):
    folder = edit_config(saved("llama-biases")[1], tmp_path, mlp_bias=False)
    with pytest.raises(ValueError, match=r"hold 6 tensors .*mlp\.down_proj\.bias"):
        hf.load_policy(folder)


def test_a_parameter_that_is_not_filled_is_named(saved, tmp_path):
    def remove(tensors):
        del tensors["transformer.h.1.attn.c_attn.bias"]

    with pytest.raises(ValueError, match=r"lack 1 tensors: transformer\.h\.1\.attn\.c_attn\.bias"):
        hf.load_policy(edit_weights(saved("gpt2")[1], tmp_path, remove))


def test_a_wrong_shape_is_told_with_both_shapes(saved, tmp_path):
    def cut(tensors):
        tensors["model.layers.1.self_attn.k_proj.weight"] = np.zeros((8, 32), np.float32)

    with pytest.raises(ValueError, match=r"1\.self_attn\.k_proj\.weight.*\(8, 32\).*\(16, 32\)"):
        hf.load_policy(edit_weights(saved("llama")[1], tmp_path, cut))


def test_stored_integers_are_refused(saved, tmp_path):
    def quantise(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)

    with pytest.raises(ValueError, match=r"model\.norm\.weight is stored as I8; choose from"):
        hf.load_policy(edit_weights(saved("llama")[1], tmp_path, quantise))


@pytest.mark.parametrize("damage", ["empty", "torn", "shortened"])
def test_a_damaged_file_is_named(saved, tmp_path, damage):
    folder = edit_weights(saved("llama")[1], tmp_path, lambda tensors: None)
    path = folder / "model.safetensors"
    content = {"empty": b"", "torn": b'{"a', "shortened": path.read_bytes()[:-1]}[damage]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} is damaged: .*$"):
        hf.load_policy(folder)


def test_a_wrong_shape_is_found_before_any_weight_is_read(saved, tmp_path, monkeypatch):
    def cut(tensors):
        tensors["model.norm.weight"] = np.zeros(3, np.float32)

    monkeypatch.setattr(hf, "read_parameters", None)
    folder = edit_weights(saved("llama")[1], tmp_path, cut)
    message = rf"{folder}: model\.norm\.weight has shape \(3,\), but config\.json asks for \(32,\)"
    with pytest.raises(ValueError, match=message):
        hf.load_policy(folder)


def test_a_tied_head_in_the_file_must_equal_the_embedding(saved, tmp_path):
    _, folder = saved("qwen2")

    def add_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    def add_other_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    copy = edit_weights(folder, tmp_path, add_head)
    assert_same_tree(hf.load_policy(copy)[1], hf.load_policy(folder)[1])
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        hf.load_policy(edit_weights(folder, tmp_path, add_other_head))


def test_pickled_weights_are_refused_with_the_command_that_converts_them(saved, tmp_path):
    (tmp_path / "config.json").write_text((saved("llama")[1] / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*python -c .*save_pretrained"):
        hf.load_policy(tmp_path)


def test_a_missing_shard_and_a_missing_config_are_named(saved, tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        hf.load_policy(tmp_path)
    (tmp_path / "config.json").write_text((saved("llama")[1] / "config.json").read_text())
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / hf.INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="model-00001-of-00002.safetensors"):
        hf.load_policy(tmp_path)


def test_a_reward_head_has_no_place_in_a_checkpoint(saved):
    config, params = hf.load_policy(saved("llama")[1])
    params = {**params, "head": {"kernel": np.zeros((32, 1)), "bias": np.zeros(1)}}
    with pytest.raises(ValueError, match=r"no place for the parameter head\.bias"):
        hf.params_to_hf(config, "llama", params)
