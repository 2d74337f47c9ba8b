"""What a reward model learns from: tokenised texts, and which of two is preferred."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ppo_jax.batches import Texts, batch_indices, encode_preferences, encode_texts
from ppo_jax.config import RewardSettings
from ppo_jax.data import load_preferences, load_ratings
from ppo_jax.pairs import held_out_pairs, pair_accuracy, rating_pairs
from ppo_jax.training import read_split

VALIDATION_PAIRS = 20_000  # of unseen texts, ordered by their mean ratings
GAPS = {"": 0.0, "_gap1": 1.0, "_gap2": 2.0}  # least difference of mean ratings, in rating units


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardData:
    """Texts, and which of them is preferred: by fixed pairs, or by ratings to draw pairs from."""

    texts: Texts
    pairs: np.ndarray | None = None  # [M, 2] rows of (chosen, rejected)
    ratings: list[tuple[float, ...]] | None = None  # a row each

    def batch(self, seed: int, step: int, settings: RewardSettings):
        """(rows [N], pairs [M, 2] within them, valid [M]) of a training step."""
        if self.ratings is None:
            chosen = batch_indices(
                seed, step, num_examples=len(self.pairs), batch_size=settings.batch_size // 2
            )
            pairs = np.arange(settings.batch_size, dtype=np.int32).reshape(-1, 2)
            return self.pairs[chosen].reshape(-1), pairs, np.ones(len(pairs), bool)
        rows = batch_indices(
            seed, step, num_examples=len(self.ratings), batch_size=settings.batch_size
        )
        ratings = [self.ratings[row] for row in rows]
        return rows, *rating_pairs(ratings, seed, step, num_pairs=settings.pairs_per_batch)

    def accuracy(self, scores: np.ndarray, seed: int) -> dict[str, float]:
        """Share of unseen pairs in the right order; with ratings, that of their means, by gap."""
        name = "reward_model/validation_accuracy"
        if self.ratings is None:
            return {name: pair_accuracy(scores, self.pairs)}
        means = np.array([np.mean(r) for r in self.ratings])
        reach = means.max() - means.min()
        return {
            name + suffix: pair_accuracy(
                scores, held_out_pairs(means, seed, num_pairs=VALIDATION_PAIRS, min_gap=gap)
            )
            for suffix, gap in GAPS.items()
            if reach > gap
        }


def reward_data(
    settings: RewardSettings, seed: int, tokenizer: Any, context: int
) -> tuple[RewardData, RewardData]:
    """Tokenised training and validation data.

    `max_length` limits the training texts alone; the validation texts may be as long as the
    model's context, so that the accuracy is that of all texts.
    """
    lengths = (settings.max_length, context)
    if settings.format == "ratings":
        split = read_split(settings, seed, load_ratings, lambda record: record.text)
        return tuple(
            rated(part, tokenizer, length) for part, length in zip(split, lengths, strict=True)
        )
    split = read_split(
        settings,
        seed,
        load_preferences,
        lambda record: record.prompt or record.chosen,
        duplicates="keep",
    )
    encoded = (
        encode_preferences(part, tokenizer, max_length=length)
        for part, length in zip(split, lengths, strict=True)
    )
    return tuple(RewardData(texts=texts, pairs=pairs) for texts, pairs in encoded)


def rated(records: Sequence, tokenizer: Any, max_length: int) -> RewardData:
    texts = encode_texts([r.text for r in records], tokenizer, max_length=max_length)
    return RewardData(texts=texts, ratings=[records[i].ratings for i in texts.records])
