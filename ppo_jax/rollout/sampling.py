"""One token at a time: which is chosen, and when a response ends.

Dimension key: B sequences, V vocabulary, S states and K classes of tokens of stop strings.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp

from ppo_jax.core import cpu
from ppo_jax.core.checks import Number, assert_counts, assert_numbers
from ppo_jax.core.distributions import is_number, positive_temperature, token_logprobs
from ppo_jax.core.renamed import renamed


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

    Numbers that are traced cannot be refused: top_p and min_p are clamped to [0, 1], and a
    temperature below 0 is greedy, one between 0 and 1e-6 is 1e-6.

    Args:
        key: one key for all rows, consumed.
        logits: [..., V] float, mostly [B, V].
        temperature: 0 or at least 1e-6, divides the logits; 0 is greedy, whatever the filters.
        top_k: keeps the k largest logits. Static; 0 is off.
        top_p: in [0, 1], keeps the smallest set of the largest probabilities that reaches top_p,
            at least one token. The Python number 1.0 is off and saves its search.
        min_p: in [0, 1], keeps probabilities of at least min_p times the largest. 0 is off.

    Returns:
        [...] int32.

    Raises:
        ValueError: a number that is known is out of its range.

    Reference: top_p is Holtzman et al. 2019, https://arxiv.org/abs/1904.09751, eq. 2 and 3;
    min_p is Nguyen et al. 2024, https://arxiv.org/abs/2407.01082.

    >>> logits = jnp.log(jnp.array([[0.1, 0.6, 0.3], [0.8, 0.1, 0.1]]))
    >>> sample(jax.random.key(0), logits, top_p=0.5).tolist()
    [1, 0]
    """
    chex.assert_type(logits, float)
    divisor = positive_temperature(temperature)
    check_filters(top_k, top_p, min_p)
    if is_number(temperature, 0):
        return cpu.argmax(logits)

    logits = logits.astype(jnp.float32) / divisor
    noise = jax.random.gumbel(key, logits.shape, jnp.float32)
    noise = jnp.where(temperature <= 0, 0.0, noise)
    tokens = None
    if top_k:
        logits, tokens = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))
        noise = jnp.take_along_axis(noise, tokens, axis=-1)
        logits = jnp.where(_in_nucleus(logits, top_p), logits, -jnp.inf)
    elif not is_number(top_p, 1):
        logits = jnp.where(cpu.nucleus(logits, top_p), logits, -jnp.inf)
    if not is_number(min_p, 0):
        ratio = jnp.clip(min_p, 0.0, 1.0)
        floor = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(ratio)
        logits = jnp.where(logits >= floor, logits, -jnp.inf)

    drawn = cpu.argmax(logits + noise)
    if tokens is not None:
        drawn = jnp.take_along_axis(tokens, drawn[..., None], axis=-1)[..., 0]
    return drawn


def check_filters(top_k: int, top_p: Number, min_p: Number) -> None:
    """Raise a ValueError where a filter that is known is out of its range."""
    assert_counts(at_least=0, top_k=top_k)
    assert_numbers(at_least=0, at_most=1, top_p=top_p, min_p=min_p)


