"""Distributions over tokens. Dimensions: B sequences, T response tokens, V vocabulary."""

import functools
import math
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from ppo_jax.core.checks import Number, assert_counts, assert_numbers, known

MOST_LOGITS = 2**26  # numbers that are held at once: 256 MB, and as much for their gradient
CHUNK_LOGITS = 2**24  # numbers that are held at a time where there are more
MIN_TEMPERATURE = 1e-6  # smaller ones but 0 make logits infinite, and what is drawn arbitrary


def token_logprobs(logits: jax.Array, tokens: jax.Array, *, temperature: Number = 1.0) -> jax.Array:
    """Log-probability of each token at the sampling temperature, over the full vocabulary.

    logprob = z[token] - log Σ_v exp z[v],  z = logits / temperature, in float32.

    The chosen logit is gathered first, so that no second array of [B, T, V] is made.

    Args:
        logits: [..., V] float, mostly [B, T, V].
        tokens: [...] int, ids in [0, V).
        temperature: [] or a number, divides the logits; see `positive_temperature`.

    Returns:
        [...] float32, NaN for an id outside of [0, V). Positions do not mix: what padding holds
        stays in padding.

    Raises:
        ValueError: the temperature is known, and neither 0 nor at least 1e-6.

    >>> logits = jnp.log(jnp.array([[[0.25, 0.75]]]))
    >>> round(jnp.exp(token_logprobs(logits, jnp.array([[1]]))).item(), 6)
    0.75
    """
    chex.assert_type([logits, tokens], [float, int])
    chex.assert_shape(tokens, logits.shape[:-1])

    divisor = positive_temperature(temperature)
    scaled = logits.astype(jnp.float32) / divisor
    return _chosen(logits, tokens) / divisor - jax.nn.logsumexp(scaled, axis=-1)


def _chosen(logits, tokens):
    """The logit of each token in float32; NaN, and not another token's, outside of [0, V)."""
    index = tokens.astype(jnp.int32)
    index = jnp.where(index < 0, logits.shape[-1], index)  # below 0 it would count from the end
    chosen = jnp.take_along_axis(logits, index[..., None], axis=-1, mode="fill")
    return chosen[..., 0].astype(jnp.float32)


def entropy(logits: jax.Array) -> jax.Array:
    """Entropy in nats of the softmax of logits.

    H = -Σ_v p_v log p_v, in float32. A logit of -inf (p = 0) adds 0, to the gradient as well.

    Args:
        logits: [..., V] float, mostly [B, T, V]; divide by the temperature beforehand.

    Returns:
        [...] float32. Positions do not mix: what padding holds stays in padding.

    >>> round(jnp.exp(entropy(jnp.zeros((1, 1, 4)))).item(), 5)  # as many equal tokens
    4.0
    """
    chex.assert_type(logits, float)
    logits = logits.astype(jnp.float32)
    logprobs = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return -jnp.sum(jnp.exp(logprobs) * _finite(logprobs), axis=-1)


def token_statistics(
    logits: jax.Array, tokens: jax.Array, *, temperature: Number = 1.0
) -> tuple[jax.Array, jax.Array]:
    """`token_logprobs` and the `entropy` at the same temperature, with a gradient in one pass.

    Autodiff of the two keeps and passes over several arrays of [B, T, V]. This keeps the logits as
    they are given, and two numbers a position; with z = logits / temperature,

    dL/dz_v = dL/dlogprob (1[v = token] - p_v) - dL/dH p_v (log p_v + H).

    Reverse mode only: `jax.jvp` is refused.

    Args:
        logits: [..., V] float, mostly [B, T, V].
        tokens: [...] int, ids in [0, V).
        temperature: [] or a number, divides the logits; see `positive_temperature`.

    Returns:
        (logprobs, entropies in nats), each [...] float32; the logprob is NaN for an id outside of
        [0, V). Positions do not mix: what padding holds stays in padding.

    Raises:
        ValueError: the temperature is known, and neither 0 nor at least 1e-6.

    >>> logprobs, entropies = token_statistics(jnp.zeros((1, 1, 4)), jnp.array([[2]]))
    >>> jnp.exp(logprobs).round(5).tolist(), jnp.exp(entropies).round(5).tolist()
    ([[0.25]], [[4.0]])
    """
    chex.assert_type([logits, tokens], [float, int])
    chex.assert_shape(tokens, logits.shape[:-1])
    check_temperature(temperature)
    return _statistics(logits, tokens, jnp.asarray(temperature, jnp.float32))


@jax.custom_vjp
def _statistics(logits, tokens, temperature):
    return _statistics_forward(logits, tokens, temperature)[0]


