"""Judges of text that had no part in the training, and what they say about the stages.

A judge is a function `list[str] -> [N] float`, higher is better; its scale is its own. Only the
order of two scores of one judge is compared, so judges of different scales stand in one table.
"""

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ppo_jax.data.ratings import held_out_pairs, pair_accuracy


def share_interval(share: float, count: int) -> tuple[float, float]:
    """The 95% interval of a share of independent pairs (Wilson 1927).

    >>> [round(x, 3) for x in share_interval(0.9, 100)]
    [0.826, 0.945]
    """
    z = 1.96
    middle, width = share + z * z / (2 * count), share * (1 - share) / count
    reach = z * (width + (z / (2 * count)) ** 2) ** 0.5
    return tuple((middle + sign * reach) / (1 + z * z / count) for sign in (-1, 1))


Judge = Callable[[Sequence[str]], np.ndarray]

WORD = r"\w+(?:['’]\w+)*"  # "isn't" is one word: the negation stays visible to the judge
RESAMPLES = 10_000
RATED_PAIRS = 100_000  # that measure a judge, at most


def fit_tfidf_judge(texts: Sequence[str], mean_ratings: np.ndarray) -> Judge:
    """A ridge on TF-IDF of words and word pairs; it shares nothing with any language model.

    It wants many texts: fitted on 1,600, 4,000 or 9,000 film sentences it orders 76, 80 or 85% of
    the unseen pairs with a gap of 1 or more as people do.

    Args:
        texts: N training texts.
        mean_ratings: [N] float, the human mean rating of each.

    Raises:
        ValueError: the lengths differ, a rating is not finite, or there are no words.

    >>> judge = fit_tfidf_judge(["good film", "bad film", "good", "bad"], np.array([2, -2, 2, -2]))
    >>> good, bad = judge(["a good story", "a bad story"])
    >>> bool(good > 0 > bad)
    True
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline

    targets = _checked(mean_ratings, len(texts), "mean_ratings")
    vectorizer = TfidfVectorizer(token_pattern=WORD, ngram_range=(1, 2), sublinear_tf=True)
    return make_pipeline(vectorizer, Ridge(alpha=0.5)).fit(list(texts), targets).predict


def fit_ridge(
    features: np.ndarray,
    targets: np.ndarray,
    *,
    alphas: Sequence[float] = (1e1, 1e2, 1e3, 1e4, 1e5),
) -> Callable[[np.ndarray], np.ndarray]:
    """A ridge regression on standardised features; alpha is chosen by leave-one-out error.

    Args:
        features: [N, F] float, one row a text, for instance frozen hidden states.
        targets: [N] float, what to predict.
        alphas: the penalties to choose from; a feature has unit variance when it is penalised.

    Returns:
        predict, a function from [M, F] features to [M] float.

    Raises:
        ValueError: the lengths differ or a number is not finite.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features = np.asarray(features, np.float64)
    if features.ndim != 2 or not np.isfinite(features).all():
        raise ValueError(f"features must be a finite [N, F] array, got shape {features.shape}.")
    targets = _checked(targets, len(features), "targets")
    model = make_pipeline(StandardScaler(), RidgeCV(alphas=np.asarray(alphas)))
    return model.fit(features, targets).predict


def vader_judge() -> Judge:
    """The compound score in [-1, 1] of the VADER lexicon and rules.

    Easy to game, so good for showing over-optimisation.

    Reference: Hutto and Gilbert, ICWSM 2014.
    """
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return lambda texts: np.array([analyzer.polarity_scores(text)["compound"] for text in texts])


def textblob_judge() -> Judge:
    """The polarity in [-1, 1] of the TextBlob lexicon: the mean over the words that it knows."""
    from textblob import TextBlob

    return lambda texts: np.array([TextBlob(text).sentiment.polarity for text in texts], float)


def rating_accuracy(scores: np.ndarray, mean_ratings: np.ndarray, *, gap: float) -> float:
    """`pair_accuracy` on pairs of texts whose mean ratings differ by `gap` or more.

    Args:
        scores: [N] float, what the judge says of each text.
        mean_ratings: [N] float, the human mean of each.
        gap: in units of rating.

    Raises:
        ValueError: the lengths differ, a number is not finite, or no pair has such a gap.
    """
    ratings = _checked(mean_ratings, len(mean_ratings), "mean_ratings")
    scores = _checked(scores, len(ratings), "scores")
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
        ValueError: the candidate or a note's judge is unknown, or the stages differ in length.
    """
    _check_table(judges, responses, candidate, notes or {})
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


def _accuracy(judge: Judge, texts: Sequence[str], mean_ratings: np.ndarray) -> dict:
    if np.ptp(mean_ratings) < 1:  # a scale of its own: no pair has the gap
        return {}
    return {"pair_accuracy_margin1": rating_accuracy(judge(texts), mean_ratings, gap=1)}


def _comparison(judge: Judge, responses: Mapping, candidate: str, seed: int) -> dict:
    scores = {stage: np.asarray(judge(texts), float) for stage, texts in responses.items()}
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
    a = _checked(scores_a, len(scores_a), "scores_a")
    b = _checked(scores_b, len(a), "scores_b")
    if not len(a):
        raise ValueError("scores_a and scores_b are empty: there is nothing to compare.")
    return _wins(a, b)


def _checked(numbers: np.ndarray, length: int, name: str) -> np.ndarray:
    numbers = np.asarray(numbers, np.float64)
    if numbers.shape != (length,):
        raise ValueError(f"{name} must have shape ({length},), got {numbers.shape}.")
    if bad := np.flatnonzero(~np.isfinite(numbers)).tolist():
        raise ValueError(f"{name} must be finite, got {numbers[bad[0]]} at index {bad[0]}.")
    return numbers