def _in_nucleus(sorted_logits: jax.Array, top_p: Number) -> jax.Array:
    """True where the tokens before it, in descending order, have less than top_p together."""
    probs = jax.nn.softmax(sorted_logits, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    # A bound above 0 keeps the first token, before which there is nothing. Rounding may lift the
    # sum to 1 before its end, while a top_p of 1 is off by definition.
    above_zero = jnp.maximum(top_p, jnp.finfo(jnp.float32).tiny)
    return before < jnp.where(top_p >= 1, jnp.inf, above_zero)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StopStrings:
    """An automaton that reads tokens and finds the first occurrence of any of some texts.

    A state is the longest end of the text so far with which one of the texts begins; the last
    state, S - 1, is that one of them has occurred. Two tokens that lead from each state to the same
    one are of one class, so that [S, K] numbers do for [S, V].

    Reference: Aho & Corasick 1975, https://doi.org/10.1145/360825.360855, section 3.
    """

    texts: tuple[str, ...]
    token_classes: tuple[int, ...]  # V; tokens of class 0 leave every state as it is
    transitions: tuple[tuple[int, ...], ...]  # S rows of K: the next state

    def advance(self, states: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One more token each.

        Args:
            states: [B] int32; 0 is that of an empty text.
            tokens: [B] int32; an id beyond the vocabulary writes nothing.

        Returns:
            (the next states [B] int32, whether a text has occurred [B] bool).
        """
        classes = jnp.asarray(self.token_classes, jnp.int32)
        classes = classes.at[tokens].get(mode="fill", fill_value=0)
        states = jnp.asarray(self.transitions, jnp.int32)[states, classes]
        return states, states == len(self.transitions) - 1


@renamed(slots="max_concurrent", refill="min_free_slots")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """What shapes the sampling program; the temperature is traced, and passed separately.

    Raises:
        ValueError: a number is out of its range.
    """

    response_length: int  # T, the most tokens a response may have
    eos_ids: tuple[int, ...]  # a response ends with any of these; () samples T tokens
    top_k: int = 0  # 0 is off
    top_p: float = 1.0  # 1 is off
    min_p: float = 0.0  # 0 is off
    samples_per_prompt: int = 1  # responses to each prompt; its keys and values are computed once
    max_concurrent: int = 0  # S, responses decoded at a time (slots); 0 is all
    min_free_slots: int = 0  # G, free slots that the next prompts wait for; 0 is a quarter of S
    stop_strings: StopStrings | None = None  # a response ends with the token that completes one

    def __post_init__(self):
        check_filters(self.top_k, self.top_p, self.min_p)
        assert_counts(
            response_length=self.response_length, samples_per_prompt=self.samples_per_prompt
        )
        limits = dict(max_concurrent=self.max_concurrent, min_free_slots=self.min_free_slots)
        assert_counts(
            at_least=0, **limits, **{f"eos_ids[{i}]": x for i, x in enumerate(self.eos_ids)}
        )

    def other_ends(self, eos_id: int) -> bool:
        """Whether a response may stop at something else than EOS, with which all texts of a reward
        model's training end."""
        return set(self.eos_ids) > {eos_id} or self.stop_strings is not None

    def group(self, max_concurrent: int) -> int:
        """G: a multiple of the samples of a prompt."""
        wanted = self.min_free_slots or max(max_concurrent // 4, 1)
        return max(wanted // self.samples_per_prompt, 1) * self.samples_per_prompt


def init_matched(num_rows: int, sampling: Sampling) -> jax.Array | None:
    """[B] int32, the state of the stop strings before a response; None where there are none."""
    return None if sampling.stop_strings is None else jnp.zeros(num_rows, jnp.int32)


def find_stops(
    tokens: jax.Array, matched: jax.Array | None, sampling: Sampling
) -> tuple[jax.Array, jax.Array | None]:
    """Which tokens end their response: stop tokens, and those that complete a stop string.

    Args:
        tokens: [B] int32, the next one of each response.
        matched: [B] int32, from `init_matched` or from here at the token before.
        sampling: has stop tokens and strings.

    Returns:
        (stops [B] bool, matched).
    """
    eos_ids = jnp.asarray(sampling.eos_ids, jnp.int32)
    stops = (tokens[:, None] == eos_ids[None]).any(axis=1)
    if sampling.stop_strings is not None:
        matched, complete = sampling.stop_strings.advance(matched, tokens)
        stops |= complete
    return stops, matched


def choose(logits, row_keys, t, sampling: Sampling, temperature) -> tuple[jax.Array, jax.Array]:
    """One token a row from logits [B, V], and its log-prob over the full vocabulary; t is the
    token's number in its response, [] or [B]."""
    keys = jax.vmap(jax.random.fold_in)(row_keys, jnp.broadcast_to(t, row_keys.shape))

    def one(key, row_logits):
        return sample(
            key,
            row_logits,
            temperature=temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
        )

    tokens = jax.vmap(one)(keys, logits).astype(jnp.int32)
    logprobs = token_logprobs(logits[:, None], tokens[:, None], temperature=temperature)
    return tokens, logprobs[:, 0]
