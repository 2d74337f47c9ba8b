"""Losses at their edges."""

import math

import jax
import jax.numpy as jnp

from ppo_jax import core
from tests.support.edges import HUGE, KEY, LOGITS, MASK, ONES, RANK, ROW, TOKENS, assert_edge, cases

EDGES_OF_8 = jnp.arange(9.0)


def policy_loss(log_ratio, advantage, function=core.clipped_policy_loss, **numbers):
    """[loss, gradient of logprobs] of one token."""

    def loss(logprobs):
        old, mask = jnp.zeros((1, 1)), jnp.ones((1, 1), bool)
        advantages = jnp.full((1, 1), advantage)
        return function(logprobs, old, advantages, mask, **numbers)[0]

    value, gradient = jax.value_and_grad(loss)(jnp.full((1, 1), log_ratio))
    return [value.item(), gradient.item()]


def of_ones(function, **how):
    """A loss of the policy at ratio 1 and advantage 1."""
    return function(ONES, ONES, ONES, MASK, **how)[0]


def ppo_loss(**numbers):
    given = dict(old_logprobs=ONES, old_values=ONES, advantages=ONES, returns=ONES)
    return core.ppo_loss(ONES, ONES, ONES, MASK, **given | numbers)


def decoupled(**how):
    given = dict(clip_range=0.2, behavior_logprobs=ONES) | how
    return of_ones(core.decoupled_policy_loss, **given)


def entropy_coef(entropy, coef=0.5, step=0.25):
    return core.adaptive_entropy_coef(coef, entropy, target=2.0, step=step)


def aggregated(**how):
    return core.aggregation_weights(MASK, **how)


def classified(mask=MASK, bins=None):
    bins = EDGES_OF_8 if bins is None else bins
    return core.classification_value_loss(LOGITS, ONES, mask, bins=bins, sigma=1.0)[0]


def targets(sigma, bins=(0, 1, 2)):
    return core.hl_gauss_targets(jnp.inf * ONES, bins=jnp.array(bins, jnp.float32), sigma=sigma)


def preference(**changes):
    return core.preference_loss(ROW, ROW, **changes)


def logprobs(**numbers):
    return core.token_logprobs(LOGITS, TOKENS, **numbers)