def _statistics_forward(logits, tokens, temperature):
    divisor = positive_temperature(temperature)
    scaled = logits.astype(jnp.float32) / divisor
    normalizer = jax.nn.logsumexp(scaled, axis=-1)
    logprobs = scaled - normalizer[..., None]
    entropies = -jnp.sum(jnp.exp(logprobs) * _finite(logprobs), axis=-1)
    chosen = _chosen(logits, tokens) / divisor - normalizer
    return (chosen, entropies), (logits, tokens, temperature, normalizer, entropies)


def _statistics_backward(saved, gradients):
    logits, tokens, temperature, normalizer, entropies = saved
    of_logprob, of_entropy = (g[..., None] for g in gradients)
    divisor = positive_temperature(temperature)
    scaled = logits.astype(jnp.float32) / divisor
    logprobs = scaled - normalizer[..., None]
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    hit = ids == tokens[..., None].astype(jnp.int32)
    of_scaled = jnp.where(hit, of_logprob, 0.0) - jnp.exp(logprobs) * (
        of_logprob + of_entropy * (_finite(logprobs) + entropies[..., None])
    )
    # A logit of -inf has a gradient of 0 and does not depend on the temperature.
    of_temperature = -jnp.sum(of_scaled * _finite(scaled)) / divisor
    of_temperature = jnp.where(temperature < MIN_TEMPERATURE, 0.0, of_temperature)
    return (of_scaled / divisor).astype(logits.dtype), None, of_temperature


_statistics.defvjp(_statistics_forward, _statistics_backward)


def _finite(x: jax.Array) -> jax.Array:
    """0 in the place of -inf: 0 x log 0 is 0."""
    return jnp.where(x == -jnp.inf, 0.0, x)


def positive_temperature(temperature: Number) -> jax.Array:
    """The divisor of logits: the temperature, or 1 where it is 0, which is greedy.

    A temperature that is traced cannot be refused: below 0 it counts as 0, between 0 and 1e-6 as
    1e-6.

    Raises:
        ValueError: it is known, and neither 0 nor at least 1e-6.
    """
    check_temperature(temperature)
    return jnp.where(temperature <= 0, 1.0, jnp.maximum(temperature, MIN_TEMPERATURE))


def check_temperature(temperature: Number) -> None:
    """Raise a ValueError unless it is 0 or at least 1e-6, or traced, and one number."""
    assert_numbers(temperature=temperature)
    if known(temperature) != 0:
        assert_numbers(at_least=MIN_TEMPERATURE, temperature=temperature)


def is_number(x: Number, number: float) -> bool:
    """Whether x is this Python number, known while tracing, so that no code is needed for it."""
    return isinstance(x, int | float) and x == number


