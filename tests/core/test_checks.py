"""Every public function at its edges: one table of function x edge.

An edge is refused, with a message that names the argument, or has the value of the formula. Values
of the right-hand side are worked out by hand or by numpy in float64.
"""

import importlib
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax import algorithms, core
from ppo_jax import rollout as rollout_function
from ppo_jax.core.checks import assert_counts, assert_divides, assert_ids, assert_numbers
from ppo_jax.core.masking import masked_moments
from ppo_jax.core.optimizer import global_norm
from ppo_jax.core.types import Prompts
from ppo_jax.models.build import policy_network
from ppo_jax.rollout import decode, sampling
from tests.support import tiny

B, T = 4, 4  # equal, so that an array of one row or column broadcasts without a word
ONES, MASK = jnp.ones((B, T)), jnp.ones((B, T), bool)
ROW, COLUMN = jnp.ones(B), jnp.ones((B, 1))
LOGITS, TOKENS = jnp.zeros((B, T, 8)), jnp.zeros((B, T), jnp.int32)
HAS_EOS = jnp.array([True, False, True, False])
KEY = jax.random.key(0)
RANK = "is one number"
NUMPY = np.ones((2, 2), np.float64)


def same(value):
    return jnp.full((64, 24), value, jnp.float32)


EVERY = jnp.ones((64, 24), bool)
# One of them is the next number of float32.
NEARLY = same(1000.1).at[0, 0].set(np.nextafter(np.float32(1000.1), np.float32(np.inf)))
ADAM = core.Optimizer(learning_rate=0.1)
WEIGHTS = {"w": jnp.ones(2)}
NONE_YET = core.Moments()


def stepped(settings, *gradients):
    """(weights after a step, norm of the gradients)"""
    state = core.init_optimizer(settings, WEIGHTS)
    gradient = {"w": jnp.array(gradients, jnp.float32)}
    params, _, norm = core.apply_gradients(settings, gradient, state, WEIGHTS, 0.1)
    return [*params["w"].tolist(), norm.item()]


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


def grpo(scores, **how):
    return core.grpo_advantages(scores, **dict(group_size=4) | how)


def reinforce(baseline=0.0, mask=MASK, **how):
    return core.reinforce_advantages(ONES, mask, baseline, **how)


def by_length(mask=MASK, alpha=0.5):
    return core.length_adaptive_lambda(mask, alpha=alpha)


def of_kl(d, estimator, **arrays):
    return core.kl_loss(d, 0 * d, MASK, estimator=estimator, **arrays)[0]


def gae_with(gae_lambda, gamma=1.0):
    rewards = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    mask = jnp.ones((2, 2), bool)
    numbers = dict(gae_lambda=gae_lambda, gamma=gamma)
    return core.gae(rewards, jnp.zeros((2, 2)), mask, **numbers)[0]


def sampled(**numbers):
    return core_sample(KEY, jnp.array([[0.0, 3.0, 1.0]]), **numbers)


core_sample = sampling.sample


def traced(name, value):
    """What is drawn with a number that is traced."""
    return jax.jit(lambda x: sampled(**{name: x}))(value)


def options(**changes):
    return lambda: tiny.options(**changes)


def rolled(tokens=None, mask=None, **numbers):
    """The rollout of a tiny policy, outside of a traced program."""
    tokens = jnp.full((2, 3), 5) if tokens is None else tokens
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask
    prompts, run = Prompts(tokens=tokens, mask=mask), tiny.setup()
    how = dict(sampling=tiny.sampling(response_length=2)) | numbers
    return rollout_function(run.networks.policy, run.policy_params, prompts, KEY, **how)


def texts(function, **how):
    """A step on three texts, with micro-batches that do not divide them."""
    run = tiny.setup()
    tokens, mask = tiny.tokens_and_mask(0, 3, 4, side="right")
    batch = core.TextBatch(inputs=tokens, tokens=tokens, mask=mask, loss_mask=mask)
    pairs = dict(pairs=jnp.zeros((1, 2), jnp.int32), valid=jnp.ones(1, bool))
    if function is algorithms.reward_step:
        batch = core.PreferenceBatch(inputs=tokens, mask=mask, **pairs)
    params = run.policy_params
    state = core.TrainState(step=jnp.int32(0), params=params, opt_state=None)
    network = run.networks.policy
    if function is algorithms.text_scores:
        return function(network, params, tokens, mask, **how)
    if function is algorithms.sft_loss:
        return function(network, params, batch, **how)
    return function(state, batch, ADAM, network=network, frozen={}, **how)


