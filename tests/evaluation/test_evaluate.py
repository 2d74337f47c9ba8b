"""Any policies are compared: the last with the one before it, by the panel's headline judge."""

import dataclasses
import json
import types

import numpy as np
import pytest

from ppo_jax.algorithms.experience import PPONetworks, response_scores
from ppo_jax.config.stages import EvaluateSettings
from ppo_jax.core.types import FrozenParams
from ppo_jax.data.records import write_jsonl
from ppo_jax.evaluation.evaluate import (
    JudgePanel,
    evaluation_prompts,
    first_scores,
    judge_all,
    last_validation,
)
from ppo_jax.inference.generate import generate
from ppo_jax.inference.score import score_responses
from ppo_jax.io.tokenizers import train_tokenizer
from ppo_jax.models.build import reward_network
from ppo_jax.rollout.sampling import Sampling
from tests.support import tiny
from tests.support.chats import TOKENIZER, turns
from tests.support.tiny_stage import random_model

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


# --- scores of the samples ------------------------------------------------------------------------

PROMPTS = ["a film", "a film of few words", "few words of a film " * 4] * 4


@pytest.fixture(scope="module")
def sampled():
    """(policy, responses, rollouts, sampling): some stopped at a word, some were cut off."""
    policy = random_model(max_length=160)
    sampling = Sampling(response_length=10, eos_ids=(0, *range(40, 60)))
    how = {"sampling": sampling, "max_prompt_length": 150, "batch_size": 5}
    return policy, *generate(policy, PROMPTS, **how)


@pytest.mark.parametrize("score_at", ["eos", "last"])
def test_samples_have_the_scores_that_ppo_gives_them(sampled, score_at):
    policy, responses, rollouts = sampled
    reward, eos_id = random_model("reward", max_length=160), 0 if score_at == "eos" else None
    networks = PPONetworks(policy=None, reward=reward_network(reward.config))
    how = dict(frozen=FrozenParams(ref_policy={}, reward=reward.params), networks=networks)
    expected = [response_scores(rollout, **how, eos_id=eos_id) for rollout in rollouts]
    ended = np.concatenate([rollout.has_eos for rollout in rollouts])[: len(PROMPTS)]
    assert 0 < ended.sum() < len(ended)
    scores = first_scores(
        reward, {"ppo": policy}, PROMPTS, {"ppo": responses}, {"ppo": rollouts}, score_at
    )
    assert list(scores["ppo"]) == list(range(12))
    got = list(scores["ppo"].values())
    np.testing.assert_allclose(got, np.concatenate(expected)[:12], atol=1e-5)


def test_samples_are_scored_as_text_by_a_reward_model_with_a_tokenizer_of_its_own(sampled):
    policy, responses, rollouts = sampled
    tokenizer = train_tokenizer(["other words of a film"] * 3, 290)
    config = tiny.model_config(vocab_size=len(tokenizer), max_length=160)
    reward = dataclasses.replace(random_model("reward"), tokenizer=tokenizer, config=config)
    reward = dataclasses.replace(reward, params=tiny.random_params(reward_network(config)))
    ended = np.concatenate([rollout.has_eos for rollout in rollouts])
    scores = first_scores(
        reward, {"ppo": policy}, PROMPTS, {"ppo": responses}, {"ppo": rollouts}, "eos"
    )
    expected = score_responses(reward, PROMPTS[:12], responses[:12], ended[:12])
    assert list(scores["ppo"]) == list(range(12))
    np.testing.assert_allclose(list(scores["ppo"].values()), expected, atol=1e-6)


def test_samples_beyond_the_reward_models_context_have_no_score(sampled):
    policy, responses, rollouts = sampled
    rows = {"ppo": responses}, {"ppo": rollouts}
    lengths = np.concatenate([rollout.mask.sum(axis=1) for rollout in rollouts])[:12]
    middle = int(np.median(lengths))
    short = random_model("reward", max_length=middle)
    scores = first_scores(short, {"ppo": policy}, PROMPTS, *rows, "last")
    assert set(scores["ppo"]) == set(np.flatnonzero(lengths <= middle)) and len(scores["ppo"]) < 12
    shortest = random_model("reward", max_length=2)
    assert first_scores(shortest, {"ppo": policy}, PROMPTS, *rows, "eos") == {"ppo": {}}
    assert first_scores(None, {"ppo": policy}, PROMPTS, *rows, "eos") == {}


def test_prompts_of_one_text_are_one_whatever_their_answers(tmp_path):
    """Judges are given texts: copies would count as independent."""
    path = tmp_path / "prompts.jsonl"
    write_jsonl(path, [{"messages": turns(x, y)} for x in ("Hi", "Ho") for y in ("Yes", "No")])
    config = types.SimpleNamespace(
        evaluate=types.SimpleNamespace(prompts=str(path), num_prompts=2),
        ppo=types.SimpleNamespace(max_prompt_length=32),
    )
    data = evaluation_prompts(config, TOKENIZER)
    assert len(data.texts) == 2 == len({*data.texts})
    assert data.dropped == {"repeated": 2} and data.columns == {} == data.gaps
