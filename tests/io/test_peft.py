"""Exported adapters: peft puts them onto the base model, with the outputs of ours."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

from ppo_jax.config.run import ModelSettings
from ppo_jax.core.network import merge_params
from ppo_jax.io import huggingface as hf
from ppo_jax.io.peft import adapter_config, peft_tensors
from ppo_jax.io.stage_folder import Model, compute_as, load_adapters, load_model
from ppo_jax.models.build import policy_apply
from ppo_jax.models.lora import init_lora, merge_lora, split_lora, targets_of
from ppo_jax.pipeline.export import check_base, export_stage
from tests.support import tiny
from tests.support.command_line import run_script
from tests.support.run_files import write_run
from tests.support.tiny_hf import LENGTH, TINY_MODELS, VOCAB, assert_same_tree, saver, torch
from tests.support.tiny_stage import exported, random_model, word_tokenizer, write_stage

# peft asks transformers under a name that is about to go.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is dep:FutureWarning")
ALPHA, RANK = 6.0, 4
LORA = {"trainable": "lora"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saver(tmp_path_factory.mktemp)


@pytest.fixture
def workdir(tmp_path):
    return write_run(tmp_path / "run", config={})


# torch's grouped products of experts refuse odd widths.
EAGER = dict(experts_implementation="eager")


def adapted(model, targets=None, seed=1):
    """The model with adapters that change what it computes; by default beside every projection."""
    how = dict(targets=targets or targets_of(model.config), rank=RANK)
    adapters = init_lora(jax.random.key(0), model.config, model.params, **how)
    rng = np.random.default_rng(seed)
    adapters = jax.tree.map(
        lambda x: (x + rng.normal(size=x.shape) / 5).astype(np.float32), jax.device_get(adapters)
    )
    config = dataclasses.replace(model.config, lora_alpha=ALPHA)
    return dataclasses.replace(model, config=config, params=merge_params(model.params, adapters))


def policy(saved, name, targets=None):
    config, params = hf.load_policy(saved(name)[1])
    model = Model(kind="policy", config=config, params=params, tokenizer=word_tokenizer(VOCAB))
    return adapted(model, targets)


TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, LENGTH))


def ours(model):
    mask = jnp.ones(TOKENS.shape, bool)
    return np.asarray(policy_apply(model.config, model.params, jnp.asarray(TOKENS), mask))


def theirs(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor(TOKENS)).logits.float().numpy()


def on_base(folder, base):
    """The exported adapter as peft loads it; every tensor of it has its place."""
    peft = pytest.importorskip("peft")
    model = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base, **EAGER), folder
    )
    own = peft.get_peft_model_state_dict(model)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert own.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(own[name].float().numpy(), tensor.astype(np.float32))
    return model.eval()


# --- equal outputs --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY_MODELS)
def test_peft_gives_the_logits_of_the_trained_policy(saved, workdir, name):
    model, base = policy(saved, name), saved(name)[1]
    out = exported(workdir, "ppo", model, adapter_of=str(base), **LORA)
    loaded, expected = on_base(out, base), ours(model)
    assert np.abs(theirs(loaded) - expected).max() <= 2e-4 < 1.0 < np.abs(expected).max()
    assert np.abs(theirs(saved(name)[0]) - expected).max() > 0.1
    assert np.abs(theirs(loaded.merge_and_unload()) - expected).max() <= 2e-4


SOME = {
    "query and value": ("value", "query"),
    "key alone": ("key",),
    "of two ranks": ("query", "value", "up", "output"),
    "no attention": ("down", "up"),
}


@pytest.mark.parametrize("targets", SOME)
@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_peft_gives_the_logits_for_any_targets(saved, workdir, name, targets):
    model, base = policy(saved, name, SOME[targets]), saved(name)[1]
    out = exported(workdir, "ppo", model, adapter_of=str(base), **LORA)
    assert np.abs(theirs(on_base(out, base)) - ours(model)).max() <= 2e-4


def test_the_folder_names_its_base_model(saved, workdir):
    peft = pytest.importorskip("peft")
    model, base = policy(saved, "llama"), saved("llama")[1]
    out = exported(workdir, "sft", model, adapter_of=str(base), dtype="bfloat16", **LORA)
    config = peft.PeftConfig.from_pretrained(out)
    assert (config.base_model_name_or_path, config.r, config.lora_alpha) == (str(base), RANK, ALPHA)
    assert config.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"} | {
        "up_proj",
        "gate_proj",
        "down_proj",
    }
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(out)
    assert np.abs(theirs(loaded) - ours(model)).max() < 0.1 * np.abs(ours(model)).max()


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_whole_export_has_the_adapters_in_its_weights(saved, workdir, name):
    model = policy(saved, name)
    out = exported(workdir, "ppo", model, **LORA)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, **EAGER).eval()
    assert np.abs(theirs(loaded) - ours(model)).max() <= 2e-4
    config, params = hf.load_policy(out)
    stage = load_model(workdir / "ppo")
    assert config == stage.config == dataclasses.replace(model.config, lora_alpha=0.0)
    assert_same_tree(params, stage.params)


# --- layouts, without peft ------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [None, *SOME.values()])
@pytest.mark.parametrize("shape", ["gpt2", "llama", "scanned"])
def test_every_pair_is_the_change_of_its_tensor(shape, targets):
    """alpha / r B A, [O, I], is what merging adds to the tensor; to GPT-2's its transpose."""
    model = adapted(random_model(**tiny.SHAPES[shape]), targets)
    base, adapters = split_lora(model.params)
    family = "gpt2" if shape == "gpt2" else "llama"
    tensors = peft_tensors(model.config, family, adapters)
    about = adapter_config(tensors, family, alpha=ALPHA, rank=RANK, base="base")
    before = hf.params_to_hf(model.config, family, base)
    after = hf.params_to_hf(model.config, family, merge_lora(model.config, model.params))
    changed = set()
    for name in [name for name in tensors if name.endswith("lora_A.weight")]:
        a, b = tensors[name], tensors[name.replace("lora_A", "lora_B")]
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        [target] = [x for x in about["target_modules"] if module.endswith(f".{x}")]
        rank = about["rank_pattern"].get(target, about["r"])
        alpha = about["alpha_pattern"].get(target, about["lora_alpha"])
        assert a.shape[0] == b.shape[1] == rank and alpha / rank == ALPHA / RANK
        change = alpha / rank * b @ a
        weight = f"{module}.weight"
        expected = after[weight] - before[weight]
        assert about["fan_in_fan_out"] == (family == "gpt2")
        np.testing.assert_allclose(change.T if family == "gpt2" else change, expected, atol=1e-5)
        changed.add(weight)
    same = [name for name in before if np.array_equal(before[name], after[name])]
    assert changed == before.keys() - same and len(changed) % model.config.num_layers == 0


