"""Weights of real model families: parity with torch, nothing unread, nothing unfilled."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from ppo_jax import hf
from ppo_jax.networks import policy_apply

VOCAB, LENGTH = 61, 24
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,  # far from the defaults, so that reading it matters
}
SMALL_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "layer_norm_epsilon": 1e-3,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
TINY_MODELS = {
    "gpt2": ("gpt2", {}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False, "n_inner": 48}),
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "llama-3": ("llama", {"rope_parameters": LLAMA3_ROPE, "head_dim": 16}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-untied": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3": ("qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
    "qwen3-biases": ("qwen3", {"head_dim": 16, "attention_bias": True}),
}


def torch_model(name):
    """A random model in which no bias is zero and no norm is one."""
    family, options = TINY_MODELS[name]
    small = SMALL_GPT2 if family == "gpt2" else SMALL
    config = transformers.AutoConfig.for_model(family, **{**small, **options})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            around = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_(around + 0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> (torch model, the folder it is saved in), each made once."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model = torch_model(name)
            model.save_pretrained(folder)
            made[name] = (model, folder)
        return made[name]

    return get


def edit_config(source, folder, **changes):
    """A copy of a saved model with some keys of its config.json changed, or removed by None."""
    raw = json.loads((source / "config.json").read_text()) | changes
    raw = {key: value for key, value in raw.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    return folder


def edit_weights(source, folder, change):
    """A copy of a saved model, with `change(tensors)` applied to its dict of arrays."""
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text((source / "config.json").read_text())
    return folder


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


def assert_same_tree(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


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
    for scan_layers in (False, True):
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shards_in_half_precision_are_read_as_float32(saved, tmp_path, dtype):
    model, _ = saved("qwen3")
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
    with pytest.raises(ValueError, match=r"model\.dtype.*int8"):
        hf.load_policy(folder, dtype="int8")


def test_old_and_new_forms_of_rope_settings_are_the_same(saved, tmp_path):
    _, folder = saved("llama-3")
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    old = edit_config(
        folder, tmp_path, rope_parameters=None, rope_theta=500.0, rope_scaling=scaling
    )
    config = hf.load_config(folder)
    assert config.rope_theta == 500.0 and config.rope_scaling.factor == 8.0
    assert hf.load_config(old) == config


def test_a_checkpoint_without_the_base_prefix_loads_the_same(saved, tmp_path):
    _, folder = saved("gpt2")

    def strip(tensors):
        for key in list(tensors):
            tensors[key.removeprefix("transformer.")] = tensors.pop(key)
        tensors["h.0.attn.bias"] = np.ones((1, 1, 64, 64), np.float32)  # a causal mask

    assert_same_tree(
        hf.load_policy(edit_weights(folder, tmp_path, strip))[1], hf.load_policy(folder)[1]
    )


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

    with pytest.raises(ValueError, match=r"model\.norm\.weight is stored as int8"):
        hf.load_policy(edit_weights(saved("llama")[1], tmp_path, quantise))


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


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france():
    from ppo_jax.vocabulary import load_tokenizer

    name = "package:smollm2-135m-instruct"
    tokenizer = load_tokenizer(name)
    config, params = hf.load_policy(name)
    tokens = jnp.asarray([tokenizer("The capital of France is")["input_ids"]], jnp.int32)
    for _ in range(2):
        logits = policy_apply(config, params, tokens, jnp.ones(tokens.shape, bool))
        tokens = jnp.concatenate([tokens, logits[:, -1:].argmax(-1).astype(jnp.int32)], axis=1)
    assert tokenizer.decode(tokens[0, 5:]) == " Paris."
