"""Responses that share rows while they are trained on, so that little of a row is padding.

The lengths are known only inside the program, so the rows are found there, and hold as many
positions and response tokens as unpacked ones at most: their number is what differs.

Dimension key: B responses and as many rows, R rows of a piece, P prompt tokens, T response tokens,
L = P + T, W = L - 1 positions of a row, D model.
"""

import chex
import jax
import jax.numpy as jnp
from flax import struct

from ppo_jax.core.masking import last_token_index
from ppo_jax.core.types import Experience


@struct.dataclass(kw_only=True)
class PackedRows:
    """What stands where. The rows in use come first; the others are all padding."""

    positions: jax.Array  # [B, W] int32, indices into [B x L], the positions of all responses
    segment_ids: jax.Array  # [B, W] int32, which response of its row: 1, 2, .. or 0 in padding
    tokens: jax.Array  # [B, T] int32, indices into [B x T], the response tokens of all responses
    mask: jax.Array  # [B, T] bool, True on response tokens
    output_positions: jax.Array  # [B, T] int32, the position before each of them, which predicts it


def pack_rows(mask: jax.Array, response_mask: jax.Array) -> tuple[PackedRows, jax.Array]:
    """Responses with their prompts as rows of at most W positions and T response tokens.

    The last token of a response predicts nothing and takes no position.

    Args:
        mask: [B, L] bool, prompts and responses.
        response_mask: [B, T] bool.

    Returns:
        (rows, [] int32 how many are in use).
    """
    chex.assert_rank([mask, response_mask], 2)
    chex.assert_type([mask, response_mask], bool)
    (batch_size, length), most = mask.shape, response_mask.shape[1]
    width = length - 1
    predicts = mask[:, :-1] & (jnp.arange(width)[None] < last_token_index(mask)[:, None])
    lengths, counts = (x.sum(axis=1, dtype=jnp.int32) for x in (predicts, response_mask))
    row, begin, token_begin, number = first_fit(lengths, counts, width=width, most=most)

    def places(x, row, begin, size):
        """Where the True ones of [B, ...] go in [B x size], one after the other; else nowhere."""
        place = row[:, None] * size + begin[:, None] + jnp.cumsum(x, axis=1, dtype=jnp.int32) - 1
        return jnp.where(x, place, batch_size * size)

    def laid_out(place, values, size):
        empty = jnp.zeros(batch_size * size, values.dtype)
        return empty.at[place].set(values, mode="drop").reshape(batch_size, size)

    place = places(predicts, row, begin, width)
    token_place = places(response_mask, row, token_begin, most)
    position = jnp.arange(batch_size * length, dtype=jnp.int32).reshape(batch_size, length)[:, :-1]
    token = jnp.arange(batch_size * most, dtype=jnp.int32).reshape(batch_size, most)
    rows = PackedRows(
        positions=laid_out(place, position, width),
        segment_ids=laid_out(place, jnp.broadcast_to(number[:, None], place.shape), width),
        tokens=laid_out(token_place, token, most),
        mask=laid_out(token_place, response_mask, most),
        output_positions=laid_out(token_place, place[:, -most:] % width, most),
    )
    return rows, row.max() + 1


def first_fit(
    lengths: jax.Array, counts: jax.Array, *, width: int, most: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Which response goes into which row: the longest first, each into the first with room for it.

    Args:
        lengths: [B] int32, positions, none above `width`.
        counts: [B] int32, response tokens, none above `most`.
        width: positions of a row.
        most: response tokens of a row.

    Returns:
        (row, position in it where the response begins, response tokens before it, number in its
        row from 1 on), each [B] int32.

    Reference: Johnson 1974, https://doi.org/10.1137/0203025, first fit decreasing.

    >>> row, begin, *_ = first_fit(
    ...     jnp.array([2, 7, 5, 3, 8]), jnp.array([1, 1, 1, 1, 1]), width=10, most=2
    ... )
    >>> row.tolist(), begin.tolist()
    ([0, 1, 2, 1, 0], [8, 0, 0, 7, 0])
    """

    def put(rooms, response):
        length, count = lengths[response], counts[response]
        room, token_room, inside = rooms
        row = jnp.argmax((room >= length) & (token_room >= count)).astype(jnp.int32)
        found = row, width - room[row], most - token_room[row], inside[row] + 1
        rooms = room.at[row].add(-length), token_room.at[row].add(-count), inside.at[row].add(1)
        return rooms, found

    order = jnp.argsort(lengths, stable=True, descending=True)
    rooms = tuple(jnp.full(len(lengths), size, jnp.int32) for size in (width, most, 0))
    _, found = jax.lax.scan(put, rooms, order)
    row, position, token, number = (jnp.zeros_like(x).at[order].set(x) for x in found)
    return row, position, token, number


def packed_experience(experience: Experience, rows: PackedRows) -> Experience:
    """The experience of some rows.

    Args:
        experience: B responses.
        rows: R of their rows.

    Returns:
        R rows, with `segment_ids` and `output_positions`.
    """

    def of_tokens(x):
        if x is None:  # without a critic
            return None
        return jnp.where(rows.mask, x.reshape(-1)[rows.tokens], 0)

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
        segment_ids=rows.segment_ids,
        output_positions=rows.output_positions,
    )
