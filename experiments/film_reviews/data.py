"""Rated sentences: downloaded, split by text, written as the data files of the configs."""

import hashlib
import html
import io
import json
import shutil
import tarfile
from pathlib import Path

from ppo_jax.data.records import RatedText, split_by_text, write_jsonl
from ppo_jax.io.hub import cache_dir, fetch_package, make_once

RATING_SETS = ("movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets", "tweets")
OTHER_SETS = ("amazonReviewSnippets", "tweets")  # product reviews and tweets, rated alike
PARTS = {"train": 0.5, "judge": 0.3, "test": 0.1, "validation": 0.1}
SPLIT_SEED = 2014
PROMPT_WORDS = 4
WORDS = (8, 24)  # of a text to imitate: whole sentences that fit into a short response


def prepare(folder: Path):
    """Write the files that the configs name. Parts are disjoint by text, prompts included."""
    parts = split_by_text(film_ratings(), PARTS, seed=SPLIT_SEED)
    train = [r for r in parts["train"] if WORDS[0] <= len(r.text.split()) <= WORDS[1]]
    prompts = sorted({first_words(r) for r in train}, key=stable_order)
    write_jsonl(folder / "sft.jsonl", [{"text": r.text} for r in train])
    others = [r for name in OTHER_SETS for r in film_ratings(name)]
    texts = [{"text": r.text} for r in parts["train"] + others]
    write_jsonl(folder / "vocabulary.jsonl", texts)
    for part, records in parts.items():
        rows = [{"text": r.text, "ratings": list(r.ratings)} for r in records]
        write_jsonl(folder / f"{part}_ratings.jsonl", rows)
    write_jsonl(folder / "prompts.jsonl", [{"prompt": p} for p in prompts])
    seen = {prompt.casefold() for prompt in prompts}
    for part in ("test", "validation"):
        unseen = {first_words(r) for r in parts[part] if len(r.text.split()) >= WORDS[0]}
        unseen = sorted((p for p in unseen if p.casefold() not in seen), key=stable_order)
        write_jsonl(folder / f"{part}_prompts.jsonl", [{"prompt": p} for p in unseen])
        seen |= {prompt.casefold() for prompt in unseen}


def first_words(record: RatedText) -> str:
    return " ".join(record.text.split()[:PROMPT_WORDS])


def stable_order(text: str) -> bytes:
    """A shuffle that does not depend on what else is in the list."""
    return hashlib.sha256(text.encode()).digest()


def hutto_folder() -> Path:
    """The rating files of Hutto & Gilbert (ICWSM 2014), from vaderSentiment's source (MIT)."""
    return make_once(cache_dir() / "hutto_ICWSM_2014-2", extract_hutto)


def extract_hutto(folder: Path) -> None:
    archive = fetch_package(
        "vaderSentiment",
        "3.3.2",
        "vaderSentiment-3.3.2.tar.gz",
        "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        source=True,
    )
    inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(archive) as outer:
        content = io.BytesIO(outer.extractfile(inner).read())
    with tarfile.open(fileobj=content) as ratings:
        for name in RATING_SETS:
            for part in ("GroundTruth", "anonDataRatings"):
                member = ratings.extractfile(f"hutto_ICWSM_2014/{name}_{part}.txt")
                with open(folder / f"{name}_{part}.txt", "wb") as file:
                    shutil.copyfileobj(member, file)


def film_ratings(name: str = "movieReviewSnippets") -> list[RatedText]:
    """Sentences with their single human ratings, -4 (most negative) to 4.

    Args:
        name: "movieReviewSnippets", or one of the other three sets of the same study:
            "amazonReviewSnippets", "nytEditorialSnippets", "tweets".

    Returns:
        One `RatedText` for each different text, in the order of the file. HTML entities are
        decoded. Sentences whose two files disagree about the mean rating (199 tweets) are left
        out, and so is the second of two equal texts.

    Raises:
        ValueError: there is no such set.

    Reference: Hutto & Gilbert 2014, VADER: A Parsimonious Rule-based Model for Sentiment Analysis
    of Social Media Text, ICWSM.
    """
    if name not in RATING_SETS:
        raise ValueError(f"unknown rating set {name!r}; choose from {sorted(RATING_SETS)}")
    folder = hutto_folder()
    rated = {row[0]: row for row in read_rows(folder / f"{name}_anonDataRatings.txt")}
    texts: dict[str, RatedText] = {}
    for key, mean, text in read_rows(folder / f"{name}_GroundTruth.txt"):
        _, other_mean, _, ratings = rated[key]
        text = unescape(text).strip()
        if abs(float(mean) - float(other_mean)) < 1e-6 and text not in texts:
            texts[text] = RatedText(text, tuple(float(x) for x in json.loads(ratings)))
    return list(texts.values())


def read_rows(path: Path) -> list[list[str]]:
    # Not splitlines, which would also split at characters inside a text.
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    return [line.split("\t") for line in lines if line]


def unescape(text: str) -> str:
    """Decode HTML entities, of which some were encoded twice."""
    while (decoded := html.unescape(text)) != text:
        text = decoded
    return text
