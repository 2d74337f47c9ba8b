"""Padded arrays from text, and batches as pure functions of (seed, step). All of it is numpy.

Dimensions: N rows, L tokens of a text, P tokens of a prompt, R rankings of up to K responses.

The token id in padding is 0 and carries no meaning; the masks do. Every `tokenizer` is a Hugging
Face tokenizer, every `max_length` a number of tokens.
"""

import collections
import dataclasses
import functools
import itertools
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ppo_jax.core.types import Prompts
from ppo_jax.data.chat import Segment
from ppo_jax.data.preferences import RankedResponses
from ppo_jax.data.readers import NoRecordsLeft
from ppo_jax.data.records import Demonstration, RatedText

MULTIPLE = 8  # tokens: lengths are rounded up to it, which bounds the number of compiled shapes
CHUNK = 4096  # texts that are tokenised at a time: their beginnings are in memory, too


@dataclass(frozen=True)
class TokenizedTexts:
    """N tokenised texts, padded on the right."""

    tokens: np.ndarray  # [N, L] int32, 0 where mask is False
    mask: np.ndarray  # [N, L] bool, True on the text up to and including EOS
    loss_mask: np.ndarray  # [N, L] bool, True on the tokens to predict
    records: np.ndarray  # [N] int64, the record that the row is made from
    dropped: Mapping[str, int] = field(default_factory=dict)  # reason -> number of records
    segment_ids: np.ndarray | None = None  # [N, L] int32 in packed rows, see `packing`


def with_dropped(texts: TokenizedTexts, dropped: Mapping[str, int]) -> TokenizedTexts:
    """The same texts; other records were dropped before them."""
    return dataclasses.replace(texts, dropped={**dropped, **texts.dropped})


@dataclass(frozen=True)
class ComparisonGroups:
    """Which rows of `TokenizedTexts` respond to one prompt, and which of them are better.

    A ranking of fewer than K responses is padded with its first, which is in no further pair.
    """

    rows: np.ndarray  # [R, K] int32, of the texts
    pairs: np.ndarray  # [R, K(K-1)/2, 2] int32, (better, worse) among the K
    valid: np.ndarray  # [R, K(K-1)/2] bool, False where there is no such pair
    # [R, K(K-1)/2] float32, by how much the better should score higher; None is 0 for all
    margins: np.ndarray | None = field(default=None, metadata={"added_later": True})

    @property
    def row_pairs(self) -> np.ndarray:
        """[M, 2] int32, all pairs as rows of the texts."""
        rows = np.take_along_axis(self.rows[:, None], self.pairs, axis=2)
        return rows[self.valid]


def encode_demonstrations(
    records: Sequence[Demonstration | RatedText],
    tokenizer: Any,
    *,
    max_length: int,
    stop_ids: Collection[int] = (),
) -> TokenizedTexts:
    """Tokens of the segments of each record and EOS, with the loss on those in it and on EOS.

    Behind one of `stop_ids`, which end a response as EOS does, there is none: nobody would read it.

    A segment starts on a token of its own, as a response does; see `token_rows`. The first token of
    a row is never in the loss: nothing precedes it. Records that are rejected, repeated or too
    long, in one of their rows, are dropped.

    Raises:
        ValueError: no record, none that is left, or no EOS to append.
    """
    texts = [(i, row) for i, record in enumerate(records) for row in record.rows]
    rows = token_rows([row for _, row in texts], tokenizer, append_eos=True, stop_ids=stop_ids)
    return _kept_texts(records, [i for i, _ in texts], rows, max_length)[1]


def encode_texts(texts: Sequence[str], tokenizer: Any, *, max_length: int) -> TokenizedTexts:
    """Tokens of whole texts and EOS, whatever they are: only what is too long is dropped.

    Raises:
        ValueError: no text, none that fits, or no EOS to append.
    """
    rows = token_rows([((text, True),) for text in texts], tokenizer, append_eos=True)
    kept = [i for i, row in enumerate(rows) if len(row.ids) <= max_length]
    dropped = collections.Counter({_too_long(max_length): len(rows) - len(kept)})
    _check_kept(kept, [len(row.ids) for row in rows], max_length, dropped)
    return _padded_texts([rows[i] for i in kept], kept, max_length, +dropped)


def encode_all(texts: Sequence[str], tokenizer: Any, *, max_length: int) -> TokenizedTexts:
    """`encode_texts` with a row for each text.

    Raises:
        ValueError: no text, or one that is too long.
    """
    rows = encode_texts(texts, tokenizer, max_length=max_length)
    if rows.dropped:
        first = min(set(range(len(texts))) - set(rows.records.tolist()))
        raise ValueError(
            f"texts must have at most {max_length} tokens, got {len(texts) - len(rows.records)} "
            f"longer ones, the first of them {texts[first][:40]!r}..."
        )
    return rows


