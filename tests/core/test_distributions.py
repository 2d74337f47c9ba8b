import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.core import cpu
from ppo_jax.core.distributions import entropy, token_logprobs, token_statistics
from ppo_jax.rollout.sampling import _in_nucleus, sample

TEMPERATURES = [0.5, 0.7, 1.0, 2.0]


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def random_logits(seed, shape, scale=3.0):
    return np.asarray(scale * np.random.default_rng(seed).normal(size=shape), np.float32)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_token_logprobs_equal_the_loop_over_the_full_vocabulary(temperature):
    logits = random_logits(0, (2, 3, 11))
    tokens = np.random.default_rng(1).integers(0, 11, size=(2, 3))
    got = token_logprobs(jnp.asarray(logits), jnp.asarray(tokens), temperature=temperature)
    for b, t in np.ndindex(2, 3):
        expected = log_softmax(logits[b, t].astype(np.float64) / temperature)[tokens[b, t]]
        np.testing.assert_allclose(got[b, t], expected, rtol=1e-5, atol=1e-6)


def test_logprobs_of_all_tokens_add_up_to_probability_one_for_huge_logits():
    logits = jnp.asarray(random_logits(2, (11,), scale=1e4))
    every = token_logprobs(jnp.tile(logits, (11, 1)), jnp.arange(11), temperature=0.7)
    np.testing.assert_allclose(jnp.exp(every).sum(), 1.0, rtol=1e-6)


def test_temperature_zero_counts_as_one():
    logits, tokens = jnp.asarray(random_logits(3, (2, 3, 5))), jnp.zeros((2, 3), jnp.int32)
    at = functools.partial(token_logprobs, logits, tokens)
    for zero in (0, 0.0, jnp.float32(0.0)):
        np.testing.assert_array_equal(at(temperature=zero), at(temperature=1.0))


def test_the_gradient_of_a_logprob_is_onehot_minus_probabilities():
    logits = jnp.asarray(random_logits(4, (7,)))
    grad = jax.grad(lambda z: token_logprobs(z, jnp.int32(2), temperature=0.5))(logits)
    expected = (np.eye(7)[2] - np.exp(log_softmax(2.0 * np.float64(logits)))) / 0.5
    np.testing.assert_allclose(grad, expected, atol=1e-6)


def test_an_impossible_token_leaves_the_others_finite_with_their_gradients():
    logits = jnp.array([0.0, -jnp.inf, 0.0])
    value, grad = jax.value_and_grad(token_logprobs)(logits, jnp.int32(0))
    np.testing.assert_allclose(value, np.log(0.5), rtol=1e-6)
    np.testing.assert_allclose(grad, [0.5, 0.0, -0.5], rtol=1e-6)


def test_bfloat16_logits_are_normalised_in_float32():
    logits = jnp.asarray(random_logits(5, (2, 3, 50))).astype(jnp.bfloat16)
    tokens = jnp.zeros((2, 3), jnp.int32)
    got = token_logprobs(logits, tokens)
    assert got.dtype == entropy(logits).dtype == jnp.float32
    np.testing.assert_array_equal(got, token_logprobs(logits.astype(jnp.float32), tokens))


def test_entropy_equals_the_sum_and_its_gradient_the_closed_form():
    logits = random_logits(6, (4, 9))
    logprobs = log_softmax(logits)
    expected = -(np.exp(logprobs) * logprobs).sum(axis=-1)
    np.testing.assert_allclose(entropy(jnp.asarray(logits)), expected, rtol=1e-5)
    # dH/dz_i = -p_i (log p_i + H)
    grad = jax.grad(lambda z: entropy(z).sum())(jnp.asarray(logits))
    np.testing.assert_allclose(
        grad, -np.exp(logprobs) * (logprobs + expected[:, None]), rtol=1e-4, atol=1e-6
    )


