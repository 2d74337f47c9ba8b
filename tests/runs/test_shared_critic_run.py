"""Whole runs whose critic is a head on the policy's own body."""

import jax
import numpy as np
import pytest

from ppo_jax.config.run import ModelSettings
from ppo_jax.io.checkpoints import load_checkpoint_item
from ppo_jax.io.critics import load_critic
from ppo_jax.io.stage_folder import load_model
from ppo_jax.pipeline import run as pipeline
from tests.support import tiny_run
from tests.support.finished_run import assert_same_bits, finished_run, read_lines

STATE = ("policy_params", "value_params", "opt_state")
FLOAT32 = ModelSettings(path="nowhere", dtype="float32")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return finished_run(tmp_path_factory)


def settings(workdir, **ppo):
    sources = {"init_from": str(workdir / "sft"), "reward_model": str(workdir / "reward")}
    values = tiny_run.on_base(workdir, ppo=sources | dict(num_samples=0) | ppo)
    values["ppo"]["optimizer"] |= {"schedule": "constant"}
    return values


def trained(folder, name="value_params"):
    return load_checkpoint_item(folder / "ppo" / "checkpoints", name)


@pytest.mark.parametrize("trainable", ["all", "1", "lora"])
def test_it_goes_on_bit_for_bit_and_starts_another(workdir, tmp_path, capsys, trainable):
    shared = dict(shared_critic=True, trainable=trainable, value_trainable="all")
    for folder, num_iterations in (("one", 4), ("two", 2), ("two", 4)):
        run = settings(workdir, **shared, num_iterations=num_iterations)
        pipeline.run(run, tmp_path / folder)
    assert "a head on the policy's body, which its loss trains as well" in capsys.readouterr().out
    for name in STATE:
        assert_same_bits(trained(tmp_path / "one", name), trained(tmp_path / "two", name))
    rows = read_lines(tmp_path / "one" / "metrics.jsonl")
    assert rows == read_lines(tmp_path / "two" / "metrics.jsonl") and len(rows) == 4
    assert rows[0]["value/mean"] == 0 != rows[1]["value/mean"]
    assert list(trained(tmp_path / "one")) == ["value_head"]
    # A critic of its own, as another run begins with it: the policy's body, with that head.
    name = str(tmp_path / "one" / "ppo")
    critic, policy = load_critic(name, tmp_path, "", FLOAT32), load_model(name, FLOAT32)
    assert_same_bits(critic.params["layers"], policy.params["layers"])
    assert_same_bits(critic.params["head"], trained(tmp_path / "one")["value_head"])
    assert np.ptp(critic.params["head"]["kernel"]) > 0
    start = dict(num_iterations=1, value_learning_rate=0.0, critic_init_from=name)
    pipeline.run(settings(workdir, **start), tmp_path / "three")
    assert "critic starts from" in capsys.readouterr().out
    found = trained(tmp_path / "three")
    whole = jax.tree.map(np.asarray, dict(critic.params))
    assert_same_bits(found["head"], whole["head"])
    if "layers" in found:
        assert_same_bits(found["layers"], {k: whole["layers"][k] for k in found["layers"]})
