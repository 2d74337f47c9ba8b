"""Greedy responses are scored by what scores the sampled ones, each for its prompt."""

import numpy as np

from ppo_jax.core.critic_free import remax_advantages, rloo_advantages
from ppo_jax.training.greedy import make_greedy
from tests.support import tiny


def test_a_greedy_response_is_scored_once_for_the_samples_of_its_prompt():
    asked = []

    def sample(*inputs, frozen):
        return inputs, frozen

    def score(chosen, rollout):
        asked.append(chosen.tolist())
        return np.float32(chosen), {"reward/other": chosen}

    chosen = np.repeat([7, 5, 9], 2)
    options = tiny.options(advantage=remax_advantages, sampling=tiny.sampling(samples_per_prompt=2))
    responses, scores = make_greedy(options, sample, score)(chosen, "state", "key", frozen="f")
    assert responses == (("state", "key"), "f") and asked == [[7, 5, 9]]
    assert scores.tolist() == [7, 5, 9]


def test_without_a_need_nothing_is_sampled():
    greedy = make_greedy(tiny.options(advantage=rloo_advantages), None, None)
    assert greedy(np.arange(4), "state", frozen=None) is None
