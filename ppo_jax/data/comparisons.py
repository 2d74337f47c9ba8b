"""Training data of a reward model: tokenised texts, and which of two is preferred."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ppo_jax.config.stages import RewardSettings
from ppo_jax.data.encode import (
    ComparisonGroups,
    TokenizedTexts,
    batch_indices,
    encode_demonstrations,
    encode_preferences,
    with_dropped,
)
from ppo_jax.data.messages import count_left_out
from ppo_jax.data.preferences import RankedResponses, load_preferences
from ppo_jax.data.ratings import held_out_pairs, pair_accuracy, rating_pairs
from ppo_jax.data.readers import naming_data
from ppo_jax.data.records import RatedText, data_files, load_ratings, read_split

VALIDATION_PAIRS = 20_000  # of unseen texts, ordered by their mean ratings
CONTEXT = "the model's context"  # the limit of texts that are only scored
MARGINS = {"": 0.0, "_margin1": 1.0, "_margin2": 2.0}  # least difference of mean ratings


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardData:
    """Texts with fixed pairs of them (`groups`), or with ratings to draw pairs from (`ratings`)."""

    texts: TokenizedTexts
    groups: ComparisonGroups | None = None  # of responses to one prompt
    ratings: list[tuple[float, ...]] | None = None  # of each row

    @property
    def num_rows(self) -> int:
        """Rows of one epoch; a ranking counts as many as the largest has responses."""
        return len(self.ratings) if self.groups is None else self.groups.rows.size

    def batch(self, seed: int, step: int, settings: RewardSettings):
        """(rows [N], pairs [M, 2] within them, valid [M], margins [M] or None) of a training step.

        All responses to a prompt are in one batch, with all pairs among them.
        """
        if self.groups is None:
            rows = batch_indices(
                seed, step, num_examples=len(self.ratings), batch_size=settings.batch_size
            )
            ratings = [self.ratings[row] for row in rows]
            pairs = rating_pairs(ratings, seed, step, num_pairs=settings.pairs_per_batch)
            return rows, *pairs, None
        groups, size = self.groups, self.groups.rows.shape[1]
        chosen = batch_indices(
            seed, step, num_examples=len(groups.rows), batch_size=settings.batch_size // size
        )
        firsts = np.arange(len(chosen), dtype=np.int32) * size
        pairs = (groups.pairs[chosen] + firsts[:, None, None]).reshape(-1, 2)
        margins = None if groups.margins is None else groups.margins[chosen].reshape(-1)
        return groups.rows[chosen].reshape(-1), pairs, groups.valid[chosen].reshape(-1), margins

    def accuracy(self, scores: np.ndarray, seed: int) -> dict[str, float]:
        """Share of unseen pairs in the right order, and how many they are.

        With ratings the order is that of their means, and pairs are drawn for each margin.
        """
        metrics = {}
        for suffix, pairs in self.unseen_pairs(seed).items():
            metrics["reward_model/validation_accuracy" + suffix] = pair_accuracy(scores, pairs)
            metrics["reward_model/validation_pairs" + suffix] = len(pairs)
        return metrics

    def unseen_pairs(self, seed: int) -> dict[str, np.ndarray]:
        """{"": all pairs, "_margin1": pairs that differ by 1 or more ...}, rows (better, worse)."""
        if self.groups is not None:
            return {"": self.groups.row_pairs}
        means = np.array([np.mean(r) for r in self.ratings])
        reach = means.max() - means.min()
        return {
            suffix: held_out_pairs(means, seed, num_pairs=VALIDATION_PAIRS, min_gap=margin)
            for suffix, margin in MARGINS.items()
            if reach > 0 and reach >= margin
        }


def reward_data(
    settings: RewardSettings, seed: int, tokenizer: Any, context: int
) -> tuple[RewardData, RewardData]:
    """Tokenised (training, validation) data.

    `max_length` limits the training texts alone; validation texts may be as long as the model's
    context, so that the accuracy is that of all texts.
    """
    left_out = collections.defaultdict(list)
    if settings.format == "ratings":
        encode, key = encode_rated, lambda record: record.text
        split = read_split(settings, seed, load_ratings, key)
    else:
        encode, key = encode_ranked, lambda record: record.conversation

        def read(path: str) -> list[RankedResponses]:
            return load_preferences(path, tokenizer, left_out[path])

        split = read_split(settings, seed, read, key, left_out)
    limits, encoded = ((settings.max_length, "reward.max_length"), (context, CONTEXT)), []
    for (field, path), records, (length, limit) in zip(
        data_files(settings), split, limits, strict=True
    ):
        with naming_data(f"reward.{field}", path, limit):
            part = encode(records, tokenizer, length)
        texts = with_dropped(part.texts, count_left_out(left_out.pop(path, [])))
        encoded.append(dataclasses.replace(part, texts=texts))
    return tuple(encoded)


def encode_ranked(
    records: Sequence[RankedResponses], tokenizer: Any, max_length: int
) -> RewardData:
    texts, groups = encode_preferences(records, tokenizer, max_length=max_length)
    return RewardData(texts=texts, groups=groups)


def encode_rated(records: Sequence[RatedText], tokenizer: Any, max_length: int) -> RewardData:
    texts = encode_demonstrations(records, tokenizer, max_length=max_length)
    return RewardData(texts=texts, ratings=[records[i].ratings for i in texts.records])