def test_the_names_are_those_of_peft(saved, workdir):
    """Written down from `get_peft_model(...).save_pretrained(...)`, so that no peft is needed."""
    layer = "model.layers.1.self_attn"
    names = {"gpt2": "transformer.h.1.attn.c_attn", "llama": f"{layer}.q_proj"}
    names["phi3"] = f"{layer}.qkv_proj"  # Llama has this model, too, under other names
    for name, module in names.items():
        run = write_run(workdir / name, config={})
        model = policy(saved, name, ("query",))
        out = exported(run, "ppo", model, adapter_of="someone/a-model", **LORA)
        assert sorted(path.name for path in out.iterdir()) == [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        tensors = load_file(out / "adapter_model.safetensors")
        shapes = {key: x.shape for key, x in tensors.items() if ".1." in key}
        width = {"gpt2": 96, "phi3": 64}.get(name, 32)
        assert shapes == {
            f"base_model.model.{module}.lora_A.weight": (RANK, 32),
            f"base_model.model.{module}.lora_B.weight": (width, RANK),
        }
        about = json.loads((out / "adapter_config.json").read_text())
        assert about["base_model_name_or_path"] == "someone/a-model"
        card = (out / "README.md").read_text()
        assert "library_name: peft" in card and "base_model: someone/a-model" in card


def test_scanned_layers_give_the_adapter_of_the_unrolled_ones(saved, workdir):
    model = policy(saved, "llama")
    scanned = compute_as(model, ModelSettings(path="x", scan_layers=True))
    write_stage(workdir, "ppo", scanned, **LORA)
    config, adapters = load_adapters(workdir / "ppo")
    assert config.lora_alpha == ALPHA
    expected = peft_tensors(model.config, "llama", split_lora(model.params)[1])
    assert_same_tree(peft_tensors(config, "llama", adapters), expected)


def test_the_code_of_the_card_runs(saved, workdir, monkeypatch, capsys):
    pytest.importorskip("peft")
    model = adapted(random_model())
    base = exported(workdir, "sft", dataclasses.replace(model, params=split_lora(model.params)[0]))
    base.rename(workdir / "base")
    monkeypatch.chdir(workdir)
    out = exported(workdir, "ppo", model, adapter_of="base", **LORA)
    card = (out / "README.md").read_text()
    assert "--adapter_of=base" in card
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].replace('"."', '"out"'), {})
    assert capsys.readouterr().out.startswith("The film is")


