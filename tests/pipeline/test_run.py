"""One command from data to report: what it leaves, what it skips, what it refuses."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from ppo_jax.config.run import STAGE_NAMES
from ppo_jax.data.records import load_texts
from ppo_jax.distributed.folder_lock import hold_folder
from ppo_jax.inference.score import score_responses, score_texts
from ppo_jax.io import huggingface as hf
from ppo_jax.io.checkpoints import Checkpoints
from ppo_jax.io.stage_folder import load_model
from ppo_jax.pipeline import preflight
from ppo_jax.pipeline import run as pipeline
from tests.support import tiny_run
from tests.support.command_line import run_script
from tests.support.documents import PAGES, python_blocks

STAGES = ("sft", "reward", "ppo")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A complete run of every stage; nothing may change it."""
    folder = tmp_path_factory.mktemp("run")
    pipeline.run(tiny_run.config(), folder)
    return folder


@pytest.fixture(scope="module")
def other(workdir, tmp_path_factory):
    """The other form of every stage: completions, preferences, a reward function; all layers."""
    folder = tmp_path_factory.mktemp("other")
    pipeline.run(other_config(workdir) | {"writers": []}, folder)
    return folder


def other_config(workdir):
    data = "{workdir}/data/"
    return tiny_run.on_base(
        workdir,
        sft={"data": data + "completions.jsonl", "validation_data": "", "validation_fraction": 0.3}
        | {"trainable": "all", "num_epochs": 0.5, "num_micro_batches": 2},
        reward={"data": data + "preferences.jsonl", "format": "preferences", "trainable": "all"}
        | {"validation_data": "", "validation_fraction": 0.4, "reference_data": ""}
        | {"num_layers": 1, "num_epochs": 0.4},
        ppo={"reward_model": "", "reward_function": "tests.support.tiny_run:letters"}
        | {"trainable": "all", "value_trainable": "all", "num_iterations": 2}
        | {"score_clip": 0.5, "overlong_tokens": 8},
    )


def test_the_evaluation_side_by_side_of_a_run_has_its_figures(workdir, tmp_path):
    ended = run_script("evaluate", f"--run={workdir}", f"--workdir={tmp_path / 'out'}")
    assert (ended.code, ended.err) == (0, "")
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    run = json.loads((workdir / "results.json").read_text())
    assert list(result["policies"]) == ["base", "sft", "ppo"]
    assert result["settings"]["reference"] == "sft"
    for row in run["judges"]:
        found = result["judges"][row["judge"]]["policies"]
        assert found["ppo"]["win_rate"] == row["win_rate_ppo_vs_sft"]
        assert found["ppo"]["win_rate_interval"] == row["win_rate_ppo_vs_sft_interval"]
        assert found["base"]["mean"] == pytest.approx(row["mean_base"])
        fair = "length_controlled_win_rate"
        assert found["ppo"][fair] == pytest.approx(row[f"{fair}_ppo_vs_sft"])
    ppo = result["policies"]["ppo"]
    assert ppo["kl"] == pytest.approx(run["policy/kl_per_response"], abs=1e-4)
    assert ppo["kl_stderr"] == pytest.approx(run["policy/kl_per_response_stderr"], abs=1e-4)
    assert ppo["perplexity"] > 1  # of the texts that SFT was validated on
    for ours, theirs in zip(result["samples"], run["samples"], strict=True):
        assert ours["prompt"] == theirs["prompt"]
        assert ours["responses"] == {name: theirs[name] for name in ("base", "sft", "ppo")}
        assert ours["scores"] == pytest.approx(theirs["scores"], abs=1e-4)


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows_of(folder, stage):
    return [row for row in read_lines(folder / "metrics.jsonl") if row["stage"] == stage]


# --- what a run leaves ----------------------------------------------------------------------------