def experience(rows=8, **changes):
    zeros = jnp.zeros((rows, 8))
    tokens, mask = jnp.full((rows, 13), 5), jnp.ones((rows, 13), bool)
    given = dict(logprobs=zeros, values=zeros, advantages=zeros, returns=zeros)
    names = dict(policy_inputs=tokens, value_inputs=tokens, mask=mask)
    response = dict(response_tokens=tokens[:, 5:], response_mask=mask[:, 5:])
    return core.Experience(**names, **response, **given | changes)


def updated(how=None, rows=8, **numbers):
    run, numbers = tiny.setup(), tiny.hyperparameters().replace(**numbers)
    parts = dict(frozen=run.frozen, networks=run.networks, options=tiny.options(**how or {}))
    state = run.start(tiny.hyperparameters())
    return algorithms.ppo_update(state, experience(rows), numbers, KEY, **parts)


def experienced(scores, function="make_experience"):
    run, numbers = tiny.setup(), tiny.hyperparameters()
    parts = dict(frozen=run.frozen, networks=run.networks, options=tiny.options())
    state, e = run.start(numbers), experience()
    rollout = core.Rollout(
        prompt_tokens=e.policy_inputs[:, :5],
        prompt_mask=e.mask[:, :5],
        response_tokens=e.response_tokens,
        response_mask=e.response_mask,
        logprobs=e.logprobs,
        has_eos=jnp.ones(8, bool),
    )
    if function == "make_experience":
        return algorithms.make_experience(rollout, scores, state, numbers, **parts)
    return algorithms.update_from_rollout(state, numbers, rollout, scores, KEY, **parts)


def iterated(function, **prompts):
    run, numbers = tiny.setup(), tiny.hyperparameters()
    parts = dict(frozen=run.frozen, networks=run.networks, options=tiny.options())
    batch = tiny.prompts().replace(**prompts)
    return function(run.start(numbers), numbers, batch, KEY, **parts)


def weights_of(**numbers):
    zeros, limits = jnp.zeros((B, T)), dict(low=0.0, high=1.0)
    return core.importance_weights(zeros + 200, zeros, MASK, **limits | numbers)[0]


def with_networks(function, **missing):
    run = tiny.setup()
    return function(None, frozen=run.frozen, networks=run.networks._replace(**missing))


EDGES_OF_8 = jnp.arange(9.0)
RIGHT_PADDED = jnp.arange(5)[None] < jnp.array([5, 3, 5, 5, 5, 5, 5, 5])[:, None]
HUGE = math.exp(20)