def chunked_token_statistics(
    logits: Callable[[jax.Array, jax.Array], jax.Array],
    weights: jax.Array,
    hidden: jax.Array,
    tokens: jax.Array,
    *,
    temperature: Number = 1.0,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """`token_statistics` of logits that are computed for a chunk of positions at a time.

    The backward pass recomputes the logits of each chunk.

    Args:
        logits: (weights, [B, C, D] hidden states) -> [B, C, V] float.
        weights: what `logits` depends on besides the hidden states.
        hidden: [B, T, D] float.
        tokens: [B, T] int.
        temperature: see `token_statistics`.
        chunk: the most positions C of each sequence at a time, at least 1.

    Returns:
        (logprobs, entropies in nats), each [B, T] float32.

    Raises:
        ValueError: the chunk is less than 1; a temperature, see `token_statistics`.
    """
    chex.assert_rank([hidden, tokens], [3, 2])
    chex.assert_equal_shape_prefix([hidden, tokens], 2)
    check_temperature(temperature)
    batch_size, length = tokens.shape
    # In float32, so that the gradients of the chunks are added in float32.
    wide = weights.astype(jnp.float32)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def statistics(wide, hidden, tokens):
        z = logits(wide.astype(weights.dtype), hidden)
        return token_statistics(z, tokens, temperature=temperature)

    chunks = split_chunks(hidden, chunk), split_chunks(tokens, chunk)
    _, outputs = jax.lax.scan(lambda _, x: (None, statistics(wide, *x)), None, chunks)
    logprobs, entropies = (x.swapaxes(0, 1).reshape(batch_size, -1)[:, :length] for x in outputs)
    return logprobs, entropies


def summed_logprobs(
    logits: Callable[[jax.Array, jax.Array], jax.Array],
    weights: jax.Array,
    hidden: jax.Array,
    tokens: jax.Array,
    factors: jax.Array,
    *,
    chunk: int,
) -> jax.Array:
    """Σ factor x `token_logprobs` of logits that are computed for a chunk of positions at a time.

    The factors are known beforehand, so the gradient of a chunk is computed with its logits,
    dL/dz_v = factor (1[v = token] - p_v), and none are computed again.

    Reverse mode only, for the weights and the hidden states: `jax.jvp` is refused.

    Args:
        logits: (weights, [B, C, D] hidden states) -> [B, C, V] float.
        weights: what `logits` depends on besides the hidden states.
        hidden: [B, T, D] float.
        tokens: [B, T] int.
        factors: [B, T] float; where one is 0, what `tokens` holds has no effect.
        chunk: the most positions C of each sequence at a time, at least 1.

    Returns:
        [] float32.

    Raises:
        ValueError: the chunk is less than 1.
    """
    chex.assert_rank([hidden, tokens, factors], [3, 2, 2])
    chex.assert_equal_shape_prefix([hidden, tokens, factors], 2)
    arrays = (split_chunks(x, chunk) for x in (hidden, tokens, factors.astype(jnp.float32)))
    # In float32, so that the gradients of the chunks are added in float32.
    wide = weights.astype(jnp.float32)
    return _summed(lambda wide, x: logits(wide.astype(weights.dtype), x), wide, *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(logits, weights, *chunks):
    def add(total, chunk):
        hidden, tokens, factors = chunk
        return total + weighted_sum(token_logprobs(logits(weights, hidden), tokens), factors), None

    return jax.lax.scan(add, jnp.float32(0.0), chunks)[0]


def _summed_forward(logits, weights, *chunks):
    def add(sums, chunk):
        hidden, tokens, factors = chunk
        z, backward = jax.vjp(logits, weights, hidden)
        scaled = z.astype(jnp.float32)
        normalizer = jax.nn.logsumexp(scaled, axis=-1)
        ids = jax.lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1)
        hit = ids == tokens[..., None].astype(jnp.int32)
        probs = jnp.exp(scaled - normalizer[..., None])
        of_z = jnp.where(factors[..., None] == 0, 0.0, factors[..., None] * (hit - probs))
        of_weights, of_hidden = backward(of_z.astype(z.dtype))
        total = weighted_sum(_chosen(z, tokens) - normalizer, factors)
        return jax.tree.map(jnp.add, sums, (total, of_weights)), of_hidden

    first = jnp.float32(0.0), jnp.zeros_like(weights)
    (total, of_weights), of_hidden = jax.lax.scan(add, first, chunks)
    return total, (of_weights, of_hidden)


def _summed_backward(_, saved, g):
    of_weights, of_hidden = saved
    return of_weights * g, (of_hidden * g).astype(of_hidden.dtype), None, None


_summed.defvjp(_summed_forward, _summed_backward)


def weighted_sum(logprobs: jax.Array, factors: jax.Array) -> jax.Array:
    """Σ factor x logprob, [] float32; where a factor is 0, the other has no effect."""
    return jnp.sum(jnp.where(factors == 0, 0.0, logprobs * factors))


def split_chunks(x: jax.Array, chunk: int) -> jax.Array:
    """[B, T, ...] -> [count, B, size, ...], padded with zeros, see `chunk_shape`."""
    batch_size, length = x.shape[:2]
    count, size = chunk_shape(length, chunk)
    x = jnp.pad(x, [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(batch_size, count, size, *x.shape[2:]).swapaxes(0, 1)


def positions_at_once(
    num_rows: int,
    length: int,
    vocab_size: int,
    *,
    chunk: int = 0,
    devices: int = 1,
    most: int | None = None,
) -> int:
    """Positions of each row whose logits are computed at a time: those of a `chunk` that is given.
    Else all where these are at most so many numbers, `MOST_LOGITS` by default, or on several
    devices, as each chunk would send the head's gradient around; of more as many as have
    `CHUNK_LOGITS` together, and at least one.

    >>> positions_at_once(16, 64, 8192), positions_at_once(8, 512, 49152)
    (64, 42)
    >>> positions_at_once(8, 512, 49152, devices=4), positions_at_once(8, 512, 49152, chunk=64)
    (512, 64)
    """
    if chunk or devices > 1:
        return min(chunk or length, length)
    if num_rows * length * vocab_size <= (MOST_LOGITS if most is None else most):
        return length
    return min(length, max(1, CHUNK_LOGITS // (num_rows * vocab_size)))


def chunk_shape(length: int, chunk: int) -> tuple[int, int]:
    """(chunks, positions in each): as few as can be of at most `chunk`, all of one size.

    >>> chunk_shape(100, 40), chunk_shape(10, 99)
    ((3, 34), (1, 10))
    """
    assert_counts(chunk=chunk)
    count = math.ceil(length / chunk)
    return count, math.ceil(length / count)
