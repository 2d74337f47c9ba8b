"""Prompts: read, tokenised, and batched by their width.

Dimension key: N prompts, P prompt tokens.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from ppo_jax.core.types import Prompts
from ppo_jax.data.encode import batch_indices, filter_records, pad_prompts, token_rows
from ppo_jax.data.messages import count_left_out
from ppo_jax.data.readers import Row, naming_data
from ppo_jax.data.records import PROMPT_SCHEMAS, load_prompt_rows

SAFETY = "is_safety"  # the column that says which prompts are meant to provoke
WINDOW = 16  # batches that are sorted together: a share of long prompts down to 1/16 pads no other


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptData:
    """The prompts of a file that are not dropped."""

    texts: list[str]  # N; messages are rendered by the chat template
    prompts: Prompts  # [N, P]
    dropped: Mapping[str, int]  # reason -> number of records
    # The columns that all of the N rows have, the prompt's own included: name -> N values as they
    # stand in the file, for functions of the user's.
    columns: Mapping[str, list] = dataclasses.field(default_factory=dict)
    gaps: Mapping[str, str] = dataclasses.field(default_factory=dict)  # any other column -> the
    # place of the first row that lacks it


def prompt_data(
    path: str | os.PathLike,
    tokenizer: Any,
    *,
    max_length: int,
    field: str = "ppo.prompts",
    columns: bool = True,
) -> PromptData:
    """Read prompts; drop those without a token, those repeated and those too long.

    None is truncated, since that would change the task. Repeated is a prompt whose other columns
    are repeated as well: two equal prompts with other answers are two, also where the answer is a
    last message, which is no part of the prompt but is in the column that functions are given.
    Without `columns` they are one, and no column is kept. `field` is the setting that names the
    file, for errors.

    Raises:
        ValueError: a row is malformed, or no prompt is left.
    """
    left_out: list[str] = []
    places, texts, rows = zip(*load_prompt_rows(path, tokenizer, left_out), strict=True)
    rows = rows if columns else [{} for _ in rows]
    tokens = token_rows([((text, False),) for text in texts], tokenizer, append_eos=False)
    lengths = [len(row.ids) for row in tokens]
    reject_reasons = ["" if length else "blank" for length in lengths]
    records = [(text, other_values(row)) for text, row in zip(texts, rows, strict=True)]
    with naming_data(field, path, "ppo.max_prompt_length"):
        kept, dropped = filter_records(records, reject_reasons, lengths, max_length)
    names = dict.fromkeys(name for i in kept for name in rows[i])
    gaps = {name: next((places[i] for i in kept if name not in rows[i]), "") for name in names}
    return PromptData(
        texts=[texts[i] for i in kept],
        prompts=pad_prompts([tokens[i].ids for i in kept], max_length),
        dropped={**count_left_out(left_out), **dropped},
        columns={name: [rows[i][name] for i in kept] for name, place in gaps.items() if not place},
        gaps={name: place for name, place in gaps.items() if place},
    )


def with_safety(data: PromptData, path: str | os.PathLike) -> PromptData:
    """The prompts with their column `is_safety`, see `Prompts`; as they are where no row has it.

    Raises:
        ValueError: a row lacks it that others have, or holds neither true nor false.
    """
    if place := data.gaps.get(SAFETY):
        raise ValueError(f"{place}: there is no {SAFETY!r}, which other rows have")
    if SAFETY not in data.columns:
        return data
    flags = data.columns[SAFETY]
    for text, flag in zip(data.texts, flags, strict=True):
        if not isinstance(flag, bool):
            got = f"got {flag!r} for the prompt {text[:40]!r}"
            raise ValueError(f"{path}: {SAFETY!r} must be true or false, {got}")
    prompts = data.prompts.replace(is_safety=np.array(flags, bool))
    return dataclasses.replace(data, prompts=prompts)


def other_values(row: Row) -> str:
    """What a row holds besides its prompt, to tell two of them apart."""
    prompt = {key for schema in PROMPT_SCHEMAS for key in schema}
    others = sorted((key, value) for key, value in row.items() if key not in prompt)
    # The last message may be an answer.
    return repr(
        (others, [row[key][-1:] for key in prompt & row.keys() if isinstance(row[key], list)])
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptBuckets:
    """Batches of prompts of like width, as a pure function of seed and step.

    The widths are `max_length`, its half, its quarter, ...: a prompt is in the smallest that holds
    it. Of the batches of `batch_indices` WINDOW at a time are joined, sorted by width, stably, and
    split again into batches, which come in random order. So each prompt comes as often as without,
    within a window; with one width the batches are those of `batch_indices`.
    """

    lengths: np.ndarray  # [N] int, tokens of each prompt, at most max_length
    max_length: int  # tokens, the largest width
    count: int  # of widths; each is a program to compile
    batch_size: int  # B
    seed: int  # of the run

    @property
    def widths(self) -> np.ndarray:
        """[count] int, ascending; fewer where one token cannot be halved.

        >>> buckets = PromptBuckets(
        ...     lengths=np.array([3, 30]), max_length=32, count=3, batch_size=1, seed=0
        ... )
        >>> buckets.widths.tolist()
        [8, 16, 32]
        """
        return np.unique([-(-self.max_length >> i) for i in range(self.count)])

    @property
    def counts(self) -> np.ndarray:
        """Number of prompts in each width."""
        return np.bincount(np.searchsorted(self.widths, self.lengths), minlength=len(self.widths))

    def batch(self, step: int) -> tuple[np.ndarray, int]:
        """(indices of the prompts [B], the tokens to pad them to)."""
        sizes = dict(num_examples=len(self.lengths), batch_size=self.batch_size)
        if self.count == 1:
            return batch_indices(self.seed, step, **sizes), self.max_length
        window, place = divmod(step, WINDOW)
        steps = range(window * WINDOW, (window + 1) * WINDOW)
        rows = np.concatenate([batch_indices(self.seed, i, **sizes) for i in steps])
        bucket = np.searchsorted(self.widths, self.lengths[rows])
        order = np.argsort(bucket, kind="stable").reshape(WINDOW, self.batch_size)
        chosen = order[np.random.default_rng((self.seed, window, 1)).permutation(WINDOW)[place]]
        return rows[chosen], int(self.widths[bucket[chosen].max()])

    def __str__(self):
        counts = zip(self.widths, self.counts, strict=True)
        each = ", ".join(f"{count:,} to {width}" for width, count in counts)
        return (
            f"prompts are padded to one of {len(self.widths)} widths, a program each: {each} tokens"
        )
