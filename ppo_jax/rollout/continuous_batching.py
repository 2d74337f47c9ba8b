"""N responses in S slots: the loop that decodes them, and what happens as they end.

When a slot's response has ended, the next prompt enters it, so that nobody waits for the longest
response of a batch; all of it is one program.

Dimension key: N responses, S slots, B sequences, P prompt tokens, T response tokens, D model,
V vocabulary, G rows that enter slots together.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from ppo_jax.core.network import Network
from ppo_jax.core.types import Params, Prompts
from ppo_jax.rollout.sampling import Sampling, choose, is_eos

# Name scopes of the loops, by which a compiled program is read, see `max_trip_counts`.
FIRST, REFILLS, LATER = "first_decoding", "refills", "later_decoding"


@struct.dataclass(kw_only=True)
class Slots:
    """What the decode loop carries from step to step.

    The response in slot s began at step begin[s]; column `step` mod T of the [S, T] arrays is that
    of its token step - begin[s].
    """

    step: jax.Array  # [] int32, tokens chosen in each slot so far
    waiting: jax.Array  # [] int32, the first row that is in no slot yet
    row: jax.Array  # [S] int32, which response; N where there is none
    keys: jax.Array  # [S] random key of the row
    begin: jax.Array  # [S] int32
    logits: jax.Array  # [S, V], that predict the next token
    alive: jax.Array  # [S] bool, neither a stop token nor T tokens yet
    stopped: jax.Array  # [S] bool, by a stop token
    tokens: jax.Array  # [S, T] int32
    logprobs: jax.Array  # [S, T] float32
    mask: jax.Array  # [S, T] bool
    hidden: jax.Array | None  # [S, T, D], what the trunk gave
    caches: Any  # (of the trunk or None, of the policy)


@struct.dataclass(kw_only=True)
class Ended:
    """The responses that have left their slots, in the places of their rows."""

    tokens: jax.Array  # [N, T] int32
    logprobs: jax.Array  # [N, T] float32
    mask: jax.Array  # [N, T] bool
    stopped: jax.Array  # [N] bool
    hidden: jax.Array | None  # [N, T, D]


class Engine(NamedTuple):
    """The steps of the decode loop: what they read and never change."""

    networks: tuple[Network | None, Network]  # trunk and policy
    params: tuple[Params | None, Params]
    prompts: Prompts
    keys: jax.Array  # [N]
    sampling: Sampling
    temperature: jax.Array | float

    @property
    def length(self) -> int:
        """Tokens of a prompt."""
        return self.prompts.tokens.shape[1]

    def init_caches(self, count: int, length: int) -> tuple:
        return tuple(n and n.init_cache(count, length) for n in self.networks)

    def forward(self, tokens, mask, caches, first_output=0):
        """New tokens through trunk and policy: (hidden states or None, logits [B, V], caches)."""
        (trunk, policy), (trunk_params, params) = self.networks, self.params
        inputs, trunk_cache = tokens, None
        if trunk is not None:
            inputs, trunk_cache = trunk.decode(trunk_params, tokens, mask, caches[0])
        logits, cache = policy.decode(params, inputs, mask, caches[1], first_output=first_output)
        return (None if trunk is None else inputs), logits[:, 0], (trunk_cache, cache)

    def begin(self, num_slots: int) -> tuple[Slots, jax.Array | None]:
        """(the first rows in the slots, hidden states of their prompts [S / samples, P, D])."""
        samples, (trunk, _) = self.sampling.samples_per_prompt, self.networks
        count = num_slots // samples
        tokens, mask = (x[:count] for x in (self.prompts.tokens, self.prompts.mask))
        capacity = self.length + self.sampling.response_length
        caches = self.init_caches(count, capacity if samples == 1 else self.length)
        hidden, logits, caches = self.forward(tokens, mask, caches, first_output=self.length - 1)
        if samples > 1:
            source = jnp.arange(num_slots) // samples
            empty = self.init_caches(num_slots, capacity)
            caches = self.refill_caches(empty, caches, source)
            logits = logits[source]
        shape = (num_slots, self.sampling.response_length)
        slots = Slots(
            step=jnp.int32(0),
            waiting=jnp.int32(num_slots),
            row=jnp.arange(num_slots),
            keys=self.keys[:num_slots],
            begin=jnp.zeros(num_slots, jnp.int32),
            logits=logits,
            alive=jnp.ones(num_slots, bool),
            stopped=jnp.zeros(num_slots, bool),
            tokens=jnp.zeros(shape, jnp.int32),
            logprobs=jnp.zeros(shape, jnp.float32),
            mask=jnp.zeros(shape, bool),
            hidden=None if trunk is None else jnp.zeros((*shape, hidden.shape[-1]), hidden.dtype),
            caches=caches,
        )
        return slots, hidden

    def refill_caches(self, caches: tuple, fresh: tuple, source: jax.Array) -> tuple:
        """Slots begin anew with prompt source[s] of the fresh caches, where that is not -1."""
        triples = zip(self.networks, caches, fresh, strict=True)
        return tuple(n and n.refill(cache, new, source) for n, cache, new in triples)

    def advance(self, s: Slots) -> Slots:
        """One more token in each slot."""
        length, t = self.sampling.response_length, s.step - s.begin
        tokens, logprobs = choose(s.logits, s.keys, t, self.sampling, self.temperature)
        tokens = jnp.where(s.alive, tokens, 0)
        hidden, logits, caches = self.forward(tokens[:, None], s.alive[:, None], s.caches)
        stopped = s.alive & is_eos(tokens, jnp.asarray(self.sampling.eos_ids, jnp.int32))

        def put(into, new):
            # A response that has ended stays as it is, until it leaves its slot.
            column = s.step % length
            old = jax.lax.dynamic_slice_in_dim(into, column, 1, axis=1)
            new = jnp.where(s.alive.reshape(-1, *(1,) * (into.ndim - 1)), new, old)
            return jax.lax.dynamic_update_slice_in_dim(into, new, column, axis=1)

        return s.replace(
            step=s.step + 1,
            logits=logits,
            alive=s.alive & ~stopped & (t + 1 < length),
            stopped=s.stopped | stopped,
            tokens=put(s.tokens, tokens[:, None]),
            logprobs=put(s.logprobs, logprobs[:, None]),
            mask=put(s.mask, s.alive[:, None]),
            hidden=None if hidden is None else put(s.hidden, hidden),
            caches=caches,
        )

    def serve(self, slots: Slots, hidden: jax.Array | None, group: int):
        """(all responses, hidden states of all prompts): the next rows enter slots as they end."""
        num_rows, num_slots = len(self.keys), len(slots.row)

        def decode(s: Slots, scope: str) -> Slots:
            def more(s):
                entering = jnp.minimum(group, num_rows - s.waiting)
                return s.alive.any() & ((entering == 0) | ((~s.alive).sum() < entering))

            with jax.named_scope(scope):
                return jax.lax.while_loop(more, self.advance, s)

        def enter(carry):
            s, ended, hidden = carry
            ended, s = leave(s, ended)
            s, fresh_hidden, numbers = self.refill(s, group)
            if hidden is not None:
                hidden = hidden.at[numbers].set(fresh_hidden, mode="drop")
            return decode(s, LATER), ended, hidden

        def rows_of(x):
            return jnp.zeros((num_rows, *x.shape[1:]), x.dtype)

        ended = Ended(
            tokens=rows_of(slots.tokens),
            logprobs=rows_of(slots.logprobs),
            mask=rows_of(slots.mask),
            stopped=rows_of(slots.stopped),
            hidden=None if hidden is None else rows_of(slots.hidden),
        )
        if hidden is not None:
            samples = self.sampling.samples_per_prompt
            rest = num_rows // samples - num_slots // samples
            hidden = jnp.pad(hidden, ((0, rest), (0, 0), (0, 0)))
        carry = (decode(slots, FIRST), ended, hidden)
        with jax.named_scope(REFILLS):
            slots, ended, hidden = jax.lax.while_loop(
                lambda carry: carry[0].waiting < num_rows, enter, carry
            )
        return leave(slots, ended)[0], hidden

    def refill(self, s: Slots, group: int):
        """The next rows, G at most, enter free slots.

        Returns:
            (slots, hidden states of the prompts [G / samples, P, D] or None, the prompts' numbers;
            past the last prompt where fewer are left).
        """
        num_rows, samples = len(self.keys), self.sampling.samples_per_prompt
        numbers = s.waiting // samples + jnp.arange(group // samples)
        prompts = jax.tree.map(lambda x: x.at[numbers].get(mode="clip"), self.prompts)
        fresh = self.init_caches(group // samples, self.length)
        hidden, logits, fresh = self.forward(
            prompts.tokens, prompts.mask, fresh, first_output=self.length - 1
        )
        rank = jnp.cumsum(~s.alive) - 1  # of a free slot among the free ones
        row = s.waiting + rank
        enters = ~s.alive & (rank < group) & (row < num_rows)
        source = jnp.where(enters, rank // samples, -1)
        row = jnp.where(enters, row, num_rows)
        key = self.keys.at[row].get(mode="clip")
        s = s.replace(
            waiting=s.waiting + enters.sum(),
            row=jnp.where(enters, row, s.row),
            keys=jnp.where(enters, key, s.keys),
            begin=jnp.where(enters, s.step, s.begin),
            logits=jnp.where(enters[:, None], logits[source], s.logits),
            alive=s.alive | enters,
            stopped=s.stopped & ~enters,
            mask=s.mask & ~enters[:, None],
            caches=self.refill_caches(s.caches, fresh, source),
        )
        return s, hidden, numbers


def max_trip_counts(num_rows: int, num_slots: int, group: int, length: int) -> dict[str, float]:
    """How often the loops of `Engine.serve` turn at most; `LATER` in each turn of `REFILLS`.

    That is where every response has its full length. When a group of G has entered, so have, T
    steps later, as many more groups as fit into the slots: one that ends has made room for one that
    waits. So R = ceil((N - S) / G) groups take at most T (1 + ceil(R / floor(S / G))) steps, those
    of the first rows included; where G divides S that is T ceil(N / S), and is reached.

    >>> max_trip_counts(12, 4, 2, 10)
    {'first_decoding': 10, 'refills': 4, 'later_decoding': 5.0}

    Args:
        num_rows: N.
        num_slots: S, less than N.
        group: G.
        length: T.
    """
    refills = math.ceil((num_rows - num_slots) / group)
    later = length * math.ceil(refills / (num_slots // group))
    return {FIRST: length, REFILLS: refills, LATER: later / refills}


def leave(s: Slots, ended: Ended) -> tuple[Ended, Slots]:
    """The responses that have ended go to the places of their rows, and their slots are free."""
    num_rows, length = ended.tokens.shape
    row = jnp.where(s.alive, num_rows, s.row)  # past the end: dropped
    columns = (s.begin[:, None] + jnp.arange(length)[None]) % length

    def put(into, values):
        return into.at[row].set(values, mode="drop")

    def in_order(x):
        index = columns if x.ndim == 2 else columns[:, :, None]
        return jnp.take_along_axis(x, index, axis=1)

    ended = Ended(
        tokens=put(ended.tokens, in_order(s.tokens * s.mask)),
        logprobs=put(ended.logprobs, in_order(s.logprobs * s.mask)),
        mask=put(ended.mask, in_order(s.mask)),
        stopped=put(ended.stopped, s.stopped),
        hidden=None if ended.hidden is None else put(ended.hidden, in_order(s.hidden)),
    )
    return ended, s.replace(row=jnp.where(s.alive, s.row, num_rows))
