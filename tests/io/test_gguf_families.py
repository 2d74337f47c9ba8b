"""GGUF files of every family: the model that they hold, and what of them no family computes."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from ppo_jax.io import huggingface as hf
from ppo_jax.io.gguf.architectures import LONG, ROPE_FREQS, SHORT
from ppo_jax.io.gguf.convert import read_metadata, scaling_of_tensors
from ppo_jax.io.gguf.header import StoredTensor
from ppo_jax.models.families import read_config
from tests.support.gguf_files import MODELS, random_model, refused, small_tokenizer, write_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PPO_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.mark.parametrize("name", MODELS)
def test_a_file_gives_config_and_parameters_of_its_model(name, tokenizer, tmp_path):
    """Those of the folder that transformers saves, whose logits are compared elsewhere."""
    model = random_model(name)
    config, params = hf.load_policy(write_gguf(tmp_path / "tiny.gguf", model, tokenizer))
    model.save_pretrained(tmp_path / "saved")
    expected, own = hf.load_policy(tmp_path / "saved")
    plain = [dataclasses.replace(x, rope_scaling=None) for x in (config, expected)]
    assert plain[0] == plain[1] and type(config.rope_scaling) is type(expected.rope_scaling)
    if config.rope_scaling is not None:  # some numbers are float32 in the file
        numbers = [jax.tree.leaves(vars(x.rope_scaling)) for x in (config, expected)]
        np.testing.assert_allclose(*numbers, rtol=1e-6)
    assert jax.tree.structure(params) == jax.tree.structure(own)
    rounding = 1e-6 if config.norm == "rmsnorm_plus_one" else 0  # of scales, whole in the file
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=rounding, rtol=0), params, own)


# Of those whose files transformers reads, with sizes that it does not read as its defaults are.
THEIRS = dict.fromkeys(("llama", "qwen2", "gemma2", "gemma3", "phi3"), {})
THEIRS |= {"qwen3": {"head_dim": 128}, "qwen3_moe": {"moe_intermediate_size": 768}}


@pytest.mark.parametrize("name", THEIRS)
def test_transformers_reads_the_same_from_a_file(name, tokenizer, tmp_path):
    """That what `write_gguf` writes is what others take for such a file."""
    model = random_model(name, **THEIRS[name])
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="tiny.gguf", pad_token_id=0
    ).state_dict()
    assert theirs.keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        np.testing.assert_allclose(theirs[key].float(), tensor, atol=1e-6, err_msg=key)


# --- what follows from metadata alone -------------------------------------------------------------

BASE = {
    "block_count": 4,
    "context_length": 64,
    "embedding_length": 32,
    "feed_forward_length": 48,
    "attention.head_count": 4,
    "attention.layer_norm_rms_epsilon": 1e-5,
}
MIXTURE = {"expert_count": 4, "expert_used_count": 2}
GEMMA_27B = {"attention.key_length": 128, "attention.sliding_window": 8}
WINDOWED = {"attention.sliding_window": 8}
LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
YARN = LINEAR | {"rope.scaling.type": "yarn"}


def options_of(architecture, **keys):
    """config.json from `BASE` and these keys, in which "__" stands for a dot."""
    keys = {**BASE, **{key.replace("__", "."): x for key, x in keys.items()}}
    own = {f"{architecture}.{key}": x for key, x in keys.items()}
    return read_metadata({"general.architecture": architecture, **own})


S, F = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("architecture", "keys", "expected"),
    [
        (
            "gemma2",
            {"block_count": 46, "embedding_length": 576, **GEMMA_27B},
            {"query_pre_attn_scalar": 144},
        ),
        (
            "gemma3",
            {"block_count": 62, "embedding_length": 672, **GEMMA_27B},
            {"query_pre_attn_scalar": 168},
        ),
        ("gemma3", GEMMA_27B, {"query_pre_attn_scalar": 128, "layer_types": [S] * 4}),
        ("gemma3", {}, {"layer_types": [F] * 4}),
        ("gemma3", {"rope.freq_base_swa": 50.0, **WINDOWED}, {"rope_local_base_freq": 50.0}),
        ("gemma2", {}, {"layer_types": [S, F, S, F]}),
        (
            "gemma2",
            {"attention.sliding_window_pattern": 3, **WINDOWED},
            {"layer_types": [S, S, F, S]},
        ),
        ("olmo2", {}, {"model_type": "olmo2"}),
        ("olmo2", {"attention.sliding_window": 0}, {"model_type": "olmo2"}),
        ("olmo2", WINDOWED, {"model_type": "olmo3", "layer_types": [S, S, S, F]}),
        (
            "olmo2",
            {"attention.sliding_window_pattern": [True, False, True, False], **WINDOWED},
            {"layer_types": [S, F, S, F]},
        ),
        ("llama", MIXTURE, {"model_type": "mixtral", "num_local_experts": 4}),
        ("llama", {"expert_count": 0}, {"model_type": "llama"}),
        ("granite", {"logit_scale": 4.0}, {"attention_multiplier": 8**-0.5}),
        ("phi3", {"rope.dimension_count": 6}, {"partial_rotary_factor": 0.75}),
        ("olmoe", MIXTURE, {"norm_topk_prob": False}),
        (
            "qwen3moe",
            {"expert_feed_forward_length": 8, "expert_gating_func": 1, **MIXTURE},
            {"norm_topk_prob": True},
        ),
    ],
)
def test_what_no_key_has_is_a_rule_of_its_architecture(architecture, keys, expected):
    raw = options_of(architecture, **keys)
    assert {name: raw[name] for name in expected} == expected
    assert read_config(raw | {"vocab_size": 9}).family == raw["model_type"]


@pytest.mark.parametrize(
    ("architecture", "keys", "words"),
    [
        ("qwen3moe", {}, "its metadata lack ['qwen3moe.expert_used_count', 'qwen3moe.expert_c"),
        ("qwen3moe", {"expert_shared_count": 1}, "qwen3moe.expert_shared_count=1 is not supported"),
        ("olmoe", MIXTURE | {"expert_weights_norm": True}, "expert_weights_norm=True is not"),
        ("olmoe", MIXTURE | {"expert_gating_func": 2}, "expert_gating_func=2 is not supported"),
        ("olmoe", MIXTURE | {"expert_used_count": -1}, "expert_used_count must be a whole number"),
        ("llama", WINDOWED, "llama.attention.sliding_window=8 is not supported"),
        ("llama", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping=5.0 is not supported"),
        ("gemma2", {"attn_logit_softcapping": "5"}, "attn_logit_softcapping must be a number"),
        ("gemma2", {"attention.sliding_window": "a"}, "sliding_window must be a whole number"),
        ("gemma2", {"attention.sliding_window_pattern": 0}, "must be a period or 4 booleans"),
        ("gemma3", {"attention.sliding_window_pattern": [True]}, "4 booleans, got [True]"),
        ("gemma3", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping=5.0 is not supported"),
        ("gemma3", {"rope.freq_base_swa": "a"}, "rope.freq_base_swa must be a number above 0"),
        ("olmo2", WINDOWED | {"rope.freq_base_swa": -1.0}, "rope.freq_base_swa must be a number"),
        ("granite", {}, "its metadata lack ['granite.logit_scale']"),
        ("granite", {"logit_scale": 1.0, "rope.scaling.finetuned": False}, "finetuned=False is"),
        ("granite", {"logit_scale": -1.0}, "granite.logit_scale must be a number above 0"),
        ("phi3", {"rope.dimension_count": 9}, "rope.dimension_count must be at most the head size"),
        ("phi3", {"rope.dimension_count": "a"}, "rope.dimension_count must be at most the head"),
        ("smollm3", {"rope.dimension_count": 4}, "rope.dimension_count=4 must be the head size, 8"),
        ("gemma", {"attention.value_length": 4}, "attention.value_length=4 must be the head size"),
        ("gptneox", {}, "layer_norm_rms_epsilon=1e-05 is not supported"),
        ("seed_oss", {"rope.scaling.type": "su", "rope.scaling.factor": 2.0}, "type='su' with a"),
        ("llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 0.0}, "factor of 0.0"),
        ("llama", YARN | {"rope.scaling.factor": "4"}, "llama.rope.scaling.factor must be a"),
        ("llama", YARN | {"rope.scaling.yarn_attn_factor": -1.0}, "scaling.yarn_attn_factor must"),
        ("llama", {"rope.scaling.yarn_beta_fast": 2.0}, "yarn_beta_fast=2.0 is not supported"),
    ],
)
def test_what_a_family_does_not_compute_is_refused_by_the_name_of_its_key(
    architecture, keys, words
):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        options_of(architecture, **keys)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("olmoe", {"blk.1.ffn_up_exps.weight": None}, "lack 4 tensors: blk.1.ffn_up_exps.weight"),
        ("olmoe", {"blk.1.ffn_up_exps.weight": (3, 96, 64)}, "blk.1.ffn_up_exps.weight"),
        ("olmoe", {"blk.0.ffn_up_exps.weight": (96, 64)}, "asks for a matrix per expert"),
        ("olmoe", {"blk.0.ffn_up.weight": (96, 64)}, "hold 1 tensors that the model of the file"),
        ("gemma2", {"blk.0.post_ffw_norm.weight": (63,)}, "post_ffw_norm.weight has shape (63,)"),
        ("pythia", {"blk.1.attn_qkv.weight": None}, "lack 1 tensors: blk.1.attn_qkv.weight"),
        ("phi3", {"blk.1.attn_q.weight": (64, 64)}, "GGUF tensor 'blk.1.attn_q.weight' is not"),
        ("phi3-long", {LONG: None}, f"GGUF tensor {SHORT} is not supported without {LONG}"),
        ("phi3-long", {LONG: (5,)}, "long_factor must have 6 numbers"),
        ("pythia", {ROPE_FREQS: (2,)}, f"GGUF tensor {ROPE_FREQS} is not supported for 'gptneox'"),
        ("gpt2", {ROPE_FREQS: (8,)}, f"GGUF tensor {ROPE_FREQS} is not supported for 'gpt2'"),
        ("seed_oss", {"blk.0.ffn_norm.weight": (64,)}, "blk.0.ffn_norm.weight are the same of"),
    ],
)
def test_tensors_that_a_family_does_not_have_are_refused_by_name(
    tokenizer, tmp_path, name, change, words
):
    path = write_gguf(tmp_path / "a.gguf", random_model(name), tokenizer, changed=change)
    assert words in refused(path)


# --- a scaling of positions that is in tensors ----------------------------------------------------

LLAMA_3 = {ROPE_FREQS: [1.0, 1.0, 8.0, 8.0]}  # of a head of 8, base 10,000 and texts of 256
FACTORS = {SHORT: [1.0] * 4, LONG: [4.0] * 4}
ORIGINAL = {"rope.scaling.original_context_length": 32}


def scaling_of(architecture, keys, tensors):
    """The `rope_scaling` of a file with these tensors, beside `BASE` and these keys."""
    raw, numbers = options_of(architecture, **keys), np.float32(list(tensors.values()))
    metadata = {f"{architecture}.{key}": value for key, value in keys.items()}
    stored = {
        name: StoredTensor((row.size,), 0, i * row.nbytes, row.nbytes)
        for i, (name, row) in enumerate(zip(tensors, numbers, strict=True))
    }
    metadata["general.architecture"] = architecture
    raw |= scaling_of_tensors(metadata, stored, numbers.tobytes(), raw)
    return raw.get("rope_scaling")


def test_a_scaling_is_in_keys_or_in_tensors():
    assert scaling_of("llama", LINEAR, {})["rope_type"] == "linear"
    divided = scaling_of("llama", {}, LLAMA_3)
    assert (divided["factor"], divided["original_max_position_embeddings"]) == (8, 256)
    assert scaling_of("llama", LINEAR, {ROPE_FREQS: [1.0] * 4})["rope_type"] == "linear"
    assert scaling_of("phi3", ORIGINAL, FACTORS)["long_factor"] == [4.0] * 4


@pytest.mark.parametrize(
    ("architecture", "keys", "tensors", "words"),
    [
        (
            "llama",
            LINEAR,
            LLAMA_3,
            f"llama.rope.scaling.type='linear' is not supported with the tensor {ROPE_FREQS}",
        ),
        ("olmo2", YARN | WINDOWED, LLAMA_3, "option olmo2.rope.scaling.type='yarn' is not suppo"),
        (
            "phi3",
            LINEAR | ORIGINAL,
            FACTORS,
            f"type='linear' is not supported with the tensor {LONG}",
        ),
        ("phi3", YARN | ORIGINAL, FACTORS, "option phi3.rope.scaling.type='yarn' with a factor of"),
        ("phi3", ORIGINAL, FACTORS | LLAMA_3, f"tensor {ROPE_FREQS} is not supported for 'phi3'"),
        ("phi3", {}, {SHORT: [1.0] * 4}, f"tensor {SHORT} is not supported without {LONG}"),
        ("phi3", {}, FACTORS, f"option phi3.{[*ORIGINAL][0]}, which {LONG} needs, is missing"),
        (
            "phi3",
            {"rope.scaling.type": "longrope"},
            {},
            f"'longrope' is not supported without {LONG}",
        ),
        (
            "phi3",
            ORIGINAL | {"rope.scaling.attn_factor": "a"},
            FACTORS,
            "phi3.rope.scaling.attn_factor must be a number",
        ),
        (
            "llama",
            {},
            {ROPE_FREQS: [1.0, 8.0]},
            f"{ROPE_FREQS} has 2 numbers, but the file asks for 4",
        ),
        ("llama", ORIGINAL, FACTORS, f"GGUF tensor {LONG} is not supported for 'llama'"),
        (
            "llama",
            YARN | {"rope.scaling.attn_factor": 1.2},
            {},
            "GGUF option llama.rope.scaling.attn_factor=1.2 is not supported",
        ),
    ],
)
def test_a_scaling_by_tensors_that_do_not_fit_is_refused_by_their_names(
    architecture, keys, tensors, words
):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        scaling_of(architecture, keys, tensors)
    assert len(str(error.value).splitlines()) == 1
