"""Runs of other methods that are stopped and go on bit for bit."""

import pytest

from ppo_jax.io.checkpoints import load_checkpoint_item
from ppo_jax.pipeline import run as pipeline
from tests.support import tiny_run
from tests.support.finished_run import assert_same_bits, finished_run, read_lines

# Settings and, of an iteration's metrics, the one that tells that they had a say.
METHODS = {
    "reference_responses": (dict(reference_responses=2), "reward/reference_score_mean"),
    "disputed_fraction": (
        dict(num_critics=2, disputed_fraction=0.3, entropy_coef=0.02),
        "value/disputed_fraction",
    ),
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return finished_run(tmp_path_factory)


@pytest.mark.parametrize("name", METHODS)
def test_it_goes_on_bit_for_bit(workdir, tmp_path, name):
    chosen, metric = METHODS[name]
    sources = {"init_from": str(workdir / "sft"), "reward_model": str(workdir / "reward")}
    values = tiny_run.on_base(workdir, ppo=sources | dict(num_samples=0) | chosen)
    values["ppo"]["optimizer"] |= {"schedule": "constant"}
    for folder, num_iterations in (("one", 4), ("two", 2), ("two", 4)):
        values["ppo"]["num_iterations"] = num_iterations
        pipeline.run(values, tmp_path / folder)
    for item in ("policy_params", "value_params", "opt_state"):
        one, two = (
            load_checkpoint_item(tmp_path / x / "ppo" / "checkpoints", item) for x in ("one", "two")
        )
        assert_same_bits(one, two)
    one, two = (read_lines(tmp_path / x / "metrics.jsonl") for x in ("one", "two"))
    assert one == two and [row["step"] for row in one] == [1, 2, 3, 4]
    assert len({row[metric] for row in one}) > 1
    if name == "reference_responses":  # counted over the stop, too
        prompts = values["ppo"]["rollout_batch_size"] // values["ppo"].get("samples_per_prompt", 1)
        assert one[-1]["reward/reference_episodes"] == 4 * 2 * prompts