# (function, edge, call, what is refused: a part of the message, or the value)
EDGES = [
    # numbers: equal values do not vary
    (core.whiten, "1000.1", lambda: core.whiten(same(1000.1), EVERY), 0.0),
    (core.whiten, "3.3", lambda: core.whiten(same(3.3), EVERY), 0.0),
    (core.whiten, "-1e-7", lambda: core.whiten(same(-1e-7), EVERY), 0.0),
    (core.whiten, "1e18", lambda: core.whiten(same(1e18), EVERY), 0.0),
    (core.whiten, "equal but for rounding", lambda: core.whiten(NEARLY, EVERY), 0.0),
    (core.whiten, "mean", lambda: core.whiten(same(3.3), EVERY, shift_mean=False), 3.3),
    (core.whiten, "a mask of integers", lambda: core.whiten(ONES, TOKENS), "assert_type"),
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
    (masked_moments, "equal", lambda: masked_moments(same(1000.1), EVERY)[1], 0.0),
    (masked_moments, "equal but for rounding", lambda: masked_moments(NEARLY, EVERY)[1], 0.0),
    (masked_moments, "nan", lambda: masked_moments(same(jnp.nan), EVERY)[1], jnp.nan),
    (masked_moments, "nothing", lambda: jnp.stack(masked_moments(ONES, ~MASK)), 0.0),
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
    (core.length_adaptive_lambda, "no token", lambda: by_length(mask=~MASK), 0.0),
    (core.length_adaptive_lambda, "4 tokens", lambda: by_length(), 0.5),
    (core.length_adaptive_lambda, "alpha 0", lambda: by_length(alpha=0), "alpha must be above 0"),
    (core.length_adaptive_lambda, "alpha [B]", lambda: by_length(alpha=ROW), RANK),
    # KL
    (core.kl_loss, "k1", lambda: of_kl(ONES, "k1"), "got 'k1': its gradient in a loss is 0 on ave"),
    (core.kl_loss, "nothing", lambda: core.kl_loss(ONES, ONES, ~MASK, estimator="k3")[0], 0.0),
    (core.kl_loss, "k3 of -1e3", lambda: of_kl(-1e3 * ONES, "k3"), math.exp(20) - 21),
    (core.kl_loss, "ratio e^89", lambda: of_kl(ONES, "k2", old_logprobs=-88 * ONES), HUGE / 2),
    (core.kl_loss, "weights [B]", lambda: of_kl(ONES, "k2", weights=ROW), "assert_equal_shape"),
    (
        core.adaptive_penalty_coef,
        "target 0",
        lambda: core.adaptive_penalty_coef(1.0, 1.0, target_kl=0),
        "target_kl must be above 0",
    ),
    (
        core.adaptive_penalty_coef,
        "a row",
        lambda: core.adaptive_penalty_coef(1.0, ROW, target_kl=1),
        "assert_rank",
    ),
    (core.kl_estimate, "numpy", lambda: core.kl_estimate(NUMPY, 0 * NUMPY), 1.0),
    (core.kl_estimate, "k3 of -1e3", lambda: k3(-1e3), math.exp(20) - 21),
    (core.kl_estimate, "shapes", lambda: core.kl_estimate(ONES, ROW), "assert_equal_shape"),
    (core.kl_estimate, "k4", lambda: core.kl_estimate(ONES, ONES, estimator="k4"), "got 'k4'"),
    (core.adaptive_kl_coef, "short horizon", lambda: coefficient(kl=0.0, horizon=1), 0.005),
    (core.adaptive_kl_coef, "no KL", lambda: coefficient(kl=0.0), 0.05 * 0.99872),
    (core.adaptive_kl_coef, "horizon 0", lambda: coefficient(horizon=0), "horizon must be above 0"),
    (core.adaptive_kl_coef, "target 0", lambda: coefficient(target_kl=0), "target_kl must be abo"),
    (core.adaptive_kl_coef, "a row", lambda: coefficient(kl=ROW), "assert_rank"),
    # rewards
    (core.token_rewards, "kl_coef [B]", lambda: rewards(kl_coef=ROW), RANK),
    (core.token_rewards, "kl_coef nan", lambda: rewards(kl_coef=math.nan), "kl_coef must be a num"),
    (core.token_rewards, "scores [B, 1]", lambda: rewards(scores=COLUMN), "equal_shape_prefix"),
    (core.missing_eos_scores, "replace [B, 1]", lambda: missing_eos(replace=COLUMN), RANK),
    (core.missing_eos_scores, "penalty [B]", lambda: missing_eos(penalty=ROW), RANK),
    (core.missing_eos_scores, "both", lambda: missing_eos(replace=0, penalty=0), "exclude"),
    # advantages
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
    # losses
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
    (core.aggregation_weights, "how", lambda: aggregated(how="sum"), "unknown how 'sum'; choose"),
    (core.aggregation_weights, "no length", lambda: aggregated(how="constant"), "length goes with"),
    (core.aggregation_weights, "length", lambda: aggregated(length=4), "got how='token_mean', len"),
    (
        core.aggregation_weights,
        "length 0",
        lambda: aggregated(how="constant", length=0),
        "length must be above 0",
    ),
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
    (core.ppo_loss, "vf_coef [2]", lambda: ppo_loss(vf_coef=jnp.ones(2)), RANK),
    (core.ppo_loss, "entropy_coef [B]", lambda: ppo_loss(entropy_coef=ROW), RANK),
    (core.ppo_loss, "normalizer [B]", lambda: ppo_loss(normalizer=ROW), RANK),
    (core.next_token_loss, "nothing", lambda: core.next_token_loss(ONES, ~MASK)[0], 0.0),
    (core.next_token_loss, "a row", lambda: core.next_token_loss(ONES, MASK[0]), "assert_equal"),
    (core.preference_loss, "mask [B, B]", lambda: preference(mask=MASK), "assert_equal_shape"),
    (core.preference_loss, "mask of numbers", lambda: preference(mask=ROW), "assert_type"),
    (core.preference_loss, "margin [1]", lambda: preference(margin=jnp.ones(1)), "assert_equal_s"),
    # masks
    (core.masked_mean, "normalizer -1", lambda: mean(-1), "normalizer must be at least 0, got -1"),
    (core.masked_mean, "normalizer 0", lambda: mean(0), 16.0),
    (core.zero_padding, "nan", lambda: core.zero_padding(~MASK, ONES * jnp.nan)[0], 0.0),
    (core.response_mask, "int8", lambda: stops([[5, 81, 7]], jnp.int8, [50257]), [[1, 1, 1]]),
    (core.response_mask, "uint8", lambda: stops([[5, 255, 7]], jnp.uint8, [-1]), [[1, 1, 1]]),
    (core.response_mask, "int8 stops", lambda: stops([[5, 81, 7]], jnp.int8, [81]), [[1, 1, 0]]),
    (core.response_mask, "[T]", lambda: core.response_mask(TOKENS[0], [1]), "assert_rank"),
    (core.last_token_index, "nothing", lambda: core.last_token_index(~MASK), 0),
    (core.last_token_index, "[T]", lambda: core.last_token_index(MASK[0]), "assert_rank"),
    # distributions
    (core.token_logprobs, "token -1", lambda: core.token_logprobs(LOGITS, TOKENS - 1), jnp.nan),
    (core.token_logprobs, "token V", lambda: core.token_logprobs(LOGITS, TOKENS + 8), jnp.nan),
    (core.token_logprobs, "int8", lambda: logprob_of(jnp.int8(-1), 300), jnp.nan),
    (core.token_logprobs, "last", lambda: logprob_of(jnp.int8(7), 8), -math.log(8)),
    (core.token_logprobs, "temperature [B]", lambda: logprobs(temperature=ROW), RANK),
    (core.token_logprobs, "temperature -1", lambda: logprobs(temperature=-1), "at least 1e-06"),
    (
        core.token_statistics,
        "token -1",
        lambda: core.token_statistics(LOGITS, TOKENS - 1)[0],
        jnp.nan,
    ),
    (core.token_statistics, "temperature 1e-38", lambda: statistics(temperature=1e-38), "got 1e-3"),
    (core.token_statistics, "temperature [B]", lambda: statistics(temperature=ROW), RANK),
    (core.chunked_token_statistics, "chunk 0", lambda: chunked(chunk=0), "chunk must be at least"),
    (core.chunked_token_statistics, "t [B]", lambda: chunked(chunk=2, temperature=ROW), RANK),
    (core.entropy, "integers", lambda: core.entropy(TOKENS), "assert_type"),
    (core.entropy, "one token", lambda: core.entropy(jnp.array([0.0, -jnp.inf])), 0.0),
    # importance weights
    (core.importance_weights, "e^200", lambda: weights_of(high=jnp.inf), HUGE),
    (core.importance_weights, "limit [B]", lambda: weights_of(low=ROW), RANK),
    (core.importance_weights, "limit -1", lambda: weights_of(low=-1), "low must be at least 0"),
    (core.importance_weights, "level", lambda: weights_of(level="row"), "unknown level 'row'; cho"),
    (core.importance_weights, "outside", lambda: weights_of(outside="cut"), "unknown outside 'cut"),
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
    (core.adaptive_entropy_coef, "at the target", lambda: entropy_coef(2.0), 0.5),
    (core.adaptive_entropy_coef, "at 0", lambda: entropy_coef(3.0, coef=0.1), 0.0),
    (core.adaptive_entropy_coef, "step -1", lambda: entropy_coef(0.0, step=-1), "step must be at"),
    (core.average_params, "none", lambda: core.average_params([]), "one or more .*, got none"),
    (core.average_params, "shapes", lambda: averaged({"w": jnp.ones(3)}), "got 2 that differ"),
    (core.average_params, "names", lambda: averaged({"v": jnp.ones(2)}), "got 2 that differ"),
    (
        core.average_params,
        "weight -1",
        lambda: averaged(WEIGHTS, [2, -1]),
        "of at least 0, and not",
    ),
    (core.average_params, "weights 0", lambda: averaged(WEIGHTS, [0, 0]), "not all 0, got"),
    (
        core.average_params,
        "one weight",
        lambda: averaged(WEIGHTS, [1]),
        "weights must be 2 numbers",
    ),
    # optimizer
    (core.apply_gradients, "1e20", lambda: stepped(ADAM, 3e20, -4e20), [0.9, 1.1, 5e20]),
    (
        core.apply_gradients,
        "limit 0, gradient 0",
        lambda: stepped(ADAM.replace(max_grad_norm=0.0), 0, 0),
        [1, 1, 0],
    ),
    (
        core.apply_gradients,
        "limit 0",
        lambda: stepped(ADAM.replace(max_grad_norm=0.0), 3, 4),
        [1, 1, 5],
    ),
    (core.apply_gradients, "limit -1", lambda: stepped(ADAM.replace(max_grad_norm=-1)), "grad_nor"),
    (core.apply_gradients, "limit [2]", lambda: stepped(ADAM.replace(max_grad_norm=ROW)), RANK),
    (core.apply_gradients, "rate [2]", lambda: rates(jnp.ones(2)), RANK),
    (core.init_optimizer, "b1 [2]", lambda: core.init_optimizer(ADAM.replace(b1=ROW), {}), RANK),
    (core.schedule, "steps [B]", lambda: core.schedule(ADAM, ROW), RANK),
    (core.schedule, "warmup -1", lambda: core.schedule(ADAM.replace(warmup_steps=-1), 0), "warmup"),
    (core.schedule, "unknown", lambda: ADAM.replace(schedule="step"), "unknown schedule 'step'"),
    (global_norm, "1e38", lambda: global_norm({"w": jnp.full(4, 1e38)}), 2e38),
    (global_norm, "nan", lambda: global_norm({"w": jnp.array([jnp.nan, 1e30])}), jnp.nan),
    (core.merge_params, "the last wins", lambda: core.merge_params({"a": 1}, {"a": 2})["a"], 2),
    # sampling: what is known is refused, what is traced clamps
    (sampling.sample, "temperature -1", lambda: sampled(temperature=-1), "temperature must be"),
    (sampling.sample, "temperature 1e-38", lambda: sampled(temperature=1e-38), "got 1e-38"),
    (sampling.sample, "temperature nan", lambda: sampled(temperature=math.nan), "got nan"),
    (sampling.sample, "an array", lambda: sampled(temperature=jnp.float32(-1)), "temperature"),
    (sampling.sample, "temperature [1]", lambda: sampled(temperature=jnp.ones(1)), RANK),
    (sampling.sample, "min_p 1.5", lambda: sampled(min_p=1.5), "min_p must be at least 0 and at m"),
    (sampling.sample, "min_p -0.1", lambda: sampled(min_p=-0.1), "min_p must be at least 0"),
    (sampling.sample, "top_p -1", lambda: sampled(top_p=-1), "top_p must be at least 0"),
    (sampling.sample, "top_k 2.5", lambda: sampled(top_k=2.5), "top_k must be at least 0 and whol"),
    (sampling.sample, "traced temperature -1", lambda: traced("temperature", -1.0), [1]),
    (sampling.sample, "traced temperature 1e-38", lambda: traced("temperature", 1e-38), [1]),
    (sampling.sample, "traced min_p 1.5", lambda: traced("min_p", 1.5), [1]),
    (sampling.sample, "traced top_p -1", lambda: traced("top_p", -1.0), [1]),
    (
        sampling.sample,
        "traced min_p -0.1",
        lambda: traced("min_p", -0.1),
        [core_sample(KEY, jnp.array([[0.0, 3.0, 1.0]])).item()],
    ),
    (sampling.Sampling, "length 0", lambda: tiny.sampling(response_length=0), "response_length"),
    (sampling.Sampling, "top_p -1", lambda: tiny.sampling(top_p=-1), "top_p must be"),
    (sampling.Sampling, "top_k -1", lambda: tiny.sampling(top_k=-1), "top_k must be"),
    (sampling.Sampling, "min_p 2", lambda: tiny.sampling(min_p=2), "min_p must be"),
    (sampling.Sampling, "stop id -1", lambda: tiny.sampling(eos_ids=(2, -1)), r"eos_ids\[1\] must"),
    (sampling.Sampling, "samples 0", lambda: tiny.sampling(samples_per_prompt=0), "samples_per_pr"),
    (sampling.Sampling, "slots -1", lambda: tiny.sampling(max_concurrent=-1), "max_concurrent"),
    # rollout
    (
        rollout_function,
        "right-padded",
        lambda: rolled(mask=RIGHT_PADDED[:2, 2:]),
        "padded on the l",
    ),
    (rollout_function, "no prompt", lambda: rolled(jnp.zeros((0, 3), jnp.int32)), "there must be"),
    (rollout_function, "token V", lambda: rolled(jnp.full((2, 3), 50)), r"in \[0, 50\), got 50"),
    (rollout_function, "token -1", lambda: rolled(jnp.full((2, 3), -1)), "got -1 in row 0"),
    (rollout_function, "temperature [B]", lambda: rolled(temperature=jnp.ones(2)), RANK),
    (rollout_function, "temperature -1", lambda: rolled(temperature=-1), "temperature must be"),
    (rollout_function, "rows [3]", lambda: rolled(rows=jnp.arange(3)), "assert_shape"),
    (decode.response_outputs, "T = L", lambda: outputs(4), "from 1 to 3 of the 4 positions, got 4"),
    (decode.response_outputs, "T = 0", lambda: outputs(0), "got 0"),
    (
        decode.response_statistics,
        "T = L",
        lambda: decode.response_statistics(None, {}, TOKENS, MASK, TOKENS),
        "from 1 to 3",
    ),
    # algorithms
    (algorithms.PPOOptions, "num_epochs 0", options(num_epochs=0), "num_epochs must be at least 1"),
    (algorithms.PPOOptions, "minibatches -1", options(num_minibatches=-1), "num_minibatches"),
    (algorithms.PPOOptions, "micro 1.5", options(num_micro_batches=1.5), "num_micro_batches"),
    (algorithms.PPOOptions, "k9", options(kl_estimator="k9"), "unknown kl_estimator 'k9'"),
    (algorithms.PPOOptions, "k2", options(kl_estimator="k2"), "away from the reference, got 'k2'"),
    (algorithms.PPOOptions, "k3", options(kl_estimator="k3"), "away from the reference, got 'k3'"),
    (
        algorithms.ppo_update,
        "3 minibatches of 8",
        lambda: updated(dict(num_minibatches=3)),
        r"num_minibatches x num_micro_batches \(3 x 1\) must divide the 8 responses",
    ),
    (algorithms.ppo_update, "rate [2]", lambda: updated(value_learning_rate=ROW), RANK),
    (algorithms.ppo_update, "vf_coef [2]", lambda: updated(vf_coef=jnp.ones(2)), RANK),
    (algorithms.experience_loss, "clip_range [B]", lambda: updated(clip_range=ROW), RANK),
    (
        algorithms.make_experience,
        "scores [B, 1]",
        lambda: experienced(jnp.ones((8, 1))),
        "assert_shape",
    ),
    (
        algorithms.make_experience,
        "equal scores",
        lambda: experienced(jnp.full(8, 0.1))[1]["reward/score_std"],
        0.0,
    ),
    (
        algorithms.make_experience,
        "scores equal but for rounding",
        lambda: experienced(NEARLY[0, :8])[1]["reward/score_std"],
        0.0,
    ),
    (
        algorithms.update_from_rollout,
        "scores [1]",
        lambda: experienced(jnp.ones(1), "update_from_rollout"),
        "assert_shape",
    ),
    (
        algorithms.sample_responses,
        "right-padded",
        lambda: iterated(algorithms.sample_responses, mask=RIGHT_PADDED),
        "padded on the left, got row 1",
    ),
    (
        algorithms.ppo_iteration,
        "token V",
        lambda: iterated(algorithms.ppo_iteration, tokens=jnp.full((8, 5), 50)),
        "got 50",
    ),
    (
        algorithms.response_scores,
        "no reward model",
        lambda: with_networks(algorithms.response_scores, reward=None),
        "needs a reward model",
    ),
    (algorithms.policy_logprobs, "token -1", lambda: of_policy(-1), r"in \[0, 50\), got -1"),
    (algorithms.init_ppo, "kl_coef", lambda: started(kl_coef=0.5).kl_coef, 0.5),
    (algorithms.trained_params, "no critic", lambda: len(algorithms.trained_params({}, None)), 1),
    (
        algorithms.sft_step,
        "2 micro-batches of 3",
        lambda: texts(algorithms.sft_step, num_micro_batches=2),
        "divide the 3",
    ),
    (
        algorithms.reward_step,
        "2 micro-batches of 3",
        lambda: texts(algorithms.reward_step, num_micro_batches=2),
        "divide the 3",
    ),
    (
        algorithms.text_scores,
        "0 micro-batches",
        lambda: texts(algorithms.text_scores, num_micro_batches=0),
        "num_micro_batches must be at least 1",
    ),
    (
        algorithms.sft_loss,
        "normalizer [2]",
        lambda: texts(algorithms.sft_loss, normalizer=ROW),
        RANK,
    ),
    # the checks themselves
    (assert_numbers, "a whole number", lambda: assert_numbers(at_least=1, x=np.int64(1)), None),
    (assert_numbers, "inf", lambda: assert_numbers(at_least=0, x=math.inf), None),
    (assert_counts, "True", lambda: assert_counts(n=True), "n must be at least 1 and whole"),
    (assert_divides, "0", lambda: assert_divides(4, "rows", n=0), "n must be at least 1"),
    (assert_ids, "padding", lambda: assert_ids(TOKENS - 1, ~MASK, 8), None),
]


