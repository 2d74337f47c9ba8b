"""What ends a run before it goes wrong, which checkpoints stay, and how an earlier one is used."""

import json

import numpy as np
import pytest

from ppo_jax.config.run import from_config_dict
from ppo_jax.io.checkpoints import Checkpoints, load_checkpoint_item
from ppo_jax.io.run_folder import append_rows
from ppo_jax.io.stage_folder import load_model, load_source, split_step
from ppo_jax.pipeline import run as pipeline
from ppo_jax.pipeline.export import export_stage
from ppo_jax.training.sft import SFT
from ppo_jax.training.stage import StageRun
from tests.support import tiny_run
from tests.support.command_line import run_script
from tests.support.run_files import read_jsonl

SCORED = {"init_from": "base", "reward_model": "", "num_samples": 0, "save_every": 1}
SCORED |= {"reward_function": "tests.support.tiny_run:letters"}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """SFT alone, with a checkpoint of every step; the best by validation is not the last."""
    folder = tmp_path_factory.mktemp("run")
    values = tiny_run.config()
    values = {name: values[name] for name in ("prepare", "model", "sft")}
    values["sft"] |= {"save_every": 1, "keep": 6}
    pipeline.run(values, folder)
    return folder


def steps_of(folder):
    return Checkpoints(folder / "checkpoints").steps()


# --- keep -----------------------------------------------------------------------------------------


def test_as_many_checkpoints_stay_as_keep_says(workdir, tmp_path):
    assert steps_of(workdir / "sft") == [1, 2, 3, 4, 5, 6]
    pipeline.run(tiny_run.on_base(workdir, sft={"save_every": 1, "keep": "3"}), tmp_path)
    assert steps_of(tmp_path / "sft") == [4, 5, 6]


def test_the_best_checkpoint_stays_beside_the_newest(workdir, tmp_path):
    """By the metrics that were logged; also when the run is resumed with another `keep`."""
    changes = {"save_every": 1, "keep": "best:sft/loss"}
    pipeline.run(tiny_run.on_base(workdir, sft=changes), tmp_path)
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    losses = {row["step"]: row["sft/loss"] for row in rows if "sft/loss" in row}
    assert steps_of(tmp_path / "sft") == sorted({min(losses, key=losses.get), 6})


@pytest.mark.parametrize(
    ("metric", "kept"), [("sft/loss", 3), ("x/score", 2), ("x/kl", 1), ("x/absent", 4)]
)
def test_lower_is_better_for_a_loss_and_higher_for_a_score(tmp_path, metric, kept):
    values = {"sft/loss": [3, 2, 1, 4], "x/score": [None, 2, 1, 0], "x/kl": [1, 2, 1.5, 3]}
    for i in range(4):
        row = {name: x[i] for name, x in values.items() if x[i] is not None}
        append_rows(tmp_path / "metrics.jsonl", [{"stage": "sft", "step": i + 1, **row}])
        append_rows(tmp_path / "metrics.jsonl", [{"stage": "ppo", "step": i + 1, metric: 1e9 * i}])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "sft", "step": 4, "sft/lo')
    run = StageRun(tmp_path, SFT, num_steps=4, save_every=1, keep=f"best:{metric}")
    assert run.best_step([1, 2, 3, 4]) == kept
    for step in (1, 2, 3, 4):
        run.checkpoints.save(step, {"params": np.float32(step)})
    run.checkpoints.close()
    assert steps_of(tmp_path / "sft") == sorted({kept, 4})


def test_a_metric_that_the_stage_has_not_is_refused_at_its_first_step(workdir, tmp_path):
    message = r"sft.keep must be 'best:METRIC' with one of \['sft/.*got 'best:sft/lost'"
    with pytest.raises(ValueError, match=message):
        pipeline.run(tiny_run.on_base(workdir, sft={"keep": "best:sft/lost"}), tmp_path)
    assert steps_of(tmp_path / "sft") == []


# --- an earlier checkpoint ------------------------------------------------------------------------


