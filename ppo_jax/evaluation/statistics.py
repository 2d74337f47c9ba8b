"""Statistics of a comparison: win rates, bootstrap intervals, variety, and the table of judges.

A judge is a function `list[str] -> [N] float`, higher is better; its scale is its own. Only the
order of two scores of one judge is compared, so judges of different scales stand in one table.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ppo_jax.config.parsing import failure
from ppo_jax.data.ratings import held_out_pairs, pair_accuracy
from ppo_jax.training.reward_functions import BadScores, read_scores

Judge = Callable[[Sequence[str]], np.ndarray]
WORD = r"\w+(?:['’]\w+)*"  # "isn't" is one word: the negation stays visible
RESAMPLES = 10_000
RATED_PAIRS = 100_000  # that measure a judge, at most


def share_interval(share: float, count: int) -> tuple[float, float]:
    """The 95% interval of a share of independent pairs (Wilson 1927).

    >>> [round(x, 3) for x in share_interval(0.9, 100)]
    [0.826, 0.945]
    """
    z = 1.96
    middle, width = share + z * z / (2 * count), share * (1 - share) / count
    reach = z * (width + (z / (2 * count)) ** 2) ** 0.5
    return tuple((middle + sign * reach) / (1 + z * z / count) for sign in (-1, 1))


def rating_accuracy(scores: np.ndarray, mean_ratings: np.ndarray, *, gap: float) -> float:
    """`pair_accuracy` on pairs of texts whose mean ratings differ by `gap` or more.

    Args:
        scores: [N] float, what the judge says of each text.
        mean_ratings: [N] float, the human mean of each.
        gap: in units of rating.

    Raises:
        ValueError: the lengths differ, a number is not finite, or no pair has such a gap.
    """
    ratings = finite_numbers(mean_ratings, len(mean_ratings), "mean_ratings")
    scores = finite_numbers(scores, len(ratings), "scores")
    return pair_accuracy(scores, held_out_pairs(ratings, 0, num_pairs=RATED_PAIRS, min_gap=gap))


def win_rate(scores_a: np.ndarray, scores_b: np.ndarray) -> float:
    """Share of prompts on which response a scores above response b; ties count half.

    Args:
        scores_a: [N] float, one score a prompt.
        scores_b: [N] float, of the other response to the same prompts.

    >>> win_rate(np.array([1.0, 2.0, 0.0, 5.0]), np.array([0.0, 2.0, 1.0, 4.0]))
    0.625
    """
    return float(_outcomes(scores_a, scores_b).mean())


def bootstrap_interval(
    scores_a: np.ndarray, scores_b: np.ndarray, *, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of `win_rate`, resampling prompts.

    A resample of N prompts is one draw of (losses, ties, wins) from a multinomial distribution.

    Args:
        scores_a: [N] float, one score a prompt.
        scores_b: [N] float, of the other response to the same prompts.
        seed: of the resampling.
        level: the share of resamples inside the interval, in (0, 1).

    Reference: Efron 1979, https://doi.org/10.1214/aos/1176344552.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}.")
    outcomes = _outcomes(scores_a, scores_b)
    shares = [(outcomes == value).mean() for value in (0.0, 0.5, 1.0)]
    draws = np.random.default_rng(seed).multinomial(len(outcomes), shares, size=RESAMPLES)
    rates = draws @ np.array([0.0, 0.5, 1.0]) / len(outcomes)
    low, high = np.quantile(rates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct word n-grams over all word n-grams of the whole set; 0 when there are none.

    It falls as texts grow longer or more numerous: compare sets of the same size.

    Reference: Li et al. 2016, https://arxiv.org/abs/1510.03055.

    >>> distinct_n(["A fine film.", "a fine day"], 2)  # (a fine), (fine film), (fine day) of 4
    0.75
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}.")
    words = [re.findall(WORD, text.lower()) for text in texts]
    grams = [tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


def judge_table(
    judges: Mapping[str, Judge],
    responses: Mapping[str, Sequence[str]],
    *,
    candidate: str = "ppo",
    seed: int = 0,
    rated: tuple[Sequence[str], np.ndarray] | None = None,
    notes: Mapping[str, str] | None = None,
) -> list[dict]:
    """One row a judge: the mean score of each stage, and how often it prefers the candidate.

    Args:
        judges: name -> judge.
        responses: stage -> N texts, one a prompt, in the same order of prompts for all stages.
        candidate: the stage that is compared with each of the others.
        seed: of the bootstrap.
        rated: (texts, [M] mean ratings) that no judge was fitted on: the measure of each judge.
        notes: name -> what a reader must know of this judge, such as what it shares with training.

    Returns:
        Rows with the keys `judge`, `note` (if any), `num_prompts`, `pair_accuracy_margin1` (with
        `rated`), `mean_<stage>` for every stage, and for every stage but the candidate
        `win_rate_<candidate>_vs_<stage>` and the same with `_interval` (95%, [low, high]).

    Raises:
        ValueError: the candidate or a note's judge is unknown, the stages differ in length, or a
            judge does not give one finite number a text.
        FunctionFailed: a judge raised something.
    """
    _check_table(judges, responses, candidate, notes or {})
    judges = {name: functools.partial(_ask, name, judge) for name, judge in judges.items()}
    return [
        {
            "judge": name,
            **({"note": notes[name]} if notes and name in notes else {}),
            "num_prompts": len(responses[candidate]),
            **(_accuracy(judge, *rated) if rated else {}),
            **_comparison(judge, responses, candidate, seed),
        }
        for name, judge in judges.items()
    ]


def _ask(name: str, judge: Judge, texts: Sequence[str]) -> np.ndarray:
    """What a judge says of N texts, [N] float64: it is a user's function, and may say anything."""
    try:
        return read_scores(judge(list(texts)), len(texts))
    except BadScores as error:
        wrong = f"must return {len(texts)} finite numbers, one a text, got {error}"
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise failure(f"the judge {name!r}", error) from error
    raise ValueError(f"the judge {name!r} {wrong}")


