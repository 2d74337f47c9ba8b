"""The evaluation while PPO trains: what it logs, what it leaves as it was, what it chooses."""

import json
import re
import shutil

import numpy as np
import pytest

from ppo_jax.data.records import write_jsonl
from ppo_jax.evaluation.judges import JudgePanel
from ppo_jax.io.checkpoints import Checkpoints, load_checkpoint_item
from ppo_jax.io.stage_folder import load_model, with_step
from ppo_jax.pipeline import run as pipeline
from tests.support import tiny_run
from tests.support.command_line import run_script
from tests.support.run_files import read_jsonl

ASKED = []  # of the judge "two words", one list of texts a call


def judges(workdir):
    """A headline that wants the contrary of what is trained for, fewer letters, and another."""

    def fewer(texts):
        return [-float(sum(character.isalpha() for character in text)) for text in texts]

    def long(texts):
        ASKED.append(list(texts))
        return [float(len(text)) for text in texts]

    return JudgePanel(judges={"two words": long, "fewer": fewer}, headline="fewer")


def settings(workdir, **ppo):
    """PPO for many letters on the base model of a folder; evaluated on all prompts there are."""
    values = tiny_run.on_base(workdir, ppo={}, evaluate={})
    values["ppo"] |= {"init_from": "base", "reward_model": "", "num_samples": 0}
    values["ppo"] |= {"reward_function": "tests.support.tiny_run:letters", "kl_control": "fixed"}
    values["ppo"]["optimizer"] = tiny_run.optimizer(schedule="constant", learning_rate=0.05)
    values["ppo"] |= {"trainable": "all", "value_trainable": "all"}
    values["ppo"] |= {"evaluate_every": 2, "evaluate_prompts": 6, **ppo}
    values["evaluate"]["judges"] = "tests.runs.test_evaluate_every:judges"
    return values


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    values = tiny_run.config()
    values["sft"] |= {"num_epochs": 0.1}
    pipeline.run({name: values[name] for name in ("prepare", "model", "sft")}, folder)
    return folder


