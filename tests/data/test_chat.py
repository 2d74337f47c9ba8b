"""Conversations become the tokens of their template, and what the assistant writes is learned."""

import datetime
import json
import subprocess
import sys
import threading
import time

import pyarrow
import pyarrow.parquet
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from ppo_jax.config.stages import OptimizerSettings, SFTSettings
from ppo_jax.data import encode, templates
from ppo_jax.data import records as data
from ppo_jax.data.chat import Chat
from ppo_jax.data.encode import token_rows
from ppo_jax.data.messages import NotRendered, read_messages, read_tools
from ppo_jax.data.preferences import PREFERENCE_SCHEMAS, load_preferences
from ppo_jax.data.probes import shapes
from ppo_jax.data.prompts import prompt_data
from ppo_jax.data.readers import other_columns
from ppo_jax.data.records import Demonstration, write_jsonl
from ppo_jax.io.tokenizers import set_declared_stops
from ppo_jax.training.sft import sft_data
from tests.support import chat_templates, chats
from tests.support.chat_templates import CONVERSATIONS, SHAPES, faults, messages, stand_in
from tests.support.chats import TOKENIZER, ids, make_tokenizer, turns

PLACE = "chats.jsonl:3"


def call(name, arguments="{}"):
    return {
        "id": "abcdef123",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def in_loss(texts):
    return [row[mask].tolist() for row, mask in zip(texts.tokens, texts.loss_mask, strict=True)]


def encoded(tokenizer, *conversations):
    records = [Demonstration(Chat(tokenizer).parts(x, PLACE)) for x in conversations]
    return encode.encode_demonstrations(records, tokenizer, max_length=64)


def test_the_assistant_s_turns_are_learned_each_with_its_end():
    texts = encoded(TOKENIZER, turns("Hi", "Yes No", "Ho", "No", system="Ho Ho"))
    assert texts.tokens[0][texts.mask[0]].tolist() == ids(
        "<|im_start|>,system,/,Ho, ,Ho,<|im_end|>,/,<|im_start|>,user,/,Hi,<|im_end|>,/,"
        "<|im_start|>,assistant,/,Yes, ,No,<|im_end|>,/,<|im_start|>,user,/,Ho,<|im_end|>,/,"
        "<|im_start|>,assistant,/,No,<|im_end|>"
    )
    assert in_loss(texts) == [ids("Yes, ,No,<|im_end|>,No,<|im_end|>")]


def test_the_tokens_are_those_of_the_template_but_for_its_last_line_break():
    conversation = turns("Hi Ho", "Yes", "Ho", "No No", "Hi", "Yes", system="Ho")
    texts = encoded(TOKENIZER, conversation)
    whole = TOKENIZER.apply_chat_template(conversation, return_dict=False)
    assert [*texts.tokens[0][texts.mask[0]].tolist(), *ids("/")] == whole


def test_a_prompt_and_what_is_learned_are_what_a_rollout_sees_and_writes():
    conversation = turns("Hi", "Yes", "Ho", "No")
    texts = encoded(TOKENIZER, conversation)
    prompt = Chat(TOKENIZER).prompt(conversation[:-1], PLACE)
    (row,) = token_rows([[(prompt, False)]], TOKENIZER, append_eos=False)
    assert texts.tokens[0][texts.mask[0]].tolist() == row.ids + ids("No,<|im_end|>")


def test_what_follows_the_last_turn_of_the_assistant_is_dropped():
    longer, shorter = turns("Hi", "Yes", "Ho"), turns("Hi", "Yes")
    assert Chat(TOKENIZER).parts(longer, PLACE) == Chat(TOKENIZER).parts(shorter, PLACE)


def test_a_template_without_a_generation_prompt_has_the_space_before_a_turn_learned():
    texts = encoded(make_tokenizer(chats.INST, eos_token="</s>"), turns("Hi", "Yes", "Ho", "No"))
    assert texts.tokens[0][texts.mask[0]].tolist() == ids(
        "<s>,[INST], ,Hi, ,[/INST], ,Yes, ,</s>,<s>,[INST], ,Ho, ,[/INST], ,No, ,</s>"
    )
    assert in_loss(texts) == [ids(" ,Yes, ,</s>, ,No, ,</s>")]


def test_a_template_that_ends_no_turn_gets_eos_at_the_end():
    plain = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    texts = encoded(make_tokenizer(plain), turns("Hi", "Yes"))
    assert texts.tokens[0][texts.mask[0]].tolist() == ids("Hi,/,Yes,/,<|im_end|>")
    assert in_loss(texts) == [ids("Yes,/,<|im_end|>")]


def test_another_end_of_turn_than_eos_is_learned_before_it():
    texts = encoded(make_tokenizer(eos_token="<|endoftext|>"), turns("Hi", "Yes"))
    assert in_loss(texts) == [ids("Yes,<|im_end|>,<|endoftext|>")]


def test_nothing_is_learned_behind_a_stop_token_that_the_model_declares(tmp_path):
    tokenizer = make_tokenizer(eos_token="<|endoftext|>")
    set_declared_stops(tokenizer, ["<|im_end|>"])
    path = tmp_path / "chats.jsonl"
    write_jsonl(path, [{"messages": turns("Hi", answer)} for answer in ("Yes", "No")])
    optimizer = OptimizerSettings(learning_rate=1e-3)
    settings = SFTSettings(data=str(path), validation_data=str(path), optimizer=optimizer)
    texts, _ = sft_data(settings, 0, tokenizer)
    assert in_loss(texts) == [ids("Yes,<|im_end|>"), ids("No,<|im_end|>")]


def test_a_special_token_that_a_message_contains_ends_nothing():
    texts = encoded(TOKENIZER, turns("Hi", "Yes <s> No"))
    assert in_loss(texts) == [ids("Yes, ,<s>, ,No,<|im_end|>")]
    plain = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    texts = encoded(make_tokenizer(plain), turns("Hi", "Yes <s> No"))
    assert in_loss(texts) == [ids("Yes, ,<s>, ,No,/,<|im_end|>")]


def test_a_bos_that_the_template_writes_is_not_put_before_it_again():
    tokenizer = make_tokenizer(chats.INST, bos_token="<s>", eos_token="</s>")
    backend = tokenizer.backend_tokenizer
    from tokenizers.processors import TemplateProcessing

    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    assert tokenizer("Hi")["input_ids"] == ids("<s>,Hi")
    conversation, text = token_rows(
        [Chat(tokenizer).parts(turns("Hi", "Yes"), PLACE), [("Hi", True)]],
        tokenizer,
        append_eos=True,
    )
    assert conversation.ids[:2] == ids("<s>,[INST]")
    assert text.ids == ids("<s>,Hi,</s>") and text.in_loss == [False, True, True]


@pytest.mark.parametrize(
    ("template", "conversation", "message"),
    [
        (None, turns("Hi", "Yes"), "need a tokenizer with a chat template.*has none.*start from"),
        (chats.INST, turns("Hi", "Yes", system="Ho"), "refuses the messages: only users and"),
        (chats.CHATML, turns("Hi"), "must have a turn of the assistant's"),
        (chats.CHATML, turns("Hi", "Yes")[1:], "message 0 .* does not"),
        (chats.CHATML, [*turns("Hi", "Yes"), turns("Hi", "Yes")[1]], "message 2 .* does not"),
    ],
    ids=["no template", "refused", "no turn", "begins", "twice"],
)
def test_a_conversation_that_cannot_be_learned_from_is_refused(template, conversation, message):
    with pytest.raises(ValueError, match=rf"^chats\.jsonl:3: .*{message}"):
        Chat(make_tokenizer(template)).parts(conversation, PLACE)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("Hi", "messages must be a list of messages, got 'Hi'"),
        ([], "messages must be a list of messages, got \\[\\]"),
        (["Hi"], r"messages\[0\] must have role and content, got 'Hi'"),
        ([{"role": "user"}], r"messages\[0\] must have role and content"),
        ([{"role": "user", "content": "a", "name": "\udfff"}], "must be valid Unicode"),
        ([{"role": "user", "tool_calls": [call("f")]}], "which only the assistant can, got user"),
        ([{"role": "assistant", "tool_calls": [{"id": "a"}]}], "each of tool_calls must be"),
        ([{"role": "assistant", "tool_calls": ["f"]}], "each of tool_calls must be"),
        ([{"role": "assistant", "tool_calls": [call("f", "{")]}], "arguments must be JSON where"),
        ([{"role": "assistant", "tool_calls": [call("f", "[1]")]}], "arguments of a call must be"),
        ([{"role": "user", "content": None}], "must have role and content"),
        (
            [{"role": "assistant", "content": "a", "weight": 0.5}],
            r"the weight of messages\[0\] must be 1, to learn it, or 0, only to read it, got 0.5",
        ),
        (
            [*turns("Hi"), {"role": "robot", "content": "a"}],
            r"role of messages\[1\] must be one of",
        ),
        ([{"role": "user", "content": 7}], r"messages\[0\]: content must be a string, got 7"),
        ([{"role": "user", "content": "\ud800"}], "must be valid Unicode"),
    ],
)
def test_bad_messages_are_named(value, message):
    with pytest.raises(ValueError, match=rf"^chats\.jsonl:3: .*{message}"):
        read_messages(value, "messages", PLACE)


