"""Conversations of words that no template writes by itself, to see what it writes around them."""

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from ppo_jax.data.messages import REASONING, Message


class Shape(NamedTuple):
    """A message without its texts."""

    role: str
    keys: tuple[str, ...] = ("content",)  # of its texts
    calls: int = 0  # of tools


USER, ASSISTANT = Shape("user"), Shape("assistant")
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "QzTzQ",
        "description": "QzTdzQ",
        "parameters": {
            "type": "object",
            "properties": {"QzTpzQ": {"type": "string", "description": "QzTpdzQ"}},
            "required": ["QzTpzQ"],
        },
    },
}


def shapes(messages: Sequence[Message]) -> tuple[Shape, ...]:
    """The messages without their texts; of other keys only those of texts remain."""
    return tuple(map(shape, messages))


def shape(message: Message) -> Shape:
    calls = len(message.get("tool_calls", ()))
    keys = {key for key, value in message.items() if isinstance(value, str)} - {"role"}
    keys -= {key for key in keys & {*REASONING} if not message[key].strip()}
    keys -= {"content"} if calls and not message["content"].strip() else set()
    return Shape(message["role"], tuple(sorted(keys)), calls)


def make_probes(shapes: Sequence[Shape]) -> list[Message]:
    """Messages whose texts are a word each that no template writes by itself."""
    return [make_probe(i, shape) for i, shape in enumerate(shapes)]


def make_probe(i: int, shape: Shape) -> Message:
    texts = {key: f"Qz{i}k{n}zQ" for n, key in enumerate(shape.keys)}
    texts |= {key: f"Qz{i}zQ" for key in texts if key == "content"}
    # Some templates count the characters of an id.
    texts |= {key: f"Qz{i:05}zQ" for key in texts if key == "tool_call_id"}
    probe: Message = {"role": shape.role, "content": "", **texts}
    if shape.calls:
        probe["tool_calls"] = [
            {
                "id": f"Qz{i:03}{j:02}zQ",
                "type": "function",
                "function": {"name": f"Qz{i}n{j}zQ", "arguments": {f"Qz{i}a{j}zQ": f"Qz{i}v{j}zQ"}},
            }
            for j in range(shape.calls)
        ]
    return probe


def pieces(text: str) -> list[str]:
    """The tags, words and other characters of a text."""
    return re.findall(r"<[^<>\s]*>|\[[^\[\]\s]*\]|\w+|\W", text)


def words(text: str) -> list[str]:
    """The tags and words of a text."""
    return [piece for piece in pieces(text) if len(piece) > 1]


def begins_otherwise(begun: list[str], opener: list[str]) -> bool:
    """Whether a turn has another header than the generation prompt; one "<think>" or "</think>" is
    no header."""
    return bool(begun) and (bool({*begun} & {*opener}) or any(x[0].isalnum() for x in opener))


def common_beginning(a: str, b: str, *, spaces: bool = True) -> int:
    """Length in `a` of the longest common beginning that ends between words and tags.

    Without `spaces` those of the two may differ.

    >>> common_beginning("<user> Hi<think>", "<user> Hi</think>")
    9
    >>> common_beginning(" <user>Hi", "<user> Ho", spaces=False)
    7
    """
    lengths = itertools.accumulate(map(len, pieces(a)))
    mine = [x for x in zip(pieces(a), lengths, strict=True) if spaces or x[0].strip()]
    other = [piece for piece in pieces(b) if spaces or piece.strip()]
    common = 0
    for (piece, end), same in zip(mine, other, strict=False):
        if piece != same:
            break
        common = end
    return common
