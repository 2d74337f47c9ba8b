"""Preferences: responses to one prompt, of which some are better than others.

A malformed row raises ValueError, "place: what is wrong".
"""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ppo_jax.data.chat import Chat
from ppo_jax.data.messages import Message, as_messages, collect, has_blank_turn, read_tools
from ppo_jax.data.readers import Row, read_number, read_rows, read_string, short_repr

PREFERENCE_SCHEMAS = (
    ("prompt", "responses"),
    ("chosen", "rejected"),
    ("prompt", "chosen", "rejected"),
    ("prompt", "responses", "scores"),
    ("chosen", "rejected", "margin"),
    ("prompt", "chosen", "rejected", "margin"),
)
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # start of a turn in transcripts, as hh-rlhf's


@dataclass(frozen=True)
class RankedResponses:
    """Two responses or more to one prompt, with scores."""

    prompt: str
    responses: tuple[str, ...]
    scores: tuple[float, ...]  # of each response; only their order counts, equal is a tie
    first_turn: str = field(default="", compare=False)  # of messages: the user's first
    margin: float = 0.0  # by how much the score of the better one should be larger

    @property
    def conversation(self) -> str:
        """What the rankings of one conversation have in common: its first turn, or the prompt."""
        return self.first_turn or self.prompt.split(ASSISTANT)[0] or self.responses[0]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """All (better, worse) of two responses; a tie is no pair, nor are two equal texts."""
        numbers = range(len(self.responses))
        return [
            (i, j)
            for i in numbers
            for j in numbers
            if self.scores[i] > self.scores[j] and self.responses[i] != self.responses[j]
        ]

    @property
    def reject_reason(self) -> str:
        """Why it cannot be trained on, or ""."""
        if not all(response.strip() for response in self.responses):
            return "blank"
        if self.prompt.startswith(HUMAN) and any(map(ends_with_human, self.responses)):
            return "ends with a turn of the human's"
        return "" if self.pairs else "tied"


def ends_with_human(response: str) -> bool:
    """Whether the last turn of a response in a transcript is not the assistant's."""
    return response.rfind(HUMAN) > response.rfind(ASSISTANT)


def load_preferences(
    path: str | os.PathLike, tokenizer: Any | None = None, left_out: list[str] | None = None
) -> list[RankedResponses]:
    """Reads preferences and rankings.

    - {"prompt", "chosen", "rejected"}: texts, or messages.
    - {"prompt", "responses": [best, ..., worst]}, or in any order with "scores": [x, ...].
    - {"chosen", "rejected"}: two conversations. What they have in common before two different turns
      of the assistant's is the prompt. They are messages, or transcripts of the form
      "\\n\\nHuman: ... \\n\\nAssistant: ...".
    - Both forms of chosen and rejected with "margin": by how much the chosen is to score higher.

    The tokenizer's chat template renders messages; without one they are refused. For `left_out`
    see `messages.collect`.
    """
    parse = functools.partial(parse_ranking, chat=Chat(tokenizer))
    return collect(read_rows(path, PREFERENCE_SCHEMAS), parse, left_out)


def parse_ranking(row: Row, place: str, chat: Chat) -> RankedResponses:
    sides, scores = read_responses(row, place)
    margin = read_margin(row, place)
    if all(isinstance(x, str) for x in [row.get("prompt", ""), *sides.values()]):
        sides = {key: read_string(sides, key, place) for key in sides}
        if "prompt" in row:
            prompt, responses = read_string(row, "prompt", place), tuple(sides.values())
        else:
            prompt, responses = split_transcripts(tuple(sides.values()), place)
        return RankedResponses(prompt, responses, scores, margin=margin)
    prompt, responses, first_turn = split_conversations(row, sides, chat, place)
    return RankedResponses(prompt, responses, scores, first_turn, margin)


def read_margin(row: Row, place: str) -> float:
    """The margin of a pair, 0 where there is none."""
    margin = read_number(row.get("margin", 0.0), "margin", place)
    if margin < 0:
        raise ValueError(
            f"{place}: margin must be at least 0, got {margin:g}: by how much the chosen response "
            "should score higher (exchange chosen and rejected where it is the other)"
        )
    return margin


