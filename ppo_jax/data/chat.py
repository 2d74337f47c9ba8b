"""Conversations as text, by the chat template of a tokenizer.

Messages are those of `messages`. A `place`, "file:line", is for errors.
"""

import contextlib
import datetime
import functools
import itertools
import json
import os
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ppo_jax.config.parsing import describe_error
from ppo_jax.data.messages import Message, NotRendered, assistant_turns, roles_of
from ppo_jax.data.readers import short_repr

SECONDS = 5.0  # of processor time that a template may take for a conversation; it needs some 0.001

Segment = tuple[str, bool]  # text, and whether it is in the loss
Row = tuple[Segment, ...]


class Turn(NamedTuple):
    """A last turn of the assistant's in a conversation that ends with it."""

    text: str  # the conversation
    start: int  # of what the assistant writes, in the text
    end: int  # behind the end-of-turn token

    @property
    def row(self) -> Row:
        return ((self.text[: self.start], False), (self.text[self.start : self.end], True))


class Outline(NamedTuple):
    """What a template writes around the contents, which follows from the roles alone."""

    excess: int | None  # last characters of the generation prompt that a finished turn lacks;
    # None where the two do not begin alike
    header: str  # of the last turn behind that, which is not for the assistant to write
    after: str  # behind the content of the last message, the assistant's
    end: int  # of the turn, in `after`
    lost: tuple[int, ...]  # messages that it does not write


