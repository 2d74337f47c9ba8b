"""What a folder of weights lacks, has too much, or asks for in vain is refused by name."""

import dataclasses
import errno
import io
import json
import os
import re

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ppo_jax.io import huggingface as hf
from ppo_jax.models import families
from ppo_jax.models.config import LayerKind
from ppo_jax.models.families import family_of
from tests.support.meshes import layout_of
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
        ("gpt2", "activation_function", "gelu", "activation_function='gelu'"),
        ("llama", "hidden_act", "gelu", "hidden_act='gelu'"),
        ("llama", "pretraining_tp", 2, "pretraining_tp=2"),
        ("llama", "sliding_window", 32, "sliding_window=32"),
        ("llama", "num_local_experts", 8, "num_local_experts=8"),
        ("llama", "attn_logit_softcapping", 50.0, "attn_logit_softcapping"),
        ("llama", "embedding_multiplier", 12.0, "embedding_multiplier"),
        ("llama", "partial_rotary_factor", 0.5, "partial_rotary_factor"),
        ("llama", "quantization_config", {"bits": 4}, "quantization_config"),
        ("llama", "auto_map", {"AutoModel": "modeling.Model"}, "auto_map"),
        ("llama", "rope_parameters", {"rope_type": "ntk", "factor": 4.0}, "'ntk'"),
        ("llama", "rope_parameters", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", "rope_parameters", {"mrope_section": [2, 2, 2]}, "mrope_section"),
        ("llama", "rope_parameters", {"rope_type": "llama3"}, "'factor'"),
        ("llama", "rope_parameters", {"rope_type": "linear"}, "'factor'"),
        ("llama", "rope_parameters", {"rope_type": "linear", "factor": 2, "alpha": 1}, "alpha"),
        ("llama", "rope_parameters", {"factor": 2.0}, "without a rope_type"),
        ("llama", "layer_types", ["chunked_attention"], "chunked_attention"),
        ("llama", "layer_types", ["sliding_attention"] * 2, "only 'full_attention' is supported"),
        ("mistral", "layer_types", ["sliding_attention"] * 2, "for mistral"),
        ("seed_oss", "hidden_act", "gelu", "hidden_act='gelu'"),
        ("gemma", "hidden_act", "silu", "hidden_act='silu'"),
        ("gemma", "use_bidirectional_attention", True, "use_bidirectional_attention=True"),
        ("gemma2", "hidden_activation", "gelu", "hidden_activation='gelu'"),
        ("gemma2", "use_bidirectional_attention", True, "use_bidirectional_attention=True"),
        ("gemma2", "layer_types", ["chunked_attention"] * 2, "chunked_attention"),
        ("gemma3", "attn_logit_softcapping", 50.0, "attn_logit_softcapping=50.0"),
        ("gemma3", "use_bidirectional_attention", True, "use_bidirectional_attention=True"),
        ("gemma3", "model_type", "gemma3", "reads images, too; save the model of its text alone"),
        ("phi3", "hidden_act", "gelu", "hidden_act='gelu'"),
        ("phi3", "auto_map", {"AutoModel": "modeling_mine.Phi3"}, "auto_map"),
        ("phi3", "model_type", "phi3small", "'phi3small' is not supported"),
        ("pythia", "hidden_act", "relu", "hidden_act='relu'"),
        ("pythia", "use_alibi", True, "use_alibi=True"),
        ("olmo2", "hidden_act", "gelu", "hidden_act='gelu'"),
        ("olmo2", "sliding_window", 8, "sliding_window=8"),
        ("smollm3", "use_sliding_window", True, "use_sliding_window=True"),
        ("smollm3", "layer_types", ["sliding_attention"] * 4, "for smollm3"),
        ("granite", "sliding_window", 8, "sliding_window=8"),
        ("granite", "num_local_experts", 8, "num_local_experts=8"),
    ],
)
def test_an_option_that_changes_the_outputs_is_refused_by_name(
    saved, tmp_path, name, key, value, named
):
    folder = edit_config(saved(name)[1], tmp_path, **{key: value})
    with pytest.raises(ValueError, match=named):
        hf.load_config(folder)


def test_a_window_that_a_config_implies_is_told(saved, tmp_path, monkeypatch):
    changes = dict(sliding_window=None, max_position_embeddings=8192)  # None leaves it out
    folder = edit_config(saved("mistral")[1], tmp_path, **changes)
    assert hf.load_config(folder).layer_kinds == (LayerKind(window=4096),) * 2
    blind = dataclasses.replace(family_of("mistral"), understood=frozenset({"rope_parameters"}))
    monkeypatch.setattr(families, "FAMILIES", (blind,))
    with pytest.raises(ValueError, match=r"sliding_window=4096, which is what .* without it means"):
        hf.load_config(folder)


