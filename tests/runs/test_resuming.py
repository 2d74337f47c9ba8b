"""What a run that is begun again may find changed, and what it refuses by name."""

import collections
import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from ppo_jax.config.run import from_config_dict
from ppo_jax.data import encode, readers
from ppo_jax.io.checkpoints import Checkpoints, load_checkpoint_item
from ppo_jax.pipeline import run as pipeline
from ppo_jax.training.resume import check_same_base
from ppo_jax.training.stage import check_settings, describe
from tests.support import tiny, tiny_run
from tests.support.finished_run import TRAINED, assert_same_bits, finished_run, read_lines


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return finished_run(tmp_path_factory)


# --- data, and what was made of them --------------------------------------------------------------


def copy_unfinished(workdir, folder):
    """The SFT stage of a run as after its third step."""
    shutil.copytree(workdir / "sft", folder / "sft")
    shutil.rmtree(folder / "sft" / "checkpoints" / "6")
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(workdir / name, folder)


def test_changed_data_are_refused_on_resume_by_the_name_of_the_file(workdir, tmp_path):
    values = tiny_run.config()
    data = tmp_path / "run" / "data" / "train_texts.jsonl"
    shutil.copytree(workdir / "data", data.parent)
    shutil.copytree(workdir / "base", tmp_path / "run" / "base")
    copy_unfinished(workdir, tmp_path / "run")
    lines = data.read_text().splitlines(keepends=True)
    since = rf"^{data} has changed since {tmp_path}/run/sft was begun \("
    for changed, told in ((lines[:40], "48 -> 40 rows"), (lines[::-1], "48 rows, but others")):
        data.write_text("".join(changed))
        for start in (pipeline.run, pipeline.dry_run):
            with pytest.raises(ValueError, match=rf"{since}{told}\): put it back, or choose"):
                start(values, tmp_path / "run", only=("sft",))
    path = tmp_path / "run" / "sft" / "stage.json"
    description = json.loads(path.read_text())
    path.write_text(json.dumps({k: x for k, x in description.items() if k != "data"}))
    pipeline.run(values, tmp_path / "run", only=("sft",))  # as a stage of before
    assert Checkpoints(path.parent / "checkpoints").latest_step() == 6


def test_a_stage_without_a_checkpoint_is_begun_anew_whatever_differs(workdir, tmp_path, capsys):
    """A reward function that fails at the first iteration, then its correction."""
    values = tiny_run.on_base(workdir, ppo={"init_from": "base", "num_iterations": 2})
    values["ppo"] |= {"reward_model": "", "reward_function": "tests.support.tiny_run:too_few"}
    with pytest.raises(ValueError, match="must return"):
        pipeline.run(values, tmp_path)
    assert json.loads((tmp_path / "ppo" / "stage.json").read_text())["num_steps"] == 2
    values["ppo"] |= {"reward_function": "tests.support.tiny_run:letters", "rollout_batch_size": 4}
    pipeline.run(values, tmp_path)
    settings = json.loads((tmp_path / "ppo" / "stage.json").read_text())["settings"]
    assert settings["reward_function"] == "tests.support.tiny_run:letters"
    assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")] == [1, 2]
    assert sorted({row["step"] for row in read_lines(tmp_path / "samples.jsonl")}) == [0, 2]
    printed = capsys.readouterr().out
    assert f"ppo: samples (every 2 iterations) go to {tmp_path}/samples.jsonl\n" in printed
    assert printed.count("ppo: compiling the first iteration\n") == 2
    # With a checkpoint the settings bind.
    values["ppo"]["rollout_batch_size"] = 8
    with pytest.raises(ValueError, match="begun with other settings: rollout_batch_size: 4 -> 8"):
        pipeline.run(values, tmp_path)
    values["ppo"] |= {"rollout_batch_size": 4, "num_iterations": 1}
    description = json.loads((tmp_path / "ppo" / "stage.json").read_text()) | {"num_steps": 9}
    (tmp_path / "ppo" / "stage.json").write_text(json.dumps(description))
    pipeline.run(values, tmp_path)
    line = "ppo: has taken 2 iterations, num_iterations is 1: nothing to do\n"
    assert line in capsys.readouterr().out