class Chat:
    """The chat template of a tokenizer.

    What a model has to write in a turn is all that follows the template's generation prompt, up to
    the first end-of-turn token behind the content. Some templates open the answer in the
    generation prompt alone ("<think>\\n"): there the turn begins where the generation prompt and
    the finished conversation part. Where there is no generation prompt, the header of the turn is
    put behind the prompt.

    Args:
        tokenizer: a Hugging Face tokenizer; None, or one without a template, refuses all messages.
            Its attribute `chat_date`, "2026-11-28", is today for the template; see
            `io.tokenizers.with_chat`.
    """

    def __init__(self, tokenizer: Any | None):
        self.tokenizer = tokenizer
        self._outlines: dict[tuple[str, ...], Outline | None] = {}

    @functools.cached_property
    def special_tokens(self) -> re.Pattern:
        """Tokens that are control codes, not text."""
        added = self.tokenizer.added_tokens_decoder.values()
        tokens = {token.content for token in added if token.special}
        tokens = sorted({*tokens, self.tokenizer.eos_token or ""} - {""}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, tokens)) or "$^")

    def prompt(self, messages: Sequence[Message], place: str) -> str:
        """The conversation up to where the assistant's next message begins.

        Raises:
            NotRendered: the template refuses the messages, fails, or loses one of them.
            ValueError: there is no template.
        """
        text = self.render(messages, place, generation_prompt=True)
        outline = self.outline((*roles_of(messages), "assistant"))
        check_kept(messages, text, place, outline)
        return text + outline.header if outline and not outline.excess else text

    def parts(self, messages: Sequence[Message], place: str, *, first: int = 0) -> Row | list[Row]:
        """The conversation as (text, whether it is in the loss); the assistant's turns are.

        Whatever follows the assistant's last turn is dropped, since it adds no loss. Where the
        template writes a turn otherwise once the conversation goes on, as those that show what the
        assistant thought in its last turn alone, there is a row for each turn, in which it is the
        last one.

        Args:
            messages: the conversation.
            place: for errors.
            first: of the messages to learn from, if it is the assistant's; those before are only
                read.

        Returns:
            The segments of the whole, or a list of such rows.

        Raises:
            NotRendered: as `prompt`, or no turn of the assistant's.
            ValueError: there is no template.
        """
        numbers = [i for i in assistant_turns(messages, place) if i >= first]
        if not numbers:
            raise NotRendered(f"{place}: messages must have a turn of the assistant's to learn")
        turns = [self.turn(messages[:i], messages[i : i + 1], place, numbers) for i in numbers]
        whole, done = turns[-1].text, 0
        segments: list[Segment] = []
        for turn in turns:
            if not whole.startswith(turn.text[: turn.end]):
                return [turn.row for turn in turns]
            segments += [(whole[done : turn.start], False), (whole[turn.start : turn.end], True)]
            done = turn.end
        return tuple(segments)

    def response(
        self, prompt: Sequence[Message], messages: Sequence[Message], place: str
    ) -> tuple[str, str]:
        """(prompt, response) as texts; the response's first and last messages are the assistant's.

        Raises:
            NotRendered, ValueError: as `parts`.
        """
        assistant_turns([*prompt, *messages], place)
        turn = self.turn(prompt, messages, place)
        return turn.text[: turn.start], turn.text[turn.start : turn.end]

    def turn(
        self,
        prompt: Sequence[Message],
        messages: Sequence[Message],
        place: str,
        learned: Sequence[int] = (),
    ) -> Turn:
        """What follows a prompt, as one turn; its first and last messages are the assistant's.

        `learned` are messages that have a turn of their own, and may be rewritten in this one.
        """
        conversation = [*prompt, *messages]
        opened = self.render(prompt, place, generation_prompt=True)
        text = self.render(conversation, place)
        check_kept(conversation, text, place, self.outline(roles_of(conversation)), learned)
        content_end, end = self.ends(conversation, text, place)
        begun_roles = roles_of(conversation[: len(prompt) + 1])
        start, begun = self.start(opened, text, begun_roles), self.outline(begun_roles)
        content = messages[-1]["content"].strip()
        if start is None:  # the prompt as it is generated, the turn as it is written
            before = text[:content_end].rstrip()
            if len(messages) > 1 or not before.endswith(content):
                raise NotRendered(
                    f"{place}: the chat template writes the beginning of this conversation "
                    f"otherwise when it goes on, {short_repr(opened[-40:])} is not in it, so that "
                    "the turns cannot be told apart; give it as texts, prompt and completion"
                )
            check_kept(prompt, opened, place, None, learned)
            turn = content + text[len(before) : end]
            return Turn(opened + turn, len(opened), len(opened) + len(turn))
        # A content may begin with what the generation prompt ends in.
        earliest = min(start, len(opened) - (begun.excess or 0 if begun else 0))
        if not contains(text[earliest:content_end], content):
            raise lost(conversation, len(conversation) - 1, place)
        return Turn(text, start, end)

    def start(self, opened: str, text: str, roles: tuple[str, ...]) -> int | None:
        """Where what the assistant writes begins in a finished conversation.

        Args:
            opened: the conversation before the turn, with the generation prompt.
            text: the finished one.
            roles: of the messages up to the turn.

        Returns:
            None where the two begin otherwise.
        """
        outline = self.outline(roles)
        if outline and outline.excess is None:
            return None
        if text.startswith(opened) and not (outline and outline.header):
            return len(opened)
        if outline is None:
            return None
        begun = opened[: len(opened) - outline.excess] + outline.header
        return len(begun) if text.startswith(begun) else None

    def ends(self, conversation: Sequence[Message], text: str, place: str) -> tuple[int, int]:
        """(end of the last message's content, end of its turn) in the rendered conversation."""
        outline = self.outline(roles_of(conversation))
        if outline and text.endswith(outline.after):
            content_end = len(text) - len(outline.after)
            return content_end, content_end + outline.end
        content = conversation[-1]["content"].strip()
        if content not in text:
            raise lost(conversation, len(conversation) - 1, place)
        content_end = text.rindex(content) + len(content)
        return content_end, content_end + self.end_of_turn(text[content_end:], None, "")

    def outline(self, roles: tuple[str, ...]) -> Outline | None:
        """The outline of a conversation that ends with the assistant; None where there is none."""
        if roles not in self._outlines:
            try:
                self._outlines[roles] = self.find_outline(make_slots(roles))
            except NotRendered:
                self._outlines[roles] = None
        return self._outlines[roles]

    def find_outline(self, slots: list[Message]) -> Outline | None:
        opened = self.render(slots[:-1], "", generation_prompt=True)
        before, found, after = self.render(slots, "").rpartition(slots[-1]["content"])
        if not found:
            return Outline(None, "", "", 0, (len(slots) - 1,))
        lost = tuple(i for i, x in enumerate(slots[:-1]) if x["content"] not in before + after)
        rest = (after, self.end_of_turn(after, self.between(slots), before), lost)
        border = common_beginning(opened, before)
        begun, opener = before[border:], opened[border:]
        if any(slot["content"] in begun for slot in slots):
            return Outline(None, "", *rest)
        if opened == self.render(
            slots[:-1], ""
        ):  # no generation prompt, or one that is always there
            always = words(os.path.commonprefix([opened[::-1], after[::-1]]))
            if always or begun.strip():
                return Outline(len(opener), begun, *rest)
        header = begun[: common_beginning(begun, opener, spaces=False)]
        if header:
            header = begun[: len(begun) - len(begun[len(header) :].lstrip())]
        if not header and begins_otherwise(words(begun), words(opener)):
            return Outline(None, "", *rest)
        return Outline(len(opener), header, *rest)

    def between(self, slots: list[Message]) -> str | None:
        """What stands behind the last message where the user goes on; None if that is refused."""
        more = {"role": "user", "content": "Qz-zQ"}
        try:
            text = self.render([*slots, more], "").partition(slots[-1]["content"])[2]
        except NotRendered:
            return None
        between, found, _ = text.partition(more["content"])
        return between if found else None

    def end_of_turn(self, after: str, between: str | None, before: str) -> int:
        """End of a turn in what follows its content: behind its end-of-turn token, if it has one.

        That is the first special token, or EOS where only special tokens come before.

        Args:
            after: the rest of the text where it is the last turn.
            between: what stands before the next content where the conversation goes on: the turn's
                end is in both, unless it has two forms. None where it is not known.
            before: the text before the content; a token in it may begin a header.
        """
        shared = after if between is None else os.path.commonprefix([after, between])
        if ends := self.end_tokens(shared):
            eos = self.tokenizer.eos_token
            return next((x.end() for x in ends if x.group() == eos), ends[0].end())
        last = self.special_tokens.match(after.lstrip())
        if last and last.group() not in before:
            return len(after) - len(after.lstrip()) + last.end()
        # Of a header that both have, no part is the turn's.
        end = shared if shared == after else shared[: len(shared) - len(shared.lstrip())]
        return len(end.rstrip() or end)

    def end_tokens(self, text: str) -> list[re.Match]:
        """The first special token of a text, and those that follow it at once."""
        found: list[re.Match] = []
        for match in self.special_tokens.finditer(text):
            if found and match.start() > found[-1].end():
                break
            found.append(match)
        return found

    @functools.cached_property
    def in_parts(self) -> bool:
        """Whether the template reads contents only as lists of parts, as some with images do."""
        slots = make_slots(("user", "assistant"))
        for form in (False, True):
            try:
                text = self.apply(slots, in_parts=form)
            except TimeoutError:
                raise
            except Exception:
                continue
            if all(slot["content"] in text for slot in slots):
                return form
        return False

    def apply(self, messages: Sequence[Message], *, in_parts: bool, **options: Any) -> str:
        if in_parts:
            messages = [
                {**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages
            ]
        with time_limit(SECONDS):
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, **options, **self.dated
            )

    def render(
        self, messages: Sequence[Message], place: str, *, generation_prompt: bool = False
    ) -> str:
        """The messages as the template writes them."""
        template = getattr(self.tokenizer, "chat_template", None)
        if template is None:
            raise ValueError(
                f"{place}: messages need a tokenizer with a chat template, and this one has none: "
                "start from a chat model, put the template as chat_template.jinja beside the "
                "model's tokenizer.json, name it as model.chat_template, or give texts, prompt and "
                "completion"
            )
        from jinja2 import TemplateError

        try:
            return self.apply(
                messages, in_parts=self.in_parts, add_generation_prompt=generation_prompt
            )
        except TimeoutError as error:  # it would take as long for every other row
            raise ValueError(f"{place}: the chat template fails: {error}") from error
        except Exception as error:
            # It raised by itself, or it is faulty: jinja2's own errors are of derived classes.
            verb, reason = "fails", describe_error(error)
            if type(error) is TemplateError:
                verb, reason = "refuses the messages", reason.removeprefix("TemplateError: ")
            raise NotRendered(f"{place}: the chat template {verb}: {reason}") from error

    def check(self, place: str):
        """Refuse a template that renders nothing at all; one that refuses a conversation is fine.

        Raises:
            ValueError: it is no Jinja template, or takes too long.
        """
        from jinja2 import TemplateSyntaxError

        try:
            self.render(make_slots(("user",)), place)
        except NotRendered as error:
            if isinstance(error.__cause__, TemplateSyntaxError):
                raise

    @functools.cached_property
    def dated(self) -> dict[str, str]:
        """The template with a fixed date, as an argument; {} where it does not ask for one."""
        date, template = getattr(self.tokenizer, "chat_date", ""), self.tokenizer.chat_template
        if not date or "strftime_now" not in str(template):
            return {}
        template = self.tokenizer.get_chat_template()
        return {"chat_template": dated(template, datetime.date.fromisoformat(date))}


