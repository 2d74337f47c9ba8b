"""Responses of the reference are scored by what scores the policy's, each for its prompt."""

import numpy as np
import pytest

from ppo_jax.training.references import make_references
from tests.support import tiny


def options(count):
    sampling = tiny.sampling(samples_per_prompt=2)
    return tiny.options(reference_responses=count, sampling=sampling)


def sample(*inputs, frozen):
    return inputs, frozen


def test_each_is_scored_for_the_prompt_that_it_responds_to():
    asked = []

    def score(chosen, rollout):
        asked.append(chosen.tolist())
        return np.float32(chosen), {"reward/other": chosen}

    references = make_references(options(3), sample, score)
    responses, scores = references(np.repeat([7, 5], 2), "state", "key", frozen="f")
    assert responses == (("state", "key"), "f") and asked == [[7, 7, 7, 5, 5, 5]]
    assert scores.tolist() == asked[0]


def test_a_function_that_scores_tokens_is_refused():
    references = make_references(options(3), sample, lambda chosen, _: (np.zeros((6, 4)), {}))
    with pytest.raises(ValueError, match="ppo.reference_responses must be 0 where a function"):
        references(np.repeat([7, 5], 2), "state", frozen="f")


def test_without_the_option_nothing_is_sampled():
    assert make_references(options(0), None, None)(np.arange(4), "state", frozen=None) is None