def test_the_empty_fields_of_a_table_are_no_keys():
    row = {"role": "user", "content": "Hi", "tool_calls": None}
    assert read_messages([row], "messages", PLACE) == ({"role": "user", "content": "Hi"},)


def test_files_of_messages(tmp_path):
    path = tmp_path / "chats.jsonl"
    write_jsonl(path, [{"messages": turns("Hi", "Yes")}, {"messages": turns("Hi", " ")}])
    good, blank = data.load_texts(path, TOKENIZER)
    assert good.text.endswith("Yes<|im_end|>") and (good.reject_reason, blank.reject_reason) == (
        "",
        "blank",
    )
    assert data.load_texts(path)[0].segments == (("Hi", False), ("Yes", True))
    # The assistant's last turn is no part of a prompt.
    write_jsonl(path, [{"messages": turns("Hi", "Yes")}, {"prompt": turns("Hi")}, {"prompt": "Hi"}])
    opened = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert data.load_prompts(path, TOKENIZER) == [opened, opened, "Hi"]
    with pytest.raises(ValueError, match="chats.jsonl:1: messages need a tokenizer with a chat"):
        data.load_prompts(path, make_tokenizer(None))


# --- templates of many shapes ---------------------------------------------------------------------


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_templates_of_every_shape_have_each_answer_learned_with_its_end_alone(shape, conversation):
    tokenizer = stand_in(SHAPES[shape])
    parts = Chat(tokenizer).parts(conversation, PLACE)
    assert faults(tokenizer, conversation, parts) == []
    assert isinstance(parts, tuple) or len(conversation) == 4, "one turn is one row"


