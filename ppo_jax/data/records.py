"""Records of text: read row by row, checked, and split by text.

`readers` gives the rows, `encode` makes arrays of the records. A malformed row raises ValueError,
"place: what is wrong".
"""

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from ppo_jax.config.stages import RewardSettings, SFTSettings
from ppo_jax.data.atomic import atomic_write
from ppo_jax.data.chat import Chat, Segment
from ppo_jax.data.messages import (
    as_messages,
    assistant_turns,
    collect,
    has_blank_turn,
    is_learned,
    read_messages,
    read_tools,
)
from ppo_jax.data.readers import Row, read_number, read_rows, read_string, whole_rows

Record = TypeVar("Record")

DEMONSTRATION_SCHEMAS = (("text",), ("prompt", "completion"), ("messages",))
RATING_SCHEMAS = (("text", "rating"), ("text", "ratings"))
PROMPT_SCHEMAS = (("prompt",), ("messages",))


@dataclass(frozen=True)
class Demonstration:
    """A text to imitate, in segments (text, whether it is in the loss).

    A plain text is one segment, prompt and completion are two, a conversation has two for each turn
    of the assistant's. Segments are tokenised apart, as prompt and response are in a rollout.
    """

    segments: tuple[Segment, ...]
    earlier: tuple[tuple[Segment, ...], ...] = ()  # rows of the turns before, see `Chat.parts`

    @property
    def rows(self) -> tuple[tuple[Segment, ...], ...]:
        """The texts to train on, in segments: one, or one for each turn of the assistant's."""
        return (*self.earlier, self.segments)

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.segments)

    @property
    def reject_reason(self) -> str:
        """Why it cannot be trained on, or ""."""
        learned = (text for row in self.rows for text, in_loss in row if in_loss)
        return "" if any(text.strip() for text in learned) else "blank"


@dataclass(frozen=True)
class RatedText:
    """A text and its human ratings, one of each rater, at least one."""

    text: str
    ratings: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.ratings) / len(self.ratings)

    @property
    def rows(self) -> tuple[tuple[Segment, ...], ...]:
        """As those of a `Demonstration`."""
        return (((self.text, True),),)

    @property
    def reject_reason(self) -> str:
        """Why it cannot be trained on, or ""."""
        return "" if self.text.strip() else "blank"


def load_texts(
    path: str | os.PathLike,
    tokenizer: Any | None = None,
    *,
    turns: str = "all",
    left_out: list[str] | None = None,
) -> list[Demonstration]:
    """Reads demonstrations: {"text"}, {"prompt", "completion"} or {"messages"}.

    Of messages the assistant's turns are in the loss, each with the token that ends it; those of a
    prompt are not, and with turns="last" the last one alone is. The tokenizer's chat template
    renders them; None takes their contents as they are. For `left_out` see `messages.collect`.
    """
    chat = Chat(tokenizer) if tokenizer is not None else None
    parse = functools.partial(parse_demonstration, chat=chat, turns=turns)
    return collect(read_rows(path, DEMONSTRATION_SCHEMAS), parse, left_out)


def load_ratings(path: str | os.PathLike) -> list[RatedText]:
    """Reads rated texts: {"text", "ratings": [x, ...]} or {"text", "rating": x}.

    Ratings are finite numbers on any scale; higher is better.
    """
    return [parse_rated_text(row, place) for place, row in read_rows(path, RATING_SCHEMAS)]


def load_prompts(
    path: str | os.PathLike, tokenizer: Any | None = None, left_out: list[str] | None = None
) -> list[str]:
    """Reads prompts: {"prompt"}, a text or messages, or {"messages"}.

    Of messages a last turn of the assistant's is dropped: the policy writes its own. The
    tokenizer's chat template renders messages; without one they are refused. A prompt may be "",
    which has a token where the tokenizer adds a BOS. For `left_out` see `messages.collect`.
    """
    parse = functools.partial(parse_prompt, chat=Chat(tokenizer))
    return collect(read_rows(path, PROMPT_SCHEMAS), parse, left_out)


def load_prompt_rows(
    path: str | os.PathLike, tokenizer: Any | None = None, left_out: list[str] | None = None
) -> list[tuple[str, str, Row]]:
    """(place, prompt, row) of each prompt of `load_prompts`; the row has all its columns."""
    chat = Chat(tokenizer)

    def parse(read: tuple[Row, tuple[str, ...]], place: str) -> tuple[str, str, Row]:
        row, schema = read
        return place, parse_prompt({key: row[key] for key in schema}, place, chat), row

    rows = ((place, (row, schema)) for place, row, schema in whole_rows(path, PROMPT_SCHEMAS))
    return collect(rows, parse, left_out)


