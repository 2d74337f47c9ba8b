"""What a response is worth at its edges: rewards, scores, advantages, values."""

import math

import jax
import jax.numpy as jnp

from ppo_jax import core
from tests.support.edges import (
    COLUMN,
    EVERY,
    MASK,
    NEARLY,
    ONES,
    RANK,
    ROW,
    TOKENS,
    assert_edge,
    cases,
    same,
)

HAS_EOS = jnp.array([True, False, True, False])
NONE_YET = core.Moments()


def grpo(scores, **how):
    return core.grpo_advantages(scores, **dict(group_size=4) | how)


def reinforce(baseline=0.0, mask=MASK, **how):
    return core.reinforce_advantages(ONES, mask, baseline, **how)


def by_length(mask=MASK, alpha=0.5):
    return core.length_adaptive_lambda(mask, alpha=alpha)


def gae_with(gae_lambda, gamma=1.0):
    rewards = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    mask = jnp.ones((2, 2), bool)
    numbers = dict(gae_lambda=gae_lambda, gamma=gamma)
    return core.gae(rewards, jnp.zeros((2, 2)), mask, **numbers)[0]


def ensemble(scores, how, **numbers):
    return core.ensemble_scores(scores, how=how, **numbers)


def moments_of(scores):
    return jnp.stack([*map(jnp.float32, jax.tree.leaves(core.update_moments(NONE_YET, scores)))])


def normalized(scores, **how):
    return core.normalize_scores(scores, core.update_moments(NONE_YET, scores), **how)


def overlong(mask=MASK, **lengths):
    return core.overlong_penalty(mask, **dict(max_length=4, cache_length=2) | lengths)


def ruled(**how):
    return core.threshold_scores(ROW, 2 * ROW, **how)


def extremes(**how):
    return core.best_and_worst(ROW, **dict(group_size=4, keep=1) | how)


def varied(scores):
    return core.groups_with_variance(scores, group_size=4)


def by_position(returns, num_bins=4):
    return core.explained_variance_by_position(same(0.0), returns, EVERY, num_bins=num_bins)


def calibration(mask=MASK, num_bins=2):
    return jnp.stack(core.value_calibration(ONES, ONES, mask, num_bins=num_bins))


def agreed(fraction):
    return core.mask_agreed_advantages(ONES, ONES, MASK, fraction=fraction)


def disputed(fraction):
    return core.disputed_states(ONES, MASK, fraction=fraction)


def rewards(scores=ROW, kl_coef=0.1):
    return core.token_rewards(scores, ONES, ONES, MASK, kl_coef=kl_coef)


def missing_eos(**numbers):
    return core.missing_eos_scores(ROW, HAS_EOS, **numbers)