def decoupled(**how):
    given = dict(clip_range=0.2, behavior_logprobs=ONES) | how
    return of_ones(core.decoupled_policy_loss, **given)


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


def entropy_coef(entropy, coef=0.5, step=0.25):
    return core.adaptive_entropy_coef(coef, entropy, target=2.0, step=step)


def averaged(other, weights=None):
    return core.average_params([WEIGHTS, other], weights)


def aggregated(**how):
    return core.aggregation_weights(MASK, **how)


def by_position(returns, num_bins=4):
    return core.explained_variance_by_position(same(0.0), returns, EVERY, num_bins=num_bins)


def calibration(mask=MASK, num_bins=2):
    return jnp.stack(core.value_calibration(ONES, ONES, mask, num_bins=num_bins))


def agreed(fraction):
    return core.mask_agreed_advantages(ONES, ONES, MASK, fraction=fraction)


def disputed(fraction):
    return core.disputed_states(ONES, MASK, fraction=fraction)


def classified(mask=MASK, bins=None):
    bins = EDGES_OF_8 if bins is None else bins
    return core.classification_value_loss(LOGITS, ONES, mask, bins=bins, sigma=1.0)[0]


def targets(sigma, bins=(0, 1, 2)):
    return core.hl_gauss_targets(jnp.inf * ONES, bins=jnp.array(bins, jnp.float32), sigma=sigma)