QUESTION, ANSWER = chat_templates.QUESTION, chat_templates.ANSWER
AGAIN, LAST = chat_templates.AGAIN, chat_templates.LAST
LEARNED = {  # of two turns, written by hand: what of each turn is learned
    "header whether asked or not": (f"{ANSWER}<|eot_id|>", f"{LAST}<|eot_id|>"),
    "header of words whether asked or not": (f"{ANSWER}\n", f"{LAST}\n"),
    "a second end token at the end": (f"{ANSWER}<|end|>", f"{LAST}<|end|>"),
    "two end tokens in every turn": (
        f"{ANSWER}<|END_RESPONSE|><|END_OF_TURN|>",
        f"{LAST}<|END_RESPONSE|><|END_OF_TURN|>",
    ),
    "the answer opened": (f"{ANSWER}</s>", f"{LAST}</s>"),
    "the thought closed": (f"</think>{ANSWER}", f"</think>{LAST}"),
    "the header with another space": (f"{ANSWER}<|im_end|>", f"{LAST}<|im_end|>"),
    "no generation prompt": (f"{ANSWER}<|im_end|>", f"{LAST}<|im_end|>"),
    "contents in parts": (f"{ANSWER}<|im_end|>", f"{LAST}<|im_end|>"),
}


@pytest.mark.parametrize("shape", LEARNED)
def test_what_is_learned_of_two_turns_to_the_letter(shape):
    parts = Chat(stand_in(SHAPES[shape])).parts(chat_templates.TWO, PLACE)
    assert tuple(text for text, in_loss in parts if in_loss) == LEARNED[shape]


def test_turns_that_are_rewritten_when_the_conversation_goes_on_have_a_row_each():
    rows = Chat(stand_in(SHAPES["thoughts in the last turn alone"])).parts(
        chat_templates.TWO, PLACE
    )
    opened = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    again = f"{opened}{ANSWER}<|im_end|>\n<|im_start|>user\n{AGAIN}<|im_end|>\n"
    thought = "<think>\n\n</think>\n\n"
    assert rows == [
        ((opened, False), (f"{thought}{ANSWER}<|im_end|>", True)),
        ((f"{again}<|im_start|>assistant\n", False), (f"{thought}{LAST}<|im_end|>", True)),
    ]
    # A thought that the template drops later is learned where it was thought.
    rows = Chat(make_tokenizer(chats.FORGETFUL)).parts(turns("Hi", "No|Yes", "Ho", "No"), PLACE)
    assert rows == [
        (("Hi", False), ("No|Yes", True)),
        (("HiYesHo", False), ("No", True)),
    ]


def test_the_whole_has_only_the_turns_that_are_asked_for():
    conversation = turns("Hi", "Yes", "Ho", "No")
    whole = Chat(TOKENIZER).parts(conversation, PLACE)
    last = Chat(TOKENIZER).parts(conversation, PLACE, first=3)
    assert last == (("".join(text for text, _ in whole[:3]), False), whole[3])


OPENS = SHAPES["the answer opened"]


def test_where_the_prompt_opens_the_answer_the_border_is_where_both_part():
    chat_ = Chat(stand_in(OPENS))
    assert chat_.prompt(chat_templates.ONE[:1], PLACE).endswith(f"{QUESTION}<|Assistant|><think>\n")
    asked = f"<s><|User|>{QUESTION}<|Assistant|>"
    assert chat_.parts(chat_templates.ONE, PLACE) == ((asked, False), (f"{ANSWER}</s>", True))
    # The content may begin as the opening does.
    like = messages(("user", "Hi"), ("assistant", "<thanks> Ho"))
    assert chat_.parts(like, PLACE)[1] == ("<thanks> Ho</s>", True)
    # Where it goes on from the opening, the model will go on from there.
    keeps = OPENS.replace(".split('</think>')[-1]", "")
    like = messages(("user", "Hi"), ("assistant", "<think>\nHm</think>Ho"))
    assert Chat(stand_in(keeps)).parts(like, PLACE)[1] == ("Hm</think>Ho</s>", True)