def _accuracy(judge: Judge, texts: Sequence[str], mean_ratings: np.ndarray) -> dict:
    if np.ptp(mean_ratings) < 1:  # a scale of its own: no pair has the gap
        return {}
    return {"pair_accuracy_margin1": rating_accuracy(judge(texts), mean_ratings, gap=1)}


def _comparison(judge: Judge, responses: Mapping, candidate: str, seed: int) -> dict:
    scores = {stage: judge(texts) for stage, texts in responses.items()}
    row = {f"mean_{stage}": float(values.mean()) for stage, values in scores.items()}
    for stage in reversed([stage for stage in scores if stage != candidate]):
        pair = scores[candidate], scores[stage]
        name = f"win_rate_{candidate}_vs_{stage}"
        row[name] = win_rate(*pair)
        row[f"{name}_interval"] = list(bootstrap_interval(*pair, seed=seed))
    return row


def _check_table(judges: Mapping, responses: Mapping, candidate: str, notes: Mapping) -> None:
    if candidate not in responses:
        raise ValueError(f"candidate {candidate!r} has no responses; stages: {list(responses)}.")
    lengths = {stage: len(texts) for stage, texts in responses.items()}
    if len(set(lengths.values())) > 1 or not lengths[candidate]:
        raise ValueError(f"responses must be one a prompt for every stage, got {lengths}.")
    if unknown := sorted(set(notes) - set(judges)):
        raise ValueError(f"notes name unknown judges {unknown}; judges: {list(judges)}.")


def _wins(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a > b) + 0.5 * (a == b)


def _outcomes(scores_a: np.ndarray, scores_b: np.ndarray) -> np.ndarray:
    a = finite_numbers(scores_a, len(scores_a), "scores_a")
    b = finite_numbers(scores_b, len(a), "scores_b")
    if not len(a):
        raise ValueError("scores_a and scores_b are empty: there is nothing to compare.")
    return _wins(a, b)


def finite_numbers(numbers: np.ndarray, length: int, name: str) -> np.ndarray:
    numbers = np.asarray(numbers, np.float64)
    if numbers.shape != (length,):
        raise ValueError(f"{name} must have shape ({length},), got {numbers.shape}.")
    if bad := np.flatnonzero(~np.isfinite(numbers)).tolist():
        raise ValueError(f"{name} must be finite, got {numbers[bad[0]]} at index {bad[0]}.")
    return numbers