# (function, edge, call, what is refused: a part of the message, or the value)
EDGES = [
    # GAE and whitening: equal values do not vary
    (core.whiten, "1000.1", lambda: core.whiten(same(1000.1), EVERY), 0.0),
    (core.whiten, "3.3", lambda: core.whiten(same(3.3), EVERY), 0.0),
    (core.whiten, "-1e-7", lambda: core.whiten(same(-1e-7), EVERY), 0.0),
    (core.whiten, "1e18", lambda: core.whiten(same(1e18), EVERY), 0.0),
    (core.whiten, "equal but for rounding", lambda: core.whiten(NEARLY, EVERY), 0.0),
    (core.whiten, "mean", lambda: core.whiten(same(3.3), EVERY, shift_mean=False), 3.3),
    (core.whiten, "a mask of integers", lambda: core.whiten(ONES, TOKENS), "assert_type"),
    (core.length_adaptive_lambda, "no token", lambda: by_length(mask=~MASK), 0.0),
    (core.length_adaptive_lambda, "4 tokens", lambda: by_length(), 0.5),
    (core.length_adaptive_lambda, "alpha 0", lambda: by_length(alpha=0), "alpha must be above 0"),
    (core.length_adaptive_lambda, "alpha [B]", lambda: by_length(alpha=ROW), RANK),
    (core.gae, "lambda [B]", lambda: gae_with(jnp.array([0.0, 1.0])), [[1, 2], [7, 4]]),
    (
        core.gae,
        "lambda [B, T]",
        lambda: gae_with(jnp.array([[0.5, 9], [0.25, 9]])),
        [[2, 2], [4, 4]],
    ),
    (core.gae, "lambda [B, 1]", lambda: gae_with(jnp.array([[0.0], [1.0]])), [[1, 2], [7, 4]]),
    (core.gae, "lambda [1, T]", lambda: gae_with(jnp.ones((1, 2))), "assert_shape"),
    (core.gae, "lambda [3]", lambda: gae_with(jnp.ones(3)), "assert_shape"),
    (core.gae, "gamma [B, 1]", lambda: gae_with(1.0, gamma=jnp.ones((2, 1))), "assert_shape"),
    (core.gae, "gamma [T]", lambda: gae_with(1.0, gamma=jnp.ones(2)), "assert_rank"),
    # how good a critic is
    (
        core.explained_variance,
        "equal returns",
        lambda: core.explained_variance(same(0.0), same(1000.1), EVERY),
        0.0,
    ),
    (
        core.explained_variance,
        "no value",
        lambda: core.explained_variance(ONES, ONES, ~MASK),
        0.0,
    ),
    (
        core.explained_variance,
        "returns equal but for rounding",
        lambda: core.explained_variance(same(0.0), NEARLY, EVERY),
        0.0,
    ),
    (core.value_bias, "nothing", lambda: core.value_bias(ONES, ONES, ~MASK), 0.0),
    (
        core.value_bias,
        "a mask of integers",
        lambda: core.value_bias(ONES, ONES, TOKENS),
        "assert_t",
    ),
    (core.explained_variance_by_position, "equal", lambda: by_position(same(1000.1)), 0.0),
    (core.explained_variance_by_position, "0", lambda: by_position(NEARLY, 0), "num_bins must be"),
    (core.value_calibration, "nothing", lambda: calibration(mask=~MASK), jnp.nan),
    (core.value_calibration, "equal", lambda: calibration(num_bins=3), 1.0),
    (core.value_calibration, "1.5 bins", lambda: calibration(num_bins=1.5), "num_bins must be at"),
    (core.ensemble_values, "equal", lambda: core.ensemble_values(same(0.1)[None])[1], 0.0),
    (core.ensemble_values, "one critic", lambda: core.ensemble_values(ONES), "assert_rank"),
    (core.mask_agreed_advantages, "fraction 2", lambda: agreed(2), "fraction must be at least 0 a"),
    (core.mask_agreed_advantages, "fraction [B]", lambda: agreed(ROW), RANK),
    (core.mask_agreed_advantages, "equal", lambda: agreed(0.9), 1.0),
    (core.disputed_states, "fraction -1", lambda: disputed(-1), "fraction must be at least 0"),
    (core.disputed_states, "equal", lambda: disputed(0.9), 0.0),
    # advantages without a critic
    (
        core.leave_one_out,
        "equal scores",
        lambda: core.leave_one_out(jnp.full((6, 1), 0.1), jnp.ones((6, 1), bool), group_size=3),
        0.0,
    ),
    (
        core.leave_one_out,
        "equal large scores",
        lambda: core.leave_one_out(jnp.full((7, 1), 1e3 / 3), jnp.ones((7, 1), bool), group_size=7),
        0.0,
    ),
    (
        core.leave_one_out,
        "group of 3 of 4",
        lambda: core.leave_one_out(ONES, MASK, group_size=3),
        "divide the 4",
    ),
    (core.rloo_advantages, "equal", lambda: core.rloo_advantages(same(0.1)[0], group_size=8), 0.0),
    (core.rloo_advantages, "[B, 1]", lambda: core.rloo_advantages(COLUMN, group_size=2), "rank"),
    (core.grpo_advantages, "equal", lambda: grpo(same(1000.1)[0], eps=0), 0.0),
    (core.grpo_advantages, "equal but for rounding", lambda: grpo(NEARLY[0], eps=0), 0.0),
    (core.grpo_advantages, "eps -1", lambda: grpo(ROW, eps=-1), "eps must be at least 0"),
    (core.grpo_advantages, "eps [B]", lambda: grpo(ROW, eps=ROW), RANK),
    (core.grpo_advantages, "ddof 2", lambda: grpo(ROW, ddof=2), "got 2"),
    (core.grpo_advantages, "3 of 4", lambda: grpo(ROW, group_size=3), "divide the 4"),
    (
        core.reinforce_plus_plus_advantages,
        "no token",
        lambda: core.reinforce_plus_plus_advantages(ONES, ~MASK),
        0.0,
    ),
    (
        core.reinforce_plus_plus_advantages,
        "groups of 1",
        lambda: core.reinforce_plus_plus_advantages(ONES, MASK, group_size=1),
        "at least 2",
    ),
    (core.remax_advantages, "one", lambda: core.remax_advantages(ROW, ROW[:1]), "equal_shape"),
    (core.reinforce_advantages, "no token", lambda: reinforce(mask=~MASK), 0.0),
    (core.reinforce_advantages, "baseline [B]", lambda: reinforce(baseline=ROW), "assert_rank"),
    (core.reinforce_advantages, "baseline nan", lambda: reinforce(math.nan), [[0, -1, -2, -3]]),
    (core.reinforce_advantages, "gamma [B]", lambda: reinforce(gamma=ROW), RANK),
    (core.running_baseline, "first", lambda: core.running_baseline(math.nan, ROW, decay=1), 1.0),
    (core.running_baseline, "all new", lambda: core.running_baseline(9.0, ROW, decay=0), 1.0),
    (core.running_baseline, "2", lambda: core.running_baseline(0, ROW, decay=2), "decay must be"),
    # rewards
    (core.token_rewards, "kl_coef [B]", lambda: rewards(kl_coef=ROW), RANK),
    (core.token_rewards, "kl_coef nan", lambda: rewards(kl_coef=math.nan), "kl_coef must be a num"),
    (core.token_rewards, "scores [B, 1]", lambda: rewards(scores=COLUMN), "equal_shape_prefix"),
    (core.missing_eos_scores, "replace [B, 1]", lambda: missing_eos(replace=COLUMN), RANK),
    (core.missing_eos_scores, "penalty [B]", lambda: missing_eos(penalty=ROW), RANK),
    (core.missing_eos_scores, "both", lambda: missing_eos(replace=0, penalty=0), "exclude"),
    # shaping of scores
    (core.ensemble_scores, "how", lambda: ensemble(ONES, "max"), "unknown rule 'max'; choose"),
    (core.ensemble_scores, "k [B]", lambda: ensemble(ONES, "mean", k=ROW), RANK),
    (core.ensemble_scores, "one model", lambda: ensemble(ONES[:1], "mean_minus_std"), ROW),
    (core.ensemble_scores, "no model", lambda: ensemble(ONES[:0], "min"), "reward_models must be"),
    (core.ensemble_scores, "nearly", lambda: ensemble(NEARLY[:2], "mean_minus_std", k=1e9), 1000.1),
    (core.ensemble_scores, "scores [B]", lambda: ensemble(ROW, "mean"), "assert_rank"),
    (core.par_scores, "references [1]", lambda: core.par_scores(ROW, ROW[:1]), "assert_equal_sha"),
    (core.par_scores, "inf", lambda: core.par_scores(-jnp.inf * ROW, ROW), 0.0),
    (core.clip_scores, "limit 0", lambda: core.clip_scores(ROW, limit=0), "limit must be above 0"),
    (core.clip_scores, "limit [B]", lambda: core.clip_scores(ROW, limit=ROW), RANK),
    (core.clip_scores, "limit inf", lambda: core.clip_scores(9 * ROW, limit=math.inf), 9.0),
    (core.update_moments, "no scores", lambda: moments_of(jnp.zeros(0)), [0, 0, 0]),
    (core.update_moments, "integers", lambda: moments_of(TOKENS), "assert_type"),
    (core.normalize_scores, "equal scores", lambda: normalized(same(0.1)), 0.0),
    (core.normalize_scores, "nearly", lambda: normalized(NEARLY), 0.0),
    (core.normalize_scores, "with the mean", lambda: normalized(ROW, shift_mean=False), 1.0),
    (core.normalize_scores, "nothing before", lambda: core.normalize_scores(ROW, NONE_YET), 0.0),
    (core.length_penalty, "empty", lambda: core.length_penalty(~MASK, coef=1.0), 0.0),
    (core.length_penalty, "coef [B]", lambda: core.length_penalty(MASK, coef=ROW), RANK),
    (core.length_penalty, "coef inf", lambda: core.length_penalty(~MASK, coef=math.inf), 0.0),
    (
        core.length_penalty,
        "free -1",
        lambda: core.length_penalty(MASK, coef=1.0, free_tokens=-1),
        "free_tokens must be at least 0",
    ),
    (core.overlong_penalty, "cache 0", lambda: overlong(cache_length=0), "cache_length must be at"),
    (core.overlong_penalty, "length [B]", lambda: overlong(max_length=ROW), RANK),
    (core.overlong_penalty, "beyond", lambda: overlong(max_length=2), -1.0),
    (core.overlong_penalty, "empty", lambda: overlong(~MASK), 0.0),
    (
        core.overlong_penalty,
        "a traced cache of 0",
        lambda: jax.jit(lambda c: overlong(cache_length=c))(0.0),
        -1.0,
    ),
    (core.threshold_scores, "at it", lambda: ruled(threshold=1.0), 2.0),
    (core.threshold_scores, "below", lambda: ruled(threshold=1.5), 1.0),
    (core.threshold_scores, "of safety", lambda: ruled(threshold=0, is_safety=HAS_EOS), [1, 2] * 2),
    (core.threshold_scores, "[1]", lambda: ruled(threshold=0, is_safety=HAS_EOS[:1]), "assert_equ"),
    (core.threshold_scores, "threshold [B]", lambda: ruled(threshold=ROW), RANK),
    (core.best_and_worst, "keep 0", lambda: extremes(keep=0), "keep must be at least 1"),
    (
        core.best_and_worst,
        "keep 3 of 4",
        lambda: extremes(keep=3),
        "at most half of the group_size",
    ),
    (core.best_and_worst, "groups of 3", lambda: extremes(group_size=3), "divide the 4 responses"),
    (core.best_and_worst, "ties", lambda: extremes(), [True, False, False, True]),
    (core.groups_with_variance, "nearly", lambda: varied(NEARLY[0]), False),
    (core.groups_with_variance, "nan", lambda: varied(jnp.nan * NEARLY[0]), True),
    (core.groups_with_variance, "[B, 1]", lambda: varied(COLUMN), "assert_rank"),
]


@cases(EDGES)
def test_an_edge_is_refused_by_name_or_has_the_value_of_its_formula(call, expected):
    assert_edge(call, expected)
