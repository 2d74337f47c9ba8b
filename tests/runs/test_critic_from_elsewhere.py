"""Whole runs whose critic is of another size or family, or is that of another PPO run."""

import shutil

import jax
import numpy as np
import pytest

from ppo_jax.config.run import ModelSettings
from ppo_jax.core.network import merge_params
from ppo_jax.io.checkpoints import load_checkpoint_item
from ppo_jax.io.critics import load_critic
from ppo_jax.io.stage_folder import describe_stage, load_model
from ppo_jax.io.tokenizers import load_tokenizer
from ppo_jax.pipeline import run as pipeline
from tests.support import tiny_run
from tests.support.finished_run import assert_same_bits, finished_run, read_lines
from tests.support.tiny_hf import torch_model

STATE = ("policy_params", "value_params", "opt_state")
FLOAT32 = ModelSettings(path="nowhere", dtype="float32")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return finished_run(tmp_path_factory)


@pytest.fixture(scope="module")
def other_family(workdir, tmp_path_factory):
    """A language model of three layers of width 48 with the run's tokenizer."""
    folder = tmp_path_factory.mktemp("critic")
    tokenizer = load_tokenizer(workdir / "base")
    size = dict(vocab_size=len(tokenizer), hidden_size=48, num_hidden_layers=3)
    torch_model("qwen3", "CausalLM", **size).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings(workdir, critic, **ppo):
    """PPO with a critic from elsewhere, on the policy of a run."""
    sources = {"init_from": str(workdir / "sft"), "reward_model": str(workdir / "reward")}
    values = tiny_run.on_base(workdir, ppo=sources | {"critic_init_from": str(critic)} | ppo)
    values["ppo"]["optimizer"] |= {"schedule": "constant"}
    return values


def trained(folder, name="value_params", step=None):
    return load_checkpoint_item(folder / "ppo" / "checkpoints", name, step)


def test_a_critic_of_another_family_is_trained_and_goes_on_bit_for_bit(
    workdir, other_family, tmp_path, capsys
):
    changes = dict(value_trainable="2", num_samples=0)
    pipeline.run(settings(workdir, other_family, **changes, num_iterations=6), tmp_path / "one")
    assert "critic starts from" in (out := capsys.readouterr().out) and "3 layers x 48" in out
    for num_iterations in (3, 6):
        resumed = settings(workdir, other_family, **changes, num_iterations=num_iterations)
        pipeline.run(resumed, tmp_path / "two")
    for name in STATE:
        assert_same_bits(trained(tmp_path / "one", name), trained(tmp_path / "two", name))
    rows = read_lines(tmp_path / "one" / "metrics.jsonl")
    assert rows == read_lines(tmp_path / "two" / "metrics.jsonl") and len(rows) == 6
    # Its two top layers of three, and the rest beside them; with a head of zeros at first.
    start = load_model(other_family, FLOAT32).params
    critic = load_critic(str(tmp_path / "one" / "ppo"), tmp_path, "", FLOAT32)
    assert critic.config.num_layers == 3 and critic.config.embed_dim == 48
    assert_same_bits(critic.params["layers"]["0"], start["layers"]["0"])
    assert_same_bits(critic.params["layers"]["1"], trained(tmp_path / "one")["layers"]["1"])
    assert np.ptp(critic.params["head"]["kernel"]) > 0


@pytest.mark.parametrize("step", [3, 6])
def test_a_run_starts_from_the_critic_of_another_at_a_step(workdir, tmp_path, capsys, step):
    name = f"{workdir}/ppo@{step}"
    changes = dict(num_iterations=1, value_learning_rate=0.0, num_samples=0)
    pipeline.run(settings(workdir, name, **changes), tmp_path)
    assert f"ppo@{step}: a critic, at step {step}, of " in capsys.readouterr().out
    assert_same_bits(trained(tmp_path), trained(workdir, step=step))
    assert describe_stage(tmp_path / "ppo")["sources"]["critic_init_from"] == step
    # Whole, with the layer that it shares with the policy: the same critic again.
    first = load_critic(name, workdir, "", FLOAT32)
    again = load_critic(str(tmp_path / "ppo"), workdir, "", FLOAT32)
    assert_same_bits(first.params, again.params)
    reward = load_model(workdir / "reward").params
    whole = merge_params(reward, trained(workdir, step=step))
    assert_same_bits(jax.tree.map(np.asarray, whole), jax.tree.map(np.asarray, dict(first.params)))


