"""Conversations become the tokens of their template, and what the assistant writes is learned."""

import pytest

from ppo_jax.data import encode
from ppo_jax.data import records as data
from ppo_jax.data.chat import Chat, read_messages
from ppo_jax.data.encode import token_rows
from ppo_jax.data.records import Demonstration, write_jsonl
from tests.support import chats
from tests.support.chats import TOKENIZER, ids, make_tokenizer, turns

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
        ([{"role": "user", "content": "a", "name": "b"}], "must have role and content"),
        ([{"role": "user", "content": None}], "must have role and content"),
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