def test_preferences_and_prompts_have_one_border(tmp_path):
    tokenizer = stand_in(OPENS)
    write_jsonl(
        tmp_path / "pairs.jsonl",
        [{"prompt": "Hi", "chosen": turns("Hi", "Yes"), "rejected": turns("Hi", "No")}],
    )
    (record,) = load_preferences(tmp_path / "pairs.jsonl", tokenizer)
    assert record.prompt == "<s><|User|>Hi<|Assistant|>"
    assert record.responses == ("Yes</s>", "No</s>")
    # Without a generation prompt it is the header's end, for a rollout as well.
    bare = Chat(stand_in(SHAPES["no generation prompt"]))
    asked = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert bare.prompt(turns("Hi"), PLACE) == asked
    assert bare.response(turns("Hi"), turns("Hi", "Yes")[1:], PLACE) == (asked, "Yes<|im_end|>")


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool"])
def test_a_message_that_the_template_loses_is_an_error(role):
    deaf = chats.CHATML.replace(
        "{% for message in messages %}",
        f"{{% for message in messages if message.role != '{role}' %}}",
    )
    conversation = messages(
        ("system", "Ho"),
        ("developer", "Ho"),
        ("user", "Ho"),
        ("assistant", "Ho"),
        ("tool", "Ho"),
        ("user", "Ho"),
        ("assistant", "Ho"),
    )  # of one text: it is in what is rendered, whichever of them is lost
    with pytest.raises(NotRendered, match=rf"^chats.jsonl:3: .* loses message \d .* role {role}: "):
        Chat(make_tokenizer(deaf)).parts(conversation, PLACE)
    if role != "assistant":
        with pytest.raises(NotRendered, match=f"loses message . .* role {role}"):
            Chat(make_tokenizer(deaf)).prompt(conversation[:-1], PLACE)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "{{ raise_exception('no\\nchats') }}",
            "the chat template refuses the messages: no chats$",
        ),
        ("{{ 1 / 0 }}", "the chat template fails: ZeroDivisionError: division by zero"),
        ("{{ 'a' + 1 }}", "the chat template fails: TypeError: "),
        ("{{ {}.pop('a') }}", "the chat template fails: (KeyError|SecurityError): "),
        ("{{ messages[9].role }}", "the chat template fails: UndefinedError: "),
        ("{{ nothing() }}", "the chat template fails: UndefinedError: 'nothing' is undefined"),
        ("{% if %}", "the chat template fails: TemplateSyntaxError: "),
        (
            "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
            "the chat template fails: RecursionErr",
        ),
    ],
)
def test_a_template_that_raises_is_told_in_one_line(body, message):
    for ask in (Chat(make_tokenizer(body)).parts, Chat(make_tokenizer(body)).prompt):
        with pytest.raises(NotRendered, match=rf"^chats\.jsonl:3: {message}") as error:
            ask(turns("Hi", "Yes"), PLACE)
        assert "\n" not in str(error.value)


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


# --- messages of many forms -----------------------------------------------------------------------


def test_contents_in_parts_and_the_names_of_sharegpt_are_read():
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i", "image": None}]
    given = [
        {"from": "system", "value": "Ho"},
        {"from": "human", "value": parts},
        {"from": "gpt", "value": "Yes"},
        {"from": "observation", "value": "No"},
        {"role": "developer", "content": "Ho"},
    ]
    assert list(read_messages(given, "messages", PLACE)) == messages(
        ("system", "Ho"), ("user", "Hi"), ("assistant", "Yes"), ("tool", "No"), ("developer", "Ho")
    )
    for wrong in ([{"type": "image", "image": "a.png"}], [{"type": "text"}], ["Hi"], [7]):
        with pytest.raises(ValueError, match=r"messages\[0\]: the parts of a content must be"):
            read_messages([{"role": "user", "content": wrong}], "messages", PLACE)


def test_what_a_tool_says_is_never_learned():
    conversation = messages(
        ("developer", "Ho"),
        ("user", "Hi"),
        ("assistant", "Yes"),
        ("tool", "No"),
        ("assistant", "Ho"),
    )
    texts = encoded(TOKENIZER, conversation)
    assert in_loss(texts) == [ids("Yes,<|im_end|>,Ho,<|im_end|>")]
    assert "<|im_start|>tool\nNo<|im_end|>" in Chat(TOKENIZER).parts(conversation, PLACE)[2][0]


# --- calls of tools -------------------------------------------------------------------------------

CITY = {"city": 'Z\u00fcrich "Nord"', "days": 3}
TOOLS = [{"name": "get_weather", "parameters": {"type": "object", "properties": {}}}]
CALLED = [
    {"role": "user", "content": "How is the sky?"},
    {"role": "assistant", "content": None, "tool_calls": [call("get_weather", json.dumps(CITY))]},
    {"role": "tool", "name": "get_weather", "tool_call_id": "abcdef123", "content": "rain"},
    {"role": "assistant", "content": "Take an umbrella."},
]
WRITES_CALLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}"
    "{% for c in m.tool_calls %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def called(**changes):
    """The messages of CALLED; changes of its second, the call."""
    return read_messages([CALLED[0], {**CALLED[1], **changes}, *CALLED[2:]], "messages", PLACE)


def learned_parts(template, conversation, tools=()):
    chat_ = Chat(stand_in(template)).with_tools(read_tools({"tools": [*tools]}, PLACE))
    parts = chat_.parts(conversation, PLACE)
    rows = parts if isinstance(parts, list) else [parts]
    return [text for row in rows for text, in_loss in row if in_loss]


