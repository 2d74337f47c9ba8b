"""Continuous batching: a finished response frees its slot for the next prompt.

N responses in S = `max_concurrent` slots, which are rows of a `DecodeState`, as one program.
Prompts wait until G slots are free and are admitted together: one prefill of G prompts.

Dimension key: N responses, S slots, P prompt tokens, T response tokens, D model, G rows that are
admitted together.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import struct

from ppo_jax.core.lanes import any_lane
from ppo_jax.core.types import Prompts
from ppo_jax.rollout.decode import DecodeState, Policy, add_tokens, decode_step, init_decode
from ppo_jax.rollout.sampling import Sampling, choose

# Name scopes of the loops, by which a compiled program is read, see `max_trip_counts`.
FIRST, REFILLS, LATER = "first_decoding", "refills", "later_decoding"


@struct.dataclass(kw_only=True)
class Finished:
    """The responses that were retired from their slots, at their rows."""

    tokens: jax.Array  # [N, T] int32
    logprobs: jax.Array  # [N, T] float32
    mask: jax.Array  # [N, T] bool
    stopped: jax.Array  # [N] bool
    hidden_states: jax.Array | None  # [N, T, D]


@struct.dataclass(kw_only=True)
class RefillState:
    """What the loop over refills carries."""

    slots: DecodeState
    row: jax.Array  # [S] int32, the response in each slot; N where the slot is free
    waiting: jax.Array  # [] int32, the first row that was not admitted yet
    finished: Finished
    prompt_states: jax.Array | None  # [N / samples, P, D], the trunk's


def decode_with_refills(
    policy: Policy,
    prompts: Prompts,
    keys: jax.Array,
    sampling: Sampling,
    temperature: jax.Array | float,
) -> tuple[Finished, jax.Array | None]:
    """`decode.decode_all` with at most S responses at a time: (responses, prompts' states)."""
    num_rows, num_slots = len(keys), sampling.max_concurrent
    group = sampling.group(num_slots)

    def run(s: RefillState, scope: str) -> RefillState:
        """Decode until as many slots are free as the next group needs."""
        admitted = jnp.minimum(group, num_rows - s.waiting)

        def more(slots):
            enough = (admitted > 0) & ((~slots.active).sum() >= admitted)
            return any_lane(slots.active.any() & ~enough)

        def step(slots):
            return decode_step(policy, slots, sampling, temperature)

        with jax.named_scope(scope):
            return dataclasses.replace(s, slots=jax.lax.while_loop(more, step, s.slots))

    def refill(s: RefillState) -> RefillState:
        return run(admit(policy, retire(s), prompts, keys, sampling, temperature, group), LATER)

    state = init_refills(policy, prompts, keys, sampling, temperature, num_slots)
    state = run(state, FIRST)
    with jax.named_scope(REFILLS):
        state = jax.lax.while_loop(lambda s: s.waiting < num_rows, refill, state)
    state = retire(state)
    return state.finished, state.prompt_states


def init_refills(
    policy: Policy,
    prompts: Prompts,
    keys: jax.Array,
    sampling: Sampling,
    temperature: jax.Array | float,
    num_slots: int,
) -> RefillState:
    """The first S rows in their slots, none retired."""
    num_rows, count = len(keys), num_slots // sampling.samples_per_prompt
    first = jax.tree.map(lambda x: x[:count], prompts)
    slots, prompt_states = init_decode(policy, first, keys[:num_slots], sampling, temperature)

    def empty(x):
        return jnp.zeros((num_rows, *x.shape[1:]), x.dtype)

    finished = Finished(
        tokens=empty(slots.tokens),
        logprobs=empty(slots.logprobs),
        mask=empty(slots.mask),
        stopped=empty(slots.stopped),
        hidden_states=None if prompt_states is None else empty(slots.hidden_states),
    )
    if prompt_states is not None:
        rest = len(prompts.tokens) - count
        prompt_states = jnp.pad(prompt_states, ((0, rest), (0, 0), (0, 0)))
    return RefillState(
        slots=slots,
        row=jnp.arange(num_slots, dtype=jnp.int32),
        waiting=jnp.int32(num_slots),
        finished=finished,
        prompt_states=prompt_states,
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
        index = columns if x.ndim == 2 else columns[:, :, None]
        return jnp.take_along_axis(x, index, axis=1)

    states = None
    if finished.hidden_states is not None:
        states = write(finished.hidden_states, in_order(s.hidden_states))
    finished = Finished(
        tokens=write(finished.tokens, in_order(s.tokens * s.mask)),
        logprobs=write(finished.logprobs, in_order(s.logprobs * s.mask)),
        mask=write(finished.mask, in_order(s.mask)),
        stopped=write(finished.stopped, s.stopped),
        hidden_states=states,
    )
    return dataclasses.replace(
        state, finished=finished, row=jnp.where(s.active, state.row, num_rows)
    )


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
    fresh_states, logits, fresh = policy.prefill(admitted, fresh)
    offsets = jnp.arange(group, dtype=jnp.int32)
    fresh_keys = keys.at[state.waiting + offsets].get(mode="clip")
    chosen = choose(logits[offsets // samples], fresh_keys, jnp.int32(0), sampling, temperature)
    rank = jnp.cumsum(~s.active, dtype=jnp.int32) - 1  # of a free slot among the free ones
    row = state.waiting + rank
    enters = ~s.active & (rank < group) & (row < num_rows)
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
    prompt_states = state.prompt_states
    if prompt_states is not None:
        prompt_states = prompt_states.at[numbers].set(fresh_states, mode="drop")
    return dataclasses.replace(
        state,
        slots=slots,
        row=jnp.where(enters, row, state.row),
        waiting=jnp.minimum(state.waiting + group, num_rows),  # there was room for all of them
        prompt_states=prompt_states,
    )


def max_trip_counts(num_rows: int, num_slots: int, group: int, steps: int) -> dict[str, float]:
    """Trip counts of the loops in the worst case: N rows in S < N slots, groups of G.

    That of `LATER` is per trip of `REFILLS`. In the worst case every response has its full length,
    which is K steps, see `decode.max_steps`. Within K steps of the admission of a group, as many
    groups as fit into the slots are admitted: each that ends makes room for one that waits. So
    R = ceil((N - S) / G) groups take at most K (1 + ceil(R / floor(S / G))) steps, those of the
    first rows included; where G divides S that is K ceil(N / S), and is reached.

    >>> max_trip_counts(12, 4, 2, 10)
    {'first_decoding': 10, 'refills': 4, 'later_decoding': 5.0}
    """
    refills = math.ceil((num_rows - num_slots) / group)
    later = steps * math.ceil(refills / (num_slots // group))
    return {FIRST: steps, REFILLS: refills, LATER: later / refills}