def test_an_impossible_token_adds_nothing_to_the_entropy_or_its_gradient():
    logits = jnp.array([[1.0, -jnp.inf, 2.0, 0.5]])
    possible = jnp.array([[1.0, 2.0, 0.5]])
    value, grad = jax.value_and_grad(lambda z: entropy(z)[0])(logits)
    expected, expected_grad = jax.value_and_grad(lambda z: entropy(z)[0])(possible)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(grad[0, jnp.array([0, 2, 3])], expected_grad[0], rtol=1e-5)
    assert grad[0, 1] == 0.0


def allowed_tokens(logits, *, temperature, top_k, top_p, min_p):
    """The filters as their definitions have them, one token after the other."""
    logits = np.asarray(logits, np.float64) / temperature
    order = sorted(range(len(logits)), key=lambda v: (-logits[v], v))
    order = order[: top_k or None]
    probs = np.exp(log_softmax(logits[order]))
    nucleus, total = [], 0.0
    for token, prob in zip(order, probs, strict=True):
        nucleus.append((token, prob))
        total += prob
        if total >= top_p:
            break
    return {token for token, prob in nucleus if prob >= min_p * probs[0]}


FILTERS = [
    dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0),
    dict(temperature=0.7, top_k=3, top_p=1.0, min_p=0.0),
    dict(temperature=1.0, top_k=99, top_p=1.0, min_p=0.0),
    dict(temperature=1.0, top_k=0, top_p=0.8, min_p=0.0),
    dict(temperature=2.0, top_k=0, top_p=0.8, min_p=0.0),
    dict(temperature=1.0, top_k=0, top_p=0.0, min_p=0.0),
    dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.2),
    dict(temperature=2.0, top_k=0, top_p=1.0, min_p=0.2),
    dict(temperature=1.5, top_k=5, top_p=0.7, min_p=0.25),
]


STATISTICS = (2, 3, 11)
CHOSEN = jnp.asarray(np.random.default_rng(21).integers(0, 11, size=STATISTICS[:-1]))
WEIGHTS = [jnp.asarray(random_logits(22 + i, STATISTICS[:-1])) for i in range(2)]


def plain_statistics(logits, tokens, *, temperature):
    divisor = jnp.where(temperature == 0, 1.0, temperature)
    scaled = logits.astype(jnp.float32) / divisor
    return token_logprobs(logits, tokens, temperature=temperature), entropy(scaled)


@functools.partial(jax.jit, static_argnums=0)
def weighted(function, logits, temperature):
    """(values of both statistics, gradients of a weighting of theirs)."""

    def loss(logits, temperature):
        found = function(logits, CHOSEN, temperature=temperature)
        return sum(jnp.sum(w * x) for w, x in zip(WEIGHTS, found, strict=True)), found

    gradients, found = jax.grad(loss, argnums=(0, 1), has_aux=True)(logits, temperature)
    return found, gradients


def statistics_logits(kind):
    logits = jnp.asarray(random_logits(20, STATISTICS, scale=30.0 if kind == "peaked" else 3.0))
    if kind == "impossible":  # none of them chosen
        near = (jnp.arange(11)[None, None] - CHOSEN[..., None]) % 11
        logits = jnp.where((near == 1) | (near == 4), -jnp.inf, logits)
    return logits.astype(jnp.bfloat16) if kind == "bfloat16" else logits


@pytest.mark.parametrize("kind", ["plain", "peaked", "impossible", "bfloat16"])
@pytest.mark.parametrize("temperature", [0.0, *TEMPERATURES])
def test_token_statistics_and_their_gradients_are_those_of_the_plain_formulas(kind, temperature):
    logits, temperature = statistics_logits(kind), jnp.float32(temperature)
    found, (of_logits, of_temperature) = weighted(token_statistics, logits, temperature)
    expected, (expected_grad, by_temperature) = weighted(plain_statistics, logits, temperature)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)
    assert of_logits.dtype == logits.dtype
    short = kind == "bfloat16"
    np.testing.assert_allclose(
        of_logits.astype(jnp.float32),
        expected_grad.astype(jnp.float32),
        rtol=2e-2 if short else 1e-5,
        atol=2e-2 if short else 1e-5,
    )
    if kind == "impossible":  # autodiff gives NaN, as 0 x -inf
        assert np.isfinite(of_logits).all() and np.isfinite(of_temperature)
        assert not of_logits[logits == -jnp.inf].any()
    else:
        np.testing.assert_allclose(of_temperature, by_temperature, rtol=1e-4, atol=1e-4)