LONG = {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types must .* 2 layers, got 1"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be a number above 0"),
        ("gemma2", {"final_logit_softcapping": -1.0}, "final_logit_softcapping must be a number"),
        ("gemma2", {"sliding_window": -4}, "sliding_window must be a whole number"),
        ("gemma3", {"layer_types": ["full_attention"] * 5}, "layer_types must .* 3 layers, got 5"),
        ("gemma3", {"layer_types": None, "sliding_window_pattern": 0}, "sliding_window_pattern"),
        ("gemma3", {"rope_local_base_freq": "1e4"}, "rope_local_base_freq must be a number"),
        (
            "gemma3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope_parameters.sliding_attention may have a rope_theta alone",
        ),
        ("gemma3", {"rope_parameters": {"full_attention": []}}, "full_attention must be an object"),
        (
            "phi3-long",
            {"rope_parameters": LONG},
            "short_factor must have 4 numbers, one for each rotated pair of a head, got 3",
        ),
        ("phi3-long", {"rope_parameters": LONG | {"short_factor": ["a"]}}, "short_factor must be"),
        ("phi3-long", {"rope_parameters": LONG | {"long_factor": [0.0]}}, "long_factor must be"),
        ("phi3", {"rope_parameters": {"partial_rotary_factor": 1.5}}, "partial_rotary_factor must"),
        ("phi3", {"rope_parameters": {"partial_rotary_factor": 0.4}}, "rotary_dim must be even"),
        ("pythia", {"hidden_size": 30}, r"hidden_size \(30\) must be a multiple"),
        ("pythia", {"rope_parameters": None, "rotary_pct": 0}, "rotary_pct must be a number"),
        ("pythia", {"use_parallel_residual": "no"}, "use_parallel_residual must be true or false"),
        ("olmo3", {"layer_types": ["full"] * 4}, "layer_types has 'full'"),
        ("olmo3", {"sliding_window": 2.5}, "sliding_window must be a whole number"),
        ("smollm3", {"no_rope_layers": [1, 1, 0]}, "no_rope_layers must .* 4 layers"),
        ("smollm3", {"no_rope_layers": [1, 1, 0, 2]}, "no_rope_layers must be a list of 0 and 1"),
        ("granite", {"logits_scaling": 0}, "logits_scaling must be a number above 0"),
        ("granite", {"attention_multiplier": True}, "attention_multiplier must be a number"),
        ("granite", {"attention_bias": 1}, "attention_bias must be true or false"),
    ],
)
def test_a_malformed_config_of_a_newer_family_is_one_line(saved, tmp_path, name, changes, named):
    folder = edit_config(saved(name)[1], tmp_path, **changes)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(folder))}/config\.json: ") as error:
        hf.load_policy(folder)
    assert re.search(named, str(error.value)) and len(str(error.value).splitlines()) == 1