def read_responses(row: Row, place: str) -> tuple[dict[str, Any], tuple[float, ...]]:
    """(responses of a row by their keys, not yet checked; their scores)."""
    if "chosen" in row:
        return {key: row[key] for key in ("chosen", "rejected")}, (1.0, 0.0)
    responses = row["responses"]
    if not isinstance(responses, list) or len(responses) < 2:
        raise ValueError(
            f"{place}: responses must be a list of two or more, got {short_repr(responses)}"
        )
    ranks = list(range(len(responses), 0, -1))
    scores = row.get("scores", ranks)
    if not isinstance(scores, list) or len(scores) != len(responses):
        raise ValueError(
            f"{place}: scores must be a list of {len(responses)} numbers, one for each of the "
            f"responses, got {short_repr(scores)}"
        )
    sides = {f"responses[{i}]": response for i, response in enumerate(responses)}
    return sides, tuple(read_number(score, "a score", place) for score in scores)


def split_transcripts(texts: Sequence[str], place: str) -> tuple[str, tuple[str, ...]]:
    """(prompt, responses): the prompt ends with the last ASSISTANT that all have in common."""
    turns = [text.split(ASSISTANT) for text in texts]
    shared = common_length([x[:-1] for x in turns])
    if not shared or not texts[0].startswith(HUMAN):
        raise ValueError(
            f"{place}: without a prompt, chosen and rejected must be lists of messages, or "
            f"transcripts that begin with {HUMAN!r} and go on alike up to an {ASSISTANT!r}, got "
            f"{' and '.join(map(short_repr, texts))}"
        )
    prompt = "".join(turn + ASSISTANT for turn in turns[0][:shared])
    return prompt, tuple(text[len(prompt) :] for text in texts)


def split_conversations(
    row: Row, sides: dict[str, Any], chat: Chat, place: str
) -> tuple[str, tuple[str, ...], str]:
    """(prompt, responses, the user's first turn) where one or more are lists of messages.

    A response begins with the assistant's message, or it is the whole conversation and begins with
    the prompt. A text is one message, the user's in a prompt and else the assistant's.
    """
    texts = [as_messages(side, key, "assistant", place) for key, side in sides.items()]
    if "prompt" in row:
        prompt = as_messages(row["prompt"], "prompt", "user", place)
        texts = [x[len(prompt) :] if x[: len(prompt)] == prompt else x for x in texts]
    else:
        prompt = common_messages(texts)
        texts = [x[len(prompt) :] for x in texts]
    for key, messages in zip(sides, texts, strict=True):
        ends = {message["role"] for message in (*messages[:1], *messages[-1:])}
        if not prompt or ends != {"assistant"}:
            raise ValueError(
                f"{place}: {key} must go on from the prompt with a turn of the assistant's and end "
                "with one (leave prompt out where both are whole conversations), got "
                f"{short_repr(sides[key])}"
            )
    chat = chat.with_tools(read_tools(row, place))
    split = [chat.response(prompt, messages, place) for messages in texts]
    responses = (
        "" if has_blank_turn(messages) else response
        for messages, (_, response) in zip(texts, split, strict=True)
    )
    first_turn = next((m["content"] for m in prompt if m["role"] == "user"), "")
    return split[0][0], tuple(responses), first_turn


def common_messages(conversations: Sequence[tuple[Message, ...]]) -> tuple[Message, ...]:
    """The longest common beginning that a turn of the assistant's follows in each of them."""
    for end in range(common_length(conversations), -1, -1):
        if all(x[end : end + 1] and x[end]["role"] == "assistant" for x in conversations):
            return conversations[0][:end]
    return ()


def common_length(sequences: Sequence[Sequence]) -> int:
    """Length of the longest common beginning of all sequences."""
    count = 0
    for items in zip(*sequences, strict=False):
        if any(item != items[0] for item in items):
            break
        count += 1
    return count