def test_a_base_model_that_nothing_learned_from_is_made_anew(tmp_path, monkeypatch):
    """A mistake that is found when the base model is made already binds nothing."""
    whole = json.loads(json.dumps(tiny_run.config()))
    values = {name: whole[name] for name in ("prepare", "model", "sft")}
    values["sft"]["max_length"] = 2
    with pytest.raises(ValueError, match="see sft.max_length"):
        pipeline.run(values, tmp_path)
    before = json.loads((tmp_path / "base" / "config.json").read_text())
    values["sft"]["max_length"], values["model"]["scratch"]["embed_dim"] = 48, 16
    monkeypatch.setattr(pipeline, "run_stage", lambda *_: None)
    monkeypatch.setattr(pipeline, "closing", lambda *_: "")
    pipeline.dry_run(values, tmp_path)
    assert json.loads((tmp_path / "base" / "config.json").read_text()) == before
    pipeline.run(values, tmp_path)
    after = json.loads((tmp_path / "base" / "config.json").read_text())
    assert (before["hidden_size"], after["hidden_size"]) == (32, 16)


def test_other_data_are_refused_on_resume(workdir, tmp_path):
    data = tmp_path / "texts.jsonl"
    lines = (workdir / "data" / "train_texts.jsonl").read_text().splitlines(keepends=True)
    data.write_text("".join(lines[:40]))
    values = tiny_run.on_base(workdir, sft={"data": str(data)})
    shutil.copytree(workdir / "sft", tmp_path / "run" / "sft")
    path = tmp_path / "run" / "sft" / "stage.json"
    description = json.loads(path.read_text())
    config = from_config_dict(values)
    description |= describe("sft", config, tmp_path / "run") | {"num_steps": 9}
    del description["data"]  # as in a stage of before
    path.write_text(json.dumps(description))
    with pytest.raises(ValueError, match="begun with data for 9 steps, sft.data now gives 5"):
        pipeline.run(values, tmp_path / "run")


# --- what a stage starts from ---------------------------------------------------------------------


def test_a_source_that_goes_on_meanwhile_is_read_at_the_step_that_was_taken(workdir, tmp_path):
    """PPO from another run's PPO, which is given more iterations."""
    source, straight, broken_off = (tmp_path / name for name in ("source", "straight", "run"))
    shutil.copytree(workdir, source)
    start = {"init_from": str(source / "ppo"), "reward_model": str(source / "reward")}

    def train(folder, iterations):
        changes = start | {"num_iterations": iterations, "save_every": 1}
        pipeline.run(tiny_run.on_base(workdir, ppo=changes), folder)

    def more(iterations):
        values = tiny_run.config()
        values["ppo"] |= {"num_iterations": iterations, "save_every": 1}
        pipeline.run(values, source, only=("ppo",))

    train(straight, 2)
    train(broken_off, 1)
    description = json.loads((broken_off / "ppo" / "stage.json").read_text())
    assert description["sources"] == {"init_from": 6, "reward_model": 6}
    more(7)
    path = source / "ppo" / "stage.json"  # as of a run that goes on, with the step still there
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_steps": 99}))
    train(broken_off, 2)
    for name in TRAINED["ppo"]:
        folders = (folder / "ppo" / "checkpoints" for folder in (straight, broken_off))
        assert_same_bits(*(load_checkpoint_item(folder, name, step=2) for folder in folders))
    more(8)
    told = (
        rf"{source}/ppo had taken 6 steps when this run began from it, .* steps \[7, 8\] alone now"
    )
    with pytest.raises(ValueError, match=told):
        train(broken_off, 3)
    values = tiny_run.on_base(workdir, ppo=start | {"num_iterations": 2}, evaluate={})
    with pytest.raises(ValueError, match=told):  # which would compare it with another policy
        pipeline.run(values, broken_off)
    assert Checkpoints(broken_off / "ppo" / "checkpoints").latest_step() == 2


# --- settings -------------------------------------------------------------------------------------


