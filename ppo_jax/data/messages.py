"""Conversations as rows hold them: messages, read and checked.

A message is {"role": ..., "content": text}, the role one of `ROLES`. A `place`, "file:line", is for
errors. What a chat template makes of them is in `chat`.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ppo_jax.data.readers import read_string, short_repr

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = {"human": "user", "gpt": "assistant", "observation": "tool"}  # "from" -> role

Message = dict[str, Any]


class NotRendered(ValueError):
    """The chat template makes no text of a row's messages, or none to learn from."""


def read_messages(value: Any, key: str, place: str) -> tuple[Message, ...]:
    """The messages under a key of a row, checked.

    Keys other than role and content, or from and value, must be None, as the empty fields of a
    table are.

    Raises:
        ValueError: which message is wrong, and why.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"{place}: {key} must be a list of messages, got {short_repr(value)}")
    return tuple(read_message(message, f"{key}[{i}]", place) for i, message in enumerate(value))


def read_message(value: Any, key: str, place: str) -> Message:
    fields = {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else {}
    if fields.keys() == {"from", "value"}:  # ShareGPT's
        role = fields["from"]
        role = SHAREGPT.get(role, role) if isinstance(role, str) else role
        fields = {"role": role, "content": fields["value"]}
    if fields.keys() != {"role", "content"}:
        raise ValueError(f"{place}: {key} must have role and content, got {short_repr(value)}")
    role = fields["role"]
    if role not in ROLES:
        raise ValueError(
            f"{place}: the role of {key} must be one of {list(ROLES)}, got {short_repr(role)}"
        )
    return {"role": role, "content": read_content(fields, f"{place}: {key}")}


def read_content(fields: dict[str, Any], place: str) -> str:
    """The text of a message, whose content may be a list of parts {"type": "text", "text": ...}."""
    if not isinstance(fields["content"], list):
        return read_string(fields, "content", place)
    texts = []
    for part in fields["content"]:
        part = {k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else {}
        if part.keys() != {"type", "text"} or part["type"] != "text":
            raise ValueError(
                f"{place}: the parts of a content must be {{'type': 'text', 'text': ...}}, got "
                f"{short_repr(fields['content'])}"
            )
        texts.append(read_string(part, "text", place))
    return "".join(texts)


def as_messages(value: Any, key: str, role: str, place: str) -> tuple[Message, ...]:
    """A list of messages; a text is one message of the role."""
    if isinstance(value, str):
        return ({"role": role, "content": read_string({key: value}, key, place)},)
    if not isinstance(value, list):
        raise ValueError(
            f"{place}: {key} must be a string or a list of messages, got {short_repr(value)}"
        )
    return read_messages(value, key, place)


def roles_of(messages: Sequence[Message]) -> tuple[str, ...]:
    return tuple(message["role"] for message in messages)


def assistant_turns(messages: Sequence[Message], place: str) -> list[int]:
    """Which of the messages are the assistant's.

    Raises:
        NotRendered: one of them has nothing to respond to.
    """
    roles = ["assistant", *(message["role"] for message in messages)]
    for i, (before, role) in enumerate(itertools.pairwise(roles)):
        if before == role == "assistant":
            raise NotRendered(
                f"{place}: a turn of the assistant's must follow one of another role, message {i} "
                "(counted from 0) does not"
            )
    return [i for i, role in enumerate(roles[1:]) if role == "assistant"]


def has_blank_turn(messages: Sequence[Message]) -> bool:
    """Whether the assistant says nothing in one of its turns."""
    return any(m["role"] == "assistant" and not m["content"].strip() for m in messages)


def collect(
    rows: Iterable[tuple[str, dict]],
    parse: Callable[[dict, str], Any],
    left_out: list[str] | None,
) -> list:
    """What `parse(row, place)` makes of rows. Of a row that is not rendered the reason goes into
    `left_out`; where that is None, it is raised.

    Raises:
        NotRendered: no row is left.
    """
    records = []
    for place, row in rows:
        try:
            records.append(parse(row, place))
        except NotRendered as error:
            if left_out is None:
                raise
            left_out.append(str(error))
    if left_out and not records:
        raise NotRendered(f"none of the {len(left_out):,} rows is rendered; {left_out[0]}")
    return records


def count_left_out(left_out: Sequence[str]) -> dict[str, int]:
    """{reason: number of rows}, the reason of the first one for all of them."""
    return {f"not rendered (the first: {left_out[0]})": len(left_out)} if left_out else {}
