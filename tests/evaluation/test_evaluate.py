"""Any policies are compared: the last with the one before it, by the panel's headline judge."""

import json

import numpy as np
import pytest

from ppo_jax.config.stages import EvaluateSettings
from ppo_jax.evaluation.evaluate import JudgePanel, judge_all, last_validation

TEXTS = {"sft": ["a", "bbb"], "ppo": ["aa", "bb"], "best_of_4": ["aaa", "bbbb"]}


def length(texts):
    return np.array([len(text) for text in texts], float)


def panel(workdir):
    del workdir
    return JudgePanel(
        judges={"gold": lambda texts: -length(texts), "long": length}, headline="long"
    )


def gold_panel(workdir):
    del workdir
    return JudgePanel(judges={"long": length, "gold": length})


def test_the_headline_is_gold_or_the_first():
    assert JudgePanel(judges={"long": length, "gold": length}).headline == "gold"
    assert JudgePanel(judges={"long": length, "short": length}).headline == "long"
    with pytest.raises(ValueError, match="judges must be one or more"):
        JudgePanel(judges={})


def no_panel(workdir):
    return {"judges": {"long": length}}


def test_what_is_no_panel_is_refused():
    with pytest.raises(ValueError, match="no_panel must return a JudgePanel, got"):
        judged("no_panel")


def judged(name, texts=TEXTS):
    settings = EvaluateSettings(prompts="p", judges=f"{__name__}:{name}")
    return judge_all(settings, None, texts)


def test_the_last_policy_is_compared_with_every_other_and_the_one_before_it_is_the_headline():
    results = judged("panel")
    assert results["gold/win_rate_best_of_4_vs_ppo"] == 1.0
    assert results["gold/win_rate_best_of_4_vs_ppo_interval"] == [1.0, 1.0]
    assert results["headline_judge"] == "long"
    assert [row["judge"] for row in results["judges"]] == ["gold", "long"]
    assert {"win_rate_best_of_4_vs_ppo", "win_rate_best_of_4_vs_sft"} <= set(results["judges"][0])


def test_the_headline_judge_is_the_one_named_gold_where_the_panel_names_none():
    results = judged("gold_panel", {"base": ["a"], "ppo": ["aa"]})
    assert results["gold/win_rate_ppo_vs_base"] == 1.0 and results["headline_judge"] == "gold"


def test_a_headline_that_is_no_judge_of_the_panel_is_refused():
    with pytest.raises(ValueError, match=r"headline must be one of .*\['long'\], got 'lnog'"):
        JudgePanel(judges={"long": length}, headline="lnog")


def test_the_last_validation_has_the_newest_value_of_each_metric(tmp_path):
    rows = [
        {"stage": "reward", "step": 1, "reward_model/validation_accuracy": 0.5, "time/step_s": 1.0},
        {"stage": "reward", "step": 2, "reward_model/validation_accuracy": 0.7},
        {"stage": "ppo", "step": 1, "kl/ref": 0.1},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert last_validation(path) == {"reward_model/validation_accuracy": 0.7}
