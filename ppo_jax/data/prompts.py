"""What a policy responds to: prompts, read and tokenised.

Dimension key: N prompts, P prompt tokens.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from ppo_jax.core.types import Prompts
from ppo_jax.data.encode import batch_indices, filter_records, pad_prompts, token_rows
from ppo_jax.data.readers import naming_data
from ppo_jax.data.records import load_prompts


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptData:
    """The prompts of a file that are of use."""

    texts: list[str]  # N; those of messages as the chat template writes them
    prompts: Prompts  # [N, P]
    left_out: Mapping[str, int]  # why: how many of the records


def prompt_data(
    path: str | os.PathLike, tokenizer: Any, *, max_length: int, field: str = "ppo.prompts"
) -> PromptData:
    """Read prompts; leave out those without a token, those repeated and those too long.

    None is cut, since that would change the task.

    Args:
        path: as for `formats.read_rows`.
        tokenizer: of the policy.
        max_length: tokens, `ppo.max_prompt_length`.
        field: that names the file, for the message of an error.

    Raises:
        ValueError: a row is malformed, or no prompt is left.
    """
    texts = load_prompts(path, tokenizer)
    rows = token_rows([((text, False),) for text in texts], tokenizer, append_eos=False)
    lengths = [len(row.ids) for row in rows]
    reject_reasons = ["" if length else "blank" for length in lengths]
    with naming_data(field, path, "ppo.max_prompt_length"):
        kept, left_out = filter_records(texts, reject_reasons, lengths, max_length)
    prompts = pad_prompts([rows[i].ids for i in kept], max_length)
    return PromptData(texts=[texts[i] for i in kept], prompts=prompts, left_out=left_out)


WINDOW = 16  # batches that are sorted together: a share of long prompts down to 1/16 pads no other


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptBuckets:
    """Which prompts are in which batch, and how wide it is; a pure function of seed and step.

    The widths are `max_length`, its half, its quarter, ...: a prompt is in the smallest that holds
    it. The batches of `batch_indices` are taken WINDOW at a time, their prompts sorted by width,
    stably, and cut into batches anew, which come in random order. So each prompt comes as often as
    without, within a window; with one width the batches are those of `batch_indices`.
    """

    lengths: np.ndarray  # [N] int, tokens of each prompt, at most max_length
    max_length: int  # tokens, the widest
    count: int  # how many widths; each is a program to compile
    batch_size: int  # B
    seed: int  # of the run

    @property
    def widths(self) -> np.ndarray:
        """[count] int, rising; fewer where one token cannot be halved.

        >>> buckets = PromptBuckets(
        ...     lengths=np.array([3, 30]), max_length=32, count=3, batch_size=1, seed=0
        ... )
        >>> buckets.widths.tolist()
        [8, 16, 32]
        """
        return np.unique([-(-self.max_length >> i) for i in range(self.count)])

    @property
    def counts(self) -> np.ndarray:
        """How many prompts are in each."""
        return np.bincount(np.searchsorted(self.widths, self.lengths), minlength=len(self.widths))

    def batch(self, step: int) -> tuple[np.ndarray, int]:
        """(the numbers of the prompts [B], the tokens to pad them to)."""
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
