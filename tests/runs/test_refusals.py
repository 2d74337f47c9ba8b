"""What is refused before anything is trained, and what a run from models of elsewhere reads."""

import copy
import json

import pytest

from ppo_jax.data.records import write_jsonl
from ppo_jax.pipeline import run as pipeline
from tests.support import tiny_run

STAGES = ("sft", "reward", "ppo")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A complete run of every stage; nothing may change it."""
    folder = tmp_path_factory.mktemp("run")
    pipeline.run(tiny_run.config(), folder)
    return folder


def refused(values, folder, match):
    with pytest.raises(ValueError, match=match):
        pipeline.run(values, folder)
    assert not any((folder / stage).exists() for stage in STAGES)
    assert not (folder / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("section", "changes", "match"),
    [
        ("sft", {"data": "nowhere.jsonl"}, "sft.data must be a file, got 'nowhere.jsonl'"),
        ("sft", {"max_length": 2}, "sft.data: .*over 2 tokens.*see sft.max_length$"),
        ("sft", {"trainable": "3"}, "sft.trainable must be at most 2"),
        ("reward", {"num_layers": 3}, "reward.num_layers must be at most 2"),
        ("reward", {"num_layers": 1, "trainable": "2"}, "reward.trainable must be at most 1"),
        ("reward", {"format": "preferences"}, "train_ratings.jsonl:1: the keys must be"),
        ("ppo", {"trainable": "3"}, "ppo.trainable must be at most 2"),
        ("ppo", {"value_trainable": "3"}, "ppo.value_trainable must be at most 2"),
        ("ppo", {"max_prompt_length": 2}, "ppo.prompts: .* 6 too long .*see ppo.max_prompt_length"),
        ("ppo", {"response_length": 25}, r"at most 48 .*got 24 \+ 25"),
        ("ppo", {"stop_tokens": ["x" * 600]}, "ppo.stop_tokens must have at most 512 bytes"),
        ("ppo", {"reward_model": "", "reward_function": "no_module:f"}, "ppo.reward_function"),
        (
            "ppo",
            {"reward_model": "some/folder"},
            "ppo.reward_model: some/folder is neither",
        ),
        ("ppo", {"init_from": "ppo"}, "ppo.init_from='ppo' needs the stage ppo"),
        ("evaluate", {"num_prompts": 7}, "evaluate.num_prompts must be at most the 6"),
        ("evaluate", {"judges": "tests.support.tiny_run:juries"}, "evaluate.judges must be"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_what_a_later_stage_would_refuse_is_refused_at_once(
    workdir, tmp_path, section, changes, match
):
    values = tiny_run.on_base(workdir, sft={}, reward={}, ppo={}, evaluate={})
    values[section].update(changes)
    refused(values, tmp_path, match)


@pytest.mark.parametrize("field", ["reward_model", "init_from"])
def test_a_stage_that_nobody_makes_is_missed_at_once(workdir, tmp_path, field):
    values = tiny_run.on_base(workdir, ppo={"init_from": "base", "reward_model": "reward"})
    values["ppo"][field] = "reward" if field == "reward_model" else "sft"
    refused(values, tmp_path, f"ppo.{field}='{values['ppo'][field]}' needs the stage")


def test_a_malformed_line_is_named_with_file_and_line(workdir, tmp_path):
    data = tmp_path / "texts.jsonl"
    data.write_text('{"text": "good"}\n{"text": "bad"\n')
    refused(
        tiny_run.on_base(workdir, sft={"data": str(data)}),
        tmp_path / "run",
        "texts.jsonl:2: not a JSON",
    )


def test_a_text_beyond_the_context_is_refused_and_one_beyond_max_length_counted(
    workdir, tmp_path, capsys
):
    data = tmp_path / "texts.jsonl"
    rows = [{"text": text} for text, _ in tiny_run.sentences("train")]
    write_jsonl(data, rows + [{"text": "good " * 60}])
    values = tiny_run.on_base(
        workdir, sft={"data": str(data), "max_length": 512, "num_epochs": 0.1}
    )
    refused(values, tmp_path / "run", "sft.max_length must be at most 48")
    values["sft"]["max_length"] = 40
    pipeline.run(values, tmp_path / "run")
    counts = "49 read, 1 too long (over 40 tokens); 48 used"
    assert f"sft.data: {data}: {counts}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stage", "match"),
    [("sft", "must be a reward model"), ("reward", "must be a policy")],
)
def test_a_policy_gives_no_score_and_a_reward_model_no_text(workdir, tmp_path, stage, match):
    field = "reward_model" if stage == "sft" else "init_from"
    paths = {"init_from": str(workdir / "sft"), "reward_model": str(workdir / "reward")}
    values = tiny_run.on_base(workdir, ppo=paths | {field: str(workdir / stage)})
    refused(values, tmp_path, match)


def test_a_folder_that_is_not_there_is_missed_before_the_base_model_is_made(tmp_path):
    values = tiny_run.config()
    values["ppo"]["reward_model"] = str(tmp_path / "reward")
    with pytest.raises(
        ValueError, match=f"ppo.reward_model: there is no folder or .gguf file {tmp_path}/reward"
    ):
        pipeline.run(values, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"ppo": {"rollout_batch_size": 16}},
        {"sft": {"trainable": "all"}},
        {"reward": {"num_layers": 1}},
        {"sft": {"batch_size": 4}, "ppo": {"response_length": 4}},
    ],
    ids=str,
)
def test_other_sizes_are_refused_on_resume_with_their_fields(workdir, changes):
    values = tiny_run.config()
    for section, fields in changes.items():
        values[section].update(fields)
    before = (workdir / "config.json").read_bytes()
    field = next(iter(next(iter(changes.values()))))
    with pytest.raises(ValueError, match=f"begun with other settings: {field}: "):
        pipeline.run(values, workdir)
    assert (workdir / "config.json").read_bytes() == before


def test_another_seed_or_model_is_refused_on_resume(workdir):
    values = tiny_run.config() | {"seed": 1}
    values["model"] = copy.deepcopy(values["model"])
    values["model"]["scratch"]["mlp_dim"] = 64
    with pytest.raises(ValueError, match="seed: 0 -> 1; model.scratch.mlp_dim: 48 -> 64"):
        pipeline.run(values, workdir)


# --- models from elsewhere ------------------------------------------------------------------------


def from_elsewhere(workdir, **changes):
    """PPO on another run's stages; the base model of this config cannot be had."""
    paths = {"init_from": str(workdir / "sft"), "reward_model": str(workdir / "reward")}
    values = tiny_run.on_base(workdir, ppo=paths | changes, evaluate={"judges": ""})
    values["model"]["path"] = "nowhere/at-all"
    return values