# --- what is refused ------------------------------------------------------------------------------


def test_what_has_no_adapter_for_the_model_is_refused_and_leaves_nothing(saved, workdir):
    model, out = policy(saved, "llama"), workdir / "out"
    plain = dataclasses.replace(model, params=split_lora(model.params)[0])
    write_stage(workdir, "sft", plain, trainable="all")
    write_stage(workdir, "ppo", model, **LORA)
    head = {"kernel": np.zeros((32, 1), np.float32), "bias": np.zeros(1, np.float32)}
    params = {**model.params, "head": head}
    write_stage(workdir, "reward", dataclasses.replace(model, kind="reward", params=params), **LORA)
    with pytest.raises(ValueError, match=r"sft has no adapter: its trainable is 'all', not 'lora'"):
        export_stage(workdir, "sft", out, adapter_of="someone/a-model")
    with pytest.raises(ValueError, match="adapter_of is for a policy: the trained head of a rew"):
        export_stage(workdir, "reward", out, adapter_of="someone/a-model")
    other = str(saved("qwen2")[1])
    with pytest.raises(ValueError, match=rf"that the stage ppo began with, got '{other}', which"):
        export_stage(workdir, "ppo", out, adapter_of=other)
    for path in ("package:smollm2-135m-instruct", "a.gguf", f"{workdir}/none", "runs/x/y"):
        with pytest.raises(
            ValueError, match=f"must be a Hugging Face folder or a hub id, got '{path}'"
        ):
            export_stage(workdir, "ppo", out, adapter_of=path)
    assert not out.exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_of_an_adapter_must_have_its_weights(saved, workdir, monkeypatch, dtype):
    model = adapted(random_model())
    base = dataclasses.replace(model, params=split_lora(model.params)[0])
    before = exported(write_run(workdir / "before", config={}), "sft", base, dtype=dtype)
    after = exported(write_run(workdir / "after", config={}), "ppo", model, **LORA)
    assert check_base(str(before), workdir / "after" / "ppo") == "llama"
    with pytest.raises(ValueError, match=r"the stage ppo began with, got .*, which has other weig"):
        check_base(str(after), workdir / "after" / "ppo")
    monkeypatch.chdir(workdir)
    with pytest.raises(ValueError, match="a Hugging Face folder or a hub id, got 'before/none'"):
        check_base("before/none", workdir / "after" / "ppo")


def test_the_script_exports_an_adapter(saved, workdir):
    model, base = policy(saved, "qwen2"), saved("qwen2")[1]
    write_stage(workdir, "ppo", model, **LORA)
    flags = (f"--workdir={workdir}", "--stage=ppo", f"--adapter_of={base}")
    assert run_script("export_hf", *flags, f"--out={workdir / 'out'}").code == 0
    assert (workdir / "out" / "adapter_config.json").is_file()
