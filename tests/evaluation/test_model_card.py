"""The README of an exported model: what it tells, and that its code runs."""

import re
import shutil

import pytest

from tests.support.run_files import write_run
from tests.support.tiny_stage import exported, random_model, write_stage


@pytest.fixture
def workdir(tmp_path):
    """The files of a short run; its stages are for the tests to write."""
    ppo = [
        {"stage": "ppo", "step": i, "reward/score_mean": i / 9, "kl/ref": i / 5} for i in range(9)
    ]
    judge = {
        "judge": "gold",
        "num_prompts": 8,
        "mean_ppo": 1.0,
        "mean_sft": 0.0,
        "win_rate_ppo_vs_sft": 0.75,
        "win_rate_ppo_vs_sft_interval": [0.5, 0.9],
    }
    config = {"config": {"prepare": "film_reviews:prepare"}, "packages": {"jax": "0.10"}}
    return write_run(tmp_path / "run", metrics=ppo, results={"judges": [judge]}, config=config)


def run_code_of(card, folder, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.chdir(folder)
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], {})


def test_the_card_of_a_policy_tells_all_and_its_code_runs(workdir, monkeypatch, capsys):
    settings = {"prompts": "/home/me/prompts.jsonl", "optimizer": {"learning_rate": 0.125}}
    model = random_model()
    write_stage(workdir, "sft", model, data="texts.jsonl")
    out = exported(workdir, "ppo", model, init_from="sft", response_length=9, **settings)
    card = (out / "README.md").read_text()
    for part in (
        "library_name: transformers",
        "base_model: someone/some-model",
        "It began with `someone/some-model`.",
        "| sft | data | `texts.jsonl` |",
        "| ppo | prompts | `prompts.jsonl` |",
        "| `optimizer.learning_rate` | `0.125` |",
        "| gold | 1.000 | 0.000 | 0.750 |",
        "| `reward/score_mean` | 0.8889 |",
        "| data made by | film_reviews:prepare |",
        "--stage=ppo --out=out --dtype=float32",
        "![Curves of the run](training.png)",
    ):
        assert part in card, part
    assert "/home/me" not in card and str(workdir) not in card
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    run_code_of(card, out, monkeypatch)
    assert capsys.readouterr().out.startswith("The film is")


def test_the_card_of_a_reward_model_gives_its_scores(workdir, monkeypatch, capsys):
    out = exported(workdir, "reward", random_model("reward"), init_from="models/mine")
    card = (out / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "`logits + score_bias`" in card
    assert "It began with `models/mine`." in card and "training.png" not in card
    run_code_of(card, out, monkeypatch)
    assert capsys.readouterr().out.startswith("tensor([")


def test_a_card_does_not_list_a_base_model_that_was_never_read(workdir):
    model = {"path": "package:some-model", "dtype": "float32"}
    out = exported(workdir, "ppo", random_model(), model=model, init_from="runs/small/sft")
    card = (out / "README.md").read_text()
    assert "It began with `runs/small/sft`." in card and "package:some-model" not in card
    assert "| `model.dtype` | `float32` |" in card
    shutil.rmtree(out)
    out = exported(workdir, "sft", random_model(), model=model)
    assert "| `model.path` | `package:some-model` |" in (out / "README.md").read_text()


def test_a_card_without_anything_to_tell_is_still_one(tmp_path):
    workdir = write_run(tmp_path / "run", config={})
    model = {"path": "", "scratch": {"num_layers": 2}}
    card = (exported(workdir, "sft", random_model(), model=model) / "README.md").read_text()
    assert "It began with random weights." in card and "base_model" not in card
    assert "There is no result to report yet." in card and "| `model.scratch.num_layers` |" in card