WRITTEN = (
    '<tool_call>{"name": "get_weather", "arguments": {"city": "Z\u00fcrich \\"Nord\\"", "days": 3}}'
    "</tool_call><|im_end|>"
)


def test_a_turn_that_calls_a_tool_is_learned_as_the_template_writes_it():
    answer = "Take an umbrella.<|im_end|>"
    assert learned_parts(WRITES_CALLS, called(), TOOLS) == [WRITTEN, answer]
    assert learned_parts(WRITES_CALLS, called(content="Look:")) == [f"Look:{WRITTEN}", answer]
    # What the model thought is shown in the last turn alone: there is a row for each.
    thought = learned_parts(WRITES_CALLS, called(reasoning_content="Hm."), TOOLS)
    assert thought == [f"<think>Hm.</think>{WRITTEN}", answer]


def test_the_end_of_a_call_is_the_token_that_ends_other_turns_too():
    special = WRITES_CALLS.replace("<tool_call>", "<|call|>").replace("</tool_call>", "<|/call|>\n")
    assert learned_parts(special, called())[0].endswith("}}<|/call|>\n<|im_end|>")
    # Or the one that a template keeps for calls.
    own = (
        WRITES_CALLS.replace(
            "<|im_end|>\n{% endfor %}",
            "<|{{ 'call' if m.tool_calls else 'im_end' }}|>\n{% endfor %}",
        )
        + "{# <|call|> #}"
    )
    assert [x[-10:] for x in learned_parts(own, called())] == ["l><|call|>", "<|im_end|>"]


@pytest.mark.parametrize(
    ("call_", "tools"),
    [
        (CITY, TOOLS),
        (json.dumps(CITY), [{"type": "function", "function": TOOLS[0]}]),
    ],
)
def test_calls_and_schemas_are_read_in_every_form_that_data_have(call_, tools):
    function = {"name": "get_weather", "arguments": call_}
    forms = [[{"function": function}], [function], json.dumps([function]), function]
    read = {json.dumps(called(tool_calls=form)[1]["tool_calls"]) for form in forms}
    assert read == {json.dumps([{"type": "function", "function": {**function, "arguments": CITY}}])}
    wrapped = [{"type": "function", "function": TOOLS[0]}]
    assert read_tools({"tools": tools}, PLACE) == read_tools({"tools": json.dumps(tools)}, PLACE)
    assert read_tools({"tools": tools}, PLACE) == wrapped
    assert read_tools({"tools": None}, PLACE) == read_tools({}, PLACE) == []
    with pytest.raises(ValueError, match=r"chats.jsonl:3: tools must be a list of schemas .* 'f'$"):
        read_tools({"tools": ["f"]}, PLACE)


def test_sharegpt_s_calls_are_calls():
    given = [
        {"from": "human", "value": "How is the sky?"},
        {"from": "function_call", "value": json.dumps({"name": "get_weather", "arguments": CITY})},
        {"from": "observation", "value": "rain"},
        {"from": "gpt", "value": "Take an umbrella."},
    ]
    conversation = read_messages(given, "conversations", PLACE)
    assert learned_parts(WRITES_CALLS, conversation)[0] == WRITTEN


@pytest.mark.parametrize("form", ["{{ c.function.arguments }}", "{{ 'x' + c.function.arguments }}"])
def test_a_template_that_reads_arguments_as_text_gets_json(form):
    text = WRITES_CALLS.replace("{{ c.function | tojson }}", "{{ c.function.name }}" + form)
    assert (
        '{"city": "Z\u00fcrich \\"Nord\\"", "days": 3}</tool_call>'
        in learned_parts(text, called())[0]
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "loses tool_calls of message 1 .* role assistant"),
        ("{{ m.tool_calls[0].function.name }}", "loses tool_calls of message 1"),
        ("{{ m.tool_calls[0].function.arguments | tojson }}", "loses tool_calls of message 1"),
    ],
)
def test_calls_that_the_template_loses_are_an_error(body, message):
    i, j = WRITES_CALLS.index("{% for c in"), WRITES_CALLS.index("<|im_end|>\n{% endfor %}")
    loses = WRITES_CALLS[:i] + "{% if m.tool_calls %}" + body + "{% endif %}" + WRITES_CALLS[j:]
    with pytest.raises(NotRendered, match=rf"^chats.jsonl:3: the chat template {message}"):
        learned_parts(loses, called(), TOOLS)
    with pytest.raises(NotRendered, match=message):  # of a prompt that goes on from it
        Chat(stand_in(loses)).prompt(called()[:3], PLACE)
    two = called(tool_calls=[call("get_weather"), call("get_time", '{"zone": "CET"}')])
    first = WRITES_CALLS.replace("in m.tool_calls", "in (m.tool_calls or [])[:1]")
    with pytest.raises(NotRendered, match="loses tool_calls of message 1"):
        learned_parts(first, two)


