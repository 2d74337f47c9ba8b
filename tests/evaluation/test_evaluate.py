"""The evaluation of a run: its prompts, the scores of its samples, the last validation."""

import dataclasses
import json
import types

import numpy as np
import pytest

from ppo_jax.algorithms.experience import response_scores
from ppo_jax.algorithms.options import PPONetworks
from ppo_jax.core.types import FrozenParams
from ppo_jax.data.records import write_jsonl
from ppo_jax.evaluation.evaluate import (
    evaluation_prompts,
    first_scores,
    last_validation,
)
from ppo_jax.inference.generate import generate
from ppo_jax.inference.responses import read_rollouts
from ppo_jax.inference.score import score_responses
from ppo_jax.io.tokenizers import train_tokenizer
from ppo_jax.models.build import reward_network
from ppo_jax.rollout.sampling import Sampling
from tests.support import tiny
from tests.support.chats import TOKENIZER, turns
from tests.support.tiny_stage import random_model


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
    """(policy, responses, rollouts): some stopped at a word, some were cut off."""
    policy = random_model(max_length=160)
    sampling = Sampling(response_length=10, eos_ids=(0, *range(40, 60)))
    how = {"sampling": sampling, "max_prompt_length": 150, "batch_size": 5}
    texts, rollouts = generate(policy, PROMPTS, **how)
    return policy, read_rollouts(texts, rollouts), rollouts


@pytest.mark.parametrize("score_at", ["eos", "last"])
def test_samples_have_the_scores_that_ppo_gives_them(sampled, score_at):
    policy, responses, rollouts = sampled
    reward, eos_id = random_model("reward", max_length=160), 0 if score_at == "eos" else None
    networks = PPONetworks(policy=None, reward=reward_network(reward.config))
    how = dict(frozen=FrozenParams(ref_policy={}, reward=reward.params), networks=networks)
    expected = [response_scores(rollout, **how, eos_id=eos_id) for rollout in rollouts]
    ended = np.concatenate([rollout.has_eos for rollout in rollouts])[: len(PROMPTS)]
    assert 0 < ended.sum() < len(ended)
    backwards = responses.take(range(11, -1, -1))
    policies, both = {"sft": policy, "ppo": policy}, {"sft": backwards, "ppo": responses}
    scores = first_scores(reward, policies, PROMPTS, both, score_at)
    for name, order in {"sft": slice(None, None, -1), "ppo": slice(None)}.items():
        assert list(scores[name]) == list(range(12))
        got = list(scores[name].values())
        np.testing.assert_allclose(got, np.concatenate(expected)[:12][order], atol=1e-5)


def test_samples_are_scored_as_text_by_a_reward_model_with_a_tokenizer_of_its_own(sampled):
    policy, responses, _ = sampled
    tokenizer = train_tokenizer(["other words of a film"] * 3, 290)
    config = tiny.model_config(vocab_size=len(tokenizer), max_length=160)
    reward = dataclasses.replace(random_model("reward"), tokenizer=tokenizer, config=config)
    reward = dataclasses.replace(reward, params=tiny.random_params(reward_network(config)))
    scores = first_scores(reward, {"ppo": policy}, PROMPTS, {"ppo": responses}, "eos")
    first = responses.take(range(12))
    expected = score_responses(reward, PROMPTS[:12], first.texts, first.ended)
    assert list(scores["ppo"]) == list(range(12))
    np.testing.assert_allclose(list(scores["ppo"].values()), expected, atol=1e-6)


def test_samples_beyond_the_reward_models_context_have_no_score(sampled):
    policy, responses, rollouts = sampled
    rows = ({"ppo": responses},)
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
