"""Runs whose coefficients, baseline and reference move: what is saved of them, and going on."""

import pytest

from ppo_jax.io.checkpoints import load_checkpoint_item
from ppo_jax.pipeline import run as pipeline
from tests.support import tiny_run
from tests.support.finished_run import assert_same_bits, finished_run, read_lines

MOVING = {
    "of coefficients": dict(
        loss="kl_penalty", penalty_target_kl=1e-4, target_entropy=1.0, entropy_coef=0.01
    ),
    "of the reference": dict(advantage="reinforce", ref_ema_decay=0.9, kl_control="fixed"),
    "of adapters": dict(
        trainable="lora", value_trainable="lora", ref_reset_every=2, kl_control="fixed"
    ),
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return finished_run(tmp_path_factory)


def settings(workdir, **ppo):
    sources = {"init_from": str(workdir / "sft"), "reward_model": str(workdir / "reward")}
    values = tiny_run.on_base(workdir, ppo=sources | {"num_samples": 0, "save_every": 3} | ppo)
    values["ppo"]["optimizer"] |= {"schedule": "constant"}
    return values


@pytest.mark.parametrize("name", MOVING)
def test_a_run_with_what_moves_goes_on_bit_for_bit(workdir, tmp_path, name):
    moving = MOVING[name]
    pipeline.run(settings(workdir, **moving, num_iterations=6), tmp_path / "one")
    for num_iterations in (3, 6):
        again = settings(workdir, **moving, num_iterations=num_iterations)
        pipeline.run(again, tmp_path / "two")
    rows = read_lines(tmp_path / "one" / "metrics.jsonl")
    assert rows == read_lines(tmp_path / "two" / "metrics.jsonl") and len(rows) == 6
    for item in ("policy_params", "adaptive" if name == "of coefficients" else "ref_params"):
        saved = [
            load_checkpoint_item(tmp_path / run / "ppo" / "checkpoints", item)
            for run in ("one", "two")
        ]
        assert_same_bits(*saved)
    if "penalty_target_kl" in moving:
        assert len({row["policy/penalty_coef"] for row in rows}) > 1
        assert len({row["policy/entropy_coef"] for row in rows}) > 1


def test_where_a_control_began_may_not_change_while_it_goes_on(workdir, tmp_path):
    moving = MOVING["of coefficients"]
    pipeline.run(settings(workdir, **moving, num_iterations=1), tmp_path)
    for field, value in (("penalty_coef", 2.0), ("entropy_coef", 0.5), ("target_entropy", 0.0)):
        changed = settings(workdir, **moving | {field: value}, num_iterations=2)
        with pytest.raises(ValueError, match=f"begun with other settings: {field}"):
            pipeline.run(changed, tmp_path)