def test_token_statistics_keep_the_logits_alone():
    logits = statistics_logits("bfloat16")
    _, pull = jax.vjp(lambda x: token_statistics(x, CHOSEN, temperature=0.7), logits)
    kept = [x for x in jax.tree.leaves(pull) if x.size >= logits.size]
    assert [(x.shape, x.dtype) for x in kept] == [(logits.shape, logits.dtype)]


def test_token_statistics_stay_in_their_position_and_under_vmap():
    logits, temperature = statistics_logits("plain"), jnp.float32(0.7)
    expected = weighted(token_statistics, logits, temperature)
    broken, (gradient, _) = weighted(token_statistics, logits.at[0, 1].set(jnp.nan), temperature)
    elsewhere = np.ones(STATISTICS[:-1], bool)
    elsewhere[0, 1] = False
    for x, y in zip((*broken, gradient), (*expected[0], expected[1][0]), strict=True):
        np.testing.assert_array_equal(x[elsewhere], y[elsewhere])
        assert np.isnan(x[0, 1]).all()

    temperatures = jnp.array([0.5, 0.7])
    sweep = jax.vmap(lambda t: weighted(token_statistics, logits, t))(temperatures)
    lane = jax.tree.map(lambda x: x[1], sweep)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), lane, expected
    )


def test_token_statistics_scatter_and_gather_nothing_of_the_size_of_the_logits():
    gradient = jax.jit(lambda logits: weighted(token_statistics, logits, 0.7)[1][0])
    text = gradient.lower(statistics_logits("plain")).as_text()
    assert "scatter" not in text
    assert (
        "scatter"
        in jax.jit(lambda logits: weighted(plain_statistics, logits, 0.7)[1][0])
        .lower(statistics_logits("plain"))
        .as_text()
    )


NUM_DRAWS = 5000
LOGITS = random_logits(7, (4, 8), scale=1.0)
LOGITS[1] = 0.0  # all tokens equal: the lower ids come first


def draw(**filters):
    keys = jax.random.split(jax.random.key(0), NUM_DRAWS)
    return jax.vmap(lambda key: sample(key, jnp.asarray(LOGITS), **filters))(keys)


draw_traced = jax.jit(draw, static_argnames="top_k")


@pytest.mark.parametrize("filters", FILTERS)
def test_sample_draws_from_the_renormalised_allowed_tokens(filters):
    draws = np.asarray(jax.jit(lambda: draw(**filters))())
    for row, logits in enumerate(LOGITS):
        allowed = sorted(allowed_tokens(logits, **filters))
        counts = np.bincount(draws[:, row], minlength=8)
        assert np.flatnonzero(counts).tolist() == allowed
        probs = np.zeros(8)
        probs[allowed] = np.exp(log_softmax(logits[allowed] / filters["temperature"]))
        # Five standard deviations of a binomial count.
        bound = 5 * np.sqrt(NUM_DRAWS * probs * (1 - probs))
        assert (np.abs(counts - NUM_DRAWS * probs) <= bound + 1e-6).all()
    np.testing.assert_array_equal(draws, draw_traced(**filters))  # numbers may be traced


def test_a_filter_that_keeps_the_token_that_would_be_drawn_changes_nothing():
    logits = random_logits(10, (200, 8))
    key = jax.random.key(1)
    free = sample(key, jnp.asarray(logits))
    filtered = sample(key, jnp.asarray(logits), top_k=4, top_p=0.9, min_p=0.05)
    for row in range(200):
        allowed = allowed_tokens(logits[row], temperature=1.0, top_k=4, top_p=0.9, min_p=0.05)
        assert (filtered[row] == free[row]) == (int(free[row]) in allowed)


