"""SFT that starts from a stage of another run, as rejection sampling does."""

import pytest

from ppo_jax.config.run import from_config_dict
from ppo_jax.evaluation.evaluate import compared
from ppo_jax.io.checkpoints import load_checkpoint_item
from ppo_jax.io.stage_folder import describe_stage
from ppo_jax.pipeline import run as pipeline
from tests.support import tiny_run
from tests.support.finished_run import assert_same_bits, finished_run


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return finished_run(tmp_path_factory)


def settings(workdir, init_from="sft", **sft):
    values = tiny_run.on_base(workdir, sft={"init_from": str(workdir / init_from)} | sft)
    values["model"]["path"] = "not/read"
    return values


def trained(folder, step=None):
    return load_checkpoint_item(folder / "sft" / "checkpoints", "params", step)


@pytest.mark.parametrize("step", ["", "@3"])
def test_sft_goes_on_from_a_stage_of_another_run(workdir, tmp_path, step):
    still = settings(workdir, f"sft{step}")
    still["sft"]["optimizer"] |= {"learning_rate": 0.0}
    pipeline.run(still, tmp_path, only=["sft"])
    assert_same_bits(trained(tmp_path), trained(workdir, 3 if step else None))
    about = describe_stage(tmp_path / "sft")
    assert about["sources"] == {"init_from": 3 if step else 6}


def test_the_base_of_an_evaluation_is_what_sft_began_with(workdir, tmp_path):
    values = tiny_run.config()
    values["sft"]["init_from"] = str(workdir / "sft")
    config = from_config_dict(values)
    (tmp_path / "ppo").mkdir()
    found = compared(config, workdir, "the base", None)
    assert found["base"] == (str(workdir / "sft"), None)
    assert found["sft"] == (str(workdir / "sft"), None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sft@3", "no stage of this run comes before sft"),
        ("", "no stage of this run comes before sft"),
        ("{run}/reward", "sft.init_from must be a policy"),
        ("{run}/nowhere", "sft.init_from: there is no folder"),
        ("{run}", "sft.init_from must be a stage, got the run"),
    ],
)
def test_what_sft_cannot_start_from_is_one_line(workdir, tmp_path, name, message):
    values = settings(workdir)
    values["sft"]["init_from"] = name.replace("{run}", str(workdir))
    with pytest.raises(ValueError, match=message):
        pipeline.run(values, tmp_path, only=["sft"])
