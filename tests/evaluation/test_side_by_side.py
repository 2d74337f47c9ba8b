"""Policies side by side: every figure by another way, and a folder that goes on where it was."""

import json

import numpy as np
import pytest

from ppo_jax.data.records import write_jsonl
from ppo_jax.evaluation import side_by_side as sides
from ppo_jax.evaluation.compare import log_ratios
from ppo_jax.evaluation.judges import JudgePanel, load_judges, parse_judges
from ppo_jax.evaluation.statistics import (
    length_controlled_win_rate,
    outcomes_of,
    win_rate,
)
from ppo_jax.inference.score import score_responses
from ppo_jax.io.stage_folder import load_model
from ppo_jax.models.build import policy_network
from tests.support import tiny
from tests.support.command_line import run_script
from tests.support.run_files import write_run
from tests.support.tiny_stage import exported, random_model, write_stage

PROMPTS = [f"a film of {word}" for word in ("few", "words", "and", "more", "art", "fun")]


def letters(texts):
    """A judge: how often a text has the letter a."""
    return np.array([float(text.count("a")) for text in texts])


def shapes(workdir):
    """A panel: its headline is the length, and it is measured on rated texts."""
    assert (workdir / "sft").is_dir()

    def length(texts):
        return np.array([float(len(text)) for text in texts])

    rated = (["a", "aa", "aaa"], np.array([0.0, 2.0, 4.0]))
    return JudgePanel(judges={"letters": letters, "length": length}, headline="length", rated=rated)


