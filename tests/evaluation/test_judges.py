"""A panel of judges: its headline, and what it says of the responses of some policies."""

import dataclasses

import numpy as np
import pytest

from ppo_jax.evaluation.judges import JudgePanel, ask_panel, make_panel

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
    assert JudgePanel(judges={"long": length, "gold": length}).headline_judge == "gold"
    words = JudgePanel(judges={"long": length, "short": length})
    assert words.headline_judge == "long"
    # A panel made of another one chooses again, as the quickstart's does.
    with_gold = dataclasses.replace(words, judges={**words.judges, "gold": length})
    assert with_gold.headline_judge == "gold"
    with pytest.raises(ValueError, match="judges must be one or more"):
        JudgePanel(judges={})


def no_panel(workdir):
    return {"judges": {"long": length}}


def test_what_is_no_panel_is_refused():
    with pytest.raises(ValueError, match="no_panel must return a JudgePanel, got"):
        judged("no_panel")


def judged(name, texts=TEXTS):
    return ask_panel(make_panel(f"{__name__}:{name}", None), texts)


def test_the_last_policy_is_compared_with_every_other_and_the_one_before_it_is_the_headline():
    results = judged("panel")
    assert results["gold/win_rate_best_of_4_vs_ppo"] == 1.0
    assert results["gold/win_rate_best_of_4_vs_ppo_interval"] == [1.0, 1.0]
    assert results["gold/length_controlled_win_rate_best_of_4_vs_ppo"] == 1.0
    assert results["headline_judge"] == "long"
    assert [row["judge"] for row in results["judges"]] == ["gold", "long"]
    assert {"win_rate_best_of_4_vs_ppo", "win_rate_best_of_4_vs_sft"} <= set(results["judges"][0])


def test_the_headline_judge_is_the_one_named_gold_where_the_panel_names_none():
    results = judged("gold_panel", {"base": ["a"], "ppo": ["aa"]})
    assert results["gold/win_rate_ppo_vs_base"] == 1.0 and results["headline_judge"] == "gold"


def test_a_headline_that_is_no_judge_of_the_panel_is_refused():
    with pytest.raises(ValueError, match=r"headline must be one of .*\['long'\], got 'lnog'"):
        JudgePanel(judges={"long": length}, headline="lnog")