def test_every_step_of_every_stage_has_its_line(workdir):
    for stage in STAGES:
        first = 1 if stage == "ppo" else 0  # the others are validated before their first step
        assert [row["step"] for row in rows_of(workdir, stage)] == list(range(first, 7))
        assert all(np.isfinite(list(row.values())[2:]).all() for row in rows_of(workdir, stage))


def test_the_metrics_have_their_standard_names(workdir):
    sft, reward, ppo = (rows_of(workdir, stage)[-1] for stage in STAGES)
    assert {"sft/loss", "sft/validation_loss", "sft/validation_perplexity"} <= sft.keys()
    assert {"reward_model/loss", "reward_model/validation_accuracy_margin1"} <= reward.keys()
    names = {"reward/score_mean", "kl/ref", "kl/coef", "policy/loss", "policy/clip_fraction"}
    names |= {"policy/approx_kl", "policy/entropy", "value/loss", "value/explained_variance"}
    assert names | {"response/length", "response/eos_fraction"} <= ppo.keys()
    assert np.isclose(sft["sft/validation_perplexity"], np.exp(sft["sft/validation_loss"]))


def test_validation_comes_every_so_many_steps_and_at_the_end(workdir):
    for stage, name in (
        ("sft", "sft/validation_loss"),
        ("reward", "reward_model/calibration_shift"),
    ):
        steps = [row["step"] for row in rows_of(workdir, stage) if name in row]
        assert steps == ([0, 2, 4, 6] if stage == "sft" else [6])


def test_config_json_holds_the_settings_and_the_versions(workdir):
    record = json.loads((workdir / "config.json").read_text())
    assert record["config"]["ppo"]["rollout_batch_size"] == 8
    assert record["config"]["sft"]["data"] == "{workdir}/data/train_texts.jsonl"  # may be moved
    assert record["packages"]["jax"] and "git_commit" in record


def test_the_same_prompts_are_sampled_every_so_many_iterations(workdir):
    rows = read_lines(workdir / "samples.jsonl")
    assert [row["step"] for row in rows[::3]] == [0, 2, 4, 6]
    assert len({tuple(row["prompt"] for row in rows[i : i + 3]) for i in (0, 3, 6, 9)}) == 1
    assert set(rows[0]) == {"stage", "step", "prompt", "response", "score"}
    assert rows[0]["response"] != rows[-3]["response"] or rows[1] != rows[-2]


def test_results_have_the_names_that_outside_code_relies_on(workdir):
    results = json.loads((workdir / "results.json").read_text())
    names = ["reward_model/accuracy_margin1", "gold/win_rate_ppo_vs_sft", "policy/kl_per_response"]
    names += ["text/distinct2_ratio", "time/total_s"]
    assert all(np.isfinite(results[name]) for name in names)
    assert results["judges"][0]["judge"] == "gold" and len(results["samples"]) == 6
    assert set(results["samples"][0]) == {"prompt", "base", "sft", "ppo", "scores"}
    parts = [results[f"time/{part}_s"] for part in ("prepare", *STAGES, "evaluate")]
    assert np.isclose(results["time/total_s"], sum(parts))


def test_the_last_validation_is_the_result(workdir):
    results = json.loads((workdir / "results.json").read_text())
    row = rows_of(workdir, "reward")[-1]
    got = results["reward_model/accuracy_margin1"]
    assert got == row["reward_model/validation_accuracy_margin1"]


def test_there_is_a_report_and_tensorboard_files(workdir, other):
    page = (workdir / "report.html").read_text()
    assert "<html" in page and "the film is" not in page[:200] and "gold" in page
    for stage in STAGES:
        assert list((workdir / "tensorboard" / stage).glob("events.out.*"))
    assert not (other / "tensorboard").exists()  # whose `writers` are none


def test_every_stage_is_a_model_that_can_be_loaded(workdir):
    kinds = {stage: load_model(workdir / stage).kind for stage in STAGES}
    assert kinds == {"sft": "policy", "reward": "reward", "ppo": "policy"}