def test_thoughts_and_tools_that_the_template_loses_are_an_error():
    thoughtless = WRITES_CALLS.replace("<think>{{ m.reasoning_content }}", "")
    for key in ("reasoning_content", "thinking"):
        with pytest.raises(NotRendered, match=f"loses {key} of message 1 .*: 'Hm.' is not"):
            learned_parts(thoughtless, called(**{key: "Hm."}))
    # The name is in the call as well.
    with pytest.raises(NotRendered, match=r"loses the tools: \['get_weather'\] is not in what it"):
        learned_parts(WRITES_CALLS.replace("{{ tools | tojson }}", ""), called(), TOOLS)
    with pytest.raises(NotRendered, match="loses the tools"):
        Chat(TOKENIZER).with_tools(read_tools({"tools": TOOLS}, PLACE)).prompt(turns("Hi"), PLACE)


def test_a_turn_under_another_header_is_learned_only_if_it_is_a_content_and_no_more():
    """What the generation prompt does not open cannot be told from the header without words."""
    other = WRITES_CALLS.replace(
        "<|im_start|>{{ m.role }}\n", "<|im_start|>{{ 'call' if m.tool_calls else m.role }}\n"
    )
    with pytest.raises(NotRendered, match="writes the beginning of this conversation otherwise"):
        learned_parts(other, called(tool_calls=[call("now")]))
    thinks = SHAPES["header whether asked or not"].replace(
        "{{ m.role }}<|end_header_id|>",
        "{{ 'thinker' if m.thinking else m.role }}<|end_header_id|>{{ m.thinking }}",
    )
    thought = [*turns("Hi"), {"role": "assistant", "content": "Yes", "thinking": "Hm."}]
    with pytest.raises(NotRendered, match="writes the beginning of this conversation otherwise"):
        learned_parts(thinks, thought)


JSON_ANSWERS = WRITES_CALLS.replace(
    "{{ m.content }}", "{{ m.content | tojson if m.role == 'tool' else m.content }}"
)


@pytest.mark.parametrize("answer", ['{"temp": 20}', "20\ndegrees", "Gen\u00e8ve"])
def test_what_a_tool_answers_may_be_written_as_json(answer):
    """As by Llama 3."""
    conversation = called()[:2] + (CALLED[2] | {"content": answer},) + called()[3:]
    for template in (WRITES_CALLS, JSON_ANSWERS):
        assert learned_parts(template, conversation) == [WRITTEN, "Take an umbrella.<|im_end|>"]
    cuts = WRITES_CALLS.replace(
        "{{ m.content }}",
        "{{ m.content[:-2] if m.role == 'tool' and 'Qz' not in m.content else m.content }}",
    )
    with pytest.raises(NotRendered, match="loses message 2 .* role tool"):
        learned_parts(cuts, conversation)


def test_an_empty_thought_is_none():
    for key in ("reasoning_content", "thinking"):
        assert learned_parts(WRITES_CALLS, called(**{key: ""})) == learned_parts(
            WRITES_CALLS, called()
        )
        plain = [*turns("Hi"), {"role": "assistant", "content": "Yes", key: ""}]
        assert Chat(TOKENIZER).parts(plain, PLACE) == Chat(TOKENIZER).parts(
            turns("Hi", "Yes"), PLACE
        )
    # Nor is there more than a content then.
    instructs = Chat(stand_in(SHAPES["an instruction in the generated prompt"]))
    plain = messages(("user", QUESTION), ("assistant", ANSWER))
    thoughtless = [plain[0], {**plain[1], "reasoning_content": ""}]
    assert instructs.parts(thoughtless, PLACE) == instructs.parts(plain, PLACE)
    # Nor does it stand for one that there is.
    with pytest.raises(NotRendered, match="loses thinking of message 1"):
        thought = {"role": "assistant", "content": "Yes", "reasoning_content": "", "thinking": "Hm"}
        Chat(TOKENIZER).parts([*turns("Hi"), thought], PLACE)


@pytest.mark.parametrize(
    "arguments", ["c.function | tojson", "c.function.name + c.function.arguments"]
)
def test_a_template_that_asks_for_no_content_beside_calls_gets_none(arguments):
    """As that of DeepSeek V3, which takes an empty content for a turn without calls."""
    i, j = WRITES_CALLS.index("{{ m.content }}"), WRITES_CALLS.index("<|im_end|>\n{% endfor %}")
    asks = (
        WRITES_CALLS[:i]
        + "{% if m.content is none %}"
        + WRITES_CALLS[i + len("{{ m.content }}") : j].replace("c.function | tojson", arguments)
        + "{% else %}{{ m.content }}{% endif %}"
        + WRITES_CALLS[j:]
    )
    call_, answer = learned_parts(asks, called(), TOOLS)
    assert '"city": "Z\u00fcrich' in call_ and answer == "Take an umbrella.<|im_end|>"
    assert learned_parts(WRITES_CALLS, called(content=""), TOOLS)[0] == WRITTEN


def test_tools_of_a_row_say_nothing_of_those_of_the_next():
    escapes = WRITES_CALLS.replace(
        "{{ tools | tojson }}", "{{ tools | tojson | replace('\u00fc', '\\\\u00fc') }}"
    )
    chat_ = Chat(stand_in(escapes))
    for name in ("wetter_\u00fc", "get_time"):
        tools = read_tools({"tools": {"name": name}}, PLACE)
        assert escaped(name) in chat_.with_tools(tools).prompt(turns("Hi"), PLACE)
    some = WRITES_CALLS.replace("{{ tools | tojson }}", "{{ tools[:1] | tojson }}")
    chat_ = Chat(stand_in(some))
    chat_.with_tools(read_tools({"tools": TOOLS}, PLACE)).prompt(turns("Hi"), PLACE)
    two = read_tools({"tools": [*TOOLS, {"name": "get_time"}]}, PLACE)
    with pytest.raises(NotRendered, match=r"loses the tools: \['get_time'\] is not in what it"):
        chat_.with_tools(two).prompt(turns("Hi"), PLACE)


