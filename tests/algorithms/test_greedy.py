"""ReMax: the greedy response to a prompt as the baseline of those that are sampled."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.algorithms import sweep
from ppo_jax.algorithms.greedy import greedy_options, greedy_responses, greedy_rollout
from ppo_jax.algorithms.update import init_optimizers
from ppo_jax.core.critic_free import remax_advantages, rloo_advantages
from ppo_jax.core.network import merge_params
from ppo_jax.core.types import Prompts
from tests.support import tiny

sample_greedy, with_scores = tiny.program(greedy_responses), tiny.program(greedy_rollout)
HOW = dict(advantage=remax_advantages, missing_eos="penalty", num_epochs=1)
NUMBERS = dict(missing_eos_score=0.5, score_clip=0.4)


def options(**changes):
    sampling = tiny.sampling(samples_per_prompt=2)
    return tiny.options(**dict(sampling=sampling) | HOW | changes)


def run_of(kind="trunk", chosen=None, **numbers):
    """A run without a critic, of four prompts and two responses to each."""
    run = tiny.Run(kind, chosen or options(), **NUMBERS | numbers)
    run.parts["networks"] = run.setup.networks._replace(value=None)
    run.state = dataclasses.replace(run.state, value_params=None)
    optimizer = init_optimizers({"policy": run.state.policy_params}, run.numbers)
    run.state = dataclasses.replace(run.state, opt_state=optimizer)
    return run


def few_prompts():
    return jax.tree.map(lambda x: x[:4], tiny.prompts())


def greedy_of(run):
    return sample_greedy(run.state, run.numbers, few_prompts(), tiny.RUN_KEY, **run.parts)


def sampled(run):
    return tiny.sample_responses(run.state, run.numbers, few_prompts(), tiny.RUN_KEY, **run.parts)


def test_a_greedy_response_is_the_likeliest_token_at_each_step():
    run = run_of("whole")
    greedy = greedy_of(run)
    assert greedy.tokens.shape[0] == 4
    params = merge_params(run.setup.frozen.policy, run.state.policy_params)
    logits = run.setup.networks.policy.apply(params, greedy.tokens, greedy.mask)
    before = logits[:, tiny.PROMPT_LENGTH - 1 : -1]
    mask = np.asarray(greedy.response_mask)
    np.testing.assert_array_equal(
        np.asarray(before.argmax(axis=-1))[mask], np.asarray(greedy.response_tokens)[mask]
    )
    again = sample_greedy(run.state, run.numbers, few_prompts(), jax.random.key(99), **run.parts)
    np.testing.assert_array_equal(again.response_tokens, greedy.response_tokens)


def test_with_fewer_rows_at_a_time_the_greedy_responses_are_the_same():
    few = options(sampling=tiny.sampling(samples_per_prompt=2, max_concurrent=2))
    assert greedy_options(few).sampling.samples_per_prompt == 1
    got, expected = greedy_of(run_of(chosen=few)), greedy_of(run_of())
    np.testing.assert_array_equal(got.response_tokens, expected.response_tokens)


@pytest.mark.parametrize("of_tokens", [False, True])
def test_advantages_are_rewards_less_the_shaped_score_of_the_greedy_response(of_tokens):
    run = run_of()
    rollout, greedy = sampled(run), greedy_of(run)
    how = dict(frozen=run.setup.frozen, networks=run.parts["networks"])
    scores, baseline = (tiny.response_scores(x, **how) for x in (rollout, greedy))
    given = baseline
    if of_tokens:  # the same sums
        count = greedy.response_mask.sum(axis=1, keepdims=True)
        given = jnp.where(greedy.response_mask, baseline[:, None] / count, 7.0)
    experience, metrics = tiny.make_experience(
        rollout, scores, run.state, run.numbers, greedy=(greedy, given), **run.parts
    )

    def shaped(scores, has_eos):
        clipped = np.clip(np.float64(scores), -0.4, 0.4)
        return np.where(has_eos, clipped, clipped - 0.5)

    mask = np.asarray(rollout.response_mask)
    frozen, inputs = run.setup.frozen, rollout.hidden_states
    logprobs = [
        tiny.experience.policy_logprobs(
            rollout,
            params,
            run.numbers,
            policy_inputs=inputs,
            frozen=frozen,
            networks=run.parts["networks"],
        )
        for params in (run.state.policy_params, frozen.ref_policy)
    ]
    kl = np.where(mask, logprobs[0] - logprobs[1], 0.0).sum(axis=1)
    rewards = shaped(scores, rollout.has_eos) - float(run.numbers.kl_coef) * kl
    expected = rewards - shaped(baseline, greedy.has_eos).repeat(2)
    assert not greedy.has_eos.all() and (np.abs(baseline) > 0.4).any()
    np.testing.assert_allclose(
        experience.advantages, np.where(mask, expected[:, None], 0.0), atol=2e-5
    )
    np.testing.assert_allclose(metrics["reward/greedy_score_mean"], baseline.mean(), rtol=1e-5)
    length = np.asarray(greedy.response_mask).sum(axis=1).mean()
    assert metrics["response/greedy_length"] == length


def test_an_iteration_is_its_two_rollouts_and_an_update():
    run = run_of()
    state, metrics = tiny.iterate(run.state, run.numbers, few_prompts(), tiny.RUN_KEY, **run.parts)
    rollout_key, shuffle_key = jax.random.split(tiny.RUN_KEY)
    rollout = tiny.sample_responses(run.state, run.numbers, few_prompts(), rollout_key, **run.parts)
    greedy = with_scores(run.state, run.numbers, few_prompts(), rollout_key, **run.parts)
    scores = tiny.response_scores(rollout, frozen=run.setup.frozen, networks=run.parts["networks"])
    expected, its_metrics = tiny.update_from_rollout(
        run.state, run.numbers, rollout, scores, shuffle_key, greedy, **run.parts
    )
    tiny.leaves_close(state.policy_params, expected.policy_params, atol=2e-5)
    tiny.leaves_close(metrics, its_metrics, atol=1e-4)
    assert metrics["reward/episodes"] == 8 and metrics["reward/greedy_episodes"] == 4


def test_each_lane_is_the_run_alone():
    run = run_of()
    lanes = [run.numbers, dataclasses.replace(run.numbers, kl_coef=jnp.float32(0.3))]
    states = sweep.stack_lanes([run.state] * 2)
    axes, frozen, networks = sweep.LaneAxes(), run.setup.frozen, run.parts["networks"]

    def program(function, **more):
        how = dict(networks=networks, axes=axes) | more
        return functools.partial(jax.jit(functools.partial(function, **how)), frozen=frozen)

    of_run = dict(options=run.parts["options"])
    numbers, given = sweep.stack_lanes(lanes), (few_prompts(), tiny.RUN_KEY)
    got, _ = program(sweep.sweep_iteration, **of_run)(states, numbers, *given)
    # In two halves, with scores from outside.
    rollout_key, shuffle_key = jax.random.split(tiny.RUN_KEY)
    inputs = (states, numbers, few_prompts(), rollout_key)
    rollouts = program(sweep.sweep_responses, **of_run)(*inputs)
    greedy = program(sweep.sweep_responses, sample=greedy_responses, **of_run)(*inputs)
    score = program(sweep.sweep_scores, num_lanes=2)
    scores, baseline = score(rollouts), score(greedy)
    update = program(sweep.sweep_update, **of_run)
    halves, _ = update(states, numbers, rollouts, scores, shuffle_key, (greedy, baseline))
    for i, own in enumerate(lanes):
        alone, _ = tiny.iterate(run.state, own, *given, **run.parts)
        for states in (got, halves):
            lane = sweep.take_lane(states.policy_params, i)
            tiny.leaves_close(lane, alone.policy_params, atol=1e-4)


def test_greedy_responses_where_they_are_not_needed_and_none_where_they_are():
    run = run_of()
    rollout, greedy = sampled(run), greedy_of(run)
    scores, baseline = jnp.zeros(8), jnp.zeros(4)
    with pytest.raises(ValueError, match="remax_advantages needs greedy responses"):
        run.experience(rollout, scores)
    other = run_of(chosen=options(advantage=rloo_advantages))
    assert greedy_rollout(other.state, other.numbers, Prompts, None, **other.parts) is None
    with pytest.raises(ValueError, match="rloo_advantages needs no greedy responses"):
        tiny.make_experience(
            rollout, scores, other.state, other.numbers, greedy=(greedy, baseline), **other.parts
        )
