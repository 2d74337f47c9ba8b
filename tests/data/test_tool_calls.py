"""Calls of tools, tools of a row, and other keys of messages reach the template."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from ppo_jax.data import records as data
from ppo_jax.data import templates
from ppo_jax.data.chat import Chat
from ppo_jax.data.messages import NotRendered, read_messages, read_tools
from ppo_jax.data.preferences import PREFERENCE_SCHEMAS, load_preferences
from ppo_jax.data.probes import shapes
from ppo_jax.data.prompts import prompt_data
from ppo_jax.data.readers import other_columns
from ppo_jax.data.records import write_jsonl
from tests.support import chat_templates, chats
from tests.support.chat_templates import SHAPES, messages, stand_in
from tests.support.chats import TOKENIZER, call, learned, make_tokenizer, turns

PLACE = "chats.jsonl:3"


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
    plain = messages(("user", chat_templates.QUESTION), ("assistant", chat_templates.ANSWER))
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
