"""The panels of judges that the configs name."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from film_reviews.data import OTHER_SETS, film_ratings, stable_order
from ppo_jax.data.records import load_ratings
from ppo_jax.evaluation.evaluate import JudgePanel
from ppo_jax.io.hub import cache_dir
from ppo_jax.io.stage_folder import load_model

try:
    from film_reviews.scorers import (
        JUDGE_LAYER,
        fit_tfidf_judge,
        gold_judge,
        textblob_judge,
        vader_judge,
    )
except ImportError as error:
    raise ImportError(f"{error}; pip install 'ppo_jax[quickstart]' has it") from error

BASE_MODEL = "package:smollm2-135m-instruct"
NUM_GOLD = 2500  # texts that the gold judge is fitted on
NUM_RATED = 500  # unseen texts that measure the judges
# Accuracy on pairs of unseen film sentences with a gap of 1 or more, on a split of its own.
REFERENCE = {"human rater": 0.943, "ridge on a frozen layer": 0.888, "TF-IDF ridge": 0.855}


def judges(workdir: Path) -> JudgePanel:
    """The panel of the quickstart: gold, words, and two lexicons."""
    panel = word_judges(workdir)
    texts, means = rated_texts(workdir, "judge")
    texts, means, rated = texts[:NUM_GOLD], means[:NUM_GOLD], panel.rated[0]
    about = json.dumps([BASE_MODEL, JUDGE_LAYER, texts, rated])
    folder = cache_dir() / f"film_judge-{hashlib.sha256(about.encode()).hexdigest()[:12]}"
    gold = gold_judge(load_model(BASE_MODEL), texts, means, rated=rated, folder=folder)
    note = (
        f"ridge regression on layer {JUDGE_LAYER} of the pretrained model, fitted on {NUM_GOLD} "
        "rated texts of its own; it shares these frozen layers with policy and reward model, and "
        "no text, rating or trained weight"
    )
    judges = {"gold": gold} | dict(panel.judges)
    return dataclasses.replace(panel, judges=judges, notes=dict(panel.notes) | {"gold": note})


def word_judges(workdir: Path) -> JudgePanel:
    """Judges that share nothing with the policy's model."""
    texts, means = rated_texts(workdir, "judge")
    others = [r for name in OTHER_SETS for r in film_ratings(name)]
    tfidf = fit_tfidf_judge(
        texts + [r.text for r in others], np.concatenate([means, [r.mean for r in others]])
    )
    unseen, unseen_means = rated_texts(workdir, "test")
    return JudgePanel(
        judges={"tf-idf": tfidf, "vader": vader_judge(), "textblob": textblob_judge()},
        notes={
            "tf-idf": "ridge regression on words and word pairs; film texts of its own, product "
            "reviews and tweets; shares nothing with the policy's model",
            "vader": "a lexicon; easy to please with a few strong words",
            "textblob": "a lexicon; easy to please with a few strong words",
        },
        rated=(unseen[:NUM_RATED], unseen_means[:NUM_RATED]),
        reference=REFERENCE,
    )


def vader(texts: Sequence[str]) -> np.ndarray:
    """A judge by itself: the lexicon of `vader_judge`."""
    return vader_judge()(texts)


def textblob(texts: Sequence[str]) -> np.ndarray:
    """A judge by itself: the lexicon of `textblob_judge`."""
    return textblob_judge()(texts)


def words_as_gold(workdir: Path) -> JudgePanel:
    """The panel of the tiny variant: a model from scratch has no layer that knows sentiment."""
    return dataclasses.replace(word_judges(workdir), headline="tf-idf")


def rated_texts(workdir: Path, part: str) -> tuple[list[str], np.ndarray]:
    """Texts and mean ratings of a part, shuffled: the source has the kind reviews first."""
    records = load_ratings(workdir / "data" / f"{part}_ratings.jsonl")
    records.sort(key=lambda record: stable_order(record.text))
    return [r.text for r in records], np.array([r.mean for r in records])
