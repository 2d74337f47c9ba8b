"""Conversations as text, by the chat template of a tokenizer.

A message is {"role": "system" | "user" | "assistant", "content": text}. A `place`,
"file:line", is for errors.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

from ppo_jax.data.readers import read_string, short_repr

ROLES = ("system", "user", "assistant")

Message = dict[str, str]
Segment = tuple[str, bool]  # text, and whether it is in the loss


class Chat:
    """The chat template of a tokenizer.

    What a model has to write in a turn is all that follows the template's generation prompt, up to
    the special token that ends the turn. A line break after that token is the template's.

    Args:
        tokenizer: a Hugging Face tokenizer; None, or one without a template, refuses all messages.
    """

    def __init__(self, tokenizer: Any | None):
        self.tokenizer = tokenizer

    @functools.cached_property
    def special_tokens(self) -> list[str]:
        """Tokens that are control codes, not text."""
        added = self.tokenizer.added_tokens_decoder.values()
        return [token.content for token in added if token.special]

    def prompt(self, messages: Sequence[Message], place: str) -> str:
        """The conversation up to where the assistant's next message begins.

        Raises:
            ValueError: there is no template, or it refuses the messages.
        """
        return self.render(messages, place, generation_prompt=True)

    def segments(self, messages: Sequence[Message], place: str) -> tuple[Segment, ...]:
        """The conversation in segments; those that the assistant has to write are in the loss.

        Whatever follows the assistant's last turn is dropped, since it adds no loss.

        Raises:
            ValueError: no turn of the assistant's, no template, or one that renders the beginning
                of a conversation differently when it continues.
        """
        turns = assistant_turns(messages, place)
        if not turns:
            raise ValueError(f"{place}: messages must have a turn of the assistant's to learn")
        messages = messages[: turns[-1] + 1]
        whole, done = self.render(messages, place), 0
        segments: list[Segment] = []
        for turn in turns:
            prompt = self.prompt(messages[:turn], place)
            turn_text = self.text_after(prompt, self.render(messages[: turn + 1], place), place)
            self.text_after(prompt + turn_text, whole, place)
            end = len(prompt) + self.end_of_turn(turn_text, messages[turn]["content"])
            segments += [(whole[done : len(prompt)], False), (whole[len(prompt) : end], True)]
            done = end
        return tuple(segments)

    def response(
        self, prompt: Sequence[Message], messages: Sequence[Message], place: str
    ) -> tuple[str, str]:
        """(prompt, response) as texts; the response's first and last messages are the assistant's.

        Raises:
            ValueError: as `segments`.
        """
        assistant_turns([*prompt, *messages], place)
        before = self.prompt(prompt, place)
        text = self.text_after(before, self.render([*prompt, *messages], place), place)
        return before, text[: self.end_of_turn(text, messages[-1]["content"])]

    def text_after(self, beginning: str, whole: str, place: str) -> str:
        if not whole.startswith(beginning):
            raise ValueError(
                f"{place}: the chat template writes the beginning of this conversation otherwise "
                f"when it goes on, {short_repr(beginning[-40:])} is not in it, so that the turns "
                "cannot be told apart; give it as texts, prompt and completion"
            )
        return whole[len(beginning) :]

    def end_of_turn(self, text: str, content: str) -> int:
        """End of a rendered turn: behind the last special token after its content, or all of it.

        `text` is the turn without the generation prompt.
        """
        content = content.strip()
        start = text.rfind(content) + len(content) if content in text else 0
        places = [(text.rfind(token, start), token) for token in self.special_tokens]
        return max((at + len(token) for at, token in places if at >= 0), default=len(text))

    def render(
        self, messages: Sequence[Message], place: str, *, generation_prompt: bool = False
    ) -> str:
        """The messages as the template writes them."""
        if self.tokenizer is None or self.tokenizer.chat_template is None:
            raise ValueError(
                f"{place}: messages need a tokenizer with a chat template, and this one has none: "
                "start from a chat model, put the template as chat_template.jinja beside the "
                "model's tokenizer.json, or give texts, prompt and completion"
            )
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation_prompt
            )
        except TemplateError as error:
            raise ValueError(f"{place}: the chat template refuses the messages: {error}") from error


def read_messages(value: Any, key: str, place: str) -> tuple[Message, ...]:
    """The messages under a key of a row, checked.

    Keys other than role and content must be None, as the empty fields of a table are.

    Raises:
        ValueError: which message is wrong, and why.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"{place}: {key} must be a list of messages, got {short_repr(value)}")
    return tuple(read_message(message, f"{key}[{i}]", place) for i, message in enumerate(value))


def read_message(value: Any, key: str, place: str) -> Message:
    fields = {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else {}
    if fields.keys() != {"role", "content"}:
        raise ValueError(f"{place}: {key} must have role and content, got {short_repr(value)}")
    role = fields["role"]
    if role not in ROLES:
        raise ValueError(
            f"{place}: the role of {key} must be one of {list(ROLES)}, got {short_repr(role)}"
        )
    return {"role": role, "content": read_string(fields, "content", f"{place}: {key}")}


def assistant_turns(messages: Sequence[Message], place: str) -> list[int]:
    """Which of the messages are the assistant's.

    Raises:
        ValueError: one of them has nothing to respond to.
    """
    roles = ["assistant", *(message["role"] for message in messages)]
    for i, (before, role) in enumerate(itertools.pairwise(roles)):
        if before == role == "assistant":
            raise ValueError(
                f"{place}: a turn of the assistant's must follow one of another role, message {i} "
                "(counted from 0) does not"
            )
    return [i for i, role in enumerate(roles[1:]) if role == "assistant"]


def has_blank_turn(messages: Sequence[Message]) -> bool:
    """Whether the assistant says nothing in one of its turns."""
    return any(m["role"] == "assistant" and not m["content"].strip() for m in messages)
