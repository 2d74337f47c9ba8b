"""Conversations become the tokens of their template, and what the assistant writes is learned."""

import pytest

from ppo_jax.config.stages import OptimizerSettings, SFTSettings
from ppo_jax.data import encode
from ppo_jax.data import records as data
from ppo_jax.data.chat import Chat
from ppo_jax.data.encode import token_rows
from ppo_jax.data.messages import NotRendered, read_messages
from ppo_jax.data.preferences import load_preferences
from ppo_jax.data.prompts import prompt_data
from ppo_jax.data.records import Demonstration, write_jsonl
from ppo_jax.io.tokenizers import set_declared_stops
from ppo_jax.training.sft import sft_data
from tests.support import chat_templates, chats
from tests.support.chat_templates import CONVERSATIONS, SHAPES, faults, messages, stand_in
from tests.support.chats import TOKENIZER, call, ids, learned, make_tokenizer, turns

PLACE = "chats.jsonl:3"


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
    write_jsonl(path, [bad, good[0], bad])
    with pytest.raises(
        ValueError, match=r"1 records \(2 more are not rendered: .*:1: the chat temp"
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
