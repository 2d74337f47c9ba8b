"""Records of text: read from JSON lines, checked line by line, and split by text.

Another source (Parquet, a dataset id, chat messages) is one more function that returns these
records; `batches` makes arrays of them and does not know where they come from.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Record = TypeVar("Record")

DEMONSTRATION_FORMS = (("text",), ("prompt", "completion"))
PREFERENCE_FORMS = (("prompt", "chosen", "rejected"),)
RATING_FORMS = (("text", "ratings"), ("text", "rating"))
PROMPT_FORMS = (("prompt",),)


@dataclass(frozen=True)
class Demonstration:
    """One text to imitate; a plain text has the prompt ""."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Preference:
    """Two completions of one prompt, of which a judge chose the first."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class RatedText:
    """A text and its single human ratings, at least one, a number for each rater."""

    text: str
    ratings: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean rating."""
        return sum(self.ratings) / len(self.ratings)


def load_demonstrations(path: str | os.PathLike) -> list[Demonstration]:
    """Reads demonstrations from lines {"text"} or {"prompt", "completion"}.

    Args:
        path: a JSONL file. A prompt may be "", a text or a completion may not be blank.

    Raises:
        ValueError: "file:line: what is wrong".
    """
    return [_demonstration(row, where) for where, row in _checked(path, DEMONSTRATION_FORMS)]


def load_preferences(path: str | os.PathLike) -> list[Preference]:
    """Reads preferences from lines {"prompt", "chosen", "rejected"}.

    Args:
        path: a JSONL file. A prompt may be ""; the two completions are not blank, and differ.

    Raises:
        ValueError: "file:line: what is wrong".
    """
    return [_preference(row, where) for where, row in _checked(path, PREFERENCE_FORMS)]


def load_ratings(path: str | os.PathLike) -> list[RatedText]:
    """Reads rated texts from lines {"text", "ratings": [x, ...]} or {"text", "rating": x}.

    Args:
        path: a JSONL file. Ratings are finite numbers on any scale; higher is better.

    Raises:
        ValueError: "file:line: what is wrong".
    """
    return [_rated_text(row, where) for where, row in _checked(path, RATING_FORMS)]


def load_prompts(path: str | os.PathLike) -> list[str]:
    """Reads prompts from lines {"prompt"}.

    Args:
        path: a JSONL file. A prompt may be "": whether that is one, the tokenizer decides.

    Raises:
        ValueError: "file:line: what is wrong".
    """
    return [_string(row, "prompt", where) for where, row in _checked(path, PROMPT_FORMS)]


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads a file of JSON objects, one a line; blank lines are passed over.

    Args:
        path: a UTF-8 file.

    Raises:
        ValueError: no such file, no object in it, or "file:line: what is wrong".
    """
    return [row for _, row in _numbered(path)]


def write_jsonl(path: str | os.PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, atomically: the file appears whole or not at all.

    Args:
        path: where to; missing folders are made, an existing file is replaced.
        rows: what `json` can write; NaN and infinities are not JSON.

    Raises:
        ValueError: a row holds a number that is not finite.
    """
    path = Path(path)
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since a rename is atomic only within one file system.
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes("".join(lines).encode("utf-8"))
    os.replace(partial, path)


def split_by_text(
    records: Sequence[Record],
    fractions: Mapping[str, float],
    *,
    seed: int,
    key: Callable[[Record], str] = lambda record: record.text,
    duplicates: str = "drop",
) -> dict[str, list[Record]]:
    """Splits records so that no text, compared without case and spacing, is in two splits.

    A text's split follows from a hash of (seed, text) alone, so that adding records moves none of
    the others; sizes are therefore the fractions only on average.

    Args:
        records: in any order, which the splits keep.
        fractions: the share of each split, by name; they sum to 1.
        seed: another seed gives another split.
        key: the text of a record. Preferences over one prompt are kept together by their prompt.
        duplicates: "drop" keeps the first record of each text; "keep" all of them, in one split.

    Raises:
        ValueError: shares that are negative or do not sum to 1, or an unknown `duplicates`.
    """
    _check_split(fractions, duplicates)
    splits = {name: [] for name in fractions}
    seen = set()
    for record in records:
        text = _normalized(key(record))
        if duplicates == "drop" and text in seen:
            continue
        seen.add(text)
        splits[_split_of(text, fractions, seed)].append(record)
    return splits


