"""The rated sentences of the quickstart are what their source says."""

import pytest
from film_reviews import data


def test_film_ratings_are_different_sentences_with_many_ratings_each():
    rated = data.film_ratings()
    assert len(rated) == len({r.text for r in rated}) == 10_603  # 10,605 lines, 2 twice
    assert all(len(r.ratings) >= 15 for r in rated)
    assert {x for r in rated for x in r.ratings} == set(range(-4, 5))
    assert rated[0].text.startswith("The Rock is destined to be the 21st Century's new")
    assert rated[0].mean == pytest.approx(2.26666666667)  # as in the file
    assert not any("&amp;" in r.text or "\r" in r.text for r in rated)


@pytest.mark.parametrize(
    ("name", "count"),
    # Lines, less equal texts, less the tweets whose files disagree.
    [
        ("amazonReviewSnippets", 3708 - 11),
        ("nytEditorialSnippets", 5190 - 72),
        ("tweets", 4200 - 199),
    ],
)
def test_the_other_rating_sets_are_read_too(name, count):
    assert len(data.film_ratings(name)) == count


def test_an_unknown_rating_set_is_refused():
    with pytest.raises(ValueError, match="'films'.*movieReviewSnippets"):
        data.film_ratings("films")
