"""Whole runs on adapters: what the stages keep, what goes on from them, what comes out."""

import json
import re
import shutil

import jax
import numpy as np
import pytest

from ppo_jax.core.network import merge_params
from ppo_jax.distributed.trees import named_leaves
from ppo_jax.io.checkpoints import load_checkpoint_item, load_params
from ppo_jax.io.huggingface import load_policy
from ppo_jax.io.stage_folder import load_adapters, load_model
from ppo_jax.models.build import policy_apply
from ppo_jax.models.lora import merge_lora, split_lora
from ppo_jax.pipeline import run as pipeline
from ppo_jax.pipeline.export import export_stage
from tests.support import tiny, tiny_run
from tests.support.finished_run import TRAINED, assert_same_bits, read_lines

LORA = {"rank": 4, "alpha": 8.0, "targets": ["query", "value", "up"]}
STAGES = ("sft", "reward", "ppo")
MESH = {"data": 2, "fsdp": 2, "model": 2, "rules": {"vocab": ()}, "rollout_rules": {"vocab": ()}}


def config(**ppo):
    values = json.loads(json.dumps(tiny_run.config()))
    for stage in STAGES:
        values[stage] |= {"trainable": "lora", "lora": LORA}
    values["ppo"] |= {"value_trainable": "lora", **ppo}
    return values


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run whose every stage trains adapters; nothing may change it."""
    folder = tmp_path_factory.mktemp("run")
    pipeline.run(config(), folder)
    return folder


def size(tree):
    return sum(np.size(leaf) for leaf in jax.tree.leaves(tree))


def checkpoint(folder, field):
    return load_checkpoint_item(folder / "checkpoints", field)


def test_checkpoints_hold_adapters_and_the_frozen_folder_the_model_before_them(workdir):
    before = load_model(workdir / "base").params
    for stage, field in (("sft", "params"), ("reward", "params"), ("ppo", "policy_params")):
        trained = checkpoint(workdir / stage, field)
        named = {name.split("/")[-1] for name in named_leaves(trained["layers"])}
        assert named == {"lora_a", "lora_b"} and len(named_leaves(trained["layers"])) == 12
        assert ("head" in trained) == (stage == "reward")
        frozen = load_params(workdir / stage / "frozen")
        if stage == "reward":
            before = {name: part for name, part in before.items() if name != "head"}
        assert_same_bits(frozen, before)
        before = load_model(workdir / "sft").params
        description = json.loads((workdir / stage / "stage.json").read_text())
        assert description["model"]["lora_alpha"] == 8.0
    critic = checkpoint(workdir / "ppo", "value_params")
    assert critic.keys() == {"layers", "head"} and size(critic["layers"]) == size(trained)
    moments = checkpoint(workdir / "ppo", "opt_state")
    assert size(moments) <= 2 * (size(critic) + size(trained)) + 4


def test_the_model_of_a_stage_has_its_adapters_in_the_weights(workdir):
    model, (trained, adapters) = load_model(workdir / "ppo"), load_adapters(workdir / "ppo")
    assert model.config.lora_alpha == 0 and trained.lora_alpha == 8.0
    base = load_model(workdir / "sft")
    assert jax.tree.structure(model.params) == jax.tree.structure(base.params)
    beside = merge_params(base.params, adapters)
    assert_same_bits(model.params, jax.tree.map(np.asarray, merge_lora(trained, beside)))
    tokens, mask = tiny.tokens_and_mask(0, 3, 12)
    logits = policy_apply(model.config, model.params, tokens, mask)
    np.testing.assert_allclose(policy_apply(trained, beside, tokens, mask), logits, atol=1e-4)
    assert np.abs(policy_apply(base.config, base.params, tokens, mask) - logits).max() > 1e-2
    for name, leaf in named_leaves(base.params).items():
        moved = not np.array_equal(leaf, named_leaves(model.params)[name])
        assert moved == name.endswith(("query/kernel", "value/kernel", "up/kernel")), name


def test_training_begins_at_the_model_before_and_moves_away(workdir):
    rows = read_lines(workdir / "metrics.jsonl")
    kl = [row["kl/ref"] for row in rows if row["stage"] == "ppo"]
    assert len(kl) == 6 and abs(kl[0]) < 1e-4 < 1e-2 < kl[-1]
    loss = [row["sft/validation_loss"] for row in rows if "sft/validation_loss" in row]
    assert loss[-1] < loss[0] - 0.1
    assert json.loads((workdir / "results.json").read_text())["judges"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_resumes_bit_for_bit(workdir, tmp_path, stage):
    folder = tmp_path / "run"
    shutil.copytree(workdir, folder)
    for later in STAGES[STAGES.index(stage) + 1 :]:
        shutil.rmtree(folder / later)
    shutil.rmtree(folder / stage / "checkpoints" / "6")
    pipeline.run(config(), folder, only=(stage,))
    for name in TRAINED[stage]:
        assert_same_bits(*(checkpoint(run / stage, name) for run in (folder, workdir)))


def test_what_the_adapters_are_may_not_change_on_resume(workdir, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(workdir, folder)
    for changes, told in (
        ({"alpha": 4.0}, "lora.alpha: 8.0 -> 4.0"),
        ({"rank": 2}, "lora.rank: 4 -> 2"),
        ({"targets": ["query"]}, r"lora.targets.*query"),
    ):
        with pytest.raises(ValueError, match=f"begun with other settings: {told}"):
            pipeline.run(config(lora=LORA | changes), folder, only=("ppo",))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is dep:FutureWarning")  # of peft
def test_the_export_is_the_model_and_the_adapter_goes_onto_the_stage_before(workdir, tmp_path):
    for stage in ("sft", "ppo"):
        export_stage(workdir, stage, tmp_path / stage)
    found, expected = load_policy(tmp_path / "ppo"), load_model(workdir / "ppo")
    assert found[0] == expected.config
    assert_same_bits(found[1], expected.params)
    export_stage(workdir, "ppo", tmp_path / "adapter", adapter_of=str(tmp_path / "sft"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 50_000

    pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    import torch
    import transformers

    tokens, mask = tiny.tokens_and_mask(0, 3, 12, least=12)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sft")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(np.asarray(tokens, np.int64))).logits.numpy()
    mine = policy_apply(expected.config, expected.params, tokens, mask)
    np.testing.assert_allclose(logits, mine, atol=1e-4)


@pytest.mark.slow
def test_a_run_on_eight_devices_is_that_of_one(workdir, tmp_path, all_devices):
    """PPO alone, from the stages of one device; and its adapters are read into their pieces."""
    for part in ("data", "base", "sft", "reward"):
        shutil.copytree(workdir / part, tmp_path / part)
    values = config() | {"mesh": MESH}
    pipeline.run(values, tmp_path, only=("ppo",))
    found = named_leaves(checkpoint(tmp_path / "ppo", "policy_params"))
    for name, leaf in named_leaves(checkpoint(workdir / "ppo", "policy_params")).items():
        np.testing.assert_allclose(found[name], leaf, atol=1e-3, err_msg=name)


def test_a_dry_run_counts_adapters(workdir, tmp_path, capsys):
    pipeline.dry_run(config(), workdir)
    rows = re.findall(r"^  (\S[^\n]*?)  +(\S.*)$", capsys.readouterr().out, re.MULTILINE)
    lines = dict(rows)
    count = size(checkpoint(workdir / "ppo", "policy_params"))
    whole = size(load_model(workdir / "base").params)
    assert lines["policy trains"] == f"adapters, {count / 1e3:.0f}k parameters"
    assert lines["memory, policy"] == f"{4 * (whole + count) / 1e6:.1f} MB"
    assert lines["memory, reference"] == "0.0 MB"
    critic = size(checkpoint(workdir / "ppo", "value_params"))
    assert lines["memory, critic"] == f"{4 * critic / 1e6:.1f} MB"
    assert lines["memory, optimizer"] == f"{8 * (count + critic) / 1e6:.1f} MB"


def test_a_critic_of_adapters_stands_beside_a_policy_whose_top_layer_is_trained(workdir, tmp_path):
    values = tiny_run.on_base(workdir, ppo={"init_from": "base", "trainable": "1"})
    values["ppo"] |= {"reward_model": "", "reward_function": "tests.support.tiny_run:letters"}
    values["ppo"] |= {"value_trainable": "lora", "num_iterations": 1}
    pipeline.run(values, tmp_path / "mixed")
    critic = checkpoint(tmp_path / "mixed" / "ppo", "value_params")
    assert critic.keys() == {"layers", "head"}
    assert split_lora(critic["layers"])[1].keys() == {"0", "1"}
