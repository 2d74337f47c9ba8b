"""A template is stopped when it does not end, and has the date that is set."""

import datetime
import subprocess
import sys
import threading
import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from ppo_jax.data import templates
from ppo_jax.data.chat import Chat
from ppo_jax.data.messages import NotRendered
from tests.support import chats
from tests.support.chat_templates import SHAPES
from tests.support.chats import TOKENIZER, make_tokenizer, turns

PLACE = "chats.jsonl:3"


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_without_end_is_stopped(monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 0.2)
    began = time.monotonic()
    with pytest.raises(
        ValueError, match=r"^chats\.jsonl:3: .* fails: it takes more than 0.2 s$"
    ) as e:
        Chat(make_tokenizer(ENDLESS)).parts(turns("Hi", "Yes"), PLACE)
    assert time.monotonic() - began < 30 and not isinstance(e.value, NotRendered)
    with pytest.raises(ValueError, match="^here: .* takes more than 0.2 s"):
        Chat(make_tokenizer(ENDLESS)).check("here")


def test_a_template_without_end_is_stopped_in_any_thread(monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 0.2)
    out = []

    def ask(template):
        try:
            out.append(Chat(make_tokenizer(template)).prompt(turns("Hi"), PLACE))
        except ValueError as error:
            out.append(str(error))

    for template in (ENDLESS, chats.CHATML):
        thread = threading.Thread(target=ask, args=(template,), daemon=True)
        thread.start()
        thread.join(timeout=60)
    assert out == [
        f"{PLACE}: the chat template fails: it takes more than 0.2 s",
        Chat(TOKENIZER).prompt(turns("Hi"), PLACE),
    ]


def test_a_template_that_goes_on_is_stopped_again(monkeypatch):
    """The error may come in a `__del__`, where it is swallowed."""
    monkeypatch.setattr(templates, "AGAIN", 0.1)
    swallowed = []

    def swallow():
        try:
            spend(20)
        except TimeoutError as error:
            swallowed.append(error)
        spend(20)

    with pytest.raises(TimeoutError, match=r"^it takes more than 0.1 s$"):
        templates.within(0.1, swallow)
    assert swallowed and not templates._left


def spend(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)


class Late(dict):
    def pop(self, *args):
        super().pop(*args)
        raise TimeoutError


def test_a_limit_that_ends_as_the_template_does_has_its_reason(monkeypatch):
    monkeypatch.setattr(templates, "_left", Late())
    with pytest.raises(TimeoutError, match=r"^it takes more than 5 s$"):
        templates.within(5, lambda: "")


def test_no_limit_is_left_where_it_could_not_begin(monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(templates, "_watcher", threading.Thread())
    monkeypatch.setattr(templates.threading, "Thread", fail)
    with pytest.raises(RuntimeError, match="start new thread"):
        templates.within(5, lambda: "")
    assert not templates._left


def test_a_forked_process_counts_only_its_own_threads():
    code = """
import os, threading
from ppo_jax.data import templates
templates._left[1] = 9
templates._watch.acquire()  # as by the watcher
child = os.fork()
if not child:
    os._exit(0 if templates.within(5, lambda: dict(templates._left)).keys() == {
        threading.get_ident()} else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_date_of_a_template_is_the_one_that_is_set():
    tokenizer = make_tokenizer(SHAPES["today"])
    tokenizer.chat_date = "2024-02-09"
    for generate in (Chat(tokenizer).prompt, lambda *x: Chat(tokenizer).parts(*x)[0][0]):
        text = generate(turns("Hi", "Yes"), PLACE)
        assert text.startswith("<|im_start|>system\nToday is 09 February 2024.<|im_end|>\n")


def test_a_date_is_written_into_a_template_once():
    tokenizer = make_tokenizer(SHAPES["today"])
    tokenizer.chat_date = "2024-02-10"
    templates.dated.cache_clear()
    for _ in range(3):
        Chat(tokenizer).parts(turns("Hi", "Yes"), PLACE)
    assert templates.dated.cache_info().misses == 1


@pytest.mark.parametrize("begin", ["", "\n", "  {% if true %}a{% endif %}"])
def test_every_directive_of_a_date_is_python_s(begin):
    date = datetime.datetime(2024, 2, 9)
    directives = [f"%{c}" for c in "aAbBcdDeFHIjmMpSTuUwWxXyYZ%"] + ["%-d", "%-m", "%-j", "%-H"]
    asked = " ".join(directives)
    body = (
        begin + "{% if strftime_now is defined %}{% macro now() %}"
        f"{{{{ strftime_now('{asked}') }}}}{{% endmacro %}}{{{{ now() }}}}{{% endif %}}"
    )
    (text,), _ = render_jinja_template(
        [turns("Hi")], chat_template=templates.dated(body, date.date().isoformat())
    )
    # transformers itself, without its clock
    (plain,), _ = render_jinja_template([turns("Hi")], chat_template=begin + "|")
    assert text == plain[:-1] + date.strftime(asked)
