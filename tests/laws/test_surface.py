"""What `import ppo_jax` offers beside the pure names works as a user would call it."""

import jax.numpy as jnp
import pytest

import ppo_jax
from tests.support import tiny_run


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of SFT alone, through the public function."""
    folder = tmp_path_factory.mktemp("run")
    config = tiny_run.config()
    ppo_jax.run({name: config[name] for name in ("prepare", "model", "sft")}, folder)
    return folder


def test_a_model_is_loaded_talks_and_is_exported(workdir, tmp_path):
    model = ppo_jax.load_model(workdir / "sft")
    responses, _ = ppo_jax.generate(model, ["the film", "a"])
    assert len(responses) == 2 and all(isinstance(text, str) for text in responses)
    again, _ = ppo_jax.generate(model, ["the film", "a"], seed=0, batch_size=1)
    assert again == responses
    ppo_jax.export(workdir, "sft", tmp_path / "exported")
    tokens = jnp.array([[1, 2, 3]])
    mask = jnp.ones((1, 3), bool)
    logits = {}
    for dtype in ("float32", jnp.float32, "bfloat16", jnp.bfloat16):
        config, params = ppo_jax.hf.load_policy(tmp_path / "exported", dtype=dtype)
        assert config.dtype == jnp.dtype(dtype).name
        found = ppo_jax.policy_apply(config, params, tokens, mask)
        assert (logits.setdefault(config.dtype, found) == found).all()
    assert ppo_jax.load_policy is ppo_jax.hf.load_policy


def test_a_dry_run_leaves_nothing(workdir, tmp_path, capsys):
    config = tiny_run.on_base(workdir, sft={})
    ppo_jax.dry_run(config, tmp_path / "other")
    assert "sft steps" in capsys.readouterr().out
    assert not (tmp_path / "other").exists()


def test_an_evaluation_needs_its_section(workdir, tmp_path):
    with pytest.raises(ValueError, match="none of the sections"):
        ppo_jax.evaluate(tiny_run.on_base(workdir, sft={}), tmp_path)


def test_a_plan_has_the_phases_of_an_iteration():
    config = tiny_run.config()
    config = {"model": config["model"], "ppo": config["ppo"]}
    plan = ppo_jax.plan(config)
    assert [cost.phase.name for cost in plan.costs] == ["rollout", "scoring", "update"]
    assert all(cost.program_cost.flops > 0 for cost in plan.costs)
