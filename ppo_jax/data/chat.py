"""Conversations as text, by the chat template of a tokenizer.

Messages are those of `messages`. A `place`, "file:line", is for errors.
"""

import functools
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from ppo_jax.data.messages import (
    Message,
    NotRendered,
    assistant_turns,
    is_learned,
    json_forms,
    tool_name,
    written_texts,
)
from ppo_jax.data.probes import (
    ASSISTANT,
    PROBE_TOOL,
    Shape,
    begins_otherwise,
    common_beginning,
    make_probes,
    shapes,
    words,
)
from ppo_jax.data.readers import short_repr
from ppo_jax.data.templates import Template

OUTLINES = 1024  # that are kept, of the shapes seen last

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
    """What a template writes around the texts, which follows from the shapes alone."""

    excess: int | None  # last characters of the generation prompt that a finished turn lacks;
    # None where the two do not begin alike
    header: str  # of the last turn behind that, which is not for the assistant to write
    after: str  # behind the texts of the last message, the assistant's
    end: int  # of the turn, in `after`
    lost: tuple[tuple[int, str], ...]  # (message, key) of the texts that it does not write
    loses_tools: bool


class Chat(Template):
    """What the chat template of a tokenizer writes, and what the assistant writes of it.

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
        super().__init__(tokenizer)
        self._outlines: dict[tuple[bool, tuple[Shape, ...]], Outline | None] = {}

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
        outline = self.outline((*shapes(messages), ASSISTANT))
        self.check_kept(messages, text, place, outline)
        return text + outline.header if outline and not outline.excess else text

    def parts(self, messages: Sequence[Message], place: str, *, first: int = 0) -> Row | list[Row]:
        """The conversation as (text, whether it is in the loss); the assistant's turns are, but for
        those with a weight of 0.

        Whatever follows the last learned turn is dropped, since it adds no loss. Where the
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
        numbers = [i for i in numbers if is_learned(messages[i])]
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
        outline = self.outline(shapes(conversation))
        self.check_kept(conversation, text, place, outline, learned)
        content_end, end = self.ends(conversation, text, outline, place)
        begun = self.outline((*shapes(prompt), ASSISTANT))
        start, last = self.start(opened, text, begun), messages[-1]
        content = last["content"].strip()
        if start is None:  # the prompt as it is generated, the turn as it is written
            before = text[:content_end].rstrip()
            keys = [key for key, _ in written_texts(last, reasoning=True)]
            if len(messages) > 1 or keys != ["content"] or not before.endswith(content):
                raise NotRendered(
                    f"{place}: the chat template writes the beginning of this conversation "
                    f"otherwise when it goes on, {short_repr(opened[-40:])} is not in it, so that "
                    "the turns cannot be told apart; give it as texts, prompt and completion"
                )
            self.check_kept(prompt, opened, place, None, learned)
            turn = content + text[len(before) : end]
            return Turn(opened + turn, len(opened), len(opened) + len(turn))
        # A content may begin with what the generation prompt ends in.
        earliest = min(start, len(opened) - (begun.excess or 0 if begun else 0))
        check_written(
            conversation, len(conversation) - 1, squeezed(text[earliest:content_end]), place
        )
        return Turn(text, start, end)

    def start(self, opened: str, text: str, begun: Outline | None) -> int | None:
        """Where what the assistant writes begins in a finished conversation.

        Args:
            opened: the conversation before the turn, with the generation prompt.
            text: the finished one.
            begun: the outline where a turn without calls follows.

        Returns:
            None where the two begin otherwise.
        """
        if begun is None:
            return len(opened) if text.startswith(opened) else None
        if begun.excess is None:
            return None
        if text.startswith(opened) and not begun.header:
            return len(opened)
        start = opened[: len(opened) - begun.excess] + begun.header
        # A call may follow the header without a line break.
        border = common_beginning(start, text)
        return None if start[border:].strip() else border

    def ends(
        self, conversation: Sequence[Message], text: str, outline: Outline | None, place: str
    ) -> tuple[int, int]:
        """(end of the last message's texts, end of its turn) in the rendered conversation."""
        if outline and text.endswith(outline.after):
            content_end = len(text) - len(outline.after)
            return content_end, content_end + outline.end
        number, content = len(conversation) - 1, conversation[-1]["content"].strip()
        if content not in text:
            raise lost(conversation, number, "content", place)
        if "tool_calls" in conversation[-1]:
            raise lost(conversation, number, "tool_calls", place)
        content_end = text.rindex(content) + len(content)
        return content_end, content_end + self.end_of_turn(text[content_end:], None, "")

    def outline(self, key: tuple[Shape, ...]) -> Outline | None:
        """The outline of a conversation that ends with the assistant; None where there is none."""
        known, at = self._outlines, (bool(self.tools), key)
        if at in known:
            outline = known.pop(at)
        else:
            # What is known is for the tools of any row.
            chat = self.plain.with_tools([PROBE_TOOL]) if self.tools else self.plain
            try:
                outline = chat.find_outline(key)
            except NotRendered:
                outline = None
        known[at] = outline  # behind all others: the first is the one not seen for longest
        if len(known) > OUTLINES:
            del known[next(iter(known))]
        return outline

    def find_outline(self, key: tuple[Shape, ...]) -> Outline | None:
        *asked, answer = probes = make_probes(key)
        opened, text = self.render(asked, "", generation_prompt=True), self.render(probes, "")
        lost = tuple(
            (i, name)
            for i, probe in enumerate(probes)
            for name, (word,) in written_texts(probe, reasoning=probe is answer)
            if word not in text
        )
        rest = (lost, any(tool_name(tool) not in opened for tool in self.tools))
        if any(i == len(asked) for i, _ in lost):
            return Outline(None, "", "", 0, *rest)
        written = [word for _, (word,) in written_texts(answer, reasoning=True)]
        last = max(written, key=text.rfind)
        before, _, after = text.rpartition(last)
        between = self.between(probes, last)
        if key[-1].calls:
            begin, end = self.end_of_calls(
                after, between, before, self.outline((*key[:-1], ASSISTANT))
            )
            return Outline(None, "", after[begin:], end - begin, *rest)
        rest = (after, self.end_of_turn(after, between, before), *rest)
        if key[-1] != ASSISTANT:  # A prompt does not know what is thought.
            return Outline(None, "", *rest)
        border = common_beginning(opened, before)
        begun, opener = before[border:], opened[border:]
        if any(probe["content"] and probe["content"] in begun for probe in asked):
            return Outline(None, "", *rest)
        if opened == self.render(asked, ""):  # none, or one that is always there
            always = words(os.path.commonprefix([opened[::-1], after[::-1]]))
            if always or begun.strip():
                return Outline(len(opener), begun, *rest)
        header = begun[: common_beginning(begun, opener, spaces=False)]
        if header:
            header = begun[: len(begun) - len(begun[len(header) :].lstrip())]
        if not header and begins_otherwise(words(begun), words(opener)):
            return Outline(None, "", *rest)
        return Outline(len(opener), header, *rest)

    def between(self, probes: list[Message], last: str) -> str | None:
        """What is written behind the last text where the conversation goes on; None if that is
        refused."""
        more = {"role": "user", "content": "Qz-zQ"}
        try:
            if calls := probes[-1].get("tool_calls"):
                more |= {"role": "tool", "tool_call_id": calls[-1]["id"]}
            text = self.render([*probes, more], "").rpartition(last)[2]
        except NotRendered:
            return None
        between, found, _ = text.partition(more["content"])
        return between if found else None

    def end_of_calls(
        self, after: str, between: str | None, before: str, plain: Outline | None
    ) -> tuple[int, int]:
        """Where the token that ends a turn with calls begins and ends in what follows their texts.

        It is EOS, or ends a turn without calls as well; else see `end_of_turn`. What stands before
        it belongs to the calls.
        """
        shared = after if between is None else os.path.commonprefix([after, between])
        ends = self.end_tokens(plain.after[: plain.end])[-1:] if plain else []
        known = {self.tokenizer.eos_token, *(x.group() for x in ends)}
        for match in self.plain.special_tokens.finditer(shared):
            if match.group() in known:
                return match.span()
        end = self.end_of_turn(after, between, before)
        tokens = self.end_tokens(after[:end])
        return (tokens[-1].start() if tokens else len(after[:end].rstrip())), end

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
        last = self.plain.special_tokens.match(after.lstrip())
        if last and last.group() not in before:
            return len(after) - len(after.lstrip()) + last.end()
        # Of a header that both have, no part is the turn's.
        end = shared if shared == after else shared[: len(shared) - len(shared.lstrip())]
        return len(end.rstrip() or end)

    def end_tokens(self, text: str) -> list[re.Match]:
        """The first special token of a text, and those that follow it at once."""
        found: list[re.Match] = []
        for match in self.plain.special_tokens.finditer(text):
            if found and match.start() > found[-1].end():
                break
            found.append(match)
        return found

    def check_kept(
        self,
        messages: Sequence[Message],
        text: str,
        place: str,
        outline: Outline | None,
        learned: Sequence[int] = (),
    ):
        """Every message is in the rendered text, and every tool. Former turns of the assistant's
        may be rewritten, to drop what it thought; those that are `learned` from another text may be
        missing.
        """
        last = len(messages) - 1
        for i, key in outline.lost if outline else ():
            if i <= last and (i == last or i not in learned):
                raise lost(messages, i, key, place)
        bare = squeezed(text)
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or i == last:
                check_written(messages, i, bare, place)
        names = [tool_name(tool) for tool in self.tools]
        if not outline or not outline.loses_tools:
            names = [name for name in names if not any(x in text for x in json_forms(name))]
        if names:
            raise NotRendered(
                f"{place}: the chat template loses the tools: {short_repr(names)} is not in what "
                "it writes of them; leave tools out, or name another template as "
                "model.chat_template"
            )


def squeezed(text: str) -> str:
    """A text without spaces and line breaks, which templates change."""
    return "".join(text.split())


def check_written(messages: Sequence[Message], i: int, bare: str, place: str):
    """Every text of a message is in a rendered one, `bare` without its spaces."""
    for key, forms in written_texts(messages[i], reasoning=i == len(messages) - 1):
        if not any(squeezed(form) in bare for form in forms):
            raise lost(messages, i, key, place)


def lost(messages: Sequence[Message], i: int, key: str, place: str) -> NotRendered:
    role, value = messages[i]["role"], messages[i].get(key)
    of = "" if key == "content" else f"{key} of "
    return NotRendered(
        f"{place}: the chat template loses {of}message {i} (counted from 0), of role {role}: "
        f"{short_repr(value)} is not in what it writes; leave it out, or name another template as "
        "model.chat_template"
    )
