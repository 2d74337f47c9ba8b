"""Sampled responses on the host: their text, their tokens and how likely they were."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ppo_jax.core.types import Rollout
from ppo_jax.data.encode import unpadded
from ppo_jax.distributed.layout import fetch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Responses:
    """N responses of one policy, in the order of their prompts."""

    texts: list[str]  # without the stop token
    rows: list[list[int]]  # tokens of the prompt and the response
    lengths: np.ndarray  # [N] int, tokens of the response alone
    logprobs: np.ndarray  # [N] float, of the whole response by its policy, at its temperature
    ended: np.ndarray  # [N] bool, by a stop token; the others were cut off

    def take(self, chosen: Sequence[int] | np.ndarray) -> "Responses":
        """Some of them."""
        chosen = np.asarray(chosen)
        return Responses(
            texts=[self.texts[i] for i in chosen],
            rows=[self.rows[i] for i in chosen],
            lengths=self.lengths[chosen],
            logprobs=self.logprobs[chosen],
            ended=self.ended[chosen],
        )


def join(parts: Sequence[Responses]) -> Responses:
    """The responses of several policies, one after another."""
    return Responses(
        texts=[text for part in parts for text in part.texts],
        rows=[row for part in parts for row in part.rows],
        lengths=np.concatenate([part.lengths for part in parts]),
        logprobs=np.concatenate([part.logprobs for part in parts]),
        ended=np.concatenate([part.ended for part in parts]),
    )


def read_rollouts(texts: Sequence[str], rollouts: Sequence[Rollout]) -> Responses:
    """The responses of `generate`, whose last batch may be padded: N texts, N or more rows."""
    rows, lengths, logprobs, ended = [], [], [], []
    wanted = [(r.tokens, r.mask, r.response_mask, r.logprobs, r.has_eos) for r in rollouts]
    for tokens, mask, response_mask, logprob, has_eos in fetch(wanted):
        rows += unpadded(tokens, mask)
        lengths.append(response_mask.sum(axis=1))
        logprobs.append(np.where(response_mask, logprob, 0.0).sum(axis=1, dtype=np.float64))
        ended.append(has_eos)
    count = len(texts)
    lengths, logprobs, ended = (np.concatenate(x)[:count] for x in (lengths, logprobs, ended))
    return Responses(
        texts=list(texts), rows=rows[:count], lengths=lengths, logprobs=logprobs, ended=ended
    )
