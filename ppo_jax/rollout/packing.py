"""Packing: responses share rows in the update, so that little of a row is padding.

The lengths are known only inside the program, so it packs there: rows have the shape of unpacked
ones, and fewer of them are used.

Dimension key: B responses and as many rows, R rows of a micro-batch, P prompt tokens, T response
tokens, L = P + T, W = L - 1 positions of a row, D model.
"""

import chex
import jax
import jax.numpy as jnp
from flax import struct

from ppo_jax.core.masking import last_token_index
from ppo_jax.core.types import Experience


@struct.dataclass(kw_only=True)
class PackedRows:
    """The contents of rows. The rows in use come first; the others are all padding."""

    positions: jax.Array  # [B, W] int32, indices into [B x L], the positions of all responses
    segment_ids: jax.Array  # [B, W] int32, which response of its row: 1, 2, .. or 0 in padding
    tokens: jax.Array  # [B, T] int32, indices into [B x T], the response tokens of all responses
    mask: jax.Array  # [B, T] bool, True on response tokens
    output_positions: jax.Array  # [B, T] int32, the position before each of them, which predicts it


def pack_rows(mask: jax.Array, response_mask: jax.Array) -> tuple[PackedRows, jax.Array]:
    """Pack responses with their prompts: (rows, [] int32 the number of rows in use).

    A row has at most W positions and T response tokens. The last token of a response predicts
    nothing and needs no position. `mask` [B, L] covers prompts and responses, `response_mask` is
    [B, T].
    """
    chex.assert_rank([mask, response_mask], 2)
    chex.assert_type([mask, response_mask], bool)
    (batch_size, length), max_tokens = mask.shape, response_mask.shape[1]
    width = length - 1
    predicts = mask[:, :-1] & (jnp.arange(width)[None] < last_token_index(mask)[:, None])
    lengths, counts = (x.sum(axis=1, dtype=jnp.int32) for x in (predicts, response_mask))
    row, begin, token_begin, number = first_fit(lengths, counts, width=width, max_tokens=max_tokens)

    def targets(x, begin, size):
        """Indices into [B x size] of the True ones of x, one after the other; else past the end."""
        index = row[:, None] * size + begin[:, None] + jnp.cumsum(x, axis=1, dtype=jnp.int32) - 1
        return jnp.where(x, index, batch_size * size)

    def scatter(index, values, size):
        empty = jnp.zeros(batch_size * size, values.dtype)
        return empty.at[index].set(values, mode="drop").reshape(batch_size, size)

    def source(size):
        return jnp.arange(batch_size * size, dtype=jnp.int32).reshape(batch_size, size)

    index = targets(predicts, begin, width)
    token_index = targets(response_mask, token_begin, max_tokens)
    rows = PackedRows(
        positions=scatter(index, source(length)[:, :-1], width),
        segment_ids=scatter(index, jnp.broadcast_to(number[:, None], index.shape), width),
        tokens=scatter(token_index, source(max_tokens), max_tokens),
        mask=scatter(token_index, response_mask, max_tokens),
        output_positions=scatter(token_index, index[:, -max_tokens:] % width, max_tokens),
    )
    return rows, row.max() + 1


def first_fit(
    lengths: jax.Array, counts: jax.Array, *, width: int, max_tokens: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Assign responses to rows: the longest first, each to the first row with room for it.

    Args:
        lengths: [B] int32, positions, none above `width`.
        counts: [B] int32, response tokens, none above `max_tokens`.
        width: positions of a row.
        max_tokens: response tokens of a row.

    Returns:
        (row, its first position there, response tokens before it, its number there from 1 on), each
        [B] int32.

    Reference: Johnson 1974, https://doi.org/10.1137/0203025, first fit decreasing.

    >>> row, begin, *_ = first_fit(
    ...     jnp.array([2, 7, 5, 3, 8]), jnp.array([1, 1, 1, 1, 1]), width=10, max_tokens=2
    ... )
    >>> row.tolist(), begin.tolist()
    ([0, 1, 2, 1, 0], [8, 0, 0, 7, 0])
    """

    def assign(rooms, response):
        length, count = lengths[response], counts[response]
        room, token_room, inside = rooms
        row = jnp.argmax((room >= length) & (token_room >= count)).astype(jnp.int32)
        slot = row, width - room[row], max_tokens - token_room[row], inside[row] + 1
        rooms = room.at[row].add(-length), token_room.at[row].add(-count), inside.at[row].add(1)
        return rooms, slot

    order = jnp.argsort(lengths, stable=True, descending=True)
    rooms = tuple(jnp.full(len(lengths), size, jnp.int32) for size in (width, max_tokens, 0))
    _, slots = jax.lax.scan(assign, rooms, order)
    row, position, token, number = (jnp.zeros_like(x).at[order].set(x) for x in slots)
    return row, position, token, number


def packed_experience(experience: Experience, rows: PackedRows) -> Experience:
    """The experience of B responses in R packed rows, with `segment_ids` and `output_positions`.

    What needs a critic stays None without one.
    """

    def of_tokens(x):
        if x is None:
            return None
        return jnp.where(rows.mask, x.reshape(-1)[rows.tokens], jnp.zeros((), x.dtype))

    def of_positions(x):
        return None if x is None else x.reshape(-1, *x.shape[2:])[rows.positions]

    e = experience
    return Experience(
        policy_inputs=of_positions(e.policy_inputs),
        value_inputs=of_positions(e.value_inputs),
        mask=rows.segment_ids > 0,
        response_tokens=of_tokens(e.response_tokens),
        response_mask=rows.mask,
        logprobs=of_tokens(e.logprobs),
        values=of_tokens(e.values),
        advantages=of_tokens(e.advantages),
        returns=of_tokens(e.returns),
        ref_logprobs=of_tokens(e.ref_logprobs),
        behavior_logprobs=of_tokens(e.behavior_logprobs),
        dropped_mask=of_tokens(e.dropped_mask),
        penalty_mask=of_tokens(e.penalty_mask),
        disputed_mask=of_tokens(e.disputed_mask),
        weights=of_tokens(e.weights),
        critics=of_tokens(e.critics),
        segment_ids=rows.segment_ids,
        output_positions=rows.output_positions,
        experts=of_positions(e.experts),
        replays_experts=e.replays_experts,
    )