def refused(values, folder):
    with pytest.raises(ValueError) as error:
        pipeline.run(values, folder)
    assert not (folder / "ppo").exists() and "\n" not in str(error.value)
    return str(error.value)


BINS = dict(value_bins=8, value_range=[-4.0, 3.0], num_samples=0)


def test_a_critic_with_bins_goes_on_bit_for_bit_and_starts_another(workdir, tmp_path, capsys):
    """On the reward model's body, which has one output: its head is new."""
    pipeline.run(settings(workdir, "", **BINS, num_iterations=6), tmp_path / "one")
    assert "8 bins of returns from -4 to 3; its head is new" in capsys.readouterr().out
    for num_iterations in (3, 6):
        pipeline.run(settings(workdir, "", **BINS, num_iterations=num_iterations), tmp_path / "two")
    for name in STATE:
        assert_same_bits(trained(tmp_path / "one", name), trained(tmp_path / "two", name))
    assert trained(tmp_path / "one")["head"]["kernel"].shape[1] == 8
    name = f"{tmp_path}/one/ppo@6"
    start = BINS | dict(num_iterations=1, value_learning_rate=0.0)
    pipeline.run(settings(workdir, name, **start), tmp_path / "three")
    assert "8 bins of returns from -4 to 3\n" in capsys.readouterr().out
    assert_same_bits(trained(tmp_path / "three"), trained(tmp_path / "one"))
    others = {"value_bins": 9}, {"value_range": [-4.0, 4.0]}, {"value_bins": 0, "value_range": []}
    for other in others:
        message = refused(settings(workdir, name, **start | other), tmp_path / "four")
        assert "must be those of the critic that it starts from, 8 and [-4.0, 3.0], got" in message


def test_several_critics_go_on_bit_for_bit_and_start_no_other(workdir, tmp_path):
    two = dict(num_critics=2, agreed_fraction=0.3, num_samples=0)
    for folder, num_iterations in (("one", 4), ("two", 3), ("two", 4)):
        pipeline.run(settings(workdir, "", **two, num_iterations=num_iterations), tmp_path / folder)
    for name in STATE:
        assert_same_bits(trained(tmp_path / "one", name), trained(tmp_path / "two", name))
    critics = trained(tmp_path / "one")
    assert all(len(x) == 2 and np.ptp(x, axis=0).max() > 0 for x in jax.tree.leaves(critics))
    message = refused(settings(workdir, tmp_path / "one" / "ppo"), tmp_path / "three")
    assert message.startswith(
        f"{tmp_path / 'one' / 'ppo'} has 2 critics: start from a run with one"
    )


def test_what_cannot_be_a_critic_is_refused_in_a_line(workdir, other_family, tmp_path):
    strange = tmp_path / "strange"
    shutil.copytree(other_family, strange)
    load_tokenizer(workdir / "base").train_new_from_iterator(["x y z"] * 3, 290).save_pretrained(
        strange
    )
    run, name = tmp_path / "run", "ppo.critic_init_from"
    message = refused(settings(workdir, strange), run)
    assert message.startswith(f"{name} must be a model with the policy's tokens, got '{strange}': ")
    assert "it has a tokenizer of its own" in message
    message = refused(settings(workdir, other_family, value_trainable="4"), run)
    assert message == "ppo.value_trainable must be at most 3, the model's layers, got 4"
    message = refused(settings(workdir, f"{workdir}/ppo@5"), run)
    assert "has no checkpoint of step 5, but of [3, 6]" in message
    assert f"{name}: there is no folder" in refused(settings(workdir, tmp_path / "none"), run)
    assert f"{name} must be a stage before ppo" in refused(settings(workdir, "ppo@3"), run)
    assert f"{name} must be a stage, got the run" in refused(settings(workdir, workdir), run)
    assert "did you mean 'policy'?" in refused(settings(workdir, "polcy"), run)
    free = dict(advantage="rloo", samples_per_prompt=2)
    assert f"{name} must be '' with" in refused(settings(workdir, other_family, **free), run)


def test_a_run_without_a_critic_has_none_to_start_from(workdir, tmp_path):
    free = dict(advantage="rloo", samples_per_prompt=2, num_iterations=1, num_samples=0)
    values = settings(workdir, "", **free)
    pipeline.run(values, tmp_path / "free")
    message = refused(settings(workdir, tmp_path / "free" / "ppo"), tmp_path / "run")
    assert message.startswith(f"{tmp_path / 'free' / 'ppo'} has no critic to start from: ")