def k3(d):
    return core.kl_estimate(jnp.full((1, 1), d), jnp.zeros((1, 1)), estimator="k3")


def coefficient(**changes):
    numbers = dict(kl=0.0, target_kl=6.0, horizon=10_000, batch_size=64) | changes
    return core.adaptive_kl_coef(0.05, numbers.pop("kl"), **numbers)


def rewards(scores=ROW, kl_coef=0.1):
    return core.token_rewards(scores, ONES, ONES, MASK, kl_coef=kl_coef)


def missing_eos(**numbers):
    return core.missing_eos_scores(ROW, HAS_EOS, **numbers)


def preference(**changes):
    return core.preference_loss(ROW, ROW, **changes)


def mean(normalizer):
    return core.masked_mean(ONES, MASK, normalizer=normalizer)


def stops(tokens, dtype, eos_ids):
    return core.response_mask(jnp.array(tokens, dtype), eos_ids)


def logprob_of(token, vocab_size):
    return core.token_logprobs(jnp.zeros(vocab_size), token)


def logprobs(**numbers):
    return core.token_logprobs(LOGITS, TOKENS, **numbers)


def statistics(**numbers):
    return core.token_statistics(LOGITS, TOKENS, **numbers)


def chunked(**numbers):
    hidden = jnp.zeros((B, T, 2))
    return core.chunked_token_statistics(jnp.matmul, jnp.zeros((2, 8)), hidden, TOKENS, **numbers)