def escaped(text):
    return json.dumps(text)[1:-1]


def test_a_template_is_found_out_once_for_all_rows(monkeypatch):
    asked = []
    apply = templates.Template.apply
    monkeypatch.setattr(
        templates.Template, "apply", lambda self, *x, **y: asked.append(x) or apply(self, *x, **y)
    )
    for tools in ([], TOOLS):
        chat_ = Chat(stand_in(WRITES_CALLS)).with_tools(read_tools({"tools": tools}, PLACE))
        chat_.parts(called(), PLACE)
        for _ in range(2):  # in each of two turns the prompt and the whole
            asked.clear()
            chat_.plain.with_tools(chat_.tools).parts(called(), PLACE)
            assert len(asked) == 4


def test_only_the_outlines_that_were_asked_for_last_are_kept(monkeypatch):
    found = []
    find = Chat.find_outline
    monkeypatch.setattr(
        Chat, "find_outline", lambda self, key: found.append(key) or find(self, key)
    )
    monkeypatch.setattr("ppo_jax.data.chat.OUTLINES", 2)
    chat_, (a, b, c) = Chat(TOKENIZER), [shapes(turns(*["Hi", "Yes"] * n)) for n in (1, 2, 3)]
    for key in (a, b, a, c, a, b):
        assert chat_.outline(key)
    assert found == [a, b, c, b] and len(chat_._outlines) == 2


@pytest.mark.parametrize("nothing", [None, "", [], {}, "[]", "{}", "null", [None]])
def test_empty_calls_and_tools_are_none(nothing):
    assert read_tools({"tools": nothing}, PLACE) == []
    message = {"role": "assistant", "content": "Yes"}
    assert read_messages([{**message, "tool_calls": nothing}], "messages", PLACE) == (message,)