@pytest.fixture(scope="module")
def workdir(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    ASKED.clear()
    pipeline.run(settings(base, keep="best:eval/gold_score"), folder)
    return folder


def logged(folder):
    """{step: what the evaluation logged}"""
    rows = [row for row in read_jsonl(folder / "metrics.jsonl") if row["stage"] == "ppo"]
    found = {r["step"]: {k: v for k, v in r.items() if k.startswith("eval/")} for r in rows}
    return {step: values for step, values in found.items() if values}


def trained(folder):
    """Metrics of the training alone."""
    rows = [row for row in read_jsonl(folder / "metrics.jsonl") if row["step"]]
    return [{k: v for k, v in r.items() if not k.startswith(("eval/", "time/"))} for r in rows]


def params(folder, step=None):
    return load_checkpoint_item(folder / "ppo" / "checkpoints", "policy_params", step)


def test_it_comes_every_so_many_steps_and_where_a_checkpoint_is_saved(workdir):
    assert list(logged(workdir)) == [0, 2, 3, 4, 6]  # 3 is saved
    names = ["gold_score", "gold_win_rate", "kl", "length", "proxy_score"]
    names += ["two_words_score", "two_words_win_rate"]
    assert all(sorted(x) == sorted(f"eval/{n}" for n in names) for x in logged(workdir).values())


def test_it_begins_with_the_starting_policy(workdir):
    first = logged(workdir)[0]
    assert first["eval/gold_win_rate"] == first["eval/two_words_win_rate"] == 0.5
    assert first["eval/kl"] == pytest.approx(0, abs=1e-5)
    assert logged(workdir)[6]["eval/kl"] != pytest.approx(0, abs=1e-2)


def test_judges_read_the_same_prompts_each_time_and_each_text_once(workdir):
    prompts = [row["prompt"] for row in read_jsonl(workdir_data(workdir) / "test_prompts.jsonl")]
    during = ASKED[: len(logged(workdir))]
    for texts, figures in zip(during, logged(workdir).values(), strict=True):
        pairs = zip(texts, prompts, strict=True)
        assert all(text.startswith(prompt) for text, prompt in pairs)
        assert figures["eval/two_words_score"] == np.mean([len(text) for text in texts])
        letters = [
            tiny_run.letters([""], [text[len(prompt) :]])[0]
            for text, prompt in zip(texts, prompts, strict=True)
        ]
        assert figures["eval/proxy_score"] == pytest.approx(np.mean(letters), rel=1e-6)
    wins = np.sign([len(a) - len(b) for a, b in zip(during[-1], during[0], strict=True)])
    assert logged(workdir)[6]["eval/two_words_win_rate"] == pytest.approx((wins / 2 + 0.5).mean())


def workdir_data(workdir):
    path = json.loads((workdir / "config.json").read_text())["config"]["evaluate"]["prompts"]
    return type(workdir)(path).parent


def test_the_best_checkpoint_stays_and_the_verdict_is_of_it(workdir, capsys):
    """The evaluation of the run samples with the same keys, by another program."""
    scores = {step: x["eval/gold_score"] for step, x in logged(workdir).items()}
    best = max((3, 6), key=lambda step: (scores[step], step))
    assert best == 3  # as letters become more
    assert Checkpoints(workdir / "ppo" / "checkpoints").steps() == sorted({best, 6})
    results = json.loads((workdir / "results.json").read_text())
    of_fewer = next(row for row in results["judges"] if row["judge"] == "fewer")
    assert of_fewer["mean_ppo"] == pytest.approx(scores[best])
    assert results["policy/kl_per_response"] == pytest.approx(
        logged(workdir)[best]["eval/kl"], abs=1e-4
    )
    assert results["evaluated"]["steps"]["ppo"] == best
    assert with_step("ppo@best", workdir) == f"ppo@{best}" and with_step("ppo", workdir) == "ppo"
    model, checkpoint = load_model(f"{workdir}/ppo@best"), params(workdir, best)
    np.testing.assert_array_equal(
        model.params["final_norm"]["scale"], checkpoint["final_norm"]["scale"]
    )
    how = [f"--workdir={workdir}", "--prompt=a film", "--response_length=4", "--temperature=0"]
    texts = [run_script("generate", f"--stage=ppo@{x}", *how).out for x in ("best", best)]
    assert texts[0] == texts[1] and texts[0].startswith("a film|")


def test_the_training_is_the_same_without_it(base, workdir, tmp_path):
    values = settings(base, evaluate_every=0)
    del values["evaluate"]
    pipeline.run(values, tmp_path)
    assert logged(tmp_path) == {} and trained(tmp_path) == [
        row for row in trained(workdir) if row["stage"] == "ppo"
    ]
    for mine, theirs in zip(_leaves(params(tmp_path)), _leaves(params(workdir)), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def _leaves(tree):
    return [x for y in tree.values() for x in _leaves(y)] if isinstance(tree, dict) else [tree]


def test_a_run_that_goes_on_is_evaluated_as_one_in_one_go(base, workdir, tmp_path):
    values = settings(base, keep="best:eval/gold_score", num_iterations=3)
    pipeline.run(values, tmp_path, only=("ppo",))
    values["ppo"]["num_iterations"] = 6
    pipeline.run(values, tmp_path, only=("ppo",))
    assert logged(tmp_path) == logged(workdir)
    assert [row["step"] for row in trained(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_it_can_be_turned_on_when_a_run_goes_on(base, workdir, tmp_path):
    """`keep` by a metric of it is known before the first time that it comes."""
    for name in ("ppo", "config.json", "metrics.jsonl"):
        copy = shutil.copytree if (workdir / name).is_dir() else shutil.copy
        copy(workdir / name, tmp_path / name)
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").unlink()
    without = [{k: v for k, v in row.items() if not k.startswith("eval/")} for row in lines]
    write_jsonl(tmp_path / "metrics.jsonl", without)
    values = settings(base, keep="best:eval/kl", num_iterations=8, evaluate_every=4, save_every=4)
    pipeline.run(values, tmp_path, only=("ppo",))
    assert list(logged(tmp_path)) == [8]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ppo", "evaluate", "message"),
    [
        (
            {},
            None,
            "ppo.evaluate_every needs an evaluate section with prompts and judges, got none",
        ),
        ({}, {"judges": ""}, "ppo.evaluate_every needs .* got one without judges"),
        ({"evaluate_prompts": 7}, {}, "ppo.evaluate_prompts must be at most the 6 prompts of .*, "),
        ({"evaluate_every": 0, "keep": "best:eval/kl"}, {}, "ppo.keep must be by another metric"),
        ({"evaluate_every": -1}, {}, "ppo.evaluate_every must be >= 0"),
        ({"evaluate_prompts": 0}, {}, "ppo.evaluate_prompts must be > 0"),
        ({}, {"judges": "tests.nowhere:judges"}, "evaluate.judges must be 'module:function'"),
        ({}, {"prompts": "none.jsonl"}, "evaluate.prompts must be a file, got 'none.jsonl'"),
        ({"keep": "best:eval/silver"}, {}, r"ppo.keep must be .*'eval/gold_score'.*eval/silver"),
    ],
)
def test_what_cannot_be_is_refused(base, tmp_path, ppo, evaluate, message):
    values = settings(base, **ppo)
    values["evaluate"] = None if evaluate is None else values["evaluate"] | evaluate
    with pytest.raises(ValueError, match=message):
        pipeline.run(values, tmp_path, only=("ppo",))
    assert not Checkpoints(tmp_path / "ppo" / "checkpoints").steps()


def test_a_stage_without_a_best_checkpoint_says_so(base, tmp_path):
    with pytest.raises(
        ValueError, match="has no best checkpoint: its keep is 2, not 'best:METRIC'"
    ):
        with_step("sft@best", base)
    wrong = run_script("generate", f"--workdir={base}", "--stage=sft@best", "--prompt=a")
    assert wrong.code == 2 and "has no best checkpoint" in wrong.err


def test_the_table_says_it(base, tmp_path, capsys):
    pipeline.dry_run(settings(base), tmp_path)
    line = "ppo evaluates +every 2 iterations: 6 prompts, tests.runs.test_evaluate_every:judges"
    assert re.search(line, capsys.readouterr().out)
