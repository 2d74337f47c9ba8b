"""Scores of responses by a reward model that reads their text."""

import types

import jax
import numpy as np
import pytest

from ppo_jax.core.types import FrozenParams, Rollout
from ppo_jax.data.encode import pad_right
from ppo_jax.distributed.layout import one_device
from ppo_jax.inference.score import score_responses
from ppo_jax.models.build import reward_network
from ppo_jax.models.rope import LongRopeScaling
from ppo_jax.training.text_rewards import text_scorer
from tests.support.tiny_stage import random_model, word_tokenizer

WORDS = word_tokenizer(64)  # of the policy; the reward model reads bytes
LONGROPE = LongRopeScaling(
    short_factor=(1.0,) * 4, long_factor=(1.0, 2.0, 4.0, 8.0), original_max_length=16
)


def rollout_of(prompts, responses, width):
    """Texts of words, as the policy has them; only the first has ended."""
    asked, answers = (
        pad_right([WORDS.encode(text, add_special_tokens=False) for text in texts], width)
        for texts in (prompts, responses)
    )
    return Rollout(
        prompt_tokens=asked[0],
        prompt_mask=asked[1],
        response_tokens=answers[0],
        response_mask=answers[1],
        logprobs=np.zeros(answers[0].shape, np.float32),
        has_eos=np.arange(len(prompts)) == 0,
    )


def test_a_text_has_one_score_whatever_is_read_with_it():
    """A row is as long as its text, whatever it is padded to or packed with."""
    reward, layout = random_model("reward", rope_scaling=LONGROPE, max_length=100), one_device()
    prompts, responses = ["w1 w2", "w3"], [" w4 w5", " w6" * 12]
    lengths = [len(reward.tokenizer.encode(p + r)) for p, r in zip(prompts, responses, strict=True)]
    assert lengths[0] < LONGROPE.original_max_length < lengths[1]
    setup = types.SimpleNamespace(
        text_reward=lambda config: reward_network(config, constrain=layout.constrain),
        frozen=FrozenParams(ref_policy={}, reward=jax.device_put(reward.params)),
        options=types.SimpleNamespace(sampling=types.SimpleNamespace(eos_ids=(0,))),
    )
    score = text_scorer(setup, reward, prompts, WORDS, layout)
    both, _ = score(np.arange(2), rollout_of(prompts, responses, 12))
    one, _ = score(np.arange(1), rollout_of(prompts[:1], responses[:1], 12))
    later = score_responses(reward, prompts, responses, [True, False])
    alone = [
        score_responses(reward, [p], [r], [ended])[0]
        for p, r, ended in zip(prompts, responses, (True, False), strict=True)
    ]
    for found in (both, later):
        np.testing.assert_allclose(found, alone, rtol=1e-5, atol=1e-5)
    assert one[0] == pytest.approx(alone[0], abs=1e-5)
