"""Dynamic sampling: groups of equal scores make room for those of the next rollouts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.algorithms.dynamic_sampling import (
    gather,
    gather_first,
    gather_more,
    gathering_metrics,
    rollout_keys,
)
from ppo_jax.algorithms.ensembles import RewardEnsemble
from ppo_jax.core.critic_free import grpo_advantages, remax_advantages
from ppo_jax.core.network import Network
from ppo_jax.core.types import Prompts, Rollout
from tests.support import tiny

GROUP, B, T = 2, 8, 3
HOW = dict(group_size=GROUP)


def rollout_of(ids):
    """B responses that are told apart by their tokens."""
    ids = jnp.asarray(ids, jnp.int32)[:, None]
    length = 1 + ids % T
    return Rollout(
        prompt_tokens=jnp.repeat(ids, 2, axis=1),
        prompt_mask=jnp.ones((len(ids), 2), bool),
        response_tokens=jnp.repeat(ids, T, axis=1),
        response_mask=jnp.arange(T)[None] < length,
        logprobs=-jnp.repeat(ids, T, axis=1).astype(jnp.float32),
        has_eos=ids[:, 0] % 3 == 0,
    )


def by_hand(batches):
    """(ids, scores, kept, rollouts) of lists of groups [(ids, scores)], as a loop over groups."""
    kept, spare, used = [], [], 0
    for number, (ids, scores) in enumerate(batches):
        if len(kept) >= B // GROUP:
            break
        used += 1
        for i in range(0, B, GROUP):
            group = ids[i : i + GROUP], scores[i : i + GROUP]
            if len(set(group[1])) > 1:
                kept.append(group)
            elif number == 0:
                spare.append(group)
    groups = (kept + spare)[: B // GROUP] if len(kept) < B // GROUP else kept[: B // GROUP]
    count = min(len(kept), B // GROUP)
    if count < B // GROUP:  # the places that are left hold the last of the spare ones
        groups = kept + spare[len(spare) - (B // GROUP - count) :]
    return *(np.concatenate([group[k] for group in groups]) for k in (0, 1)), count * GROUP, used


def made_up(seed, count, varied):
    """Rollouts with about this share of groups whose scores vary."""
    draw = np.random.default_rng(seed)
    batches = []
    for number in range(count):
        scores = np.repeat(draw.integers(0, 2, B // GROUP), GROUP).astype(np.float32)
        flips = draw.random(B // GROUP) < varied
        scores[::GROUP] = np.where(flips, 1 - scores[::GROUP], scores[::GROUP])
        batches.append((np.arange(B) + 100 * number, scores))
    return batches


@pytest.mark.parametrize("of_tokens", [False, True])
@pytest.mark.parametrize("seed, varied", [(0, 0.5), (1, 0.2), (2, 1.0), (3, 0.0), (4, 0.7)])
def test_the_batch_is_that_of_a_loop_over_groups(seed, varied, of_tokens):
    batches = made_up(seed, 4, varied)

    def given(ids, scores):
        rollout = rollout_of(ids)
        if of_tokens:  # the score in the first token; what padding holds has no effect
            padding = jnp.where(rollout.response_mask, 0.0, jnp.nan)
            return rollout, padding.at[:, 0].set(jnp.asarray(scores))
        return rollout, jnp.asarray(scores)

    gathered = gather_first(*given(*batches[0]), **HOW)
    for batch in batches[1:]:
        gathered = gather_more(gathered, *given(*batch), **HOW)
    ids, scores, kept, used = by_hand(batches)
    expected = given(ids, scores)
    tiny.leaves_close((gathered.rollout, gathered.scores), expected)
    assert (gathered.num_kept, gathered.num_rollouts) == (kept, used)
    metrics = gathering_metrics(gathered)
    seen = np.stack([scores for _, scores in batches[:used]])
    groups = seen.reshape(used, -1, GROUP)
    share = (groups[..., 0] != groups[..., 1]).mean()
    np.testing.assert_allclose(metrics["ppo/varied_group_fraction"], share, rtol=1e-6)
    np.testing.assert_allclose(metrics["reward/sampled_score_mean"], seen.mean(), rtol=1e-6)
    assert metrics["ppo/rollouts"] == used and metrics["ppo/kept_fraction"] == kept / B


def sample_of_tables(scores, prompts, key):
    """The number of a rollout is in its prompts; its scores are in a table [R, B]."""
    number = prompts.tokens[0, 0]
    ids = 100 * number + jnp.arange(B)
    return rollout_of(ids), scores[number]


def tables(seed, varied):
    return jnp.asarray(np.stack([scores for _, scores in made_up(seed, 5, varied)]))


def numbered_prompts(count):
    mask = jnp.ones((B // GROUP, 2), bool)
    return tuple(
        Prompts(tokens=jnp.full((B // GROUP, 2), i, jnp.int32), mask=mask) for i in range(count)
    )


def gathered_alone(scores):
    sample = functools.partial(sample_of_tables, scores)
    return gather(sample, numbered_prompts(5), jax.random.key(0), **HOW)


def test_one_program_samples_until_the_batch_is_full():
    counts = set()
    for seed, varied in ((0, 0.5), (2, 1.0), (3, 0.0)):
        scores = tables(seed, varied)
        gathered = jax.jit(gathered_alone)(scores)
        ids, expected, kept, used = by_hand(
            [(np.arange(B) + 100 * i, np.asarray(x)) for i, x in enumerate(scores)]
        )
        assert gathered.num_rollouts == used and gathered.num_kept == kept
        counts.add(used)
        np.testing.assert_array_equal(gathered.rollout.response_tokens[:, 0], ids)
        np.testing.assert_array_equal(gathered.scores, expected)
    assert len(counts) == 3 and {1, 5} < counts


def test_each_lane_gathers_as_it_does_alone():
    lanes = [tables(seed, varied) for seed, varied in ((0, 0.5), (2, 1.0), (1, 0.2))]
    together = jax.jit(jax.vmap(gathered_alone))(jnp.stack(lanes))
    for i, lane in enumerate(lanes):
        tiny.leaves_close(jax.tree.map(lambda x, i=i: x[i], together), gathered_alone(lane))


def parity(params, inputs, mask, **_):
    """A reward model that knows whether a token is odd."""
    return (inputs % 2).astype(jnp.float32)


def run_without_critic(**changes):
    sampling = tiny.sampling(samples_per_prompt=GROUP)
    chosen = tiny.options(sampling=sampling, advantage=grpo_advantages, max_rollouts=3, **changes)
    run = tiny.Run("whole", chosen)
    reward = Network(None, parity)
    networks = run.setup.networks._replace(value=None, reward=reward)
    run.parts["networks"] = networks
    run.state = tiny.ppo.init_ppo(run.setup.policy_params, None, run.numbers)
    return run


def batches_of_prompts():
    return tuple(tiny.prompts(seed, B // GROUP) for seed in range(3))


def chosen_by_hand(run):
    """(the rollout that an iteration learns from, scores, kept responses, rollouts, the key of the
    updates)."""
    rollout_key, shuffle_key = jax.random.split(tiny.RUN_KEY)
    rollouts, batches = [], []
    for number, prompts in enumerate(batches_of_prompts()):
        key = rollout_keys(rollout_key, 3)[number]
        rollout = tiny.sample_responses(run.state, run.numbers, prompts, key, **run.parts)
        scores = last_tokens(rollout) % 2
        rollouts.append(rollout)
        batches.append((np.arange(B) + B * number, scores.astype(np.float32)))
    ids, scores, kept, used = by_hand(batches)
    assert used > 1 and 0 < kept
    every = jax.tree.map(lambda *x: jnp.concatenate(x), *rollouts)
    return jax.tree.map(lambda x: x[ids], every), jnp.asarray(scores), kept, used, shuffle_key


def last_tokens(rollout):
    last = np.asarray(rollout.response_mask).sum(axis=1) - 1
    return np.asarray(rollout.response_tokens)[np.arange(B), last]


def test_an_iteration_learns_from_the_groups_that_vary():
    run = run_without_critic()
    state, metrics = tiny.iterate(
        run.state, run.numbers, batches_of_prompts(), tiny.RUN_KEY, **run.parts
    )
    *chosen, kept, used, shuffle_key = chosen_by_hand(run)
    expected, plain = tiny.update_from_rollout(
        run.state, run.numbers, *chosen, shuffle_key, **run.parts
    )
    tiny.leaves_close(state.policy_params, expected.policy_params, atol=2e-5)
    np.testing.assert_allclose(metrics["reward/score_mean"], plain["reward/score_mean"], rtol=1e-5)
    assert metrics["ppo/rollouts"] == used and metrics["ppo/kept_fraction"] == kept / B
    assert state.episodes == metrics["reward/episodes"] == used * B


def hundred_and_token(params, inputs, mask, **_):
    """A reward model that never gives the lower score."""
    return inputs + 100.0


def test_each_reward_model_has_the_mean_score_of_the_responses_learned_from():
    run = run_without_critic()
    rollout, scores, _, used, _ = chosen_by_hand(run)
    ensemble = RewardEnsemble(
        (run.parts["networks"].reward, Network(None, hundred_and_token)), "min"
    )
    run.parts["networks"] = run.parts["networks"]._replace(reward=ensemble)
    run.parts["frozen"] = run.parts["frozen"].replace(reward={"0": {}, "1": {}})
    _, metrics = tiny.iterate(
        run.state, run.numbers, batches_of_prompts(), tiny.RUN_KEY, **run.parts
    )
    assert metrics["ppo/rollouts"] == used
    each = np.stack([scores, 100.0 + last_tokens(rollout)])
    found = [metrics[f"reward/score_{number}"] for number in (0, 1)]
    np.testing.assert_allclose(found, each.mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(metrics["reward/disagreement"], each.std(axis=0).mean(), rtol=1e-5)


def test_prompts_of_another_number_and_greedy_responses_are_refused():
    run = run_without_critic()
    for prompts in (tiny.prompts(0, B // GROUP), batches_of_prompts()[:2]):
        with pytest.raises(ValueError, match="max_rollouts=3 needs a tuple"):
            tiny.ppo.ppo_iteration(run.state, run.numbers, prompts, tiny.RUN_KEY, **run.parts)
    with pytest.raises(ValueError, match="remax_advantages needs max_rollouts=1"):
        tiny.options(advantage=remax_advantages, max_rollouts=2)