WRITTEN = {  # by a stage, whatever it is
    **{"kind": "policy", "model": dataclasses.asdict(tiny.model_config())},
    **{"frozen": False, "num_steps": 1},
}


def test_numbers_may_change_on_resume_and_sizes_may_not(tmp_path):
    sizes = {"rollout_batch_size": 8, "kl_coef": 0.1, "optimizer": {"learning_rate": 1e-3}}
    description = WRITTEN | {"stage": "ppo", "settings": sizes}
    (tmp_path / "stage.json").write_text(json.dumps(description))
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    numbers = sizes | {"kl_coef": 0.2, "optimizer": {"learning_rate": 1e-4}}
    check_settings(tmp_path, {"stage": "ppo", "settings": numbers})
    with pytest.raises(ValueError, match="begun with other settings: rollout_batch_size: 8 -> 16"):
        check_settings(tmp_path, {"stage": "ppo", "settings": numbers | {"rollout_batch_size": 16}})
    check_settings(tmp_path / "absent", {"stage": "ppo", "settings": numbers})
    # A field that is younger than the stage had its default then.
    younger = numbers | {"critic_init_from": ""}
    check_settings(tmp_path, {"stage": "ppo", "settings": younger})
    with pytest.raises(ValueError, match="critic_init_from:  -> policy"):
        changed = numbers | {"critic_init_from": "policy"}
        check_settings(tmp_path, {"stage": "ppo", "settings": changed})


def test_remat_and_attention_may_change_on_resume_and_the_dtype_may_not(tmp_path):
    """They change memory and time alone; runs from before they were settings had none."""
    made = {"path": "", "vocabulary_data": "x", "dtype": "float32"}
    asked = made | {"remat": "full", "attention": "plain", "scratch": None, "scan_layers": False}
    description = WRITTEN | {"stage": "sft", "settings": {"model": made}}
    (tmp_path / "sft" / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "sft" / "stage.json").write_text(json.dumps(description))
    check_settings(tmp_path / "sft", {"stage": "sft", "settings": {"model": asked}})
    other = asked | {"dtype": "bfloat16"}
    with pytest.raises(ValueError, match="settings: model.dtype: float32 -> bfloat16. Set"):
        check_settings(tmp_path / "sft", {"stage": "sft", "settings": {"model": other}})

    (tmp_path / "base").mkdir()
    younger = ("remat", "attention")
    before = {"model": {name: x for name, x in asked.items() if name not in younger}, "seed": 0}
    (tmp_path / "config.json").write_text(json.dumps({"config": before}))
    check_same_base(tmp_path, {"model": asked, "seed": 0})
    with pytest.raises(ValueError, match="settings: model.dtype: float32 -> bfloat16. Set"):
        check_same_base(tmp_path, {"model": other, "seed": 0})


def test_a_run_reads_each_data_set_twice_and_tokenises_it_once(workdir, tmp_path, monkeypatch):
    """As text before there is a tokenizer, then for training; a stage gets what was checked."""
    files, texts = collections.Counter(), collections.Counter()
    read, tokenise = readers.json_lines, encode.token_ids

    def count_file(path, *args, **kwargs):
        files[Path(path).name] += 1
        return read(path, *args, **kwargs)

    def count_texts(given, *args):
        texts.update(given)
        return tokenise(given, *args)

    monkeypatch.setattr(readers, "json_lines", count_file)
    monkeypatch.setattr(encode, "token_ids", count_texts)
    ppo = {"init_from": "base", "reward_model": "", "num_iterations": 1}
    ppo["reward_function"] = "tests.support.tiny_run:letters"
    values = tiny_run.on_base(workdir, sft={"num_epochs": 0.1}, ppo=ppo)
    pipeline.run(values, tmp_path / "run")
    assert files == {"train_texts.jsonl": 2, "unseen_texts.jsonl": 2, "prompts.jsonl": 2}
    assert set(texts.values()) == {1} and len(texts) == 48 + 16 + 6
    files.clear()
    values["ppo"]["num_iterations"] = 2
    pipeline.run(values, tmp_path / "run")  # SFT is complete: its data are not needed
    assert files == {"prompts.jsonl": 2}
