"""The quickstart's judges order texts as they should."""

import sys

import numpy as np
import pytest
from film_reviews import scorers as judges

from ppo_jax.config.parsing import load_function

PRAISE = ["a wonderful film", "wonderful and moving", "a moving story", "moving, wonderful story"]
BLAME = ["a dreadful film", "dreadful and dull", "a dull story", "dull, dreadful story"]
RATINGS = np.array([2.0, 3.0, 2.5, 3.5, -2.0, -3.0, -2.5, -3.5])


@pytest.fixture
def tfidf():
    return judges.fit_tfidf_judge(PRAISE + BLAME, RATINGS)


def test_the_tfidf_judge_ranks_unseen_praise_above_unseen_blame(tfidf):
    scores = tfidf(["wonderful acting", "dull acting", "acting"])
    assert scores.shape == (3,)
    assert scores[0] > 1 and scores[1] < -1
    assert scores[1] < scores[2] < scores[0]


def test_the_tfidf_judge_keeps_a_contraction_as_one_word():
    texts = ["it isn't good", "it is good", "this isn't good", "this is good"]
    judge = judges.fit_tfidf_judge(texts, np.array([-2.0, 2.0, -2.0, 2.0]))
    negated, plain = judge(["that isn't good", "that is good"])
    assert negated < -1 and plain > 1


def test_the_lexicons_know_good_from_bad_and_give_floats():
    by_name = [load_function(f"film_reviews:{name}", "judges") for name in ("vader", "textblob")]
    for judge in (judges.vader_judge(), judges.textblob_judge(), *by_name):
        good, bad, nothing = judge(["A great, lovely film!", "A terrible, ugly film.", ""])
        assert -1 <= bad < nothing == 0 < good <= 1
        assert judge(["words"]).dtype == np.float64


def test_ridge_recovers_a_linear_law_whatever_the_scale_of_a_feature():
    x = np.random.default_rng(0).normal(size=(400, 3)) * [1.0, 1e4, 1e-4]
    law = np.array([1.0, 2e-4, -3e4])
    predict = judges.fit_ridge(x[:300], x[:300] @ law + 5.0, alphas=(1e-4, 1.0))
    np.testing.assert_allclose(predict(x[300:]), x[300:] @ law + 5.0, atol=1e-3)


def test_ridge_chooses_the_strong_penalty_when_the_targets_are_noise():
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(60, 50)), rng.normal(size=60)
    both = judges.fit_ridge(x, noise, alphas=(1e-6, 1e6))(rng.normal(size=(40, 50)))
    assert both.std() < 0.01


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: judges.fit_tfidf_judge(["a b"], np.array([np.nan])), "finite, got nan at index 0"),
        (lambda: judges.fit_tfidf_judge(["a b"], np.zeros(2)), r"shape \(1,\), got \(2,\)"),
        (lambda: judges.fit_ridge(np.full((2, 1), np.inf), np.zeros(2)), "finite"),
    ],
)
def test_numbers_that_cannot_be_fitted_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_without_the_extra_a_judge_says_what_to_install(monkeypatch):
    import film_reviews

    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    for name in ("film_reviews.panels", "film_reviews.scorers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ValueError, match=r"evaluate.judges must .*quickstart\]' has it"):
        load_function("film_reviews:judges", "evaluate.judges")
    assert film_reviews.prepare and film_reviews.mentions_acting  # the task itself needs no judge