def rates(rate):
    state = core.init_optimizer(ADAM, WEIGHTS)
    return core.apply_gradients(ADAM, WEIGHTS, state, WEIGHTS, {"w": rate})


def outputs(response_length):
    return decode.response_outputs(None, {}, TOKENS, MASK, response_length=response_length)


def started(**numbers):
    return algorithms.init_ppo({}, None, tiny.hyperparameters(**numbers))


def of_policy(token):
    run, e = tiny.setup(), experience()
    tokens = jnp.full((8, 5), token)
    rollout = core.Rollout(
        prompt_tokens=tokens,
        prompt_mask=e.mask[:, :5],
        response_tokens=e.response_tokens,
        response_mask=e.response_mask,
        logprobs=e.logprobs,
        has_eos=jnp.ones(8, bool),
    )
    parts = dict(frozen=run.frozen, networks=run.networks, policy_inputs=rollout.tokens)
    params, numbers = run.policy_params, tiny.hyperparameters()
    return algorithms.policy_logprobs(rollout, params, numbers, **parts)


@pytest.mark.parametrize(
    "call, expected",
    [case[2:] for case in EDGES],
    ids=[f"{function.__name__}: {edge}" for function, edge, *_ in EDGES],
)
def test_an_edge_is_refused_by_name_or_has_the_value_of_its_formula(call, expected):
    if isinstance(expected, str):
        with pytest.raises((ValueError, AssertionError), match=expected):
            call()
    elif expected is None:
        assert call() is None
    else:
        got = call()
        np.testing.assert_allclose(got, np.broadcast_to(expected, np.shape(got)), rtol=2e-6)