# (function, edge, call, what is refused: a part of the message, or the value)
EDGES = [
    # losses of the policy
    (core.clipped_policy_loss, "ratio e^89, A = 1", lambda: policy_loss(89.0, 1.0), [-1.2, 0]),
    (core.clipped_policy_loss, "ratio e^89, A = 0", lambda: policy_loss(89.0, 0.0), 0.0),
    (core.clipped_policy_loss, "ratio e^89, A = -1", lambda: policy_loss(89.0, -1.0), [HUGE, 0]),
    (core.clipped_policy_loss, "ratio e^-89", lambda: policy_loss(-89.0, -1.0), [0.8, 0]),
    (
        core.clipped_policy_loss,
        "ratio e^19",
        lambda: policy_loss(19.0, -1.0),
        [math.exp(19)] * 2,
    ),
    (core.clipped_policy_loss, "clip [B]", lambda: ppo_loss(clip_range=ROW), RANK),
    (core.clipped_policy_loss, "clip < 0", lambda: ppo_loss(clip_range=-0.1), "clip_range must be"),
    (
        core.clipped_policy_loss,
        "no clip, ratio e^89, A = 0",
        lambda: policy_loss(89.0, 0.0, clip_range=math.inf),
        0.0,
    ),
    (
        core.clipped_policy_loss,
        "no clip, ratio e^2",
        lambda: policy_loss(2.0, 1.0, clip_range=math.inf),
        [-math.exp(2)] * 2,
    ),
    (
        core.clipped_policy_loss,
        "weights [B]",
        lambda: of_ones(core.clipped_policy_loss, weights=ROW),
        "assert_equal_shape",
    ),
    (
        core.dual_clip_policy_loss,
        "limit 1",
        lambda: of_ones(core.dual_clip_policy_loss, clip_range=0.2, dual_clip=1),
        "dual_clip must be above 1, got 1",
    ),
    (
        core.dual_clip_policy_loss,
        "ratio e^89, A = -1",
        lambda: policy_loss(89.0, -1.0, core.dual_clip_policy_loss, clip_range=math.inf),
        [3, 0],
    ),
    (
        core.dual_clip_policy_loss,
        "no limit, A = 0",
        lambda: policy_loss(
            1.0, 0.0, core.dual_clip_policy_loss, clip_range=math.inf, dual_clip=math.inf
        ),
        0.0,
    ),
    (
        core.kl_penalty_policy_loss,
        "ratio e^89",
        lambda: policy_loss(89.0, 0.0, core.kl_penalty_policy_loss, penalty_coef=1.0),
        [HUGE - 21, 0],
    ),
    (
        core.kl_penalty_policy_loss,
        "coefficient -1",
        lambda: of_ones(core.kl_penalty_policy_loss, penalty_coef=-1),
        "penalty_coef must be at least 0",
    ),
    (
        core.vpg_policy_loss,
        "ratio e^89",
        lambda: policy_loss(89.0, 2.0, core.vpg_policy_loss),
        [-178, -2],
    ),
    (
        core.cispo_policy_loss,
        "no clip, A = 0",
        lambda: policy_loss(89.0, 0.0, core.cispo_policy_loss, clip_range=math.inf),
        0.0,
    ),
    (
        core.cispo_policy_loss,
        "clip [B]",
        lambda: of_ones(core.cispo_policy_loss, clip_range=ROW),
        RANK,
    ),
    (
        core.dppo_policy_loss,
        "limit -1",
        lambda: of_ones(core.dppo_policy_loss, divergence_limit=-1),
        "divergence_limit must be at least 0",
    ),
    (
        core.decoupled_policy_loss,
        "limit 0",
        lambda: decoupled(behavior_weight_limit=0),
        "behavior_weight_limit must be above 0",
    ),
    (
        core.decoupled_policy_loss,
        "behavior [B]",
        lambda: decoupled(behavior_logprobs=ROW),
        "assert_equal_shape",
    ),
    (
        core.gspo_policy_loss,
        "ratio e^89",
        lambda: policy_loss(89.0, -1.0, core.gspo_policy_loss, clip_range=math.inf),
        [HUGE, 0],
    ),
    (
        core.gspo_policy_loss,
        "nothing",
        lambda: core.gspo_policy_loss(ONES, ONES, ONES, ~MASK, clip_range=0.1)[0],
        0.0,
    ),
    (
        core.gspo_policy_loss,
        "segment_ids of floats",
        lambda: of_ones(core.gspo_policy_loss, clip_range=0.1, segment_ids=ONES),
        "assert_type",
    ),
    (core.aggregation_weights, "how", lambda: aggregated(how="sum"), "unknown how 'sum'; choose"),
    (core.aggregation_weights, "no length", lambda: aggregated(how="constant"), "length goes with"),
    (core.aggregation_weights, "length", lambda: aggregated(length=4), "got how='token_mean', len"),
    (
        core.aggregation_weights,
        "length 0",
        lambda: aggregated(how="constant", length=0),
        "length must be above 0",
    ),
    # covariances of tokens, entropy
    (core.token_covariances, "equal", lambda: core.token_covariances(ONES, ONES, MASK), 0.0),
    (
        core.kl_cov_mask,
        "fraction 2",
        lambda: core.kl_cov_mask(ONES, ONES, MASK, covariance_fraction=2),
        "covariance_fraction must be at least 0 and at most 1",
    ),
    (core.kl_cov_mask, "nothing", lambda: core.kl_cov_mask(ONES, ONES, ~MASK), 0),
    (
        core.kl_cov_policy_loss,
        "penalty_mask of numbers",
        lambda: of_ones(core.kl_cov_policy_loss, penalty_coef=1, penalty_mask=ONES),
        "assert_type",
    ),
    (
        core.clip_cov_policy_loss,
        "dropped_mask of numbers",
        lambda: of_ones(core.clip_cov_policy_loss, clip_range=0.1, dropped_mask=ONES),
        "assert_type",
    ),
    (
        core.clip_cov_mask,
        "nothing",
        lambda: core.clip_cov_mask(KEY, ONES, ONES, ~MASK),
        0,
    ),
    (
        core.clip_cov_weights,
        "low nan",
        lambda: core.clip_cov_weights(KEY, ONES, ONES, MASK, low=math.nan),
        "low must be a number",
    ),
    (core.clip_cov_weights, "equal", lambda: core.clip_cov_weights(KEY, ONES, ONES, MASK), 1.0),
    (core.adaptive_entropy_coef, "at the target", lambda: entropy_coef(2.0), 0.5),
    (core.adaptive_entropy_coef, "at 0", lambda: entropy_coef(3.0, coef=0.1), 0.0),
    (core.adaptive_entropy_coef, "step -1", lambda: entropy_coef(0.0, step=-1), "step must be at"),
    # losses of the critic
    (core.clipped_value_loss, "clip [B]", lambda: ppo_loss(value_clip_range=ROW), RANK),
    (core.clipped_value_loss, "clip < 0", lambda: ppo_loss(value_clip_range=-1), "at least 0"),
    (core.classification_value_loss, "nothing", lambda: classified(mask=~MASK), 0.0),
    (
        core.classification_value_loss,
        "7 bins of 8",
        lambda: classified(bins=EDGES_OF_8[1:]),
        "assert_sh",
    ),
    (core.classification_value_loss, "equal logits", lambda: classified(), math.log(8)),
    (core.hl_gauss_targets, "sigma 0", lambda: targets(0), "sigma must be above 0, got 0"),
    (core.hl_gauss_targets, "sigma [B]", lambda: targets(ROW), RANK),
    (core.hl_gauss_targets, "one edge", lambda: targets(1, [0]), "bins must be at least two"),
    (core.hl_gauss_targets, "falling", lambda: targets(1, [1, 0]), "increasing edges, got"),
    (core.hl_gauss_targets, "inf", lambda: targets(1, [0, math.inf]), "finite and increasing"),
    (core.hl_gauss_targets, "inf of traced sigma 0", lambda: jax.jit(targets)(0.0)[..., -1], 1.0),
    (core.hl_gauss_value, "bins", lambda: core.hl_gauss_value(LOGITS, bins=ROW), "assert_axis_dim"),
    (core.hl_gauss_value, "equal", lambda: core.hl_gauss_value(LOGITS, bins=EDGES_OF_8), 4.0),
    # of both, and of SFT and the reward model
    (core.ppo_loss, "vf_coef [2]", lambda: ppo_loss(vf_coef=jnp.ones(2)), RANK),
    (core.ppo_loss, "entropy_coef [B]", lambda: ppo_loss(entropy_coef=ROW), RANK),
    (core.ppo_loss, "normalizer [B]", lambda: ppo_loss(normalizer=ROW), RANK),
    (core.next_token_loss, "nothing", lambda: core.next_token_loss(ONES, ~MASK)[0], 0.0),
    (core.next_token_loss, "a row", lambda: core.next_token_loss(ONES, MASK[0]), "assert_equal"),
    (core.preference_loss, "mask [B, B]", lambda: preference(mask=MASK), "assert_equal_shape"),
    (core.preference_loss, "mask of numbers", lambda: preference(mask=ROW), "assert_type"),
    (core.preference_loss, "margin [1]", lambda: preference(margin=jnp.ones(1)), "assert_equal_s"),
]


@cases(EDGES)
def test_an_edge_is_refused_by_name_or_has_the_value_of_its_formula(call, expected):
    assert_edge(call, expected)
