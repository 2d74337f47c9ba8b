"""Continuous batching: a finished response frees its slot for the next prompt.

N responses in S = `max_concurrent` slots, which are rows of a `DecodeState`, as one program.
Prompts wait until G slots are free and are admitted together: one prefill of G prompts. At the end,
when no prompt waits, the responses that are still under way move into fewer rows.

Dimension key: N responses, S slots, P prompt tokens, T response tokens, D model, G rows that are
admitted together.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from ppo_jax.core.lanes import any_lane
from ppo_jax.core.types import Prompts
from ppo_jax.rollout.decode import DecodeState, Kept, Policy, add_tokens, decode_step, empty_rows
from ppo_jax.rollout.sampling import Sampling, choose

# Name scopes of the loops, by which a compiled program is read, see `max_trip_counts`.
REFILLS, DECODING, DRAINING = "refills", "decoding", "draining"


@struct.dataclass(kw_only=True)
class Finished:
    """The responses that were retired from their slots, at their rows."""

    tokens: jax.Array  # [N, T] int32
    logprobs: jax.Array  # [N, T] float32
    mask: jax.Array  # [N, T] bool
    stopped: jax.Array  # [N] bool
    kept: Kept  # [N, T, ...]


@struct.dataclass(kw_only=True)
class RefillState:
    """What the loop over refills carries."""

    slots: DecodeState
    row: jax.Array  # [S] int32, the response in each slot; N where the slot is free
    waiting: jax.Array  # [] int32, the first row that was not admitted yet
    finished: Finished
    of_prompts: Kept  # [N / samples, P, ...]


def decode_with_refills(
    policy: Policy,
    prompts: Prompts,
    keys: jax.Array,
    sampling: Sampling,
    temperature: jax.Array | float,
) -> tuple[Finished, Kept]:
    """`decode.decode_all` with at most S responses at a time: (responses, what is kept of the
    prompts)."""
    num_rows, num_slots = len(keys), sampling.max_concurrent
    group, shards = sampling.group(num_slots), policy.num_shards(num_slots)
    width = narrow_width(num_slots, shards) if policy.moves_rows else 0

    def fit_into(active: jax.Array, width: int) -> jax.Array:
        """Whether so many rows can hold those that are active, on each shard its own."""
        return (active.reshape(shards, -1).sum(axis=1) <= width // shards).all()

    def run(s: RefillState, scope: str, enough: Callable[[jax.Array], jax.Array]) -> RefillState:
        """Decode until those that are still active are few enough, and free the other slots."""
        with jax.named_scope(scope):
            slots = jax.lax.while_loop(
                lambda slots: any_lane(~enough(slots.active)),
                lambda slots: decode_step(policy, slots, sampling, temperature),
                s.slots,
            )
        return retire(dataclasses.replace(s, slots=slots))

    def refill(s: RefillState) -> RefillState:
        s = admit(policy, s, prompts, keys, sampling, temperature, group)
        left = num_rows - s.waiting

        def enough(active):
            room = (~active).sum() >= jnp.minimum(num_entering(s, group), left)
            return jnp.where(left > 0, room, fit_into(active, width))

        return run(s, DECODING, enough)

    state = init_refills(policy, prompts, keys, sampling)
    with jax.named_scope(REFILLS):
        state = jax.lax.while_loop(lambda s: s.waiting < num_rows, refill, state)
    if width:
        all_ended = functools.partial(fit_into, width=0)
        state = run(narrow(policy, state, width, shards), DRAINING, all_ended)
    return state.finished, state.of_prompts


def narrow_width(num_slots: int, shards: int) -> int:
    """The number of rows that the last responses move into: a quarter of the slots, and on each
    shard of a mesh one or more. 0 where that would be all.

    >>> narrow_width(16, 1), narrow_width(16, 8), narrow_width(8, 8)
    (4, 8, 0)
    """
    width = max(num_slots // 4 // shards, 1) * shards
    return width if width < num_slots else 0


def init_refills(
    policy: Policy, prompts: Prompts, keys: jax.Array, sampling: Sampling
) -> RefillState:
    """S free slots."""
    num_rows, num_slots = len(keys), sampling.max_concurrent
    of_prompts = policy.empty_kept(prompts)
    caches = policy.init_caches(num_slots, prompts.tokens.shape[1] + sampling.response_length)
    slots = empty_rows(keys[:num_slots], caches, of_prompts, sampling)

    def empty(x):
        return jnp.zeros((num_rows, *x.shape[1:]), x.dtype)

    finished = Finished(
        tokens=empty(slots.tokens),
        logprobs=empty(slots.logprobs),
        mask=empty(slots.mask),
        stopped=empty(slots.stopped),
        kept=jax.tree.map(empty, slots.kept),
    )
    return RefillState(
        slots=slots,
        row=jnp.full(num_slots, num_rows, jnp.int32),
        waiting=jnp.int32(0),
        finished=finished,
        of_prompts=of_prompts,
    )


def retire(state: RefillState) -> RefillState:
    """Move the responses that have ended to their rows of `finished`, and free their slots."""
    s, finished = state.slots, state.finished
    num_rows, length = finished.tokens.shape
    row = jnp.where(s.active, num_rows, state.row)  # past the last row: dropped
    columns = (s.first_step[:, None] + jnp.arange(length, dtype=jnp.int32)[None]) % length

    def write(array, values):
        return array.at[row].set(values, mode="drop")

    def in_order(x):
        index = columns.reshape(*columns.shape, *(1,) * (x.ndim - 2))
        return jnp.take_along_axis(x, index, axis=1)

    finished = Finished(
        tokens=write(finished.tokens, in_order(s.tokens * s.mask)),
        logprobs=write(finished.logprobs, in_order(s.logprobs * s.mask)),
        mask=write(finished.mask, in_order(s.mask)),
        stopped=write(finished.stopped, s.stopped),
        kept=jax.tree.map(lambda x, new: write(x, in_order(new)), finished.kept, s.kept),
    )
    return dataclasses.replace(
        state, finished=finished, row=jnp.where(s.active, state.row, num_rows)
    )


def num_entering(state: RefillState, group: int) -> jax.Array:
    """How many responses enter next: G, but no more than fill the slots for the first time, so that
    none of them waits for a group where G does not divide S."""
    unused = len(state.row) - state.waiting
    return jnp.where(unused > 0, jnp.minimum(group, unused), group)


def admit(
    policy: Policy,
    state: RefillState,
    prompts: Prompts,
    keys: jax.Array,
    sampling: Sampling,
    temperature: jax.Array | float,
    group: int,
) -> RefillState:
    """Prefill the next rows, G at most, into free slots, each with its first token."""
    s, num_rows, samples = state.slots, len(keys), sampling.samples_per_prompt
    offsets = jnp.arange(group // samples, dtype=jnp.int32)
    numbers = state.waiting // samples + offsets  # of the prompts
    admitted = jax.tree.map(lambda x: x.at[numbers].get(mode="clip"), prompts)
    fresh = policy.init_caches(group // samples, prompts.tokens.shape[1])
    kept, logits, fresh = policy.prefill(admitted, fresh)
    offsets = jnp.arange(group, dtype=jnp.int32)
    fresh_keys = keys.at[state.waiting + offsets].get(mode="clip")
    chosen = choose(logits[offsets // samples], fresh_keys, jnp.int32(0), sampling, temperature)
    rank = jnp.cumsum(~s.active, dtype=jnp.int32) - 1  # of a free slot among the free ones
    row, count = state.waiting + rank, num_entering(state, group)
    enters = ~s.active & (rank < count) & (row < num_rows)
    source = jnp.where(enters, rank // samples, -1)
    row = jnp.where(enters, row, num_rows)
    slots = dataclasses.replace(
        s,
        first_step=jnp.where(enters, s.step, s.first_step),
        keys=jnp.where(enters, keys.at[row].get(mode="clip"), s.keys),
        stopped=s.stopped & ~enters,
        matched=None if s.matched is None else jnp.where(enters, 0, s.matched),
        mask=s.mask & ~enters[:, None],
        caches=policy.refill_caches(s.caches, fresh, source),
    )
    chosen = (x.at[rank].get(mode="clip") for x in chosen)
    slots = add_tokens(slots, *chosen, enters, sampling)
    of_prompts = jax.tree.map(
        lambda x, new: x.at[numbers].set(new, mode="drop"), state.of_prompts, kept
    )
    return dataclasses.replace(
        state,
        slots=slots,
        row=jnp.where(enters, row, state.row),
        waiting=jnp.minimum(state.waiting + count, num_rows),  # there was room for all of them
        of_prompts=of_prompts,
    )


def narrow(policy: Policy, state: RefillState, width: int, shards: int) -> RefillState:
    """Move the active slots into `width` rows, from each shard of a mesh into its own."""
    s = state.slots
    inactive = ~s.active.reshape(shards, -1)
    kept = jnp.argsort(inactive, axis=1, stable=True)[:, : width // shards]

    def move(x):
        of_shards = jax.vmap(lambda x, kept: x[kept])(x.reshape(shards, -1, *x.shape[1:]), kept)
        return of_shards.reshape(width, *x.shape[1:])

    row, rows = jax.tree.map(move, (state.row, dataclasses.replace(s, step=None, caches=None)))
    slots = dataclasses.replace(rows, step=s.step, caches=policy.map_rows(move, s.caches))
    return dataclasses.replace(state, slots=slots, row=row)


def max_trip_counts(num_rows: int, num_slots: int, group: int, steps: int) -> dict[str, float]:
    """Trip counts of the loops in the worst case: N rows in S < N slots, groups of G.

    That of `DECODING` is per trip of `REFILLS`. In the worst case every response has its full
    length, which is K steps, see `decode.max_steps`, and all end at once: none is left for
    `DRAINING`. The first S rows enter at once, in ceil(S / G) groups. Within K steps of the
    admission of a later group, as many groups as fit into the slots are admitted: each that ends
    makes room for one that waits. So the R = ceil((N - S) / G) later groups take at most
    K ceil(R / floor(S / G)) steps more than the K of the first; where G divides S that is
    K ceil(N / S) in all, and is reached.

    >>> max_trip_counts(12, 4, 2, 10)
    {'refills': 6, 'decoding': 5.0, 'draining': 0}
    """
    later = math.ceil((num_rows - num_slots) / group)
    refills = math.ceil(num_slots / group) + later
    decoding = steps * (1 + math.ceil(later / (num_slots // group)))
    return {REFILLS: refills, DECODING: decoding / refills, DRAINING: 0}
