"""Pairs of rated texts: preferences to learn from, pairs to evaluate on, and their accuracy.

Only numpy. A pair is two rows of a batch or a data set, the better one first.
"""

from collections.abc import Sequence

import numpy as np

TRAINING, HELD_OUT = 1, 2  # random streams: one seed must not correlate the two uses


def rating_pairs(
    ratings: Sequence[Sequence[float]], seed: int, step: int, *, num_pairs: int
) -> tuple[np.ndarray, np.ndarray]:
    """Preferences derived from human ratings: of two texts, one rating each, the higher wins.

    Each pair joins two different texts, all texts are in equally many pairs (up to two more for
    some, where it does not divide), and no two texts meet again before all have met. A rating is
    drawn for each text of a pair, so that the pairs disagree as raters do. Each step draws other
    pairs and ratings.

    Returns:
        (pairs, valid): [num_pairs, 2] int32 rows of (winner, loser); [num_pairs] bool, False where
        the two ratings are equal and nobody won.

    Raises:
        ValueError: fewer than two texts, one without ratings, or a rating that is not finite.
    """
    if num_pairs < 1:
        raise ValueError(f"num_pairs must be at least 1, got {num_pairs}")
    counts = np.array([len(row) for row in ratings])
    if counts.size < 2 or counts.min() < 1:
        raise ValueError(
            "ratings must be of two texts or more, one rating or more of each, got counts "
            f"{counts.tolist()}"
        )
    flat = _finite(np.concatenate(ratings), "ratings")
    rng = np.random.default_rng((TRAINING, seed, step))
    left, right = _round_robin(counts.size, num_pairs)
    pairs = rng.permutation(counts.size)[np.stack([left, right], axis=1)]
    firsts = np.cumsum(counts) - counts
    drawn = flat[firsts[pairs] + rng.integers(counts[pairs])]
    ordered = np.where(drawn[:, :1] >= drawn[:, 1:], pairs, pairs[:, ::-1])
    return ordered.astype(np.int32), drawn[:, 0] != drawn[:, 1]


def held_out_pairs(
    means: Sequence[float] | np.ndarray, seed: int, *, num_pairs: int, min_gap: float
) -> np.ndarray:
    """Pairs for evaluation, ordered by mean rating: a uniform draw from all that fit.

    The means [N] of a pair differ by at least `min_gap` (to 1e-9); equal means are no pair.

    Returns:
        [at most num_pairs, 2] int32 rows of (higher, lower), no pair twice; all that fit, where
        they are fewer.

    Raises:
        ValueError: no two means differ by `min_gap`.
    """
    if num_pairs < 1:
        raise ValueError(f"num_pairs must be at least 1, got {num_pairs}")
    means = _finite(np.asarray(means, dtype=np.float64), "means")
    order = np.argsort(means, kind="stable")
    ranked = means[order]
    # The texts that rank i may be paired with are those of rank 0 to partners[i] - 1.
    partners = np.minimum(
        np.searchsorted(ranked, ranked - min_gap + 1e-9, side="right"),
        np.searchsorted(ranked, ranked, side="left"),
    )
    ends = np.cumsum(partners)
    if not ranked.size or ends[-1] == 0:
        raise ValueError(f"min_gap={min_gap} leaves no pair of the {ranked.size} means given")
    rng = np.random.default_rng((HELD_OUT, seed))
    picked = rng.choice(ends[-1], size=min(num_pairs, int(ends[-1])), replace=False)
    higher = np.searchsorted(ends, picked, side="right")
    lower = picked - (ends - partners)[higher]
    return order[np.stack([higher, lower], axis=1)].astype(np.int32)


def pair_accuracy(scores: np.ndarray, pairs: np.ndarray) -> float:
    """Share of pairs whose first text has the higher score; an equal score counts one half.

    Scores are [N] float; pairs [M, 2] int, rows of (winner, loser).

    Raises:
        ValueError: no pair, or a score that is not finite.

    >>> pair_accuracy(np.array([2.0, 1.0, 1.0]), np.array([[0, 1], [1, 2], [2, 0]]))
    0.5
    """
    if len(pairs) == 0:
        raise ValueError("pairs must hold at least one pair, got none")
    winners, losers = _finite(np.asarray(scores), "scores")[pairs].T
    return float(np.mean((winners > losers) + 0.5 * (winners == losers)))


def _round_robin(size: int, num_pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Partners on a circle: all at distance 1, then all at distance 2, and so on.

    Distances d and size - d are the same pairs, so after size // 2 of them all have met.
    """
    turn, left = np.divmod(np.arange(num_pairs), size)
    return left, (left + 1 + turn % (size - 1)) % size


def _finite(numbers: np.ndarray, name: str) -> np.ndarray:
    bad = np.flatnonzero(~np.isfinite(numbers))
    if bad.size:
        raise ValueError(f"{name} must be finite, got {numbers[bad[0]]} at {bad[0]}")
    return numbers