def test_what_is_frozen_stays_and_what_is_trained_moves(workdir):
    base = load_model(workdir / "base").params["layers"]
    for stage in STAGES:
        layers = load_model(workdir / stage).params["layers"]
        kernel = ("mlp", "down", "kernel")
        for layer, moves in (("0", False), ("1", True)):
            a, b = base[layer], layers[layer]
            for name in kernel:
                a, b = a[name], b[name]
            assert (not np.array_equal(a, b)) == moves, (stage, layer)


def test_the_reward_model_scores_the_reference_texts_zero_on_average(workdir, other):
    for folder, data in ((workdir, "unseen_texts"), (other, None)):
        model = load_model(folder / "reward")
        if data is None:  # the default: the texts it was trained on
            assert "reward_model/calibration_shift" in rows_of(folder, "reward")[-1]
            continue
        records = load_texts(workdir / "data" / f"{data}.jsonl")
        scores = score_texts(model, [record.text for record in records])
        assert abs(scores.mean()) < 1e-5 < scores.std()


def test_a_score_does_not_depend_on_the_texts_beside_it(workdir):
    """Texts are scored in batches of like length, and come back in their order."""
    model = load_model(workdir / "reward")
    texts = [text for text, _ in tiny_run.sentences("train")][::3] + ["good", "a long and dull end"]
    together = score_texts(model, texts)
    alone = [score_texts(model, [text])[0] for text in texts]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert together.std() > 0.01


def test_sft_on_completions_reward_on_preferences_and_ppo_on_a_function(workdir, other):
    accuracies = [row.get("reward_model/validation_accuracy") for row in rows_of(other, "reward")]
    assert accuracies[-1] is not None and 0 <= accuracies[-1] <= 1
    # A sample's score is what the function says of its text.
    for row in read_lines(other / "samples.jsonl"):
        assert row["score"] == tiny_run.letters([""], [row["response"]])[0]
    for row in rows_of(other, "ppo"):  # a response of n of 8 tokens loses n / 8
        lost = row["response/length"] / 8
        assert -lost < row["reward/adjusted_score_mean"] <= 0.5 - lost
        assert row["reward/score_mean"] > 0.5
    assert load_model(other / "reward").config.num_layers == 1
    assert load_model(other / "sft").config.num_layers == 2


def test_several_reward_models_are_a_function_as_the_docs_have_it(workdir):
    (code,) = (x for x in python_blocks(PAGES["methods.md"]) if "ensemble_scores" in x)
    for number, step in enumerate((3, 6)):
        code = code.replace(f"runs/rm{number}/reward", f"{workdir}/reward@{step}")
    names = {}
    exec(compile(code, "docs/methods.md", "exec"), names)
    asked = (["the film is"] * 2, [" good", " bad and dull"], [True, False])
    first, second = (score_responses(model, *asked) for model in names["MODELS"])
    assert np.abs(first - second).min() > 1e-4
    doubted = np.minimum(first, second)  # of two, the mean less the deviation
    np.testing.assert_allclose(names["score"](*asked), doubted, atol=1e-5)
    averaged = np.array(names["averaged"](*asked))
    assert np.abs(averaged - (first + second) / 2).max() < np.abs(first - second).max()


# --- what is not done again -----------------------------------------------------------------------


def test_the_stages_are_the_sections_of_the_config():
    assert [stage.name for stage in preflight.STAGES] == list(STAGE_NAMES)


def test_a_finished_run_says_so_and_adds_nothing(workdir, tmp_path, capsys):
    """In another place at that: the folder may be moved."""
    moved = tmp_path / "moved"
    shutil.copytree(workdir, moved)
    files = ("metrics.jsonl", "samples.jsonl")
    before = [(moved / name).read_bytes() for name in files]
    pipeline.run(tiny_run.config(), moved)
    printed = capsys.readouterr().out
    assert "nothing to do" in printed and "ppo update" not in printed
    for stage in (*STAGES, "evaluate"):
        assert f"{stage}: complete" in printed
    assert [(moved / name).read_bytes() for name in files] == before