def _check_split(fractions: Mapping[str, float], duplicates: str) -> None:
    total = sum(fractions.values())
    if not all(share >= 0 for share in fractions.values()) or not math.isclose(total, 1.0):
        raise ValueError(f"fractions must not be negative and sum to 1, got {dict(fractions)}")
    if duplicates not in ("drop", "keep"):
        raise ValueError(f"duplicates must be 'drop' or 'keep', got {duplicates!r}")


def _normalized(text: str) -> str:
    return " ".join(text.casefold().split())


def _split_of(text: str, fractions: Mapping[str, float], seed: int) -> str:
    digest = hashlib.sha256(f"{seed}\n{text}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    names = [name for name, share in fractions.items() if share > 0]
    edge = 0.0
    for name in names:
        edge += fractions[name]
        if place < edge:
            return name
    return names[-1]  # The shares may sum to a little less than 1.


def _demonstration(row: dict[str, Any], where: str) -> Demonstration:
    if "text" in row:
        return Demonstration(prompt="", completion=_text(row, "text", where))
    return Demonstration(_string(row, "prompt", where), _text(row, "completion", where))


def _preference(row: dict[str, Any], where: str) -> Preference:
    chosen, rejected = _text(row, "chosen", where), _text(row, "rejected", where)
    if chosen == rejected:
        raise ValueError(f"{where}: chosen and rejected must differ, both are {chosen!r}")
    return Preference(_string(row, "prompt", where), chosen, rejected)


def _rated_text(row: dict[str, Any], where: str) -> RatedText:
    ratings = row["ratings"] if "ratings" in row else [row["rating"]]
    if not isinstance(ratings, list) or not ratings:
        raise ValueError(f"{where}: ratings must be a list of numbers, not empty, got {ratings!r}")
    return RatedText(_text(row, "text", where), tuple(_rating(x, where) for x in ratings))


def _rating(value: Any, where: str) -> float:
    # In JSON true is no number, though Python takes it for 1. The limit is for float32.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= 1e30:
        raise ValueError(f"{where}: a rating must be a finite number up to 1e30, got {value!r}")
    return float(value)


def _string(row: dict[str, Any], key: str, where: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key} must be a string, got {value!r}")
    # JSON can spell half a surrogate pair, which no tokenizer can encode.
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{where}: {key} must be valid Unicode, got {value!r}")
    return value


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = _string(row, key, where)
    if not value.strip():
        raise ValueError(f"{where}: {key} must not be empty or blank, got {value!r}")
    return value


def _checked(path: str | os.PathLike, forms: tuple[tuple[str, ...], ...]) -> Iterator:
    """Yields ("file:line", row) where the keys of the row are those of one of the forms."""
    for where, row in _numbered(path):
        if not any(row.keys() == set(form) for form in forms):
            allowed = " or ".join(str(list(form)) for form in forms)
            raise ValueError(f"{where}: the keys must be {allowed}, got {list(row)}")
        yield where, row


def _numbered(path: str | os.PathLike) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("file:line", object) for each line that is not blank."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file")
    empty = True
    # As bytes, because some characters inside a JSON string end a line of text for Python.
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                empty = False
                yield f"{path}:{number}", _object(line, f"{path}:{number}")
    if empty:
        raise ValueError(f"{path}: the file is empty, at least one line is needed")


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not a JSON object on one line: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a line must be a JSON object {{...}}, got {row!r}")
    return row


def _without_repeats(items: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(items)
    if len(row) < len(items):
        raise ValueError(f"a key stands twice in {[key for key, _ in items]}")
    return row