def encode_preferences(
    rankings: Sequence[RankedResponses], tokenizer: Any, *, max_length: int
) -> tuple[TokenizedTexts, ComparisonGroups]:
    """Tokens of each prompt with each of its responses and EOS, and the pairs among them.

    A ranking with a response that is too long is dropped whole.

    Returns:
        (texts, groups): the rows of a ranking are adjacent, in the order of its responses.

    Raises:
        ValueError: no record, none that is left, or no EOS to append.
    """
    responses = [(i, text) for i, ranking in enumerate(rankings) for text in ranking.responses]
    segments = [((rankings[i].prompt, False), (text, True)) for i, text in responses]
    rows = token_rows(segments, tokenizer, append_eos=True)
    kept, texts = _kept_texts(rankings, [i for i, _ in responses], rows, max_length)
    return texts, _groups([rankings[i] for i in kept])


def encode_prompts(prompts: Sequence[str], tokenizer: Any, *, max_length: int) -> Prompts:
    """Tokens of prompts, padded on the left, so that all responses start at the same position.

    The tokenizer's BOS, where it adds one, leads each prompt. A prompt that is too long is refused,
    since truncating it would change the task.

    Raises:
        ValueError: no prompt, one that is too long, or one without a token.
    """
    token_lists = token_rows([((p, False),) for p in prompts], tokenizer, append_eos=False)
    rows = [row.ids for row in token_lists]
    for index, row in enumerate(rows):
        if not 1 <= len(row) <= max_length:
            raise ValueError(
                f"prompt {index} has {len(row)} tokens, allowed are 1 to {max_length}: "
                f"{prompts[index][:80]!r}"
            )
    return pad_prompts(rows, max_length)


def pad_prompts(rows: Sequence[Sequence[int]], max_length: int) -> Prompts:
    """Rows of tokens, each at most max_length long, padded on the left with 0."""
    tokens, mask = pad_right(rows, max_length)
    # Roll each row's padding from its right end to its left.
    columns = np.arange(tokens.shape[1]) - (~mask).sum(axis=1, keepdims=True)
    return Prompts(tokens=np.take_along_axis(tokens, columns, axis=1), mask=columns >= 0)


def take_prompts(prompts: Prompts, rows: np.ndarray, width: int | None = None) -> Prompts:
    """Some of the prompts, in their last `width` positions (None is all), which must hold them."""
    begin = 0 if width is None else max(0, prompts.mask.shape[1] - width)
    flags = None if prompts.is_safety is None else prompts.is_safety[rows]
    taken = dict(tokens=prompts.tokens[rows, begin:], mask=prompts.mask[rows, begin:])
    return Prompts(**taken, is_safety=flags)