def test_a_step_behind_a_stage_is_its_checkpoint(workdir, tmp_path):
    assert split_step(f"{workdir}/sft@2") == (f"{workdir}/sft", 2)
    assert split_step(f"{workdir}/stf@2") == (f"{workdir}/stf@2", None)
    expected = load_checkpoint_item(workdir / "sft" / "checkpoints", "params", step=2)
    newest = load_checkpoint_item(workdir / "sft" / "checkpoints", "params")
    for found in (
        load_model(f"{workdir}/sft@2"),
        load_source("sft@2", workdir, "", load_settings(workdir)),
    ):
        scale = found.params["final_norm"]["scale"]
        np.testing.assert_array_equal(scale, expected["final_norm"]["scale"])
        assert (scale != newest["final_norm"]["scale"]).any() and found.step == 2
    export_stage(workdir, "sft@2", tmp_path / "out")
    scale = load_model(tmp_path / "out").params["final_norm"]["scale"]
    np.testing.assert_array_equal(scale, expected["final_norm"]["scale"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--stage=sft@2" in card and "The checkpoint of step 2." in card
    for name in ("sft@9", f"{workdir}/sft@9"):
        with pytest.raises(ValueError, match=r"no checkpoint of step 9, but of \[1, 2, 3, 4, 5, 6"):
            load_source(name, workdir, "", load_settings(workdir))
    with pytest.raises(ValueError, match="no checkpoint of step 9"):
        export_stage(workdir, "sft@9", tmp_path / "other")


def load_settings(workdir):
    return from_config_dict(tiny_run.on_base(workdir, sft={})).model


def test_the_commands_take_a_step(workdir, tmp_path):
    how = ["--prompt=the film", "--response_length=4", "--temperature=0"]
    texts = [
        run_script("generate", *where, *how).out
        for where in (
            [f"--workdir={workdir}", "--stage=sft@1"],
            [f"--model={workdir}/sft@1"],
            [f"--model={workdir}/sft"],
        )
    ]
    assert texts[0] == texts[1] and texts[0].startswith("the film|")
    wrong = run_script("generate", f"--workdir={workdir}", "--stage=sft@7", *how)
    assert wrong.code == 2 and "has no checkpoint of step 7, but of [1, 2" in wrong.err
    wrong = run_script("generate", f"--workdir={workdir}", "--stage=reward@1", *how)
    assert wrong.code == 2 and "value should be one of <sft|ppo>" in wrong.err


def test_a_stage_begins_from_an_earlier_step_and_goes_on_from_there(workdir, tmp_path):
    changes = SCORED | {"init_from": f"{workdir}/sft@2", "num_iterations": 1}
    values = tiny_run.on_base(workdir, ppo=changes)
    pipeline.run(values, tmp_path)
    description = json.loads((tmp_path / "ppo" / "stage.json").read_text())
    assert description["sources"] == {"init_from": 2}
    values["ppo"]["num_iterations"] = 2
    pipeline.run(values, tmp_path)
    assert steps_of(tmp_path / "ppo") == [1, 2]
    values["ppo"]["init_from"] = f"{workdir}/sft@8"
    with pytest.raises(ValueError, match="no checkpoint of step 8"):
        pipeline.run(values, tmp_path / "other")
    assert not (tmp_path / "other").exists()


# --- too far from the reference -------------------------------------------------------------------


def test_a_run_ends_with_its_last_good_checkpoint_when_it_is_too_far(workdir, tmp_path):
    changes = SCORED | {"optimizer": tiny_run.optimizer(learning_rate=0.03), "kl_coef": 0.0}
    values = tiny_run.on_base(workdir, ppo=changes | {"max_ref_kl": 1e-3, "num_iterations": 6})
    message = r"kl/ref is .*, above ppo.max_ref_kl=0.001, at step (\d); last checkpoint (\d)"
    with pytest.raises(FloatingPointError, match=message) as caught:
        pipeline.run(values, tmp_path)
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert rows[-1]["kl/ref"] > 1e-3 and all(row["kl/ref"] <= 1e-3 for row in rows[:-1])
    assert f"at step {len(rows)}; last checkpoint {len(rows) - 1}" in str(caught.value)
    assert max(steps_of(tmp_path / "ppo")) == len(rows) - 1
    values["ppo"]["max_ref_kl"] = float("inf")  # a number that may change
    values["ppo"]["num_iterations"] = len(rows)
    pipeline.run(values, tmp_path)
    assert max(steps_of(tmp_path / "ppo")) == len(rows)


def test_updates_end_early_in_a_run(workdir, tmp_path):
    changes = SCORED | {"stop_kl": 1e-6, "num_iterations": 1, "num_epochs": 4}
    pipeline.run(tiny_run.on_base(workdir, ppo=changes), tmp_path)
    [row] = read_jsonl(tmp_path / "metrics.jsonl")
    assert row["ppo/updates"] == 1