def renamed(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def shorter(name):
    return lambda tensors: tensors.update({name: tensors[name][:-1].copy()})


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("phi3", shorter("model.layers.1.self_attn.qkv_proj.weight"), "qkv_proj.weight has shape"),
        (
            "phi3",
            shorter("model.layers.0.mlp.gate_up_proj.weight"),
            "gate_up_proj.weight has shape",
        ),
        (
            "pythia",
            lambda x: x.pop("gpt_neox.layers.1.attention.query_key_value.bias"),
            "lack 1 tensors: gpt_neox.layers.1.attention.query_key_value.bias",
        ),
        (
            "gemma2",
            lambda x: x.pop("model.layers.0.pre_feedforward_layernorm.weight"),
            "lack 1 tensors: model.layers.0.pre_feedforward_layernorm.weight",
        ),
        ("gemma3", shorter("model.layers.0.self_attn.q_norm.weight"), "q_norm.weight has shape"),
        (
            "olmo2",
            renamed(
                "model.layers.0.post_feedforward_layernorm.weight",
                "model.layers.0.input_layernorm.weight",
            ),
            "lack 1 tensors: model.layers.0.post_feedforward_layernorm.weight",
        ),
    ],
)
def test_malformed_tensors_of_a_newer_family_are_named(saved, tmp_path, name, change, named):
    folder = edit_weights(saved(name)[1], tmp_path, change)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(folder))}.*{named}") as error:
        hf.load_policy(folder)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "key", "value", "words"),
    [
        ("llama", "rms_norm_eps", -1, "above 0"),
        ("llama", "rms_norm_eps", "1e-5", "a number"),
        ("gpt2", "layer_norm_epsilon", True, "a number"),
        ("llama", "rope_theta", 1e31, "at most"),
        ("llama", "rope_theta", [1e4], "a number"),
        ("llama", "tie_word_embeddings", 1.5, "true or false"),
        ("llama", "tie_word_embeddings", 1, "true or false"),
        ("llama", "mlp_bias", "false", "true or false"),
        ("llama", "hidden_size", "32", "a whole number from 1"),
        ("llama", "hidden_size", 32.0, "a whole number"),
        ("llama", "num_attention_heads", True, "a whole number"),
        ("llama", "num_attention_heads", 0, "a whole number from 1"),
        ("llama", "num_key_value_heads", [2], "a whole number"),
        ("llama", "num_hidden_layers", 10**9, "to 4,096"),
        ("gpt2", "n_layer", -2, "a whole number"),
        ("gpt2", "n_embd", 10**400, "a whole number"),
        ("gpt2", "n_inner", {}, "a whole number"),
        ("llama", "rope_parameters", [], "an object"),
        ("llama", "rope_parameters", {"factor": "8"}, "rope_parameters.factor must be a number"),
        ("llama", "rope_scaling", {"rope_type": 3}, "rope_scaling.rope_type must be a text"),
        ("qwen3", "layer_types", "full_attention", "a list of texts"),
        ("llama", "model_type", ["llama"], "not supported"),
        ("llama", "eos_token_id", "2", "a token id"),
        ("llama", "eos_token_id", [2, None], "a token id"),
        ("llama", "pad_token_id", -2, "a token id"),
        ("mistral", "sliding_window", "4096", "a whole number"),
    ],
)
def test_a_value_of_another_type_or_range_is_told_with_file_and_field(
    saved, tmp_path, name, key, value, words
):
    folder = edit_config(saved(name)[1], tmp_path, **{key: value})
    for load in (hf.load_config, hf.load_policy):
        with pytest.raises(ValueError) as error:
            load(folder)
        message = str(error.value)
        assert message.startswith(f"{folder / 'config.json'}: ") and len(message.splitlines()) == 1
        assert key in message and words in message and len(message) < 400


NOT_AN_OBJECT = {
    "empty": b"",
    "blank": b" \n",
    "a list": b"[1, 2]",
    "null": b"null",
    "a number": b"3",
    "torn": b'{"model_type": "lla',
    "not UTF-8": b'{"model_type": "\xff\xfe"}',
    "another encoding": '{"model_type": "llama"}'.encode("utf-16"),
    "nested": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "NaN": b'{"rms_norm_eps": NaN}',
    "too large": b'{"rope_theta": 1e999}',
    "minus infinity": b'{"a": {"b": [1, -Infinity]}}',
    "many digits": b'{"a": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("kind", NOT_AN_OBJECT)
def test_a_config_that_is_no_json_object_is_named(saved, tmp_path, kind):
    folder = edit_config(saved("llama")[1], tmp_path)
    (folder / "config.json").write_bytes(NOT_AN_OBJECT[kind])
    with pytest.raises(ValueError, match=rf"^{re.escape(str(folder))}/config\.json .{{1,300}}$"):
        hf.load_policy(folder)


def sharded(saved, folder, **weight_map):
    """A copy of a saved model in two shards, both with the first norm; the second has ones."""
    tensors = load_file(saved("llama")[1] / "model.safetensors")
    norm = "model.norm.weight"
    first = {key: x for key, x in tensors.items() if "layers.1" not in key}
    second = {key: x for key, x in tensors.items() if key not in first}
    save_file(first, folder / "a.safetensors")
    save_file(second | {norm: np.ones_like(tensors[norm])}, folder / "b.safetensors")
    where = {**dict.fromkeys(first, "a.safetensors"), **dict.fromkeys(second, "b.safetensors")}
    (folder / hf.INDEX).write_text(json.dumps({"weight_map": where | weight_map}))
    (folder / "config.json").write_text((saved("llama")[1] / "config.json").read_text())
    return folder


def test_a_tensor_in_two_shards_is_that_of_the_index(saved, tmp_path):
    norm = "model.norm.weight"
    _, expected = hf.load_policy(saved("llama")[1])
    _, first = hf.load_policy(sharded(saved, tmp_path))
    assert_same_tree(first, expected)
    _, second = hf.load_policy(sharded(saved, tmp_path, **{norm: "b.safetensors"}))
    np.testing.assert_array_equal(second["final_norm"]["scale"], 1.0)
    assert (np.asarray(expected["final_norm"]["scale"]) != 1.0).all()


def test_an_index_that_names_what_is_not_there_is_told(saved, tmp_path):
    folder = sharded(saved, tmp_path, **{"model.embed_tokens.weight": "b.safetensors"})
    with pytest.raises(ValueError, match=r"b\.safetensors has no tensor model\.embed_tokens"):
        hf.load_policy(folder)


@pytest.mark.parametrize("content", [b"{}", b'{"weight_map": []}', b'{"weight_map": {}}', b"[]"])
def test_an_index_without_a_weight_map_is_told(saved, tmp_path, content):
    folder = sharded(saved, tmp_path)
    (folder / hf.INDEX).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(folder / hf.INDEX))}.*object"):
        hf.load_policy(folder)