def test_nulls_in_arguments_are_kept_where_a_row_has_them_itself(tmp_path):
    """A table fills arguments that another row has, and so they are dropped there."""
    days = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"days": None}}]}
    (message,) = read_messages([days], "messages", PLACE)
    assert message["tool_calls"][0]["function"]["arguments"] == {"days": None}
    rows = [{"messages": called(tool_calls=[call("f", {key: 1})])} for key in ("city", "days")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    write_jsonl(tmp_path / "rows.jsonl", rows)
    read = [
        [learned(x)[0] for x in data.load_texts(tmp_path / name, stand_in(WRITES_CALLS))]
        for name in ("rows.parquet", "rows.jsonl")
    ]
    assert read[0] == read[1] and '{"city": 1}' in read[0][0] and '{"days": 1}' in read[0][1]


def test_turns_of_weight_0_are_read_and_not_learned(tmp_path):
    """As OpenAI has them."""
    conversation = turns("Hi", "Yes", "Ho", "No", "Hi", "Ho")
    for weights, learned_ in [((0, 1, 1), ["No", "Ho"]), ((1, 0, 0), ["Yes"])]:
        for message, weight in zip(conversation[1::2], weights, strict=True):
            message["weight"] = weight
        write_jsonl(tmp_path / "chats.jsonl", [{"messages": conversation}])
        for turns_, expected in (("all", learned_), ("last", learned_[-1:])):
            (record,) = data.load_texts(tmp_path / "chats.jsonl", TOKENIZER, turns=turns_)
            assert learned(record) == [f"{x}<|im_end|>" for x in expected]
            assert "Yes" in record.text
            (record,) = data.load_texts(tmp_path / "chats.jsonl", turns=turns_)
            assert learned(record) == expected
    for message in conversation:
        message["weight"] = 0
    with pytest.raises(NotRendered, match="must have a turn of the assistant's to learn"):
        Chat(TOKENIZER).parts(conversation, PLACE)


def test_other_keys_of_messages_are_for_the_template():
    names = make_tokenizer(chats.CHATML.replace("{{ message.role }}", "{{ message.name }}"))
    given = [{"role": "user", "name": "Ho", "content": "Hi", "weight": 1, "id": None}]
    assert read_messages(given, "messages", PLACE) == (
        {k: given[0][k] for k in list(given[0])[:4]},
    )
    assert (
        Chat(names)
        .prompt(read_messages(given, "messages", PLACE), PLACE)
        .startswith("<|im_start|>Ho\nHi<|im_end|>")
    )


def test_rows_of_every_kind_have_tools(tmp_path):
    path, tokenizer = tmp_path / "rows.jsonl", stand_in(WRITES_CALLS)
    write_jsonl(path, [{"messages": CALLED, "tools": TOOLS}, {"messages": CALLED, "tools": None}])
    with_tools, without = data.load_texts(path, tokenizer)
    assert learned(with_tools) == learned(without) == [WRITTEN, "Take an umbrella.<|im_end|>"]
    system = f"<|im_start|>system\n{json.dumps(read_tools({'tools': TOOLS}, PLACE))}<|im_end|>\n"
    assert with_tools.text == system + without.text
    write_jsonl(path, [{"prompt": CALLED[:1], "tools": json.dumps(TOOLS)}])
    prompts = prompt_data(path, tokenizer, max_length=999)
    assert prompts.texts[0].startswith(system) and prompts.columns["tools"] == [json.dumps(TOOLS)]
    pair = {"chosen": CALLED[:2], "rejected": [CALLED[0], CALLED[3]], "tools": TOOLS}
    write_jsonl(path, [pair])
    (ranking,) = load_preferences(path, tokenizer)
    assert ranking.prompt.startswith(system)
    assert ranking.responses == (WRITTEN, "Take an umbrella.<|im_end|>")
    assert ranking.reject_reason == ""
    assert other_columns(path, PREFERENCE_SCHEMAS) == {}


def learned(record):
    return [text for row in record.rows for text, in_loss in row if in_loss]


def test_prompts_and_completions_may_be_messages(tmp_path):
    before, after = turns("Hi", "Yes", "Ho"), turns("Ho", "No")[1:]
    rows = [
        {"prompt": before, "completion": after},
        {"prompt": before, "completion": "No"},
        {"messages": before + after},
        {"conversations": [{"from": "human", "value": "Ho"}, {"from": "gpt", "value": "No"}]},
        {"prompt": "Ho", "completion": after},
    ]
    write_jsonl(tmp_path / "chats.jsonl", rows)
    records = data.load_texts(tmp_path / "chats.jsonl", TOKENIZER)
    no, yes = "No<|im_end|>", "Yes<|im_end|>"
    assert [learned(x) for x in records] == [[no], [no], [yes, no], [no], [no]]
    assert len({x.text for x in records[:3]}) == 1 == len({x.text for x in records[3:]})
    last = data.load_texts(tmp_path / "chats.jsonl", TOKENIZER, turns="last")
    assert [learned(x) for x in last] == [[no]] * 5
    assert [x.text for x in last] == [x.text for x in records]
    plain = data.load_texts(tmp_path / "chats.jsonl")
    assert [learned(x) for x in plain] == [["No"], ["No"], ["Yes", "No"], ["No"], ["No"]]


# --- rows that are not rendered -------------------------------------------------------------------


def sft(path, **changes):
    optimizer = OptimizerSettings(learning_rate=1e-3)
    return SFTSettings(data=str(path), optimizer=optimizer, validation_fraction=0.4, **changes)


def test_rows_that_are_not_rendered_are_counted_with_the_first_of_them(tmp_path):
    path, tokenizer = tmp_path / "chats.jsonl", make_tokenizer(chats.INST, eos_token="</s>")
    words = ["Hi", "Ho", "Yes", "No", "Hi Ho", "Ho Hi"]
    good = [{"messages": turns(word, "Yes")} for word in words]
    bad = {"messages": turns("Hi", "Yes", system="Ho")}
    write_jsonl(path, [good[0], bad, *good[1:], bad])
    with pytest.raises(
        NotRendered, match=r"chats\.jsonl:2: the chat template refuses .*: only users"
    ):
        data.load_texts(path, tokenizer)
    parts = sft_data(sft(path), 1, tokenizer)
    reason = (
        f"not rendered (the first: {path}:2: the chat template refuses the messages: only users "
    )
    assert [dict(part.dropped) for part in parts] == [{f"{reason}and assistants may speak)": 2}, {}]
    assert sum(len(part.mask) for part in parts) == 6
    write_jsonl(path, [{"prompt": x["messages"][:-1]} for x in (good[0], bad, *good[1:])])
    prompts = prompt_data(path, tokenizer, max_length=32)
    assert len(prompts.texts) == 6 and list(prompts.dropped.values()) == [1]
    write_jsonl(path, [bad, bad])
    with pytest.raises(
        ValueError, match=r"^none of the 2 rows is rendered; .*chats\.jsonl:1: the cha"
    ):
        sft_data(sft(path), 0, tokenizer)
    write_jsonl(path, [{"messages": [{"role": "robot", "content": "a"}]}, *good])
    with pytest.raises(ValueError, match=r"chats\.jsonl:1: the role of messages\[0\]"):  # malformed
        sft_data(sft(path), 0, tokenizer)


def test_the_rows_of_a_conversation_are_one_record(tmp_path):
    path, tokenizer = tmp_path / "chats.jsonl", make_tokenizer(chats.FORGETFUL)
    words = ["Hi", "Ho", "Yes", "No", "Hi Ho", "Ho Hi"]
    write_jsonl(path, [{"messages": turns(word, "No|Yes", "Ho", "No")} for word in words])
    parts = sft_data(sft(path), 1, tokenizer)
    assert [len(part.mask) for part in parts] == [2 * len(set(part.records)) for part in parts]
    assert sum(len(set(part.records)) for part in parts) == 6
    last = sft_data(sft(path, turns="last"), 1, tokenizer)
    assert [len(part.mask) for part in last] == [len(set(part.records)) for part in parts]
