"""Several texts a row, so that little of a batch is padding. All of it is numpy.

A packed row is a row of `TokenizedTexts`: its texts follow one another, then padding.
`segment_ids` says which is which, and the network keeps them apart (see `core.network.Network`).
Dimensions: N texts, R rows, L tokens.
"""

import bisect
import dataclasses

import numpy as np

from ppo_jax.data.encode import TokenizedTexts


def pack(texts: TokenizedTexts, *, max_length: int) -> TokenizedTexts:
    """The same texts in as few rows as best-fit-decreasing finds; none is split.

    What a row holds depends on the lengths of the texts alone. The first token of each text stays
    out of the loss, so that no text is predicted from the one before it.

    Returns:
        R rows with `segment_ids`: 1, 2, ... on the texts of a row, 0 in padding. `records` has an
        entry for each text, in their order in the rows.

    Raises:
        ValueError: a text is longer than a row.
    """
    lengths = texts.mask.sum(axis=1)
    if lengths.max() > max_length:
        raise ValueError(f"a row of {max_length} tokens cannot hold a text of {lengths.max()}")
    rows = best_fit(lengths, max_length)
    order = np.concatenate(rows)
    totals = np.array([lengths[row].sum() for row in rows])
    mask = np.arange(totals.max()) < totals[:, None]

    def to_rows(values: np.ndarray) -> np.ndarray:
        """[number of tokens], text after text, as [R, L]."""
        out = np.zeros(mask.shape, values.dtype)
        out[mask] = values
        return out

    real = texts.mask[order]
    numbers = np.concatenate([np.arange(1, len(row) + 1, dtype=np.int32) for row in rows])
    return dataclasses.replace(
        texts,
        tokens=to_rows(texts.tokens[order][real]),
        mask=mask,
        loss_mask=to_rows(texts.loss_mask[order][real]),
        records=texts.records[order],
        segment_ids=to_rows(np.repeat(numbers, lengths[order])),
    )


def best_fit(lengths: np.ndarray, max_length: int) -> list[list[int]]:
    """Which texts go into which row: the longest first, each into the fullest row that has room.

    `lengths` are [N] int, none above `max_length`; the result is R rows of indices into them.

    Reference: Johnson 1974, https://doi.org/10.1137/0203025: at most 11/9 of the fewest rows, and
    a few more.

    >>> best_fit(np.array([2, 7, 5, 3, 8]), max_length=10)
    [[4, 0], [1, 3], [2]]
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # tokens left -> the rows that have as many
    rooms: list[int] = []  # the keys of by_room, ascending
    for text in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[text])
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            row, room = len(rows), max_length
            rows.append([])
        else:
            room = rooms[place]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        rows[row].append(text)
        if room - length not in by_room:
            bisect.insort(rooms, room - length)
        by_room.setdefault(room - length, []).append(row)
    return rows


def describe_packing(packed: TokenizedTexts) -> str:
    """Number of texts and rows, and the share of positions that hold tokens."""
    texts, rows, share = len(packed.records), len(packed.mask), packed.mask.mean()
    return f"{texts:,} texts in {rows:,} rows, {texts / rows:.1f} a row, {share:.0%} full"