def read_template(path: str | os.PathLike) -> str:
    """The chat template in a file, the setting `model.chat_template`.

    Raises:
        ValueError: there is no such file, or it is not text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"model.chat_template: {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"model.chat_template: {path}: not text in UTF-8: {error}") from error


def make_slots(roles: Sequence[str]) -> list[Message]:
    """Messages with a word each that no template writes by itself."""
    return [{"role": role, "content": f"Qz{i}zQ"} for i, role in enumerate(roles)]


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


DIRECTIVES = "aAbBcdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ"


def dated(template: str, date: datetime.date) -> str:
    """The template with a `strftime_now` that gives that date, at midnight, whenever it is asked.

    Templates have no other clock. A macro takes the place of the function that transformers gives.
    """
    texts = {f"%{c}": date.strftime(f"%{c}") for c in DIRECTIVES}
    texts |= {f"%-{c}": text.lstrip("0 ") or "0" for (_, c), text in texts.items()}
    texts["%%"] = "%"
    fill = "".join(f"|replace({json.dumps(k)},{json.dumps(v)})" for k, v in texts.items())
    return "{% macro strftime_now(format) %}{{ format" + fill + " }}{% endmacro %}\n" + template


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError after so many seconds of processor time; in the main thread alone."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(
        signal, "setitimer"
    ):
        yield
        return

    def stop(number, frame):
        raise TimeoutError(f"it takes more than {seconds:g} s")

    former = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, former)


def contains(text: str, part: str) -> bool:
    """Whether a text has the part, whatever spaces and line breaks stand in either."""
    return "".join(part.split()) in "".join(text.split())


def check_kept(
    messages: Sequence[Message],
    text: str,
    place: str,
    outline: Outline | None,
    learned: Sequence[int] = (),
):
    """Every message is in the rendered text. Former turns of the assistant's may be rewritten, to
    drop what it thought; those that are `learned` from another text may be missing.
    """
    last = len(messages) - 1
    missing = [i for i in outline.lost if i == last or i not in learned] if outline else []
    bare = "".join(text.split())
    for i, message in enumerate(messages):
        is_former = message["role"] == "assistant" and i < last
        if i in missing or not (is_former or "".join(message["content"].split()) in bare):
            raise lost(messages, i, place)


def lost(messages: Sequence[Message], i: int, place: str) -> NotRendered:
    role, content = messages[i]["role"], short_repr(messages[i]["content"])
    return NotRendered(
        f"{place}: the chat template loses message {i} (counted from 0), of role {role}: {content} "
        "is not in what it writes; leave the message out, or name another template as "
        "model.chat_template"
    )