def other(model, seed):
    """A model of the same shape with other parameters."""
    params = tiny.random_params(policy_network(model.config), seed=seed)
    return type(model)(**{**vars(model), "params": params})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two policies and a reward model as stages, prompts and texts."""
    folder = tmp_path_factory.mktemp("sides")
    policy = random_model(max_length=48)
    reward = random_model("reward", max_length=48)
    write_stage(folder, "sft", policy)
    write_stage(folder, "ppo", other(policy, 5))
    write_stage(folder, "reward", reward)
    for name, model, stage in (("hf", policy, "sft"), ("classifier", reward, "reward")):
        run = write_run(folder / f"run_of_{name}", config={})
        exported(run, stage, model).rename(folder / name)
    write_jsonl(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    write_jsonl(folder / "texts.jsonl", [{"text": "a film of few words"}, {"text": "a film"}])
    return folder


def flags(world, workdir, **changes):
    policies = f"sft={world}/sft; ppo={world}/ppo@1; best=bon({world}/sft, n=3); hf={world}/hf"
    judges = f"letters={__name__}:letters; rm={world}/reward; hf={world}/classifier"
    asked = dict(policies=policies, judges=judges, reward=f"{world}/reward", num_prompts="6")
    asked |= dict(prompts=f"{world}/prompts.jsonl", texts=f"{world}/texts.jsonl", seeds="0:2")
    asked |= dict(max_prompt_length="32", response_length="6", workdir=str(workdir)) | changes
    return [f"--{name}={value}" for name, value in asked.items() if value is not None]


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """(what the command printed, what evaluation.json holds, the folder)."""
    workdir = tmp_path_factory.mktemp("sides_out") / "out"
    ended = run_script("evaluate", *flags(world, workdir))
    assert (ended.code, ended.err) == (0, "")
    return ended.out, json.loads((workdir / "evaluation.json").read_text()), workdir


def kept(workdir, name):
    """The responses of a model, of both seeds."""
    paths = [workdir / "responses" / f"{name}-seed{seed}.json" for seed in (0, 1)]
    return [sides.from_json(json.loads(path.read_text())) for path in paths]


def test_scores_and_kl_are_those_of_the_responses_that_are_kept(world, finished):
    _, result, workdir = finished
    ppo, rows = result["policies"]["ppo"], kept(workdir, "ppo")
    reward = load_model(world / "reward")
    # As text: byte tokens are the same read again, but for what is no UTF-8.
    scores = [score_responses(reward, PROMPTS, r.texts, r.ended) for r in rows]
    ours = np.array([row["scores"]["ppo"] for row in result["samples"]])
    same = ["�" not in text for text in rows[0].texts]
    np.testing.assert_allclose(ours[same], scores[0][same], atol=1e-4)
    ratios = np.stack([log_ratios(load_model(world / "sft"), r) for r in rows], axis=1)
    assert ppo["kl"] == pytest.approx(ratios.mean(), abs=1e-4) and ppo["kl"] > 0.1
    stderr = ratios.mean(axis=1).std(ddof=1) / len(PROMPTS) ** 0.5
    assert ppo["kl_stderr"] == pytest.approx(stderr, abs=1e-4)
    assert result["policies"]["sft"]["kl"] == 0.0
    judged = result["judges"]["rm"]["policies"]["ppo"]
    assert judged["mean"] == pytest.approx(ppo["score"], abs=1e-6)


def test_the_best_of_n_is_the_best_of_the_first_n_and_a_policy_its_first_sample(finished):
    _, result, workdir = finished
    settings, best = result["settings"], result["policies"]["best"]
    assert settings["policies"]["best"]["n"] == 3 and settings["policies"]["ppo"]["step"] == 1
    pool = kept(workdir, "sft")
    assert len(pool[0].texts) == 3 * len(PROMPTS)
    for i, row in enumerate(result["samples"]):
        assert row["responses"]["sft"] == pool[0].texts[i]
        assert row["responses"]["best"] in pool[0].texts[i :: len(PROMPTS)]
    # All n of n samples are there: the estimator is the choice itself.
    assert best["score"] == pytest.approx(best["score_expected"])
    assert best["score"] > result["policies"]["sft"]["score"]
    assert best["kl"] == pytest.approx(np.log(3) - 2 / 3) and best["kl_is"] == "upper bound"
    assert "entropy" not in best and "perplexity" not in best
    curve = result["best_of_n"]["sft"]
    assert curve["n"] == [1, 2, 3] and curve["kl_bound"][0] == 0.0
    assert curve["score"]["mean"] == sorted(curve["score"]["mean"])
    assert curve["score"]["mean"][-1] == pytest.approx(best["score"])


def test_folders_of_hugging_face_are_policies_and_judges_as_their_stages_are(finished):
    _, result, workdir = finished
    assert [r.texts for r in kept(workdir, "hf")] == [r.texts[:6] for r in kept(workdir, "sft")]
    policies = result["policies"]
    assert policies["hf"]["kl"] == pytest.approx(0.0, abs=1e-4)
    assert policies["hf"]["perplexity"] == pytest.approx(policies["sft"]["perplexity"])
    assert result["judges"]["letters"]["policies"]["hf"]["win_rate"] == 0.5
    for name, row in result["judges"]["hf"]["policies"].items():
        assert row["mean"] == pytest.approx(result["judges"]["rm"]["policies"][name]["mean"])


def test_win_rates_are_over_all_seeds(finished):
    _, result, workdir = finished
    row = result["judges"]["letters"]["policies"]["ppo"]
    rates, won, longer = [], [], []
    for ppo, sft in zip(kept(workdir, "ppo"), kept(workdir, "sft"), strict=True):
        texts = [[p + r for p, r in zip(PROMPTS, x.texts[:6], strict=True)] for x in (ppo, sft)]
        rates.append(win_rate(*map(letters, texts)))
        won.append(outcomes_of(*map(letters, texts)))
        longer.append([len(a) - len(b) for a, b in zip(*texts, strict=True)])
    assert row["win_rate_by_seed"] == pytest.approx(rates)
    assert row["win_rate"] == pytest.approx(np.mean(rates))
    low, high = row["win_rate_interval"]
    assert low <= row["win_rate"] <= high
    assert "win_rate" not in result["judges"]["letters"]["policies"]["sft"]
    fair, interval = length_controlled_win_rate(np.transpose(won), np.transpose(longer), seed=0)
    assert row["length_controlled_win_rate"] == pytest.approx(fair)
    assert row["length_controlled_win_rate_interval"] == pytest.approx(interval)


def test_perplexity_is_that_of_the_texts_and_the_same_for_the_same_weights(world, finished):
    _, result, _ = finished
    found = {name: row.get("perplexity") for name, row in result["policies"].items()}
    assert found["sft"] > 1 and found["ppo"] > 1 and found["sft"] != found["ppo"]


def test_the_table_and_the_page_have_every_policy_and_judge(finished):
    out, result, workdir = finished
    page = (workdir / "evaluation.html").read_text()
    for name in (*result["policies"], *result["judges"], "at equal length", "at most"):
        assert name in out and name in page
    assert page.rstrip().endswith("</html>") and "http" not in page.replace("http://www.w3", "")


def test_a_second_call_has_nothing_to_do_and_a_killed_one_goes_on(world, finished, monkeypatch):
    out, result, workdir = finished
    sampled = []
    respond = sides.respond
    monkeypatch.setattr(sides, "respond", lambda *a: sampled.append(a[2].seed) or respond(*a))
    again = run_script("evaluate", *flags(world, workdir))
    assert again.code == 0 and "complete: nothing to do" in again.out and not sampled
    # As a kill leaves it: one response file is missing, the result is not complete.
    (workdir / "responses" / "ppo-seed1.json").unlink()
    half = {"settings": result["settings"], "complete": False}
    sides.write_result(workdir, half)
    assert run_script("evaluate", *flags(world, workdir)).code == 0
    assert sampled == [1]
    assert json.loads((workdir / "evaluation.json").read_text()) == result


def test_a_folder_of_another_evaluation_is_refused(world, finished):
    _, _, workdir = finished
    ended = run_script("evaluate", *flags(world, workdir, seeds="0:3"))
    assert ended.code == 2 and ended.err.count("\n") == 1
    assert "other settings: seeds was [0, 1], is [0, 1, 2]" in ended.err
    ended = run_script("evaluate", *flags(world, workdir, policies=f"sft={world}/sft"))
    assert ended.code == 2 and "other settings: policies differ in " in ended.err
    assert ended.err.count("\n") == 1 and str(world / "ppo") not in ended.err


def test_a_panel_is_made_of_the_runs_folder_with_its_headline_first(world):
    """Its judges are asked by their own names, and its rated texts measure them."""
    name = f"{__name__}:shapes"
    judges = load_judges(parse_judges({name: name}), str(world), "eos")
    assert [judge.name for judge in judges] == ["length", "letters"]
    assert judges[0].accuracy() == 1.0


# --- mistakes: one line, code 2, nothing sampled, nothing left ------------------------------------

MISTAKES = {
    "no policy": ({"policies": None}, 'give --policies="NAME=PATH; NAME=PATH", or --run'),
    "a policy without a name": ({"policies": "{w}/sft"}, "NAME=VALUE; NAME=VALUE ..., got"),
    "an empty list": ({"policies": " ; "}, "--policies is empty"),
    "a name twice": ({"policies": "a={w}/sft; a={w}/ppo"}, "has 'a' twice"),
    "a reserved name": ({"policies": "prompt={w}/sft"}, "cannot be called 'prompt'"),
    "no such model": ({"policies": "a={w}/nothing"}, "--policies: a: "),
    "no such step": ({"policies": "a={w}/sft@7"}, "no checkpoint of step 7, but of [1]"),
    "a reward model": ({"policies": "a={w}/reward"}, "is a reward model, not a policy"),
    "a run": ({"policies": "a={w}"}, "is a run: name a stage"),
    "no n": ({"policies": "a=bon({w}/sft)"}, "a must be bon(POLICY, n=16), got"),
    "best of one": ({"policies": "a=bon({w}/sft, n=1)"}, "n of a must be at least 2, got 1"),
    "best by nothing": ({"reward": None}, "--reward must be given: best is the best of n"),
    "a policy as reward": ({"reward": "{w}/sft"}, "--reward must be a reward model"),
    "no such reward": ({"reward": "{w}/none"}, "--reward: "),
    "an unknown reference": ({"reference": "base"}, "--reference must be one of the policies"),
    "best-of-n as reference": ({"reference": "best"}, "not the best of n, got 'best'"),
    "no prompts": ({"prompts": None}, "give --prompts"),
    "no such prompts": ({"prompts": "{w}/none.jsonl"}, "--prompts: "),
    "too many prompts": ({"num_prompts": "7"}, "--num_prompts must be at most the 6 prompts of"),
    "seeds of no number": ({"seeds": "one"}, "--seeds must be A:B"),
    "no seed": ({"seeds": "3:3"}, "--seeds must be A:B"),
    "a seed twice": ({"seeds": "1,1"}, "all different, got '1,1'"),
    "no such judge": ({"judges": "a=nowhere:judge"}, "--judges must be 'module:function'"),
    "a judge that is a policy": ({"judges": "a={w}/sft"}, "is a policy; a judge is a reward model"),
    "a judge that is no path": ({"judges": "{w}/reward"}, "--judges must be NAME=PATH"),
    "a panel without a run": ({"judges": "os:getcwd"}, "makes a panel from a run's folder"),
    "no such texts": ({"texts": "{w}/none.jsonl"}, "--texts: "),
    "too long for the reward": ({"response_length": "40"}, "--reward reads at most 48 tokens"),
    "no such run": ({"run": "{w}/none"}, "--run must be a run's folder"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_told_in_one_line_before_anything_is_sampled(world, tmp_path, what):
    changes, told = MISTAKES[what]
    filled = {k: v and v.format(w=world) for k, v in changes.items()}
    ended = run_script("evaluate", *flags(world, tmp_path / "out", **filled))
    assert ended.code == 2 and ended.out == ""
    assert ended.err.count("\n") == 1 and told in ended.err, ended.err
    assert not list(tmp_path.iterdir())
