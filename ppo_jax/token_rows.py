"""Rows of tokens from texts in parts, and padded arrays from rows. All of it is numpy.

Dimensions: N rows, L tokens.

Of a Hugging Face tokenizer are used `tokenizer(texts, add_special_tokens=...)["input_ids"]`,
`bos_token_id` and `eos_token_id`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ppo_jax.chat import Part

MULTIPLE = 8  # tokens: lengths are rounded up to it, which bounds the number of compiled shapes


class TokenRow(NamedTuple):
    """The tokens of one text."""

    ids: list[int]
    learned: list[bool]  # of each token


def token_rows(
    texts: Sequence[Sequence[Part]], tokenizer: Any, *, append_eos: bool
) -> list[TokenRow]:
    """The tokens of texts in parts (text, learned), each part tokenised for itself.

    Args:
        texts: one or more.
        tokenizer: a Hugging Face tokenizer. Its BOS, where it adds one, stands before the first
            part, unless that begins with it.
        append_eos: end each row with EOS, which is learned, unless it ends with it already.

    Raises:
        ValueError: no text, or no EOS to append.
    """
    if not texts:
        raise ValueError("at least one text is needed to make an array of tokens, got none")
    eos = tokenizer.eos_token_id
    if append_eos and eos is None:
        raise ValueError("the tokenizer must have an EOS token to append, its eos_token_id is None")
    leading = leading_tokens(tokenizer)
    pieces = iter(token_ids([text for parts in texts for text, _ in parts], tokenizer))
    rows = []
    for parts in texts:
        ids, learned = [], []
        for _, is_learned in parts:
            piece = next(pieces)
            ids += piece
            learned += [is_learned] * len(piece)
        before = [] if ids[: len(leading)] == leading else leading
        after = [eos] if append_eos and ids[-1:] != [eos] else []
        flags = [False] * len(before) + learned + [True] * len(after)
        rows.append(TokenRow(before + ids + after, flags))
    return rows


def token_ids(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """The tokens of each text, and no others."""
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []


def leading_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text, without the EOS that some put after it."""
    special = list(tokenizer("")["input_ids"])
    ends = special[-1:] == [tokenizer.eos_token_id] and special != [tokenizer.bos_token_id]
    return special[:-1] if ends else special


def padded(rows: Sequence[Sequence[int]], max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [N, L] int32, mask [N, L] bool), padded on the right with 0.

    L is the longest row, rounded up to `MULTIPLE`, or max_length where that is less.
    """
    lengths = np.array([len(row) for row in rows])
    length = min(-(-int(lengths.max()) // MULTIPLE) * MULTIPLE, max_length)
    mask = np.arange(length) < lengths[:, None]
    tokens = np.zeros(mask.shape, dtype=np.int32)
    tokens[mask] = np.concatenate(rows)
    return tokens, mask