def batch_indices(seed: int, step: int, *, num_examples: int, batch_size: int) -> np.ndarray:
    """The examples of a step, [batch_size] int64: each example once an epoch, reshuffled each time.

    Steps, counted from 0, read one endless row of permutations, so a batch may span two epochs (or
    more, where it is larger than the data), and no example is dropped at the end of an epoch.

    >>> two_epochs = [batch_indices(0, step, num_examples=4, batch_size=2) for step in range(4)]
    >>> sorted(np.concatenate(two_epochs[:2]).tolist())
    [0, 1, 2, 3]
    """
    for name, size in (("num_examples", num_examples), ("batch_size", batch_size)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    start = step * batch_size
    stop = start + batch_size
    first, last = start // num_examples, (stop - 1) // num_examples
    epochs = [
        np.random.default_rng((seed, epoch)).permutation(num_examples)
        for epoch in range(first, last + 1)
    ]
    return np.concatenate(epochs)[start - first * num_examples : stop - first * num_examples]


def filter_records(
    records: Sequence[Any], reject_reasons: Sequence[str], lengths: Sequence[int], max_length: int
) -> tuple[list[int], Mapping[str, int]]:
    """(indices of the records that are kept, {reason: number of records dropped for it}).

    Dropped are records with a reject reason ("" is none), equal to an earlier one, or of a length
    in tokens above the maximum.

    Raises:
        NoRecordsLeft: none is kept.
    """
    kept, seen, dropped = [], set(), collections.Counter()
    for i, (record, reason, length) in enumerate(
        zip(records, reject_reasons, lengths, strict=True)
    ):
        reason = reason or ("repeated" if record in seen else "")
        reason = reason or (_too_long(max_length) if length > max_length else "")
        seen.add(record)
        if reason:
            dropped[reason] += 1
        else:
            kept.append(i)
    _check_kept(kept, lengths, max_length, dropped)
    return kept, dropped


def _too_long(max_length: int) -> str:
    return f"too long (over {max_length:,} tokens)"


def _check_kept(kept, lengths, max_length, dropped: Mapping[str, int]) -> None:
    if kept:
        return
    why = ", ".join(f"{n:,} {why}" for why, n in dropped.items())
    too_long = bool(dropped.get(_too_long(max_length)))
    if too_long:
        shortest = min(length for length in lengths if length > max_length)
        why += f", the shortest of which has {shortest:,}"
    raise NoRecordsLeft(f"none of the {len(lengths)} records can be used: {why}", too_long)


def _groups(rankings: Sequence[RankedResponses]) -> ComparisonGroups:
    """The groups of rankings whose responses are consecutive rows."""
    sizes = np.array([len(ranking.responses) for ranking in rankings])
    most = int(sizes.max())
    firsts = np.cumsum(sizes) - sizes
    places = np.arange(most)
    rows = firsts[:, None] + np.where(places < sizes[:, None], places, 0)
    pairs = np.zeros((len(rankings), most * (most - 1) // 2, 2), np.int32)
    valid = np.zeros(pairs.shape[:2], bool)
    for i, ranking in enumerate(rankings):
        pairs[i, : len(ranking.pairs)] = ranking.pairs
        valid[i, : len(ranking.pairs)] = True
    margins = None
    if any(ranking.margin for ranking in rankings):
        margins = np.float32([ranking.margin for ranking in rankings])[:, None] * valid
    return ComparisonGroups(rows.astype(np.int32), pairs, valid, margins)


def _kept_texts(records, owners, rows, max_length) -> tuple[list[int], TokenizedTexts]:
    """(indices of the records that are kept, their rows); `owners` are the records of the rows."""
    longest = [0] * len(records)
    for i, row in zip(owners, rows, strict=True):
        longest[i] = max(longest[i], len(row.ids))
    kept, dropped = filter_records(
        records, [record.reject_reason for record in records], longest, max_length
    )
    kept_set = set(kept)
    chosen = [(i, row) for i, row in zip(owners, rows, strict=True) if i in kept_set]
    texts = _padded_texts([r for _, r in chosen], [i for i, _ in chosen], max_length, dropped)
    return kept, texts


def _padded_texts(rows, records, max_length, dropped) -> TokenizedTexts:
    tokens, mask = pad_right([row.ids for row in rows], max_length)
    loss_mask = np.zeros(mask.shape, bool)
    loss_mask[mask] = np.concatenate([row.in_loss for row in rows])
    loss_mask[:, 0] = False
    return TokenizedTexts(tokens, mask, loss_mask, np.array(records, dtype=np.int64), dropped)


class TokenRow(NamedTuple):
    """The tokens of one text."""

    ids: list[int]
    in_loss: list[bool]  # whether each token is


def token_rows(
    texts: Sequence[Sequence[Segment]],
    tokenizer: Any,
    *,
    append_eos: bool,
    stop_ids: Collection[int] = (),
) -> list[TokenRow]:
    """The tokens of texts in segments, each text tokenised as a whole as far as that can be.

    A segment has the tokens that the text up to its end has more than the text before it, so that
    " good" behind "It is" is the one token that it is in a text. All before a response has the
    tokens that a rollout is given as its prompt; a token never spans the border. Where the whole
    text has one that does ("good" behind "is ", 2 behind 1), the prompt keeps its own, and what
    follows is tokenised from the border on, see `continued_ids`. The border is never moved.

    The tokenizer's BOS, where it adds one, leads each row, and with `append_eos` EOS, which is in
    the loss, ends it; a row that has them already does not get them twice, nor EOS behind one of
    `stop_ids`.

    Raises:
        ValueError: no text, or no EOS to append.
    """
    if not texts:
        raise ValueError("at least one text is needed to make an array of tokens, got none")
    eos = tokenizer.eos_token_id
    if append_eos and eos is None:
        raise ValueError("the tokenizer must have an EOS token to append, its eos_token_id is None")
    leading = leading_tokens(tokenizer)
    merged = [merge_segments(segments) for segments in texts]
    parts_of = [[text for text, _ in segments] for segments in merged]
    chunks = (parts_of[n : n + CHUNK] for n in range(0, len(parts_of), CHUNK))
    tokenised = (parts for chunk in chunks for parts in segment_ids(chunk, tokenizer))
    rows = []
    for segments, parts in zip(merged, tokenised, strict=True):
        ids = [i for part in parts for i in part]
        in_loss = [counts for (_, counts), part in zip(segments, parts, strict=True) for _ in part]
        before = [] if ids[: len(leading)] == leading else leading
        has_ended = bool(ids) and ids[-1] in (eos, *stop_ids)
        after = [eos] if append_eos and not has_ended else []
        flags = [False] * len(before) + in_loss + [True] * len(after)
        rows.append(TokenRow(before + ids + after, flags))
    return rows


def merge_segments(segments: Sequence[Segment]) -> list[Segment]:
    """Neighbours that are both in the loss, or both not, as one.

    >>> merge_segments([("It ", False), ("is", False), (" good", True)])
    [('It is', False), (' good', True)]
    """
    groups = itertools.groupby(segments, key=lambda segment: segment[1])
    return [("".join(text for text, _ in group), in_loss) for in_loss, group in groups]


def segment_ids(texts: Sequence[Sequence[str]], tokenizer: Any) -> list[list[list[int]]]:
    """The tokens of each segment of each text; see `token_rows`."""
    parts: list[list[list[int]]] = [[] for _ in texts]
    encode, rest = token_ids, [i for i, segments in enumerate(texts) if segments]
    while rest:
        # All texts up to each border that is left, in one call.
        prefixes = [list(itertools.accumulate(texts[i][len(parts[i]) :])) for i in rest]
        distinct = list(dict.fromkeys(itertools.chain.from_iterable(prefixes)))
        ids = dict(zip(distinct, encode(distinct, tokenizer), strict=True))
        for i, borders in zip(rest, prefixes, strict=True):
            parts[i] += growth([ids[prefix] for prefix in borders])
        encode, rest = continued_ids, [i for i in rest if len(parts[i]) < len(texts[i])]
    return parts


def growth(lists: Sequence[list[int]]) -> list[list[int]]:
    """What each list has more than the one before it, up to the first that does not begin with it.

    >>> growth([[1], [1, 2, 3], [1, 2, 3], [1, 4, 5]])
    [[1], [2, 3], []]
    """
    before: list[int] = []
    parts = []
    for ids in lists:
        if ids[: len(before)] != before:
            break
        parts.append(ids[len(before) :])
        before = ids
    return parts


def token_ids(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """The tokens of each text, and no others."""
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []


def continued_ids(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """The tokens of texts that continue others: without the space that some tokenizers put before
    every text, as SentencePiece does."""
    tokenised, backend = token_ids(texts, tokenizer), without_first_space(tokenizer)
    if backend is None:
        return tokenised
    # Behind a special token the text is tokenised as it always is.
    special = set(tokenizer.added_tokens_decoder)
    continued = (x.ids for x in backend.encode_batch(list(texts), add_special_tokens=False))
    rows = []
    for ids, first in zip(tokenised, continued, strict=True):
        begin, end = (
            next((n for n, i in enumerate(x) if i in special), len(x)) for x in (ids, first)
        )
        rows.append(first[:end] + ids[begin:])
    return rows


@functools.lru_cache(maxsize=4)
def without_first_space(tokenizer: Any) -> Any:
    """The backend of a tokenizer that puts a space before a text, without that; None if it does
    not."""
    backend = tokenizer.backend_tokenizer
    text = backend.normalizer.normalize_str("a") if backend.normalizer else "a"
    words = backend.pre_tokenizer.pre_tokenize_str(text) if backend.pre_tokenizer else [(text, ())]
    if words[0][0].startswith("a"):
        return None
    spec = json.loads(backend.to_str())
    for name in ("normalizer", "pre_tokenizer"):
        drop_first_space(spec[name])
    return type(backend).from_str(json.dumps(spec))


def drop_first_space(part: dict[str, Any] | None):
    """Change, in place, the normalizer or pre-tokenizer of a tokenizer.json."""
    if part is None:
        return
    for name in ("normalizers", "pretokenizers"):
        for inner in part.get(name, ()):
            drop_first_space(inner)
    without = {
        "Prepend": {"prepend": ""},
        "Metaspace": {"prepend_scheme": "never"},
        "ByteLevel": {"add_prefix_space": False},
    }
    part |= without.get(part["type"], {})


def leading_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer adds before a text, without what some add after it."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    count = len(list(itertools.takewhile(bool, encoded["special_tokens_mask"])))
    return encoded["input_ids"][:count]


def pad_right(rows: Sequence[Sequence[int]], max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [N, L] int32, mask [N, L] bool), padded on the right with 0.

    L is the longest row, rounded up to `MULTIPLE`, or max_length where that is less.
    """
    lengths = np.array([len(row) for row in rows])
    length = min(-(-int(lengths.max()) // MULTIPLE) * MULTIPLE, max_length)
    mask = np.arange(length) < lengths[:, None]
    tokens = np.zeros(mask.shape, dtype=np.int32)
    tokens[mask] = np.concatenate(rows)
    return tokens, mask


def unpadded(tokens: np.ndarray, mask: np.ndarray) -> list[list[int]]:
    """The tokens of each row [N, L] that are no padding."""
    return [row[kept].tolist() for row, kept in zip(tokens, mask, strict=True)]


def row_batches(mask: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """All rows once, sorted by length, since a batch is as wide as its longest row."""
    order = np.argsort(mask.sum(axis=1), kind="stable")
    return [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