def test_top_p_keeps_every_token_at_one_and_the_first_at_zero():
    # The float32 sum of these probabilities comes to 1 before its end.
    logits = -jnp.sort(-jnp.asarray(random_logits(2, (50_000,))))
    probs = jax.nn.softmax(logits)
    assert (jnp.cumsum(probs) - probs).max() >= 1.0
    assert _in_nucleus(logits, jnp.float32(1.0)).all()
    assert jnp.flatnonzero(_in_nucleus(logits, 0.0)).tolist() == [0]


@pytest.mark.parametrize("zero", [0, 0.0, np.float32(0.0), jnp.float32(0.0)])
def test_temperature_zero_is_greedy_whatever_the_filters(zero):
    logits = jnp.asarray(random_logits(11, (5, 8)))
    key = jax.random.key(3)
    plain = sample(key, logits, temperature=zero)
    filtered = sample(key, logits, temperature=zero, top_k=2, top_p=0.5, min_p=0.1)
    traced = jax.jit(lambda zero: sample(key, logits, temperature=zero))(zero)
    for tokens in (plain, filtered, traced):
        np.testing.assert_array_equal(tokens, jnp.argmax(logits, axis=-1))


def test_impossible_tokens_are_never_drawn():
    logits = jnp.array([0.0, -jnp.inf, 1.0])
    keys = jax.random.split(jax.random.key(4), 500)
    for filters in ({}, {"top_k": 3}, {"top_p": 0.99}, {"min_p": jnp.float32(0.0)}):
        draws = jax.vmap(lambda key, f=filters: sample(key, logits, **f))(keys)
        assert set(draws.tolist()) == {0, 2}


def test_leading_shapes_are_free_and_a_key_per_row_is_a_vmap():
    logits = jnp.asarray(random_logits(12, (2, 3, 8)))
    key = jax.random.key(5)
    assert sample(key, logits, top_k=2).shape == (2, 3)
    assert sample(key, logits[0, 0]).shape == ()
    keys = jax.random.split(key, 3)
    rows = jax.vmap(functools.partial(sample, top_p=0.9))(keys, logits[0])
    singles = [sample(k, row, top_p=0.9) for k, row in zip(keys, logits[0], strict=True)]
    np.testing.assert_array_equal(rows, jnp.stack(singles))
    assert rows.dtype == jnp.int32


def test_equal_rows_draw_different_tokens():
    tokens = sample(jax.random.key(6), jnp.zeros((64, 100)))
    assert len(set(tokens.tolist())) > 20


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_the_nucleus_is_that_of_the_sorted_tokens(top_p, scale):
    """Also among equal logits, and with some of -inf."""
    for seed in range(3):
        logits = random_logits(seed, (4, 7 + 90 * seed), scale=scale)
        logits[1] = np.round(logits[1])
        logits[2, ::3] = -np.inf
        chosen, tokens = jax.lax.top_k(jnp.asarray(logits), logits.shape[1])
        in_order = np.take_along_axis(np.asarray(cpu.nucleus(logits, top_p)), np.asarray(tokens), 1)
        probs = jax.nn.softmax(chosen)
        clear = np.abs(np.cumsum(probs, axis=1) - probs - top_p) > 1e-6  # of the rounding of sums
        np.testing.assert_array_equal(in_order[clear], _in_nucleus(chosen, top_p)[clear])
        assert clear.mean() > 0.95


def test_no_filter_but_top_k_sorts():
    def program(**numbers):
        def run(key, logits):
            return sample(key, logits, **numbers)

        return str(jax.make_jaxpr(run)(jax.random.key(0), jnp.zeros((2, 8))))

    assert "top_k" in program(top_k=2)
    for numbers in (dict(top_p=0.9, min_p=0.1), dict(temperature=0.7, top_k=0, top_p=1.0)):
        assert "top_k" not in program(**numbers) and "sort" not in program(**numbers)
    assert "while" not in program(top_p=1.0)  # off, it costs nothing


def test_a_negative_top_k_is_refused():
    with pytest.raises(ValueError, match="top_k must be at least 0 .* got -1"):
        sample(jax.random.key(0), jnp.zeros(3), top_k=-1)
