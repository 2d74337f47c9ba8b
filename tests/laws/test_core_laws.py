"""Laws that hold for every public function of the pure core, one table of calls for all."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.core.advantages import gae, length_adaptive_lambda, whiten
from ppo_jax.core.covariance import (
    adaptive_entropy_coef,
    clip_cov_policy_loss,
    clip_cov_weights,
    kl_cov_policy_loss,
    token_covariances,
)
from ppo_jax.core.critic_free import (
    grpo_advantages,
    leave_one_out,
    reinforce_advantages,
    reinforce_plus_plus_advantages,
    remax_advantages,
    rloo_advantages,
    running_baseline,
)
from ppo_jax.core.critics import (
    disputed_states,
    ensemble_values,
    explained_variance,
    explained_variance_by_position,
    mask_agreed_advantages,
    value_bias,
    value_calibration,
)
from ppo_jax.core.distributions import entropy, token_logprobs, token_statistics
from ppo_jax.core.importance import LEVELS, OUTSIDE, importance_weights
from ppo_jax.core.kl import (
    LOSS_ESTIMATORS,
    adaptive_kl_coef,
    adaptive_penalty_coef,
    kl_estimate,
    kl_loss,
)
from ppo_jax.core.losses import next_token_loss, ppo_loss, preference_loss
from ppo_jax.core.masking import last_token_index, masked_mean, response_mask
from ppo_jax.core.off_policy_losses import (
    cispo_policy_loss,
    decoupled_policy_loss,
    dppo_policy_loss,
)
from ppo_jax.core.policy_losses import (
    clipped_policy_loss,
    dual_clip_policy_loss,
    kl_penalty_policy_loss,
    vpg_policy_loss,
)
from ppo_jax.core.rewards import missing_eos_scores, token_rewards
from ppo_jax.core.sequence_losses import aggregation_weights, gspo_policy_loss
from ppo_jax.core.shaping import (
    ENSEMBLE_RULES,
    Moments,
    clip_scores,
    ensemble_scores,
    length_penalty,
    normalize_scores,
    overlong_penalty,
    par_scores,
    threshold_scores,
    update_moments,
)
from ppo_jax.core.value_losses import (
    classification_value_loss,
    clipped_value_loss,
    hl_gauss_targets,
    hl_gauss_value,
)
from ppo_jax.rollout.sampling import sample

B, T, V = 3, 5, 7
LENGTHS = np.array([5, 3, 0])
MASK = jnp.asarray(np.arange(T)[None] < LENGTHS[:, None]).at[1, 1].set(False)  # with a hole
TOKENS = jnp.asarray(np.random.default_rng(9).integers(0, V, size=(B, T)), jnp.int32)
PADDED = ~np.asarray(MASK)
EMPTY_ROWS = PADDED.all(axis=1)


def array(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


class Case(NamedTuple):
    """One call: `function(*arrays, **numbers)`, arrays float, numbers what may be traced."""

    name: str
    function: Callable
    arrays: list
    numbers: dict
    padding: list = []  # bool, the leading shape of each array: True is padding
    masks_itself: bool = True  # False: elementwise, padding stays where it is


def ppo_loss_of_arrays(logprobs, values, entropies, old_logprobs, old_values, a, r, **numbers):
    constants = dict(old_logprobs=old_logprobs, old_values=old_values, advantages=a, returns=r)
    return ppo_loss(logprobs, values, entropies, MASK, **constants, **numbers)


def gae_of_arrays(rewards, values, gamma, bootstrap_values, **numbers):
    return gae(rewards, values, MASK, gamma=gamma, bootstrap_values=bootstrap_values, **numbers)


def weighted_loss(logprobs, old_logprobs, advantages, weights, **numbers):
    return clipped_policy_loss(logprobs, old_logprobs, advantages, MASK, weights=weights, **numbers)


def decoupled_loss(logprobs, old_logprobs, behavior_logprobs, advantages, **numbers):
    given = (logprobs, old_logprobs, advantages, MASK)
    return decoupled_policy_loss(*given, behavior_logprobs=behavior_logprobs, **numbers)


def logprobs_of_tokens(logits, **numbers):
    return token_logprobs(logits, TOKENS, **numbers)


def product_of_statistics(logits, **numbers):
    return jnp.multiply(*token_statistics(logits, TOKENS, **numbers))


def tokenwise(num, first_seed=0):
    return [array(first_seed + i, B, T) for i in range(num)]


def with_mask(function, **static):
    return lambda *arrays, **numbers: function(*arrays, MASK, **static, **numbers)


def hl_gauss_of_returns(returns, *, sigma):
    return hl_gauss_targets(returns, bins=BINS, sigma=sigma) @ array(15, V)


def product_of_ensemble(values):
    return jnp.multiply(*ensemble_values(values))


def disputed_numbers(stds, mask, **numbers):
    return disputed_states(stds, mask, **numbers).astype(jnp.float32)


def kl_loss_of_arrays(logprobs, reference, old_logprobs, weights, *, estimator, **numbers):
    given = dict(estimator=estimator, old_logprobs=old_logprobs, weights=weights)
    return kl_loss(logprobs, reference, MASK, **given, **numbers)


def with_eos(scores, **numbers):
    return missing_eos_scores(scores, HAS_EOS, **numbers)


def moments_of(scores):
    moments = update_moments(Moments(), scores)
    return moments.mean, moments.m2


def normalized(scores, **how):
    return normalize_scores(scores, update_moments(Moments(), scores), **how)


HAS_EOS = jnp.array([True, True, False])
GAE = dict(gamma=0.9, gae_lambda=0.8, bootstrap_values=0.5)
CLIP = dict(clip_range=0.2, clip_range_high=0.3, normalizer=11)
VALUE_CLIP = dict(value_clip_range=0.3, normalizer=11.0)
PPO = CLIP | VALUE_CLIP | dict(vf_coef=0.5, entropy_coef=0.1)
KEEP_MEAN = with_mask(whiten, shift_mean=False)
SCORES = array(10, B)
ONE, TWO, THREE, FOUR, SEVEN = (tokenwise(num) for num in (1, 2, 3, 4, 7))
IDS = jnp.where(MASK, jnp.array([1, 1, 2, 2, 3], jnp.int32), 0)
DUAL_CLIP = CLIP | dict(dual_clip=3.0)
BEHAVIOR = CLIP | dict(behavior_weight_limit=1.5)
DPPO = dict(divergence_limit=0.1, normalizer=11)
KL_PENALTY = dict(penalty_coef=0.5, normalizer=11)
KL_COV = dict(penalty_coef=0.5, covariance_fraction=0.3, normalizer=11)
CLIP_COV = dict(covariance_fraction=0.3, low=0.01, high=2.0)
DROPPED = with_mask(clip_cov_policy_loss, dropped_mask=array(17, B, T) > 0)
CLIPPED_COV = with_mask(functools.partial(clip_cov_weights, jax.random.key(0)))
PACKED_GSPO = with_mask(gspo_policy_loss, segment_ids=IDS)
LOGITS = [array(11, B, T, V)]
STEPS = [*THREE, array(12, B)]
BINS = jnp.linspace(-2.0, 2.0, V + 1)
CLASSIFICATION = with_mask(classification_value_loss, bins=BINS)
CLASSES, HL_GAUSS = [*LOGITS, *ONE], dict(sigma=0.75, normalizer=11.0)
VALUE_OF_BINS = functools.partial(hl_gauss_value, bins=BINS)
BY_POSITION = with_mask(explained_variance_by_position, num_bins=2)
CALIBRATION = with_mask(value_calibration, num_bins=2)
ENSEMBLE, PADDED_ENSEMBLE = [array(14, 3, B, T)], np.broadcast_to(PADDED, (3, B, T))
SHARE = dict(fraction=0.25)

GROUP = dict(group_size=B)
GRPO = functools.partial(grpo_advantages, **GROUP)
GROUPED_RPP = with_mask(reinforce_plus_plus_advantages, **GROUP)
BASELINE = dict(baseline=0.3, gamma=0.9)
RUNNING = dict(baseline=0.3, decay=0.4)

CASES = [
    Case("masked_mean", with_mask(masked_mean), ONE, dict(normalizer=11.0), [PADDED]),
    Case("masked_mean_of_count", with_mask(masked_mean), ONE, {}, [PADDED]),
    Case("whiten", with_mask(whiten), ONE, {}, [PADDED]),
    Case("whiten_keeping_the_mean", KEEP_MEAN, ONE, {}, [PADDED]),
    Case("gae", with_mask(gae), TWO, GAE, [PADDED] * 2),
    Case("gae_per_step", gae_of_arrays, STEPS, dict(gae_lambda=0.8), [PADDED] * 3 + [EMPTY_ROWS]),
    Case("rloo_advantages", functools.partial(rloo_advantages, **GROUP), [SCORES], {}),
    Case("grpo_advantages", GRPO, [SCORES], dict(eps=0.1)),
    Case("dr_grpo", functools.partial(GRPO, scale_by_std=False), [SCORES], {}),
    Case("leave_one_out", with_mask(leave_one_out, **GROUP), ONE, {}, [PADDED]),
    Case("reinforce_plus_plus", with_mask(reinforce_plus_plus_advantages), ONE, {}, [PADDED]),
    Case("reinforce_plus_plus_grouped", GROUPED_RPP, ONE, {}, [PADDED]),
    Case("remax_advantages", remax_advantages, [SCORES, array(13, B)], {}),
    Case("reinforce_advantages", with_mask(reinforce_advantages), ONE, BASELINE, [PADDED]),
    Case("running_baseline", lambda x, **how: running_baseline(scores=x, **how), [SCORES], RUNNING),
    Case("missing_eos_replace", with_eos, [SCORES], dict(replace=-1.0), [~np.asarray(HAS_EOS)]),
    Case("missing_eos_penalty", with_eos, [SCORES], dict(penalty=1.0)),
    Case("clipped_policy_loss", with_mask(clipped_policy_loss), THREE, CLIP, [PADDED] * 3),
    Case("clipped_policy_loss_weighted", weighted_loss, FOUR, CLIP, [PADDED] * 4),
    Case("dual_clip_policy_loss", with_mask(dual_clip_policy_loss), THREE, DUAL_CLIP, [PADDED] * 3),
    Case("kl_penalty", with_mask(kl_penalty_policy_loss), THREE, KL_PENALTY, [PADDED] * 3),
    Case("vpg_policy_loss", with_mask(vpg_policy_loss), THREE, {}, [PADDED] * 3),
    Case("cispo_policy_loss", with_mask(cispo_policy_loss), THREE, CLIP, [PADDED] * 3),
    Case("dppo_policy_loss", with_mask(dppo_policy_loss), THREE, DPPO, [PADDED] * 3),
    Case("decoupled_policy_loss", decoupled_loss, FOUR, BEHAVIOR, [PADDED] * 4),
    Case("kl_cov_policy_loss", with_mask(kl_cov_policy_loss), THREE, KL_COV, [PADDED] * 3),
    Case("token_covariances", with_mask(token_covariances), TWO, {}, [PADDED] * 2),
    Case("clip_cov_policy_loss", DROPPED, THREE, CLIP, [PADDED] * 3),
    Case("clip_cov_weights", CLIPPED_COV, TWO, CLIP_COV, [PADDED] * 2),
    Case("gspo_policy_loss", with_mask(gspo_policy_loss), THREE, CLIP, [PADDED] * 3),
    Case("gspo_policy_loss_packed", PACKED_GSPO, THREE, CLIP, [PADDED] * 3),
    Case("clipped_value_loss", with_mask(clipped_value_loss), THREE, VALUE_CLIP, [PADDED] * 3),
    Case("ppo_loss", ppo_loss_of_arrays, SEVEN, PPO, [PADDED] * 7),
    Case("next_token_loss", with_mask(next_token_loss), ONE, dict(normalizer=11), [PADDED]),
    Case("explained_variance", with_mask(explained_variance), TWO, {}, [PADDED] * 2),
    Case("explained_variance_by_position", BY_POSITION, TWO, {}, [PADDED] * 2),
    Case("value_bias", with_mask(value_bias), TWO, {}, [PADDED] * 2),
    Case("value_calibration", CALIBRATION, TWO, {}, [PADDED] * 2),
    Case("classification_value_loss", CLASSIFICATION, CLASSES, HL_GAUSS, [PADDED] * 2),
    Case("hl_gauss", hl_gauss_of_returns, ONE, dict(sigma=0.75), [PADDED], masks_itself=False),
    Case("hl_gauss_value", VALUE_OF_BINS, LOGITS, {}, [PADDED], masks_itself=False),
    Case("ensemble_values", product_of_ensemble, ENSEMBLE, {}, [PADDED_ENSEMBLE], False),
    Case("mask_agreed", with_mask(mask_agreed_advantages), TWO, SHARE, [PADDED] * 2),
    Case("disputed_states", with_mask(disputed_numbers), ONE, SHARE, [PADDED]),
    Case("par_scores", par_scores, [SCORES, array(13, B, 2)], {}),
    Case("clip_scores", clip_scores, [SCORES], dict(limit=0.5)),
    Case("update_moments", moments_of, [SCORES], {}),
    Case("normalize_scores", normalized, [SCORES], {}),
    Case("threshold_scores", threshold_scores, [SCORES, array(13, B)], dict(threshold=0.1)),
    Case("preference_loss", preference_loss, [SCORES, array(13, B)], dict(margin=0.5)),
    Case("entropy", entropy, LOGITS, {}, [PADDED], masks_itself=False),
    Case("token_logprobs", logprobs_of_tokens, LOGITS, dict(temperature=0.7), [PADDED], False),
    Case("token_statistics", product_of_statistics, LOGITS, dict(temperature=0.7), [PADDED], False),
]
for how in ENSEMBLE_RULES:
    rule = functools.partial(ensemble_scores, how=how)
    CASES.append(Case(f"ensemble_scores_{how}", rule, [array(16, 4, B)], dict(k=0.5)))
for kind in ("k1", "k2", "k3"):
    estimate = functools.partial(kl_estimate, estimator=kind)
    rewards = with_mask(token_rewards, estimator=kind)
    paddings = [EMPTY_ROWS, PADDED, PADDED]
    CASES += [
        Case(f"kl_estimate_{kind}", estimate, TWO, {}, [PADDED] * 2, masks_itself=False),
        Case(f"token_rewards_{kind}", rewards, [SCORES, *TWO], dict(kl_coef=0.1), paddings),
    ]
for kind in LOSS_ESTIMATORS:
    of_kind = functools.partial(kl_loss_of_arrays, estimator=kind)
    on_policy = with_mask(kl_loss, estimator=kind)
    CASES += [
        Case(f"kl_loss_{kind}", of_kind, FOUR, dict(normalizer=11), [PADDED] * 4),
        Case(f"kl_loss_{kind}_on_policy", on_policy, TWO, {}, [PADDED] * 2),
    ]
for level in LEVELS:
    for how in OUTSIDE:
        weights = with_mask(importance_weights, level=level, outside=how)
        limits = dict(low=0.7, high=1.5)
        CASES.append(Case(f"importance_{level}_{how}", weights, TWO, limits, [PADDED] * 2))
PADDED_CASES = [case for case in CASES if case.padding]


def named(cases):
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def fill(x, padding, value):
    padding = padding.reshape(padding.shape + (1,) * (x.ndim - padding.ndim))
    return jnp.where(jnp.asarray(np.broadcast_to(padding, x.shape)), value, x)


def run(case, value):
    """Outputs and gradients with this value in the padding.

    The gradient is that of a random weighting of all outputs: their plain sum would be blind to
    some (that of whitened numbers is always 0).
    """
    arrays = [fill(x, p, value) for x, p in zip(case.arrays, case.padding, strict=True)]

    def weighted(arrays):
        outputs = case.function(*arrays, **case.numbers)
        if not case.masks_itself:
            outputs = jnp.where(MASK, outputs, 0.0)
        leaves = jax.tree.leaves(outputs)
        weights = [array(20 + i, *leaf.shape) for i, leaf in enumerate(leaves)]
        return sum(jnp.sum(w * x) for w, x in zip(weights, leaves, strict=True)), outputs

    return jax.grad(weighted, has_aux=True)(arrays)[::-1]


@named(PADDED_CASES)
def test_what_padding_holds_is_invisible_to_values_and_gradients(case):
    run_case = jax.jit(lambda value: run(case, value))
    expected = run_case(0.0)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(expected))
    for value in (jnp.nan, jnp.inf, 1e30):
        outputs, grads = run_case(value)
        jax.tree.map(np.testing.assert_array_equal, outputs, expected[0])
        for got, expected_grad, padding in zip(grads, expected[1], case.padding, strict=True):
            np.testing.assert_array_equal(got[~padding], expected_grad[~padding])
            if case.masks_itself:
                assert (got[padding] == 0.0).all()


def assert_equal_trees(got, expected):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@named(CASES)
def test_numbers_may_be_traced_and_compile_once_for_all_values(case):
    traces = 0

    @jax.jit
    def call(arrays, numbers):
        nonlocal traces
        traces += 1
        return case.function(*arrays, **numbers)

    for scale in (1, 2):
        numbers = {name: scale * x for name, x in case.numbers.items()}
        assert_equal_trees(call(case.arrays, numbers), case.function(*case.arrays, **numbers))
    assert traces == 1


@named(CASES)
def test_no_implicit_dtype_promotion(case, strict):
    strong = {name: jnp.float32(x) for name, x in case.numbers.items()}
    call = jax.jit(lambda arrays, numbers: case.function(*arrays, **numbers))
    assert_equal_trees(call(case.arrays, case.numbers), case.function(*case.arrays, **strong))
    half = [x.astype(jnp.bfloat16) for x in case.arrays]
    for leaf in jax.tree.leaves(case.function(*half, **case.numbers)):
        assert leaf.dtype == jnp.float32


@named(CASES)
def test_integers_in_place_of_floats_are_refused(case):
    for i in range(len(case.arrays)):
        if case.name == "gae_per_step" and i >= 2:
            continue  # gamma and bootstrap are numbers, and a whole number is a number
        arrays = list(case.arrays)
        arrays[i] = arrays[i].astype(jnp.int32)
        with pytest.raises(AssertionError, match="assert_type"):
            case.function(*arrays, **case.numbers)


@named([case for case in CASES if case.numbers])
def test_a_row_of_numbers_is_one_sweep_under_vmap(case):
    sweep = {name: jnp.array([0.5, 1.0], jnp.float32) * x for name, x in case.numbers.items()}
    got = jax.vmap(lambda numbers: case.function(*case.arrays, **numbers))(sweep)
    for i in range(2):
        lane = {name: x[i] for name, x in sweep.items()}
        expected = case.function(*case.arrays, **lane)
        assert_equal_trees(jax.tree.map(lambda x, i=i: x[i], got), expected)


def test_the_controller_takes_traced_numbers_without_promotion(strict):
    numbers = dict(target_kl=6.0, horizon=100, batch_size=10)
    call = jax.jit(adaptive_kl_coef)
    expected = adaptive_kl_coef(0.1, 12.0, **numbers)
    np.testing.assert_allclose(call(0.1, 12.0, **numbers), expected, rtol=1e-6)
    np.testing.assert_allclose(call(jnp.float32(0.1), jnp.float32(12), **numbers), expected)


def test_the_controller_of_the_penalty_takes_traced_numbers_without_promotion(strict):
    call = jax.jit(adaptive_penalty_coef)
    for given in ((0.1, 2.0), (jnp.float32(0.1), jnp.float32(2.0))):
        got = call(*given, target_kl=1)
        assert got == adaptive_penalty_coef(*given, target_kl=1.0) and got.dtype == jnp.float32
    sweep = jax.vmap(lambda target_kl: adaptive_penalty_coef(1.0, 2.0, target_kl=target_kl))
    assert sweep(jnp.array([1.0, 2.0, 4.0])).tolist() == [2.0, 1.0, 0.5]


def test_aggregation_takes_a_traced_length_without_promotion(strict):
    call = jax.jit(lambda length: aggregation_weights(MASK, how="constant", length=length))
    expected = aggregation_weights(MASK, how="constant", length=jnp.float32(7))
    np.testing.assert_allclose(call(7), expected, rtol=1e-6)
    for how in ("token_mean", "sequence_mean"):
        assert aggregation_weights(MASK, how=how).dtype == jnp.float32


def test_a_lambda_by_length_takes_a_traced_number_without_promotion(strict):
    call = jax.jit(length_adaptive_lambda)
    for alpha in (0.5, jnp.float32(0.5)):
        got, expected = call(MASK, alpha=alpha), length_adaptive_lambda(MASK, alpha=alpha)
        np.testing.assert_allclose(got, expected)
        assert got.dtype == jnp.float32


def test_penalties_of_lengths_take_traced_numbers_without_promotion(strict):
    for function, numbers in (
        (length_penalty, dict(coef=0.5, free_tokens=1)),
        (overlong_penalty, dict(max_length=5, cache_length=2)),
    ):
        call = jax.jit(functools.partial(function, MASK))
        strong = {name: jnp.float32(x) for name, x in numbers.items()}
        got, expected = call(**numbers), function(MASK, **strong)
        np.testing.assert_allclose(got, expected)
        assert got.dtype == jnp.float32 and float(got.min()) < 0
        sweep = jax.vmap(call)(**{name: jnp.stack([x, x]) for name, x in strong.items()})
        np.testing.assert_allclose(sweep[1], expected)


def test_the_controller_of_the_entropy_takes_traced_numbers_without_promotion(strict):
    call = jax.jit(adaptive_entropy_coef)
    for given in ((0.5, 1.0), (jnp.float32(0.5), jnp.float32(1.0))):
        got = call(*given, target=2, step=0.25)
        assert got == 0.75 and got.dtype == jnp.float32


def test_sample_takes_traced_numbers_without_promotion(strict):
    key, logits = jax.random.key(0), array(0, B, V)
    numbers = dict(temperature=0.7, top_p=0.9, min_p=0.1)
    traced = jax.jit(lambda numbers: sample(key, logits, top_k=5, **numbers))(numbers)
    np.testing.assert_array_equal(traced, sample(key, logits, top_k=5, **numbers))


def test_a_row_of_nan_logits_leaves_the_samples_of_the_others():
    key, logits = jax.random.key(0), array(0, B, V)
    broken = logits.at[1].set(jnp.nan)
    for filters in ({}, {"top_k": 3, "top_p": 0.9, "min_p": 0.1}):
        got, expected = sample(key, broken, **filters), sample(key, logits, **filters)
        assert (got[0], got[2]) == (expected[0], expected[2])


def test_masks_are_made_without_promotion_and_in_a_jitted_program(strict):
    mask = jax.jit(lambda tokens: response_mask(tokens, (2, 5)))(TOKENS)
    np.testing.assert_array_equal(mask, response_mask(TOKENS, jnp.array([2, 5], jnp.int32)))
    np.testing.assert_array_equal(jax.jit(last_token_index)(mask), last_token_index(mask))


def test_masks_of_other_types_are_refused():
    ones = jnp.ones((B, T))
    for wrong in (ones, ones.astype(jnp.int32)):
        for call in (
            lambda m: masked_mean(ones, m),
            lambda m: whiten(ones, m),
            lambda m: gae(ones, ones, m),
            lambda m: token_rewards(ones[:, 0], ones, ones, m, kl_coef=0.1),
            lambda m: clipped_policy_loss(ones, ones, ones, m),
            lambda m: importance_weights(ones, ones, m, low=0, high=1),
            lambda m: vpg_policy_loss(ones, ones, ones, m),
            lambda m: gspo_policy_loss(ones, ones, ones, m, clip_range=0.1),
            aggregation_weights,
            lambda m: clipped_value_loss(ones, ones, ones, m),
            lambda m: explained_variance(ones, ones, m),
            lambda m: value_bias(ones, ones, m),
            lambda m: value_calibration(ones, ones, m, num_bins=2),
            lambda m: mask_agreed_advantages(ones, ones, m, fraction=0.5),
            lambda m: disputed_states(ones, m, fraction=0.5),
            lambda m: classification_value_loss(LOGITS[0], ones, m, bins=BINS, sigma=1.0),
            last_token_index,
            lambda m: kl_loss(ones, ones, m, estimator="k2"),
            lambda m: reinforce_advantages(ones, m, 0.0),
            lambda m: reinforce_plus_plus_advantages(ones, m),
            lambda m: length_adaptive_lambda(m, alpha=0.1),
        ):
            with pytest.raises(AssertionError, match="assert_type"):
                call(wrong)
