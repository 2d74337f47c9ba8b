"""Chat templates: read, run on messages, given a date, and stopped when they do not end."""

import copy
import ctypes
import datetime
import functools
import itertools
import json
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from ppo_jax.config.parsing import describe_error
from ppo_jax.data.messages import Form, Message, NotRendered
from ppo_jax.data.probes import ASSISTANT, USER, Shape, make_probes

SECONDS = 5.0  # that a template may take for a conversation; it needs some 0.001
TICK = 0.05  # seconds in which a limit is counted
AGAIN = 1.0  # seconds until a template that went on is stopped again


class Template:
    """The chat template of a tokenizer.

    Args:
        tokenizer: see `chat.Chat`.
    """

    def __init__(self, tokenizer: Any | None):
        self.tokenizer = tokenizer
        self.tools: list[dict[str, Any]] = []
        self.plain: Self = self  # without tools; what is found out of the template is kept there

    def with_tools(self, tools: list[dict[str, Any]]) -> Self:
        """The same, of conversations in which the assistant may call these functions."""
        other = copy.copy(self)
        other.tools = tools
        return other

    @functools.cached_property
    def form(self) -> Form:
        """Whether contents are read only as lists of parts, as by some templates with images."""
        probes = make_probes((USER, ASSISTANT))
        for form in (Form(), Form(in_parts=True)):
            text = self.tried(probes, form)
            if all(probe["content"] in text for probe in probes):
                return form
        return Form()

    @functools.cached_property
    def form_of_calls(self) -> Form:
        """The same where there are calls, of which there are more ways."""
        probes = make_probes((USER, Shape("assistant", (), 1)))
        arguments = probes[1]["tool_calls"][0]["function"]["arguments"]
        for null_content, json_arguments in itertools.product((False, True), repeat=2):
            form = Form(self.form.in_parts, json_arguments, null_content)
            text = self.tried(probes, form)
            # What Python prints of an object is no JSON.
            if all(word in text for word in arguments) and str(arguments) not in text:
                return form
        return self.form

    def tried(self, probes: Sequence[Message], form: Form) -> str:
        """What is rendered, or "" where that fails."""
        try:
            return self.apply(probes, form)
        except TimeoutError:
            raise
        except Exception:
            return ""

    def apply(self, messages: Sequence[Message], form: Form, **options: Any) -> str:
        return within(
            SECONDS,
            functools.partial(
                self.tokenizer.apply_chat_template,
                [form.of(message) for message in messages],
                tools=self.tools or None,
                tokenize=False,
                **options,
                **self.changed(form),
            ),
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
            has_calls = any("tool_calls" in message for message in messages)
            form = self.plain.form_of_calls if has_calls else self.plain.form
            return self.apply(messages, form, add_generation_prompt=generation_prompt)
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
            self.render(make_probes((USER,)), place)
        except NotRendered as error:
            if isinstance(error.__cause__, TemplateSyntaxError):
                raise

    def changed(self, form: Form) -> dict[str, str]:
        """The template with a fixed date, and null contents, as an argument; {} without either."""
        date, template = getattr(self.tokenizer, "chat_date", ""), self.tokenizer.chat_template
        if "strftime_now" not in str(template):
            date = ""
        if not date and not form.null_content:
            return {}
        template = self.tokenizer.get_chat_template(tools=self.tools or None)
        template = NULL_CONTENTS + template if form.null_content else template
        return {"chat_template": dated(template, date) if date else template}


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


# transformers leaves a content out that is null; a template may ask for one that is.
NULL_CONTENTS = """{% set given = namespace(messages=[]) %}
{% for m in messages %}
{% set m = m if "content" in m else dict(m, content=none) %}
{% set given.messages = given.messages + [m] %}
{% endfor %}
{% set messages = given.messages %}
"""
DIRECTIVES = "aAbBcdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ"


@functools.lru_cache(maxsize=16)
def dated(template: str, day: str) -> str:
    """The template with a `strftime_now` that gives that day, at midnight, whenever it is asked.

    Templates have no other clock. A macro takes the place of the function that transformers gives.
    """
    date = datetime.date.fromisoformat(day)
    texts = {f"%{c}": date.strftime(f"%{c}") for c in DIRECTIVES}
    texts |= {f"%-{c}": text.lstrip("0 ") or "0" for (_, c), text in texts.items()}
    texts["%%"] = "%"
    fill = "".join(f"|replace({json.dumps(k)},{json.dumps(v)})" for k, v in texts.items())
    return "{% macro strftime_now(format) %}{{ format" + fill + " }}{% endmacro %}\n" + template


_watch = threading.Lock()
_left: dict[int, int] = {}  # the ticks that a thread with a limit has left
_watcher = threading.Thread()


def within(seconds: float, run: Callable[[], str]) -> str:
    """What `run` returns, in this thread, whichever it is.

    The error comes between two steps of Python: not within a single one, however long that takes.
    The seconds are of the clock, counted in ticks, of which a process that was stopped meanwhile
    has but one.

    Raises:
        TimeoutError: it takes longer.
    """
    thread = threading.get_ident()
    try:
        try:
            begin_watch(thread, seconds)
            return run()
        finally:  # The error may come in here as well.
            with _watch:
                _left.pop(thread, None)
    except TimeoutError:
        raise TimeoutError(f"it takes more than {seconds:g} s") from None


def begin_watch(thread: int, seconds: float):
    global _watcher
    with _watch:
        _left[thread] = math.ceil(seconds / TICK)
        if not _watcher.is_alive():  # It has not begun, or ended.
            _watcher = threading.Thread(target=watch, daemon=True)
            _watcher.start()


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
                    _left[thread] = math.ceil(AGAIN / TICK)  # A destructor may swallow the error.
                    error, number = ctypes.py_object(TimeoutError), ctypes.c_ulong(thread)
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(number, error)


def forget_threads():
    """Of a process that forks only one thread goes on, and the lock may be another's."""
    global _watch, _watcher
    _watch, _watcher = threading.Lock(), threading.Thread()
    _left.clear()


os.register_at_fork(after_in_child=forget_threads)
