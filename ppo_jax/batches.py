"""Padded arrays from text, and batches as pure functions of (seed, step). All of it is numpy.

Dimensions: N rows, L tokens of a text, P tokens of a prompt.

The token id in padding is 0 and carries no meaning; the masks do. Of a Hugging Face tokenizer are
used `tokenizer(texts, add_special_tokens=...)["input_ids"]`, `bos_token_id` and `eos_token_id`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.data import Demonstration, Preference
from ppo_jax.structs import Prompts

MULTIPLE = 8  # tokens: lengths are rounded up to it, which bounds the number of compiled shapes


@dataclass(frozen=True)
class Texts:
    """N tokenised texts, padded on the right."""

    tokens: np.ndarray  # [N, L] int32, 0 where mask is False
    mask: np.ndarray  # [N, L] bool, True on the text up to and including EOS
    loss_mask: np.ndarray  # [N, L] bool, True on the tokens to predict
    records: np.ndarray  # [N] int64, which of the given records the row is made from
    num_dropped: int  # records left out because they are longer than max_length


def encode_demonstrations(
    demonstrations: Sequence[Demonstration],
    tokenizer: Any,
    *,
    max_length: int,
    append_eos: bool = True,
) -> Texts:
    """Tokens of prompt and completion, with the loss on the completion and its EOS.

    Prompt and completion are tokenised apart, as in a rollout, where the response starts on a token
    of its own. The tokenizer's BOS, where it adds one, belongs to the prompt. The first token of a
    row is never in the loss: nothing stands before it to predict it from.

    Args:
        demonstrations: N or more records.
        tokenizer: a Hugging Face tokenizer.
        max_length: tokens; longer records are dropped, and counted in `num_dropped`.
        append_eos: end each row with EOS, unless its text ends with it already.

    Raises:
        ValueError: no record, none that fits, or no EOS to append.
    """
    prompts = [demonstration.prompt for demonstration in demonstrations]
    completions = [demonstration.completion for demonstration in demonstrations]
    rows, starts = _joined(prompts, completions, tokenizer, append_eos=append_eos)
    kept = [i for i, row in enumerate(rows) if len(row) <= max_length]
    _check_kept(kept, rows, max_length)
    return _padded_texts(rows, starts, kept, kept, max_length, len(rows) - len(kept))


def encode_texts(
    texts: Sequence[str], tokenizer: Any, *, max_length: int, append_eos: bool = True
) -> Texts:
    """Tokens of whole texts; `encode_demonstrations` with the prompt "".

    Args:
        texts: N or more.
        tokenizer: a Hugging Face tokenizer.
        max_length: tokens; longer texts are dropped, and counted in `num_dropped`.
        append_eos: end each row with EOS, unless its text ends with it already.

    Raises:
        ValueError: no text, none that fits, or no EOS to append.
    """
    demonstrations = [Demonstration(prompt="", completion=text) for text in texts]
    return encode_demonstrations(
        demonstrations, tokenizer, max_length=max_length, append_eos=append_eos
    )


def encode_all(texts: Sequence[str], tokenizer: Any, *, max_length: int) -> Texts:
    """`encode_texts` with a row for each text.

    Raises:
        ValueError: no text, or one that is too long.
    """
    rows = encode_texts(texts, tokenizer, max_length=max_length)
    if rows.num_dropped:
        first = min(set(range(len(texts))) - set(rows.records.tolist()))
        raise ValueError(
            f"texts must have at most {max_length} tokens, got {rows.num_dropped} longer ones, the "
            f"first of them {texts[first][:40]!r}..."
        )
    return rows


def encode_preferences(
    preferences: Sequence[Preference], tokenizer: Any, *, max_length: int
) -> tuple[Texts, np.ndarray]:
    """Tokens of both sides of each preference, and the rows that make the pairs.

    Args:
        preferences: N or more records.
        tokenizer: a Hugging Face tokenizer with an EOS, which ends every row.
        max_length: tokens; a preference with a longer side is dropped whole.

    Returns:
        (texts, pairs): 2N rows, prompt and chosen in row 2i, prompt and rejected in row 2i + 1; and
        [N, 2] int32 rows of (chosen, rejected). `num_dropped` counts preferences.

    Raises:
        ValueError: no record, none that fits, or no EOS to append.
    """
    prompts = [preference.prompt for preference in preferences for _ in range(2)]
    sides = [
        side for preference in preferences for side in (preference.chosen, preference.rejected)
    ]
    rows, starts = _joined(prompts, sides, tokenizer, append_eos=True)
    kept = [i for i in range(len(rows)) if max(len(rows[i]), len(rows[i ^ 1])) <= max_length]
    _check_kept(kept, rows, max_length)
    num_dropped = (len(rows) - len(kept)) // 2
    records = [i // 2 for i in kept]
    pairs = np.arange(len(kept), dtype=np.int32).reshape(-1, 2)
    return _padded_texts(rows, starts, kept, records, max_length, num_dropped), pairs


def encode_prompts(prompts: Sequence[str], tokenizer: Any, *, max_length: int) -> Prompts:
    """Tokens of prompts, padded on the left, so that all responses start at the same position.

    Args:
        prompts: N texts.
        tokenizer: a Hugging Face tokenizer; its BOS, where it adds one, leads each prompt.
        max_length: tokens. A longer prompt is refused, since cutting it would change the task.

    Raises:
        ValueError: no prompt, one that is too long, or one without a token.
    """
    rows, _ = _joined(prompts, [""] * len(prompts), tokenizer, append_eos=False)
    for index, row in enumerate(rows):
        if not 1 <= len(row) <= max_length:
            raise ValueError(
                f"prompt {index} has {len(row)} tokens, allowed are 1 to {max_length}: "
                f"{prompts[index][:80]!r}"
            )
    tokens, mask = _padded(rows, max_length)
    # Roll each row's padding from its right end to its left.
    columns = np.arange(tokens.shape[1]) - (~mask).sum(axis=1, keepdims=True)
    return Prompts(tokens=np.take_along_axis(tokens, columns, axis=1), mask=columns >= 0)


def take_prompts(prompts: Prompts, rows: np.ndarray) -> Prompts:
    """Some of the prompts, on the device. All have one width: one compiled program."""
    return jax.tree.map(lambda x: jnp.asarray(x[rows]), prompts)


def batch_indices(seed: int, step: int, *, num_examples: int, batch_size: int) -> np.ndarray:
    """The examples of one step: shuffled afresh each epoch, each example once an epoch.

    The steps read one endless row of permutations, so a batch may span two epochs (or more, where
    it is larger than the data), and no example is left out at the end of an epoch.

    Args:
        seed: of the run.
        step: from 0.
        num_examples: how many there are.
        batch_size: how many to take, global.

    Returns:
        [batch_size] int64.

    >>> two_epochs = [batch_indices(0, step, num_examples=4, batch_size=2) for step in range(4)]
    >>> sorted(np.concatenate(two_epochs[:2]).tolist())
    [0, 1, 2, 3]
    """
    _check_positive(num_examples=num_examples, batch_size=batch_size)
    start = step * batch_size
    stop = start + batch_size
    first, last = start // num_examples, (stop - 1) // num_examples
    epochs = [
        np.random.default_rng((seed, epoch)).permutation(num_examples)
        for epoch in range(first, last + 1)
    ]
    return np.concatenate(epochs)[start - first * num_examples : stop - first * num_examples]


def _joined(
    prompts: Sequence[str], completions: Sequence[str], tokenizer: Any, *, append_eos: bool
) -> tuple[list[list[int]], list[int]]:
    """The tokens of each prompt and completion, and where the completion starts."""
    if not prompts:
        raise ValueError("at least one text is needed to make an array of tokens, got none")
    if append_eos and tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer must have an EOS token to append, its eos_token_id is None")
    leading = _leading_tokens(tokenizer)
    rows, starts = [], []
    for prompt, completion in zip(
        _token_ids(prompts, tokenizer), _token_ids(completions, tokenizer), strict=True
    ):
        if append_eos and completion[-1:] != [tokenizer.eos_token_id]:
            completion = completion + [tokenizer.eos_token_id]
        rows.append(leading + prompt + completion)
        starts.append(len(leading) + len(prompt))
    return rows, starts


def _token_ids(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]


def _leading_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text, without the EOS that some put after it."""
    special = list(tokenizer("")["input_ids"])
    ends = special[-1:] == [tokenizer.eos_token_id] and special != [tokenizer.bos_token_id]
    return special[:-1] if ends else special


def _padded_texts(rows, starts, kept, records, max_length, num_dropped) -> Texts:
    tokens, mask = _padded([rows[i] for i in kept], max_length)
    first_predicted = np.maximum([starts[i] for i in kept], 1)
    loss_mask = mask & (np.arange(tokens.shape[1]) >= first_predicted[:, None])
    return Texts(tokens, mask, loss_mask, np.array(records, dtype=np.int64), num_dropped)


def _padded(rows: list[list[int]], max_length: int) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(row) for row in rows])
    length = min(_rounded_up(int(lengths.max()), MULTIPLE), max_length)
    mask = np.arange(length) < lengths[:, None]
    tokens = np.zeros(mask.shape, dtype=np.int32)
    tokens[mask] = np.concatenate(rows)
    return tokens, mask


def _check_kept(kept: list[int], rows: list[list[int]], max_length: int) -> None:
    if not kept:
        shortest = min(len(row) for row in rows)
        raise ValueError(
            f"max_length={max_length} tokens leaves no text of {len(rows)}: the shortest has "
            f"{shortest}"
        )


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
