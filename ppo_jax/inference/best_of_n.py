"""Best-of-n: of n responses to a prompt the one that a reward model scores highest.

Pure numpy. Dimension key: P prompts, N samples of each, n of them that one is chosen from.
"""

import math

import numpy as np


def kl_bound(n: int) -> float:
    """KL(best-of-n || policy) in nats a response: log n - (n - 1) / n, an upper bound.

    It is exact where no two responses to a prompt are the same and no two scores are equal; where
    the policy repeats itself the KL is less.

    References: Stiennon et al. 2020, https://arxiv.org/abs/2009.01325, appendix G.3; Beirami et al.
    2024, https://arxiv.org/abs/2401.01879, theorem 1: that it is a bound.

    >>> [round(kl_bound(n), 3) for n in (1, 4, 16, 64)]
    [0.0, 0.636, 1.835, 3.175]
    """
    check_n(n)
    return math.log(n) - (n - 1) / n


def rank_weights(num_samples: int, n: int) -> np.ndarray:
    """Probability that the sample of each rank is the best of n drawn from N without replacement.

    w_i = C(i - 1, n - 1) / C(N, n) of the sample of rank i, 1 being the lowest.

    Returns:
        [N] float64, ascending by rank; they sum to 1.

    >>> rank_weights(4, 2).round(3).tolist()
    [0.0, 0.167, 0.333, 0.5]
    """
    check_n(n, num_samples)
    weights = np.zeros(num_samples)
    weights[-1] = n / num_samples
    for rank in range(num_samples, n, -1):  # no binomial coefficient, which would overflow
        weights[rank - 2] = weights[rank - 1] * (rank - n) / (rank - 1)
    return weights


def expected_best(scores: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """What the best of n by `scores` is worth by `values`, on average over all n of the N samples.

    Unbiased for a fresh n, for every n <= N, since any n of the N are a sample of n; it uses all N,
    so that its variance is less than that of one choice. Of equal scores each is as likely.

    Args:
        scores: [P, N] float, by which the best is chosen (the proxy).
        values: [P, N] float, of the same responses (gold, or the scores themselves).
        n: from 1 to N.

    Returns:
        [P] float64, of each prompt.

    Raises:
        ValueError: the shapes differ, a number is not finite, or there are fewer than n samples.

    Reference: Nakano et al. 2021, https://arxiv.org/abs/2112.09332, appendix I.

    >>> expected_best(np.array([[1.0, 2.0, 2.0]]), np.array([[9.0, 5.0, 1.0]]), 3).tolist()
    [3.0]
    """
    scores, values = (np.asarray(x, np.float64) for x in (scores, values))
    if scores.ndim != 2 or scores.shape != values.shape:
        raise ValueError(
            f"scores and values must be [P, N] alike, got {scores.shape} and {values.shape}"
        )
    for name, array in (("scores", scores), ("values", values)):
        if not np.isfinite(array).all():
            raise ValueError(f"{name} must be finite")
    weights = rank_weights(scores.shape[1], n)
    return np.array(
        [shared_weights(row, weights) @ value for row, value in zip(scores, values, strict=True)]
    )


def shared_weights(scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The weights [N] of ranks as those of samples; equal scores [N] share theirs equally."""
    _, group = np.unique(scores, return_inverse=True)
    sizes = np.bincount(group)
    ends = np.cumsum(sizes)
    sums = np.diff(np.concatenate([[0.0], np.cumsum(weights)[ends - 1]]))
    return (sums / sizes)[group]


def best_of_first(scores: np.ndarray, n: int) -> np.ndarray:
    """Which of the first n samples of each prompt has the highest score [P, N]; of equal ones the
    first. This is the response that best-of-n gives: [P] int.

    >>> best_of_first(np.array([[0.0, 2.0, 2.0, 9.0]]), 3).tolist()
    [1]
    """
    scores = np.asarray(scores)
    check_n(n, scores.shape[1])
    return scores[:, :n].argmax(axis=1)


def check_n(n: int, num_samples: int | None = None) -> None:
    """Raise a ValueError where n is no number of samples, or there are fewer."""
    if n < 1 or (num_samples is not None and n > num_samples):
        most = "" if num_samples is None else f" and at most the {num_samples} samples of a prompt"
        raise ValueError(f"n must be at least 1{most}, got {n}")