@pytest.mark.parametrize("name", ["/etc/passwd", "../out.safetensors", "sub/../../out", "link"])
def test_an_index_opens_no_file_outside_of_its_folder(saved, tmp_path, name):
    outside, folder = tmp_path / "out.safetensors", tmp_path / "model"
    folder.mkdir()
    outside.write_bytes((saved("llama")[1] / "model.safetensors").read_bytes())
    (folder / "sub").mkdir()
    (folder / "link").symlink_to(outside)
    sharded(saved, folder, **{"model.norm.weight": name})
    with pytest.raises(ValueError, match=r"weight_map\['model\.norm\.weight'\] leads out of"):
        hf.load_policy(folder)


@pytest.mark.parametrize("name", [3, None, "", ["a"], "a\0b", "gone.safetensors"])
def test_an_index_names_files_that_are_there(saved, tmp_path, name):
    sharded(saved, tmp_path, **{"model.norm.weight": name})
    with pytest.raises(ValueError, match=r"index\.json: weight_map\['model\.norm\.weight'\]"):
        hf.load_policy(tmp_path)


def test_the_links_of_the_hubs_cache_are_followed(saved, tmp_path):
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "0123abc"
    blobs.mkdir()
    folder.mkdir(parents=True)
    for path in sharded(saved, tmp_path / "blobs").iterdir():
        (folder / path.name).symlink_to(f"../../blobs/{path.name}")
    assert_same_tree(hf.load_policy(folder)[1], hf.load_policy(saved("llama")[1])[1])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_named(saved, tmp_path, dtype, number):
    name = "model.layers.1.self_attn.k_proj.weight"

    def spoil(tensors):
        tensors.update({key: x.astype(dtype) for key, x in tensors.items()})
        tensors[name][3, 5] = number

    folder = edit_weights(saved("llama")[1], tmp_path, spoil)
    message = rf"^{re.escape(str(folder))}: {re.escape(name)} holds NaN or infinity$"
    for options in ({}, {"scan_layers": True}, {"shardings": layout_of((1, 8, 1)).shardings}):
        with pytest.raises(ValueError, match=message):
            hf.load_policy(folder, **options)


def test_the_largest_weights_are_finite(saved, tmp_path):
    def enlarge(tensors):
        tensors["model.norm.weight"][:] = np.finfo(np.float32).max

    folder = edit_weights(saved("llama")[1], tmp_path, enlarge)
    assert hf.load_policy(folder)[1]["final_norm"]["scale"].max() == np.finfo(np.float32).max


@pytest.mark.parametrize("error", [errno.EMFILE, errno.EACCES])
def test_a_file_that_may_not_be_read_is_not_called_damaged(saved, tmp_path, monkeypatch, error):
    folder = edit_config(saved("llama")[1], tmp_path)
    really_open = io.open

    def refuse(file, *args, **kwargs):
        if str(file).endswith(".safetensors"):
            raise OSError(error, os.strerror(error), str(file))
        return really_open(file, *args, **kwargs)

    monkeypatch.setattr(io, "open", refuse)
    with pytest.raises(OSError, match=os.strerror(error)) as told:
        hf.load_policy(folder)
    assert told.value.filename == str(folder / "model.safetensors")


def test_an_unsupported_family_is_told_the_supported_ones(saved, tmp_path):
    folder = edit_config(saved("llama")[1], tmp_path, model_type="mamba")
    with pytest.raises(ValueError, match=r"'mamba'.*\['gemma', .*'gpt2', .*'llama', 'mistral'"):
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

    with pytest.raises(ValueError, match=r"hold 1 tensors .* have: score\.weight"):
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


def test_a_tensor_is_told_by_its_name_in_the_files(saved, tmp_path):
    """A file that was saved without the model's head leaves out the beginning of the names."""

    def rename(tensors):
        bare = {key.removeprefix("model."): x for key, x in tensors.items()}
        tensors.clear()
        tensors.update(bare, **{"norm.weight": np.zeros(3, np.float32)})

    folder = edit_weights(saved("llama")[1], tmp_path, rename)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(folder))}: norm\.weight has shape"):
        hf.load_policy(folder)


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