def test_more_iterations_go_on_from_the_last_one_and_are_judged_anew(workdir, tmp_path, capsys):
    """And other numbers: they are data, not shapes."""
    moved = tmp_path / "moved"
    shutil.copytree(workdir, moved)
    values = tiny_run.config()
    values["ppo"].update(num_iterations=7, clip_range=0.3, gamma=0.9)
    values["ppo"]["optimizer"]["learning_rate"] = 5e-3
    pipeline.run(values, moved)
    printed = capsys.readouterr().out
    assert "ppo: resuming after step 6" in printed and "sft: complete" in printed
    assert "evaluate: 6 responses of ppo" in printed
    assert [row["step"] for row in rows_of(moved, "ppo")] == [1, 2, 3, 4, 5, 6, 7]
    assert rows_of(moved, "ppo")[:6] == rows_of(workdir, "ppo")


def test_a_second_run_in_the_same_folder_is_refused(workdir):
    with hold_folder(workdir):
        with pytest.raises(ValueError, match=f"{workdir} is in use by process {os.getpid()} on"):
            pipeline.run(tiny_run.config(), workdir)


def test_a_run_is_not_taken_for_a_model(workdir):
    with pytest.raises(ValueError, match=r"is a run: its stages \['sft', 'reward', 'ppo'\] are"):
        load_model(workdir)


def test_the_page_from_python_runs_as_it_stands(workdir, tmp_path, monkeypatch, capsys):
    shutil.copytree(workdir, tmp_path / "runs" / "first")
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in python_blocks(PAGES["from-python.md"]):
        exec(compile(code, "docs/from-python.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "sft: complete" not in printed and "policy 2 " in printed
    assert "(1, 3, " in printed and "bfloat16" in printed
    assert "['rollout', 'scoring', 'update'] True" in printed


def test_a_single_stage_can_be_run_alone(workdir, tmp_path):
    values = tiny_run.on_base(workdir, sft={"num_epochs": 0.1})
    pipeline.run(values, tmp_path, only=("sft",))
    assert Checkpoints(tmp_path / "sft" / "checkpoints").latest_step() == 1
    with pytest.raises(ValueError, match=r"none of the sections \['reward'\]"):
        pipeline.run(values, tmp_path, only=("reward",))


# --- reward functions -----------------------------------------------------------------------------


def test_a_reward_function_that_gives_too_few_numbers_stops_the_run(workdir, tmp_path):
    function = {"reward_model": "", "reward_function": "tests.support.tiny_run:too_few"}
    values = tiny_run.on_base(workdir, ppo={"init_from": "base"} | function)
    told = r"tests.support.tiny_run:too_few must return 3 finite numbers, .* got 2: \["
    with pytest.raises(ValueError, match=told):
        pipeline.run(values, tmp_path)


# --- generate.py ----------------------------------------------------------------------------------


def generate(*flags):
    command = [sys.executable, str(tiny_run.ROOT / "experiments" / "generate.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_generate_answers_from_a_stage_and_from_a_folder(workdir):
    prompts = ["--prompt=the film is", "--prompt=a plot", "--response_length=6"]
    stage = generate(f"--workdir={workdir}", "--stage=ppo", "--num_responses=2", *prompts)
    assert stage.stdout.count("the film is|") == 2, stage.stderr
    assert stage.stdout.count("a plot|") == 2
    folder = generate(f"--model={workdir / 'base'}", "--temperature=0", *prompts)
    assert folder.stdout.count("|") >= 2, folder.stderr


def test_the_base_model_is_a_hugging_face_folder(workdir):
    config, params = hf.load_policy(workdir / "base", dtype="float32")
    assert config.num_layers == 2 and params["embed"]["tokens"].shape[1] == 32
