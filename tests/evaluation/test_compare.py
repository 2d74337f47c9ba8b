"""What is measured of responses is what another way of computing it says."""

import jax
import numpy as np
import pytest

from ppo_jax.evaluation.compare import (
    How,
    log_ratios,
    respond,
    response_figures,
    same_tokens,
    whole_texts,
)
from ppo_jax.inference.generate import generate
from ppo_jax.io.tokenizers import train_tokenizer
from ppo_jax.models.build import policy_network
from ppo_jax.rollout.decode import response_statistics
from ppo_jax.rollout.sampling import Sampling
from tests.support import tiny
from tests.support.tiny_stage import random_model

PROMPTS = ["a film", "few words of a film", "of"] * 4
SAMPLING = Sampling(response_length=9, eos_ids=(0, *range(40, 60)))
HOW = How(sampling=lambda tokenizer: SAMPLING, temperature=0.7, seed=3, batch_size=5)


@pytest.fixture(scope="module")
def policy():
    return random_model(max_length=64)


@pytest.fixture(scope="module")
def responses(policy):
    return respond(policy, PROMPTS, HOW, None)


def test_the_log_ratio_is_that_of_a_second_pass_over_padded_rows(policy, responses):
    """Rows are shared; the oracle has one response a row, left-padded, in the rollout's layout."""
    reference = random_model(max_length=64)
    reference = type(policy)(
        **{
            **vars(reference),
            "params": tiny.random_params(policy_network(reference.config), seed=9),
        }
    )
    _, rollouts = generate(
        policy, PROMPTS, sampling=SAMPLING, temperature=0.7, seed=3, batch_size=5
    )
    expected = []
    for rollout in rollouts:
        logprobs, _ = response_statistics(
            policy_network(reference.config),
            reference.params,
            rollout.tokens,
            rollout.mask,
            rollout.response_tokens,
            temperature=0.7,
        )
        ratio = np.where(rollout.response_mask, rollout.logprobs - logprobs, 0.0)
        expected.append(ratio.sum(axis=1))
    expected = np.concatenate(expected)[: len(PROMPTS)]
    got = log_ratios(reference, responses, temperature=0.7)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert np.abs(got).min() > 1e-3
    # To itself there is no distance, at the temperature of the sampling alone.
    np.testing.assert_allclose(log_ratios(policy, responses, 0.7), 0.0, atol=1e-4)
    assert np.abs(log_ratios(policy, responses, 1.0)).max() > 1e-2


def test_another_seed_gives_other_responses_and_the_same_seed_the_same(policy, responses):
    assert respond(policy, PROMPTS, HOW, None).texts == responses.texts
    other = How(**{**vars(HOW), "seed": 4})
    assert respond(policy, PROMPTS, other, None).texts != responses.texts


def test_figures_are_means_over_prompts_with_the_seeds_of_a_prompt_together(responses):
    other = responses.take(np.roll(np.arange(len(PROMPTS)), 1))
    figures = response_figures([responses, other])
    both = np.stack([responses.lengths, other.lengths], axis=1)
    assert figures["tokens"] == pytest.approx(both.mean())
    stderr = both.mean(axis=1).std(ddof=1) / len(PROMPTS) ** 0.5
    assert figures["tokens_stderr"] == pytest.approx(stderr)
    assert 0 < figures["ended"] < 1
    assert figures["entropy"] == pytest.approx(-responses.logprobs.sum() / responses.lengths.sum())
    assert figures["characters"] == np.mean([len(text) for text in responses.texts])
    assert {"distinct1", "distinct2", "repetition"} <= set(figures)


def test_few_responses_at_a_time_are_the_same_responses(policy, responses):
    """In slots: HOW has 5 at a time, of 12; in one batch without slots they are as many."""
    at_once = How(**{**vars(HOW), "batch_size": len(PROMPTS)})
    whole = respond(policy, PROMPTS, at_once, None)
    assert whole.texts == responses.texts and whole.rows == responses.rows
    np.testing.assert_allclose(whole.logprobs, responses.logprobs, atol=1e-4)


def test_the_entropy_of_the_samples_is_that_of_the_distribution(policy):
    """Of many samples of one token: the mean of -log p is sum p log 1/p."""
    sampling = Sampling(response_length=1, eos_ids=())
    how = How(sampling=lambda tokenizer: sampling, batch_size=1000)
    sampled = respond(policy, ["a film"] * 1000, how, None)
    logits = policy_network(policy.config).apply(
        policy.params,
        np.array([sampled.rows[0][:-1]]),
        np.ones((1, len(sampled.rows[0]) - 1), bool),
    )[0, -1]
    p = jax.nn.softmax(logits)
    exact = float(-(p * np.log(p)).sum())
    assert response_figures([sampled])["entropy"] == pytest.approx(exact, rel=0.05)


def test_judges_read_prompt_and_response(responses):
    assert whole_texts(PROMPTS, responses)[1] == PROMPTS[1] + responses.texts[1]


def test_tokens_are_the_same_where_ids_are(policy):
    assert same_tokens(policy, random_model(max_length=32))
    other = random_model()
    words = train_tokenizer(["quite another text"] * 3, 290)
    assert not same_tokens(policy, type(other)(**{**vars(other), "tokenizer": words}))