def test_every_public_function_has_its_edges():
    modules = (core, algorithms, importlib.import_module("ppo_jax.rollout"))
    public = [getattr(module, name) for module in modules for name in module.__all__]
    functions = {x for x in public if isinstance(x, types.FunctionType)}
    assert len(functions) > 40
    assert not {f.__name__ for f in functions - {function for function, *_ in EDGES}}


def test_numpy_gives_arrays_of_jax():
    for estimator in core.ESTIMATORS:
        assert isinstance(core.kl_estimate(NUMPY, NUMPY, estimator=estimator), jax.Array)


def test_with_wide_numbers_a_rollout_is_the_same():
    """jax_enable_x64: index dtypes, and noise that must not be another."""
    network = policy_network(tiny.model_config())
    params = tiny.random_params(network)
    prompts = tiny.prompts()

    def run(**slots):
        how = tiny.sampling(response_length=4, **slots)
        sample = jax.jit(lambda key: rollout_function(network, params, prompts, key, sampling=how))
        return jax.tree.map(np.asarray, sample(jax.random.key(0)))

    for slots in ({}, dict(max_concurrent=4), dict(max_concurrent=4, samples_per_prompt=2)):
        narrow = run(**slots)
        with jax.enable_x64():
            wide = run(**slots)
        np.testing.assert_array_equal(wide.response_tokens, narrow.response_tokens)
        np.testing.assert_allclose(wide.logprobs, narrow.logprobs, atol=1e-6)
        assert wide.response_tokens.dtype == np.int32 and wide.logprobs.dtype == np.float32