def test_the_table_is_about_the_model_that_is_loaded_and_the_base_is_left_alone(
    workdir, tmp_path, capsys
):
    values = from_elsewhere(workdir, num_iterations=1)
    pipeline.run(values, tmp_path)
    printed = capsys.readouterr().out
    assert "ppo starts from       a policy model of 28k parameters, 2 layers x 32" in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"text/distinct2_sft", "text/distinct2_ppo"} <= results.keys()
    assert "text/distinct2_base" not in results and not (tmp_path / "base").exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"trainable": "3"}, "ppo.trainable must be at most 2"),
        ({"value_trainable": "3"}, "ppo.value_trainable must be at most 2"),
        ({"response_length": 25}, r"at most 48 .*got 24 \+ 25"),
        ({"init_from": "base"}, "nowhere/at-all"),
        ({"replay_experts": True}, "ppo.replay_experts must be False where no layer"),
    ],
    ids=str,
)
def test_settings_are_checked_against_the_model_that_is_loaded(workdir, tmp_path, changes, match):
    refused(from_elsewhere(workdir, **changes), tmp_path, match)


def test_a_stage_folder_is_no_base_model(workdir, tmp_path):
    values = tiny_run.on_base(workdir, ppo={"init_from": "base", "reward_model": ""})
    values["ppo"]["reward_function"] = "tests.support.tiny_run:letters"
    values["model"]["path"] = str(workdir / "sft")
    refused(values, tmp_path, "got the stage folder .*/sft': name it as sft.init_from")


def test_a_missing_file_is_missed_before_the_base_model_is_looked_for(workdir, tmp_path):
    values = tiny_run.on_base(workdir, sft={"validation_data": "nowhere.jsonl"})
    values["model"]["path"] = "nowhere/at-all"
    refused(values, tmp_path, "sft.validation_data must be a file, got 'nowhere.jsonl'")


def test_a_batch_beyond_the_data_is_refused(workdir, tmp_path):
    values = tiny_run.on_base(workdir, sft={"batch_size": 64})
    refused(values, tmp_path, "sft.batch_size must be at most 48, the texts to train on, got 64")


def test_no_record_for_validation_names_the_setting(workdir, tmp_path):
    data = tmp_path / "texts.jsonl"
    write_jsonl(data, [{"text": text} for text, _ in tiny_run.sentences("train")[:4]])
    changes = {"data": str(data), "validation_data": "", "validation_fraction": 0.001}
    values = tiny_run.on_base(workdir, sft=changes)
    refused(values, tmp_path / "run", "leave none for validation with validation_fraction=0.001")


@pytest.mark.parametrize("line", ['{"text": "bad"', '{"texts": "bad"}'])
def test_a_malformed_line_is_found_before_the_base_model_is_made(workdir, tmp_path, line):
    data = tmp_path / "texts.jsonl"
    data.write_text('{"text": "good"}\n' + line + "\n")
    values = tiny_run.on_base(workdir, sft={"data": str(data)})
    values["model"] = tiny_run.config()["model"]
    values["model"]["vocabulary_data"] = str(workdir / "data" / "train_texts.jsonl")
    refused(values, tmp_path / "run", "texts.jsonl:2: ")
    assert not (tmp_path / "run").exists()


def test_a_rating_that_is_no_number_is_found_before_the_base_model_is_made(workdir, tmp_path):
    data = tmp_path / "ratings.jsonl"
    data.write_text('{"text": "good", "ratings": [1.0, NaN]}\n')
    values = tiny_run.on_base(workdir, reward={"validation_data": str(data), "init_from": "base"})
    values["model"]["path"] = "nowhere/at-all"
    refused(values, tmp_path / "run", "ratings.jsonl:1: ")
