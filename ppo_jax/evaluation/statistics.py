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
LENGTH_RESAMPLES = 1_000  # of fits that control for length
NEWTON_STEPS = 50  # at most; a handful is the rule
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
    return float(outcomes_of(scores_a, scores_b).mean())


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
    return mean_interval(outcomes_of(scores_a, scores_b), seed=seed, level=level)


def mean_interval(outcomes: np.ndarray, *, seed: int, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of some outcomes in [0, 1], resampling prompts.

    Args:
        outcomes: [N] float, one a prompt: 0 lost, 0.5 a tie, 1 won, or the mean over some seeds.
        seed: of the resampling.
        level: the share of resamples inside the interval, in (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}.")
    values = np.union1d(outcomes, [0.0, 0.5, 1.0])
    shares = (outcomes[:, None] == values).mean(axis=0)
    draws = np.random.default_rng(seed).multinomial(len(outcomes), shares, size=RESAMPLES)
    low, high = np.quantile(draws @ values / len(outcomes), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_and_stderr(values: np.ndarray) -> tuple[float, float | None]:
    """The mean over prompts and its standard error, None of a single prompt.

    Args:
        values: [N] float, one a prompt, or [N, S], of S seeds: a prompt is one observation, the
            mean over its seeds.

    >>> mean_and_stderr(np.array([[1.0, 3.0], [2.0, 6.0]]))
    (3.0, 1.0)
    """
    values = np.asarray(values, np.float64)
    values = values.reshape(len(values), -1).mean(axis=1)
    if len(values) < 2:
        return float(values.mean()), None
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)


def length_controlled_win_rate(
    outcomes: np.ndarray, length_differences: np.ndarray, *, seed: int, level: float = 0.95
) -> tuple[float, tuple[float, float]]:
    """The win rate that two policies would have, did they write at the same length.

    logit P(win) = a + b tanh(d / sd(d)) is fitted by maximum likelihood, where d is how much longer
    the candidate's response is, and P(win) at d = 0 is reported: sigmoid(a). Ties are half a win
    and half a loss. b has a ridge penalty b^2 / 2, as lengths that separate wins from losses would
    send it to infinity; a has none. Where every outcome is the same, so is the rate.

    Args:
        outcomes: [N] float, one a prompt: 0 lost, 0.5 a tie, 1 won; or [N, S] of S seeds.
        length_differences: of the same shape, the candidate's length less the reference's.
        seed: of the bootstrap over prompts, with all seeds of a prompt together.
        level: the share of resamples inside the interval, in (0, 1).

    Returns:
        (rate, (low, high)).

    Reference: Dubois et al. 2024, https://arxiv.org/abs/2404.04475, eq. 1 and 2, without the
    terms of model identity times instruction difficulty, which need many models.
    """
    outcomes = np.asarray(outcomes, np.float64).reshape(len(outcomes), -1)
    differences = np.asarray(length_differences, np.float64).reshape(outcomes.shape)
    x = np.tanh(differences / max(differences.std(), 1e-12))
    count = len(outcomes)
    draws = np.random.default_rng(seed).multinomial(
        count, np.full(count, 1 / count), size=LENGTH_RESAMPLES
    )
    weights = np.concatenate([np.ones((1, count)), draws])
    rates = fit_at_zero(x, outcomes, weights)
    low, high = np.quantile(rates[1:], [(1 - level) / 2, (1 + level) / 2])
    return float(rates[0]), (float(low), float(high))


def fit_at_zero(x: np.ndarray, outcomes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """sigmoid(a) of the fits of `length_controlled_win_rate` to some weightings of the prompts.

    Newton's method, all fits at once; a step is at most 2, for where the start is far off.

    Args:
        x: [N, S] float, in (-1, 1).
        outcomes: [N, S] float in [0, 1].
        weights: [R, N] float, of the prompts in each fit.

    Returns:
        [R] float64.
    """
    weights = np.repeat(weights, x.shape[1], axis=1)
    x, outcomes = x.ravel(), outcomes.ravel()
    means = weights @ outcomes / weights.sum(axis=1)
    certain = (means < 1e-9) | (means > 1 - 1e-9)
    inside = np.clip(means, 1e-3, 1 - 1e-3)
    a, b = np.log(inside / (1 - inside)), np.zeros(len(weights))
    for _ in range(NEWTON_STEPS):
        p = 1 / (1 + np.exp(-(a[:, None] + b[:, None] * x)))
        slope, curvature = weights * (outcomes - p), weights * p * (1 - p)
        of_a, of_b = slope.sum(axis=1), slope @ x - b
        aa, ab, bb = curvature.sum(axis=1) + 1e-12, curvature @ x, curvature @ (x * x) + 1.0
        determinant = aa * bb - ab * ab
        steps = np.stack([bb * of_a - ab * of_b, aa * of_b - ab * of_a]) / determinant
        steps = np.where(certain, 0.0, np.clip(steps, -2.0, 2.0))
        a, b = a + steps[0], b + steps[1]
        if np.abs(steps).max() < 1e-9:
            break
    return np.where(certain, means.round(), 1 / (1 + np.exp(-a)))


def repetition(texts: Sequence[str], n: int = 3) -> float:
    """Share of the word n-grams of a response that it has written before, on average over the
    responses that have an n-gram; 0 when none has.

    >>> repetition(["so good so good so good", "a fine film"], 2)  # 3 of 5, 0 of 2
    0.3
    """
    shares = [1 - len(set(grams)) / len(grams) for text in texts if (grams := word_grams(text, n))]
    return float(np.mean(shares)) if shares else 0.0


def word_grams(text: str, n: int) -> list[tuple[str, ...]]:
    """The word n-grams of a text, in order, in lower case."""
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}.")
    words = re.findall(WORD, text.lower())
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct word n-grams over all word n-grams of the whole set; 0 when there are none.

    It falls as texts grow longer or more numerous: compare sets of the same size.

    Reference: Li et al. 2016, https://arxiv.org/abs/1510.03055.

    >>> distinct_n(["A fine film.", "a fine day"], 2)  # (a fine), (fine film), (fine day) of 4
    0.75
    """
    grams = [gram for text in texts for gram in word_grams(text, n)]
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
        `win_rate_<candidate>_vs_<stage>` and the same with `_interval` (95%, [low, high]), and both
        behind `length_controlled_`, see `length_controlled_win_rate`.

    Raises:
        ValueError: the candidate or a note's judge is unknown, the stages differ in length, or a
            judge does not give one finite number a text.
        FunctionFailed: a judge raised something.
    """
    _check_table(judges, responses, candidate, notes or {})
    judges = {name: functools.partial(ask_judge, name, judge) for name, judge in judges.items()}
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


def ask_judge(name: str, judge: Judge, texts: Sequence[str]) -> np.ndarray:
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
        both = zip(responses[candidate], responses[stage], strict=True)
        longer = np.array([len(ours) - len(theirs) for ours, theirs in both])
        fair, interval = length_controlled_win_rate(outcomes_of(*pair), longer, seed=seed)
        row[f"length_controlled_{name}"] = fair
        row[f"length_controlled_{name}_interval"] = list(interval)
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


def outcomes_of(scores_a: np.ndarray, scores_b: np.ndarray) -> np.ndarray:
    """1 where a scores above b, 0 where below, 0.5 at a tie: [N] float, one a prompt."""
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
