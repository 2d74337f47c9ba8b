"""Functions of the core at their edges: masks, distributions, KL, weights, the optimizer."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax import core
from ppo_jax.core.checks import assert_counts, assert_divides, assert_ids, assert_numbers
from ppo_jax.core.masking import masked_moments
from ppo_jax.core.optimizer import global_norm
from tests.support.edges import (
    ADAM,
    EVERY,
    HUGE,
    LOGITS,
    MASK,
    NEARLY,
    ONES,
    RANK,
    ROW,
    TOKENS,
    B,
    T,
    assert_edge,
    cases,
    same,
)

NUMPY = np.ones((2, 2), np.float64)
WEIGHTS = {"w": jnp.ones(2)}


def stepped(settings, *gradients):
    """(weights after a step, norm of the gradients)"""
    state = core.init_optimizer(settings, WEIGHTS)
    gradient = {"w": jnp.array(gradients, jnp.float32)}
    params, _, norm = core.apply_gradients(settings, gradient, state, WEIGHTS, 0.1)
    return [*params["w"].tolist(), norm.item()]


def of_kl(d, estimator, **arrays):
    return core.kl_loss(d, 0 * d, MASK, estimator=estimator, **arrays)[0]


def weights_of(**numbers):
    zeros, limits = jnp.zeros((B, T)), dict(low=0.0, high=1.0)
    return core.importance_weights(zeros + 200, zeros, MASK, **limits | numbers)[0]


def averaged(other, weights=None):
    return core.average_params([WEIGHTS, other], weights)


def k3(d):
    return core.kl_estimate(jnp.full((1, 1), d), jnp.zeros((1, 1)), estimator="k3")


def coefficient(**changes):
    numbers = dict(kl=0.0, target_kl=6.0, horizon=10_000, batch_size=64) | changes
    return core.adaptive_kl_coef(0.05, numbers.pop("kl"), **numbers)


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


# (function, edge, call, what is refused: a part of the message, or the value)
EDGES = [
    # masks: equal values do not vary
    (masked_moments, "equal", lambda: masked_moments(same(1000.1), EVERY)[1], 0.0),
    (masked_moments, "equal but for rounding", lambda: masked_moments(NEARLY, EVERY)[1], 0.0),
    (masked_moments, "nan", lambda: masked_moments(same(jnp.nan), EVERY)[1], jnp.nan),
    (masked_moments, "nothing", lambda: jnp.stack(masked_moments(ONES, ~MASK)), 0.0),
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
    # importance weights
    (core.importance_weights, "e^200", lambda: weights_of(high=jnp.inf), HUGE),
    (core.importance_weights, "limit [B]", lambda: weights_of(low=ROW), RANK),
    (core.importance_weights, "limit -1", lambda: weights_of(low=-1), "low must be at least 0"),
    (core.importance_weights, "level", lambda: weights_of(level="row"), "unknown level 'row'; cho"),
    (core.importance_weights, "outside", lambda: weights_of(outside="cut"), "unknown outside 'cut"),
    # parameters
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
    (core.merge_params, "the last wins", lambda: core.merge_params({"a": 1}, {"a": 2})["a"], 2),
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
    # the checks themselves
    (assert_numbers, "a whole number", lambda: assert_numbers(at_least=1, x=np.int64(1)), None),
    (assert_numbers, "inf", lambda: assert_numbers(at_least=0, x=math.inf), None),
    (assert_counts, "True", lambda: assert_counts(n=True), "n must be at least 1 and whole"),
    (assert_divides, "0", lambda: assert_divides(4, "rows", n=0), "n must be at least 1"),
    (assert_ids, "padding", lambda: assert_ids(TOKENS - 1, ~MASK, 8), None),
]


@cases(EDGES)
def test_an_edge_is_refused_by_name_or_has_the_value_of_its_formula(call, expected):
    assert_edge(call, expected)


def test_numpy_gives_arrays_of_jax():
    for estimator in core.ESTIMATORS:
        assert isinstance(core.kl_estimate(NUMPY, NUMPY, estimator=estimator), jax.Array)
