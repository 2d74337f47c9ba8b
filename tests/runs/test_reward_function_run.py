"""A run by reward functions: answers in the rows, several functions, numbers of tokens."""

import json

import pytest

from ppo_jax.data.records import write_jsonl
from ppo_jax.pipeline import run as pipeline
from tests.support import tiny_run
from tests.support.run_files import read_jsonl

CODE = "tests.support.users_code:"


def config(folder, **ppo):
    """PPO from a model from scratch, two iterations."""
    values = tiny_run.config()
    for section in ("sft", "reward", "evaluate"):
        del values[section]
    values["ppo"] |= {"init_from": "base", "reward_model": "", "num_iterations": 2}
    values["ppo"] |= {"prompts": str(folder / "prompts.jsonl"), "rollout_batch_size": 4, **ppo}
    return values


def write_prompts(folder, answer="e"):
    rows = [{"prompt": "the film is", "answer": a, "id": 1} for a in (answer, "i")]
    write_jsonl(folder / "prompts.jsonl", [*rows, rows[1]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    write_prompts(folder)
    functions = (f"{CODE}answers", f"{CODE}each_token", f"{CODE}count_vowels")
    values = config(folder, reward_functions=functions, reward_weights=(1.0, -2.0, 0.5))
    pipeline.run(values, folder / "run")
    return folder, values


def test_each_function_is_logged_and_their_weighted_sum_is_the_score(folder):
    rows = read_jsonl(folder[0] / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        parts = [row[f"reward/{name}"] for name in ("answers", "each_token", "count_vowels")]
        total = parts[0] - 2 * parts[1] + 0.5 * parts[2]
        assert row["reward/score_mean"] == pytest.approx(total, abs=1e-5)
    assert any(row["reward/count_vowels"] > 0 for row in rows)
    samples = read_jsonl(folder[0] / "run" / "samples.jsonl")
    assert {row["prompt"] for row in samples} == {"the film is"} and len(samples) == 4


def test_the_table_says_which_columns_are_kept(folder, capsys):
    pipeline.dry_run(folder[1], folder[0] / "other")
    out = capsys.readouterr().out
    told = "prompts.jsonl: 3 read, 1 repeated; columns kept: answer; columns not read: id; 2 used"
    assert told in out and "    answer: 'e'\n" in out


def test_a_run_does_not_go_on_with_other_answers(folder):
    stage = json.loads((folder[0] / "run" / "ppo" / "stage.json").read_text())
    assert stage["data"]["rows"] == 2 and "columns" in stage["data"]
    values = json.loads(json.dumps(folder[1]))
    values["ppo"]["num_iterations"] = 3
    write_prompts(folder[0], answer="o")
    with pytest.raises(ValueError, match=r"prompts.jsonl has changed since .*2 rows, but others"):
        pipeline.dry_run(values, folder[0] / "run")
    write_prompts(folder[0])
    pipeline.dry_run(values, folder[0] / "run")


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (
            {"reward_function": f"{CODE}no_column"},
            "asks for 'colour', which .* are .*'answer', 'id",
        ),
        ({"reward_functions": (f"{CODE}answers", f"{CODE}no_column")}, "no_column asks for 'col"),
    ],
)
def test_a_keyword_without_a_column_is_refused_at_the_start(tmp_path, code, told):
    write_prompts(tmp_path)
    with pytest.raises(ValueError, match=told):
        pipeline.run(config(tmp_path, **code), tmp_path / "run")
    assert not (tmp_path / "run" / "ppo").exists()