def write_jsonl(path: str | os.PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, atomically: the file appears whole or not at all.

    Missing folders are made, and an existing file is replaced.

    Raises:
        ValueError: a row holds a number that is not finite.
    """
    path = Path(path)
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, "".join(lines))


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
        fractions: name of a split -> its share; they sum to 1.
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
        text = " ".join(key(record).casefold().split())
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


def parse_demonstration(row: Row, place: str, chat: Chat | None, turns: str) -> Demonstration:
    if "text" in row:
        return Demonstration(((read_string(row, "text", place), True),))
    if "completion" not in row:
        prompt, messages = (), read_messages(row["messages"], "messages", place)
    elif not isinstance(row["prompt"], list) and not isinstance(row["completion"], list):
        prompt, completion = (read_string(row, key, place) for key in ("prompt", "completion"))
        return Demonstration(((prompt, False), (completion, True)))
    else:
        prompt = as_messages(row["prompt"], "prompt", "user", place)
        messages = prompt + as_messages(row["completion"], "completion", "assistant", place)
    answers = [i for i, m in enumerate(messages) if is_learned(m) and i >= len(prompt)]
    first = answers[-1] if answers and turns == "last" else len(prompt)
    if chat is None:
        return Demonstration(
            tuple((m["content"], i in answers and i >= first) for i, m in enumerate(messages))
        )
    if has_blank_turn(messages):
        return Demonstration(())
    chat = chat.with_tools(read_tools(row, place))
    parts = chat.parts(messages, place, first=first)
    *earlier, last = parts if isinstance(parts, list) else [parts]
    return Demonstration(last, tuple(earlier))


def parse_prompt(row: Row, place: str, chat: Chat) -> str:
    key = "prompt" if "prompt" in row else "messages"
    if key == "prompt" and not isinstance(row[key], list):
        return read_string(row, key, place)
    messages = read_messages(row[key], key, place)
    assistant_turns(messages, place)
    chat = chat.with_tools(read_tools(row, place))
    return chat.prompt(messages[:-1] if messages[-1]["role"] == "assistant" else messages, place)


def parse_rated_text(row: Row, place: str) -> RatedText:
    ratings = row["ratings"] if "ratings" in row else [row["rating"]]
    if not isinstance(ratings, list) or not ratings:
        raise ValueError(f"{place}: ratings must be a list of numbers, not empty, got {ratings!r}")
    text = read_string(row, "text", place)
    return RatedText(text, tuple(read_number(x, "a rating", place) for x in ratings))


TextSettings = SFTSettings | RewardSettings


def read_split(
    settings: TextSettings,
    seed: int,
    read: Callable[[str], Sequence],
    key: Callable,
    left_out: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> tuple[Sequence, Sequence]:
    """(training, validation) records, disjoint by text.

    The settings name two files, or one and the share to hold out, for which `key` gives the text
    of a record. `left_out` has, once a file is read, why rows of it are not among its records.

    Raises:
        ValueError: a file is not readable, or one of the two would be empty.
    """
    if settings.validation_data:
        return read(settings.data), read(settings.validation_data)
    fraction = settings.validation_fraction
    shares = {"train": 1 - fraction, "validation": fraction}
    records = read(settings.data)
    splits = split_by_text(records, shares, seed=seed, key=key, duplicates="keep")
    reasons = left_out.get(settings.data, ())
    others = f" ({len(reasons):,} more are not rendered: {reasons[0]})" if reasons else ""
    for name, split in splits.items():
        if not split:
            raise ValueError(
                f"{settings.data}: its {len(records)} records{others} leave none for {name} with "
                f"validation_fraction={fraction}; records of one text or prompt stay together; "
                "change the fraction, or name a file as validation_data"
            )
    return splits["train"], splits["validation"]


def data_files(settings: TextSettings) -> tuple[tuple[str, str], tuple[str, str]]:
    """(field, path) of the training and of the validation records of `read_split`."""
    unseen = settings.validation_data
    validation = ("validation_data", unseen) if unseen else ("data, held out", settings.data)
    return ("data", settings.data), validation
