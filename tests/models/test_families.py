"""A family is one value: nothing outside of it knows its name."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ppo_jax.io.huggingface import load_policy, params_to_hf
from ppo_jax.models import families
from ppo_jax.models.build import policy_network
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.families import FAMILIES, family_of, read_config, write_config
from ppo_jax.models.families.llama import LLAMA

SHAPE = {
    "vocab_size": 11,
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
}


def renamed(tensor):
    name = tensor.name.replace("model.layers.{}", "net.block.{}").replace("model.", "net.")
    return tensor._replace(name=name.replace("lm_head", "unembed"), transposed=False)


def write_toyllama(config: ModelConfig):
    return {"width": config.embed_dim, **LLAMA.write(config)}


TOYLLAMA = dataclasses.replace(
    LLAMA,
    name="toyllama",
    hf_class="ToyLlama",
    tensors={path: renamed(tensor) for path, tensor in LLAMA.tensors.items()},
    prefix="net.",
    read=lambda raw: LLAMA.read(raw | {"hidden_size": raw["width"]}),
    write=write_toyllama,
)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_new_family_is_one_value_and_its_name(tmp_path, monkeypatch, tied, scan_layers):
    monkeypatch.setattr(families, "FAMILIES", (TOYLLAMA,))
    raw = {"model_type": "toyllama", "width": 8, "tie_word_embeddings": tied, **SHAPE}
    config = read_config(raw, scan_layers=scan_layers)
    params = policy_network(config).init(jax.random.key(0))
    written = write_config(config)
    assert written["model_type"] == "toyllama"

    tensors = params_to_hf(config, "toyllama", params)
    assert all(name.startswith(("net.", "unembed.")) for name in tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(written))
    loaded_config, loaded = load_policy(tmp_path, scan_layers=scan_layers)
    assert loaded_config == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_fills_its_own_fields_alone(family):
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    raw = SHAPE | {"n_layer": 2, "n_embd": 8, "n_head": 2, "n_positions": 16}
    raw |= {"rotary_pct": 0.5} if family.name == "gpt_neox" else {}
    read = family.read({**family.implied, **raw})
    assert read.keys() <= fields
    assert read_config({"model_type": family.name, **raw}) == ModelConfig(**read)
    assert family_of(family.name) is family


def test_an_unknown_family_is_refused_with_those_there_are():
    with pytest.raises(
        ValueError, match=r"'mamba' is not supported; choose from \['gemma', .*'gpt2',"
    ):
        family_of("mamba")


YARN = {"rope_type": "yarn", "factor": 1.0}


@pytest.mark.parametrize(
    ("scaling", "refused"),
    [
        (YARN, ""),
        (YARN | {"beta_fast": 32, "beta_slow": 1, "attention_factor": 1.0, "truncate": False}, ""),
        (YARN | {"mscale": 0.7, "mscale_all_dim": 2.0}, ""),
        (YARN | {"original_max_position_embeddings": 16}, ""),
        ({"type": "dynamic", "factor": 1.0}, ""),
        ({"type": "linear", "factor": 1.0}, ""),
        (YARN | {"original_max_position_embeddings": 8}, ""),
        (YARN | {"new_option": 2.0}, "new_option"),
        ({"type": "longrope", "factor": 1.0}, "'short_factor' is missing"),
        ({"type": "ntk", "factor": 1.0}, "'ntk' is not supported; choose from"),
    ],
)
def test_a_scaling_of_positions_by_one_is_none(scaling, refused):
    """As transformers computes them: the same frequencies, and attention that is not scaled."""
    raw = {"model_type": "llama", **SHAPE}
    if refused:
        with pytest.raises(ValueError, match=refused):
            read_config(raw | {"rope_scaling": scaling})
        return
    assert read_config(raw | {"rope_scaling": scaling}) == read_config(raw)
    theirs = []
    for rope in (None, dict(scaling)):
        rotary = LlamaRotaryEmbedding(LlamaConfig(**SHAPE, rope_scaling=rope))
        theirs.append([x.numpy() for x in rotary(torch.zeros(1), torch.arange(16)[None])])
    np.testing.assert_allclose(theirs[0], theirs[1], atol=1e-6)
