"""Whole runs on eight devices: those of one device, and one that moves from mesh to mesh."""

import json
import shutil

import jax
import numpy as np
import pytest

from ppo_jax.distributed import layout as sharding
from ppo_jax.distributed.trees import named_leaves
from ppo_jax.io.checkpoints import load_checkpoint_item
from ppo_jax.pipeline import run as pipeline
from tests.support import tiny_run

pytestmark = pytest.mark.slow
# The tokenizer of these runs has 317 tokens.
WHOLE = {"rules": {"vocab": ()}, "rollout_rules": {"vocab": ()}}
CUBE = {"data": 2, "fsdp": 2, "model": 2, **WHOLE}
LEARNING_RATE = 1e-2


def settings(mesh, **ppo):
    config = tiny_run.config()
    config["mesh"] = mesh
    config["ppo"] |= {"rollout_batch_size": 16, "num_minibatches": 2, **ppo}
    config["ppo"]["optimizer"]["schedule"] = "constant"  # whatever the number of iterations
    # Adam's first step is almost the sign of a gradient, and a sum's order decides the sign of one
    # that is 0 but for rounding: with an eps above rounding two meshes agree 100 times closer.
    config["ppo"]["optimizer"]["eps"] = 1e-3
    return config


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """All stages on one device."""
    folder = tmp_path_factory.mktemp("alone")
    pipeline.run(settings({}), folder)
    return folder


def lines(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def losses(folder, stage, *names):
    return [
        [row[n] for n in names if n in row]
        for row in lines(folder, "metrics.jsonl")
        if row["stage"] == stage
    ]


def policy(folder):
    return named_leaves(load_checkpoint_item(folder / "ppo" / "checkpoints", "policy_params"))


def test_a_run_on_eight_devices_is_that_of_one(alone, tmp_path, all_devices, capsys):
    pipeline.run(settings(CUBE), tmp_path)
    table = capsys.readouterr().out
    assert "8 x cpu" in table and "data 2 x fsdp 2 x model 2" in table
    assert "1/4 of the rows" in table
    for stage, name in (
        ("sft", "sft/loss"),
        ("reward", "reward_model/loss"),
        ("ppo", "value/loss"),
    ):
        mine, one = (losses(folder, stage, name) for folder in (tmp_path, alone))
        np.testing.assert_allclose(mine[1:4], one[1:4], rtol=1e-4)
    first = [
        [r["response"] for r in lines(f, "samples.jsonl") if r["step"] == 0]
        for f in (tmp_path, alone)
    ]
    assert first[0] == first[1] and first[0]
    results = [json.loads((folder / "results.json").read_text()) for folder in (tmp_path, alone)]
    assert results[0].keys() == results[1].keys()


@pytest.mark.parametrize("mesh", [CUBE, {"data": 1, "fsdp": 8}])
def test_a_run_goes_on_on_another_mesh(alone, tmp_path, monkeypatch, mesh):
    for part in ("data", "base", "sft", "reward"):
        shutil.copytree(alone / part, tmp_path / part)
    config = settings({}, num_iterations=3)
    pipeline.run(config, tmp_path, only=["ppo"])
    monkeypatch.setattr(sharding, "devices_of_run", jax.devices)
    pipeline.run(settings(mesh), tmp_path, only=["ppo"])
    found = policy(tmp_path)
    for name, leaf in policy(alone).items():
        np.testing.assert_allclose(found[name], leaf, atol=0.1 * LEARNING_RATE, err_msg=name)


def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_made(tmp_path, all_devices):
    with pytest.raises(ValueError, match=r"needs 6 devices, have 8"):
        pipeline.run(settings({"data": 3, "fsdp": 2}), tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"key/kernel: its kv_heads axis of 2 cannot be split"):
        pipeline.run(settings({"data": 1, "model": 8, **WHOLE}), tmp_path)
    with pytest.raises(
        ValueError, match=r"ppo.rollout_batch_size must be a multiple of .*16\), got 24"
    ):
        pipeline.run(settings({}, rollout_batch_size=24), tmp_path)
