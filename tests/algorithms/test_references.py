"""PAR: scores against those of responses of the reference to the same prompts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.algorithms import init_ppo, sweep
from ppo_jax.algorithms.greedy import greedy_responses
from ppo_jax.algorithms.options import Sampler
from ppo_jax.algorithms.references import (
    reference_options,
    reference_responses,
    reference_rollout,
)
from ppo_jax.core.network import Network, merge_params
from ppo_jax.core.types import Prompts
from ppo_jax.models.build import policy_network
from ppo_jax.models.lora import init_lora, merge_lora
from tests.support import tiny

NUM_PROMPTS, NUM_SAMPLES, NUM_REFERENCES = 4, 2, 3
sample_references, with_scores = tiny.program(reference_responses), tiny.program(reference_rollout)
sample_greedy = tiny.program(greedy_responses)


def as_they_are(scores):
    """An estimator of advantages that has no other."""
    return scores


def against_greedy(scores, greedy_scores):
    return scores - 2 * greedy_scores


HOW = dict(advantage=as_they_are, missing_eos="penalty", reference_responses=NUM_REFERENCES)
NUMBERS = dict(missing_eos_score=0.5, length_penalty=0.01)


def options(**changes):
    sampling = tiny.sampling(samples_per_prompt=NUM_SAMPLES)
    return tiny.options(**dict(sampling=sampling, num_epochs=1) | HOW | changes)


def run_of(kind="trunk", chosen=None, **numbers):
    """A run without a critic, of four prompts and two responses to each."""
    run = tiny.Run(kind, chosen or options(), **NUMBERS | numbers)
    run.parts["networks"] = run.setup.networks._replace(value=None)
    run.state = init_ppo(run.setup.policy_params, None, run.numbers)
    return run


def few_prompts():
    return jax.tree.map(lambda x: x[:NUM_PROMPTS], tiny.prompts())


def inputs_of(run, key=tiny.RUN_KEY):
    return run.state, run.numbers, few_prompts(), key


def scores_of(run, rollout):
    parts = dict(frozen=run.setup.frozen, networks=run.parts["networks"])
    return tiny.response_scores(rollout, **parts)


def logprobs_of(run, rollout, params):
    """Of its tokens, by the policy with these parameters; 0 where masked."""
    inputs = rollout.tokens if run.setup.networks.trunk is None else rollout.hidden_states
    parts = dict(frozen=run.setup.frozen, networks=run.setup.networks, policy_inputs=inputs)
    logprobs = tiny.experience.policy_logprobs(rollout, params, run.numbers, **parts)
    return np.where(rollout.response_mask, logprobs, 0.0)


@pytest.mark.parametrize("kind", ["whole", "trunk"])
def test_they_are_sampled_by_the_reference_and_by_chance_of_their_own(kind):
    run = run_of(kind)
    found = sample_references(*inputs_of(run), **run.parts)
    assert len(found.tokens) == NUM_PROMPTS * NUM_REFERENCES
    prompts = np.repeat(few_prompts().tokens, NUM_REFERENCES, axis=0)
    np.testing.assert_array_equal(found.prompt_tokens, prompts)
    of_reference = logprobs_of(run, found, run.setup.frozen.ref_policy)
    np.testing.assert_allclose(found.logprobs, of_reference, atol=2e-4)
    of_policy = logprobs_of(run, found, run.state.policy_params)
    assert abs(of_policy - of_reference).max() > 0.1
    # Where the policy is the reference, they are still others.
    same = run.state.replace(policy_params=run.setup.frozen.ref_policy)
    one = dataclasses.replace(run.parts["options"], reference_responses=NUM_SAMPLES)
    how = run.parts | dict(options=one)
    policy = tiny.sample_responses(same, run.numbers, few_prompts(), tiny.RUN_KEY, **how)
    others = sample_references(same, *inputs_of(run)[1:], **how)
    assert (policy.response_tokens != others.response_tokens).any(axis=1).all()


def test_a_reference_that_moves_is_that_of_the_state():
    run = run_of(ref_ema_decay=0.5)
    moved = jax.tree.map(lambda x: 1.5 * x, run.setup.frozen.ref_policy)
    run.state = run.state.replace(ref_params=moved)
    found = sample_references(*inputs_of(run), **run.parts)
    np.testing.assert_allclose(found.logprobs, logprobs_of(run, found, moved), atol=2e-4)


@pytest.mark.parametrize("merged", [False, True])  # into the weights, while they are sampled from
def test_with_adapters_they_are_those_of_the_base_wherever_the_adapters_are(merged):
    run, config = run_of("whole"), tiny.model_config(lora_alpha=4.0)
    base, policy = run.setup.policy_params, policy_network(config)
    networks = run.parts["networks"]._replace(policy=policy)
    if merged:
        reshard = functools.partial(merge_lora, config)
        networks = networks._replace(sampler=Sampler(policy, None, reshard))
    run.parts["networks"] = networks
    run.setup = run.setup._replace(networks=networks)
    init = functools.partial(init_lora, targets=("query", "value"), rank=2)
    adapters = tiny.random_params(Network(lambda key: init(key, config, base), None), 7)
    run.parts["frozen"] = run.setup.frozen.replace(ref_policy={}, policy=base)
    found = []
    for trained in ({}, adapters, jax.tree.map(lambda x: 3 * x, adapters)):
        run.state = init_ppo(trained, None, run.numbers)
        found.append(sample_references(*inputs_of(run), **run.parts))
    without, *others = found
    of_base = logprobs_of(run, without, base)
    np.testing.assert_allclose(without.logprobs, of_base, atol=2e-4)
    for other in others:
        np.testing.assert_array_equal(other.response_tokens, without.response_tokens)
    # The adapters have a say in what the policy is.
    moved = logprobs_of(run, without, merge_params(base, adapters))
    assert abs(moved - of_base).max() > 0.1


def test_with_fewer_rows_at_a_time_they_are_the_same():
    few = options(sampling=tiny.sampling(samples_per_prompt=NUM_SAMPLES, max_concurrent=6))
    assert reference_options(few).sampling.samples_per_prompt == NUM_REFERENCES
    got, expected = (
        sample_references(*inputs_of(run), **run.parts) for run in (run_of(chosen=few), run_of())
    )
    np.testing.assert_array_equal(got.response_tokens, expected.response_tokens)


@pytest.mark.parametrize("advantage", [as_they_are, against_greedy])
def test_a_score_is_the_mean_sigmoid_of_its_differences_before_the_rules(advantage):
    run = run_of(chosen=options(advantage=advantage), kl_coef=0.0)
    rollout = tiny.sample_responses(*inputs_of(run), **run.parts)
    references = sample_references(*inputs_of(run), **run.parts)
    of_greedy = sample_greedy(*inputs_of(run), **run.parts)
    scores, against, greedy = (scores_of(run, x) for x in (rollout, references, of_greedy))
    given = dict(references=(references, against))
    if advantage is against_greedy:
        given["greedy"] = (of_greedy, greedy)
    experience, metrics = tiny.make_experience(
        rollout, scores, run.state, run.numbers, **given, **run.parts
    )

    def shaped(scores, rollout):
        found = []
        for i, score in enumerate(np.float64(scores)):
            prompt = i * NUM_PROMPTS // len(scores)
            own = np.float64(against)[prompt * NUM_REFERENCES :][:NUM_REFERENCES]
            preferred = np.mean([1 / (1 + np.exp(other - score)) for other in own])
            ended, length = rollout.has_eos[i], rollout.response_mask[i].sum()
            found.append(preferred - (0.0 if ended else 0.5) - 0.01 * length)
        return np.array(found)

    expected = shaped(scores, rollout)
    np.testing.assert_allclose(metrics["reward/adjusted_score_mean"], expected.mean(), atol=1e-5)
    np.testing.assert_allclose(metrics["reward/score_mean"], np.mean(scores), rtol=1e-5)
    np.testing.assert_allclose(metrics["reward/reference_score_mean"], np.mean(against), rtol=1e-5)
    length = np.asarray(references.response_mask).sum(axis=1).mean()
    assert metrics["response/reference_length"] == pytest.approx(length)
    if advantage is against_greedy:
        expected -= 2 * shaped(greedy, of_greedy).repeat(NUM_SAMPLES)
    mask = np.asarray(rollout.response_mask)
    np.testing.assert_allclose(
        experience.advantages, np.where(mask, expected[:, None], 0.0), atol=1e-5
    )
    assert expected.std() > 0.05


def test_an_iteration_is_its_two_rollouts_and_an_update():
    run = run_of()
    state, metrics = tiny.iterate(*inputs_of(run), **run.parts)
    rollout_key, shuffle_key = jax.random.split(tiny.RUN_KEY)
    rollout = tiny.sample_responses(*inputs_of(run, rollout_key), **run.parts)
    references = with_scores(*inputs_of(run, rollout_key), **run.parts)
    given = (rollout, scores_of(run, rollout), shuffle_key, None, references)
    expected, its_metrics = tiny.update_from_rollout(run.state, run.numbers, *given, **run.parts)
    tiny.leaves_close(state.policy_params, expected.policy_params, atol=2e-5)
    tiny.leaves_close(metrics, its_metrics, atol=1e-4)
    assert metrics["reward/episodes"] == 8 and metrics["reward/reference_episodes"] == 12


def test_each_lane_is_the_run_alone():
    run = run_of()
    lanes = [run.numbers, run.numbers.replace(temperature=jnp.float32(0.7))]
    states, axes = sweep.stack_lanes([run.state] * 2), sweep.LaneAxes()
    numbers, given = sweep.stack_lanes(lanes), (few_prompts(), tiny.RUN_KEY)
    how = dict(networks=run.parts["networks"], axes=axes)
    of_run = how | dict(options=run.parts["options"])

    def program(function, **parts):
        return functools.partial(
            jax.jit(functools.partial(function, **parts)), frozen=run.setup.frozen
        )

    got, _ = program(sweep.sweep_iteration, **of_run)(states, numbers, *given)
    # In two halves, with scores from outside.
    rollout_key, shuffle_key = jax.random.split(tiny.RUN_KEY)
    inputs = (states, numbers, few_prompts(), rollout_key)
    rollouts = program(sweep.sweep_responses, **of_run)(*inputs)
    others = program(sweep.sweep_responses, sample=reference_responses, **of_run)(*inputs)
    score = program(sweep.sweep_scores, num_lanes=2, **how)
    scores, against = score(rollouts), score(others)
    update = program(sweep.sweep_update, **of_run)
    halves, _ = update(states, numbers, rollouts, scores, shuffle_key, None, (others, against))
    for i, own in enumerate(lanes):
        alone, _ = tiny.iterate(run.state, own, *given, **run.parts)
        for states in (got, halves):
            lane = sweep.take_lane(states.policy_params, i)
            tiny.leaves_close(lane, alone.policy_params, atol=1e-4)


def test_without_the_option_nothing_is_sampled_and_none_is_taken():
    run = run_of(chosen=options(reference_responses=0))
    assert reference_rollout(run.state, run.numbers, Prompts, None, **run.parts) is None
    rollout = tiny.sample_responses(*inputs_of(run), **run.parts)
    given = (rollout, jnp.zeros(8), run.state, run.numbers)
    with pytest.raises(ValueError, match="reference_responses is 0, got some"):
        tiny.make_experience(*given, references=(rollout, jnp.zeros(8)), **run.parts)


def test_what_does_not_go_together_is_refused():
    run = run_of()
    rollout = tiny.sample_responses(*inputs_of(run), **run.parts)
    references = sample_references(*inputs_of(run), **run.parts)

    def experience(scores=None, against=None, state=run.state, numbers=run.numbers):
        scores = jnp.zeros(8) if scores is None else scores
        given = None if against is None else (references, against)
        return tiny.make_experience(rollout, scores, state, numbers, references=given, **run.parts)

    with pytest.raises(ValueError, match="reference_responses is 3, got none"):
        experience()
    of_tokens = jnp.zeros(rollout.response_mask.shape)
    for scores, against in ((of_tokens, jnp.zeros(12)), (None, jnp.zeros((12, 8)))):
        with pytest.raises(ValueError, match=r"need scores \[B\] of responses"):
            experience(scores, against)
    normalized = init_ppo(run.setup.policy_params, None, run.numbers, score_normalization=True)
    clipped = run.numbers.replace(score_clip=jnp.float32(1.0))
    for changed in (dict(state=normalized), dict(numbers=clipped)):
        with pytest.raises(ValueError, match="not normalized or clipped"):
            experience(against=jnp.zeros(12), **changed)
    with pytest.raises(ValueError, match="reference_responses need max_rollouts=1"):
        options(max_rollouts=2)
    with pytest.raises(ValueError, match="reference_responses must be at least 0"):
        options(reference_responses=-1)
