"""Distributions over tokens. Dimensions: B sequences, T response tokens, V vocabulary."""

import chex
import jax
import jax.numpy as jnp

Number = jax.Array | float


def token_logprobs(logits: jax.Array, tokens: jax.Array, *, temperature: Number = 1.0) -> jax.Array:
    """Log-probability of each token at the sampling temperature, over the full vocabulary.

    logprob = z[token] - log Σ_v exp z[v],  z = logits / temperature, in float32.

    The chosen logit is gathered first, so that no second array of [B, T, V] is made.

    Args:
        logits: [..., V] float, mostly [B, T, V].
        tokens: [...] int, ids in [0, V); at padding any valid id.
        temperature: divides the logits. 0 counts as 1: greedy sampling divides by nothing.

    Returns:
        [...] float32. Positions do not mix: what padding holds stays in padding.

    >>> logits = jnp.log(jnp.array([[[0.25, 0.75]]]))
    >>> round(jnp.exp(token_logprobs(logits, jnp.array([[1]]))).item(), 6)
    0.75
    """
    chex.assert_type([logits, tokens], [float, int])
    chex.assert_shape(tokens, logits.shape[:-1])

    divisor = _divisor(temperature)
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    scaled = logits.astype(jnp.float32) / divisor
    return chosen.astype(jnp.float32) / divisor - jax.nn.logsumexp(scaled, axis=-1)


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
        tokens: [...] int, ids in [0, V); at padding any valid id.
        temperature: [] or a number, divides the logits. 0 counts as 1.

    Returns:
        (logprobs, entropies in nats), each [...] float32. Positions do not mix: what padding holds
        stays in padding.

    >>> logprobs, entropies = token_statistics(jnp.zeros((1, 1, 4)), jnp.array([[2]]))
    >>> jnp.exp(logprobs).round(5).tolist(), jnp.exp(entropies).round(5).tolist()
    ([[0.25]], [[4.0]])
    """
    chex.assert_type([logits, tokens], [float, int])
    chex.assert_shape(tokens, logits.shape[:-1])
    return _statistics(logits, tokens, jnp.asarray(temperature, jnp.float32))


@jax.custom_vjp
def _statistics(logits, tokens, temperature):
    return _statistics_forward(logits, tokens, temperature)[0]


def _statistics_forward(logits, tokens, temperature):
    divisor = _divisor(temperature)
    scaled = logits.astype(jnp.float32) / divisor
    normalizer = jax.nn.logsumexp(scaled, axis=-1)
    logprobs = scaled - normalizer[..., None]
    entropies = -jnp.sum(jnp.exp(logprobs) * _finite(logprobs), axis=-1)
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    chosen = chosen.astype(jnp.float32) / divisor - normalizer
    return (chosen, entropies), (logits, tokens, temperature, normalizer, entropies)


def _statistics_backward(saved, gradients):
    logits, tokens, temperature, normalizer, entropies = saved
    of_logprob, of_entropy = (g[..., None] for g in gradients)
    divisor = _divisor(temperature)
    scaled = logits.astype(jnp.float32) / divisor
    logprobs = scaled - normalizer[..., None]
    # A comparison in place of a scatter, which a CPU does element by element.
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    hit = ids == tokens[..., None].astype(jnp.int32)
    of_scaled = jnp.where(hit, of_logprob, 0.0) - jnp.exp(logprobs) * (
        of_logprob + of_entropy * (_finite(logprobs) + entropies[..., None])
    )
    # A logit of -inf has a gradient of 0 and does not depend on the temperature.
    of_temperature = -jnp.sum(of_scaled * _finite(scaled)) / divisor
    of_temperature = jnp.where(temperature == 0, 0.0, of_temperature)
    return (of_scaled / divisor).astype(logits.dtype), None, of_temperature


_statistics.defvjp(_statistics_forward, _statistics_backward)


def _finite(x: jax.Array) -> jax.Array:
    """0 in the place of -inf: 0 x log 0 is 0."""
    return jnp.where(x == -jnp.inf, 0.0, x)


def sample(
    key: jax.Array,
    logits: jax.Array,
    *,
    temperature: Number = 1.0,
    top_k: int = 0,
    top_p: Number = 1.0,
    min_p: Number = 0.0,
) -> jax.Array:
    """Sample token ids; temperature, top_k, top_p and min_p apply in this order.

    token = argmax_v z_v + g_v over the tokens that the filters keep, z = logits / temperature,
    g Gumbel noise. The noise belongs to the token id: a filter that keeps the token that would
    be drawn without it changes nothing. Among equal logits the lower id comes first.

    Args:
        key: one key for all rows, consumed.
        logits: [..., V] float, mostly [B, V].
        temperature: divides the logits; 0 is greedy, whatever the filters.
        top_k: keeps the k largest logits. Static; 0 is off.
        top_p: keeps the smallest set of the largest probabilities that reaches top_p, at least
            one token. The Python number 1.0 is off and saves its search.
        min_p: keeps probabilities of at least min_p times the largest. 0 is off.

    Returns:
        [...] int32.

    Raises:
        ValueError: top_k is negative.

    Reference: top_p is Holtzman et al. 2019, https://arxiv.org/abs/1904.09751, eq. 2 and 3;
    min_p is Nguyen et al. 2024, https://arxiv.org/abs/2407.01082.

    >>> logits = jnp.log(jnp.array([[0.1, 0.6, 0.3], [0.8, 0.1, 0.1]]))
    >>> sample(jax.random.key(0), logits, top_p=0.5).tolist()
    [1, 0]
    """
    if top_k < 0:
        raise ValueError(f"top_k must be at least 0 (0 is off), got {top_k}.")
    chex.assert_type(logits, float)
    if _is_number(temperature, 0):
        return _first_largest(logits)

    logits = logits.astype(jnp.float32) / _divisor(temperature)
    noise = jnp.where(temperature == 0, 0.0, jax.random.gumbel(key, logits.shape))
    tokens = None
    if top_k:
        logits, tokens = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))
        noise = jnp.take_along_axis(noise, tokens, axis=-1)
        logits = jnp.where(_in_nucleus(logits, top_p), logits, -jnp.inf)
    elif not _is_number(top_p, 1):
        logits = jnp.where(_nucleus(logits, top_p), logits, -jnp.inf)
    if not _is_number(min_p, 0):
        floor = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(min_p)
        logits = jnp.where(logits >= floor, logits, -jnp.inf)

    drawn = _first_largest(logits + noise)
    if tokens is not None:
        drawn = jnp.take_along_axis(tokens, drawn[..., None], axis=-1)[..., 0]
    return drawn


def _first_largest(x: jax.Array) -> jax.Array:
    """`jnp.argmax` of [..., V] as two reductions of one value each, which XLA vectorises on a CPU.

    [...] int32; of a row with NaN it is 0.
    """
    below = x < jnp.max(x, axis=-1, keepdims=True)
    ids = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    return jnp.min(jnp.where(below, x.shape[-1], ids), axis=-1)


def _in_nucleus(sorted_logits: jax.Array, top_p: Number) -> jax.Array:
    """True where the tokens before it, in descending order, have less than top_p together."""
    probs = jax.nn.softmax(sorted_logits, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    # Nothing stands before the first token, which a bound above 0 keeps. Rounding may lift the
    # sum to 1 before its end, while a top_p of 1 is off by definition.
    above_zero = jnp.maximum(top_p, jnp.finfo(jnp.float32).tiny)
    return before < jnp.where(top_p >= 1, jnp.inf, above_zero)


def _nucleus(logits: jax.Array, top_p: Number) -> jax.Array:
    """The same for logits [..., V] in any order, without sorting them.

    A bisection finds the largest threshold whose tokens reach top_p together: 32 sums, which cost
    a twentieth of a sort of 8,192 tokens on a CPU.
    """
    bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    probs = jax.nn.softmax(logits, axis=-1)
    bound = jnp.maximum(top_p, jnp.finfo(jnp.float32).tiny)

    def mass(chosen):
        return jnp.sum(jnp.where(chosen, probs, 0.0), axis=-1, keepdims=True)

    def halve(_, span):
        low, high = span
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, which does not overflow
        reached = mass(order >= middle) >= bound
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

    ends = jnp.iinfo(jnp.int32)
    span = tuple(jnp.full((*logits.shape[:-1], 1), end, jnp.int32) for end in (ends.min, ends.max))
    threshold, _ = jax.lax.fori_loop(0, 32, halve, span)
    above, equal = order > threshold, order == threshold
    # Of equal ones the first are in, as many as it takes.
    first = jnp.cumsum(equal, axis=-1) - 1
    inside = above | (equal & (mass(above) + first * probs < bound))
    return inside | (top_p >= 1)


def _divisor(temperature: Number) -> jax.Array:
    return jnp.where(temperature == 0, 1.0, temperature)


def _is_number(x: Number, number: float) -> bool:
    """Whether x is this number already while tracing, so that no code is needed for it."""
    return isinstance(x, int | float) and x == number
