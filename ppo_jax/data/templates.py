"""Chat templates: read, run on messages, given a date, and stopped when they do not end."""

import contextlib
import copy
import ctypes
import datetime
import functools
import json
import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from ppo_jax.config.parsing import describe_error
from ppo_jax.data.messages import Message, NotRendered, with_json_arguments
from ppo_jax.data.slots import ASSISTANT, USER, Shape, make_slots

SECONDS = 5.0  # that a template may take for a conversation; it needs some 0.001
TICK = 0.05  # seconds in which a limit is counted


class Template:
    """The chat template of a tokenizer.

    Args:
        tokenizer: see `chat.Chat`.
    """

    def __init__(self, tokenizer: Any | None):
        self.tokenizer = tokenizer
        self.tools: list[dict[str, Any]] = []

    def with_tools(self, tools: list[dict[str, Any]]) -> Self:
        """The same, of conversations in which the assistant may call these functions."""
        other = copy.copy(self)  # What it has found out of the template is shared.
        other.tools = tools
        return other

    @functools.cached_property
    def in_parts(self) -> bool:
        """Whether the template reads contents only as lists of parts, as some with images do."""
        slots = make_slots((USER, ASSISTANT))
        for form in (False, True):
            text = self.tried(slots, in_parts=form, json_arguments=False)
            if all(slot["content"] in text for slot in slots):
                return form
        return False

    @functools.cached_property
    def json_arguments(self) -> bool:
        """Whether the template reads the arguments of calls only as JSON texts, as some do."""
        slots = make_slots((USER, Shape("assistant", (), 1)))
        arguments = slots[1]["tool_calls"][0]["function"]["arguments"]
        for form in (False, True):
            text = self.tried(slots, in_parts=self.in_parts, json_arguments=form)
            # What Python prints of an object is no JSON.
            if all(word in text for word in arguments) and str(arguments) not in text:
                return form
        return False

    def tried(self, slots: Sequence[Message], **forms: bool) -> str:
        """What is rendered, or "" where that fails."""
        try:
            return self.apply(slots, **forms)
        except TimeoutError:
            raise
        except Exception:
            return ""

    def apply(
        self, messages: Sequence[Message], *, in_parts: bool, json_arguments: bool, **options: Any
    ) -> str:
        if in_parts:
            messages = [
                {**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages
            ]
        if json_arguments:
            messages = [with_json_arguments(m) if "tool_calls" in m else m for m in messages]
        with time_limit(SECONDS):
            return self.tokenizer.apply_chat_template(
                list(messages),
                tools=self.tools or None,
                tokenize=False,
                **options,
                **self.dated,
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
                messages,
                in_parts=self.in_parts,
                json_arguments=any("tool_calls" in m for m in messages) and self.json_arguments,
                add_generation_prompt=generation_prompt,
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
            self.render(make_slots((USER,)), place)
        except NotRendered as error:
            if isinstance(error.__cause__, TemplateSyntaxError):
                raise

    @property
    def dated(self) -> dict[str, str]:
        """The template with a fixed date, as an argument; {} where it does not ask for one."""
        date, template = getattr(self.tokenizer, "chat_date", ""), self.tokenizer.chat_template
        if not date or "strftime_now" not in str(template):
            return {}
        template = self.tokenizer.get_chat_template(tools=self.tools or None)
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


_watch = threading.Lock()
_left: dict[int, int] = {}  # the ticks that a thread with a limit has left
_watcher = threading.Thread()


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError in this thread, whichever it is, after so many seconds.

    It comes between two steps of Python: not within a single one, however long that takes. The
    seconds are counted in ticks, of which a process that was stopped meanwhile has but one.
    """
    global _watcher
    with _watch:
        _left[threading.get_ident()] = math.ceil(seconds / TICK)
        if not _watcher.is_alive():  # It has not begun, ended, or was left behind by a fork.
            _watcher = threading.Thread(target=watch, daemon=True)
            _watcher.start()
    try:
        yield
    except TimeoutError:
        raise TimeoutError(f"it takes more than {seconds:g} s") from None
    finally:
        with _watch:
            _left.pop(threading.get_ident(), None)


def watch():
    """Count the ticks of all threads with a limit, until there has been none for a second."""
    global _watcher
    idle = 0.0
    while True:
        time.sleep(TICK)
        with _watch:
            idle = 0.0 if _left else idle + TICK
            if idle > 1:
                _watcher = threading.Thread()
                return
            for thread in list(_left):
                _left[thread] -= 1
                if _left[thread] == 0:
                    del _left[thread]
                    error, number = ctypes.py_object(TimeoutError), ctypes.c_ulong(thread)
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(number, error)
