"""Prompt and response have the tokens of their text, and their tokens give it back, exactly."""

import random

import numpy as np
import pytest

from ppo_jax.core.types import Prompts
from ppo_jax.data import encode
from ppo_jax.data.decode import TextDecoder, printable
from ppo_jax.inference.generate import decode_rows, decode_stream
from ppo_jax.io.tokenizers import train_tokenizer
from tests.support.chats import TOKENIZER as CHAT
from tests.support.chats import ids
from tests.support.sentencepiece import KINDS, REAL, TEXTS, make_tokenizer, real_tokenizer

PIECES = ["The", " film", " is", " ", "  ", "good", ".", "a", " It", "!"]
HARD = ["é", "東京", "\U0001f3ac", "\n", "\n\n", "\t", "12345", "don't", "x=1;\n    y", "\ufffd"]


def tokens_of(tokenizer, *segments):
    """The tokens of segments, every other one of which is learned."""
    marked = [(text, bool(i % 2)) for i, text in enumerate(segments)]
    (row,) = encode.token_rows([marked], tokenizer, append_eos=False)
    return row


def names_of(tokenizer, *segments):
    return tokenizer.convert_ids_to_tokens(tokens_of(tokenizer, *segments).ids)


def made_up(pieces, count, seed):
    """Prompts and responses of some pieces; neither is empty."""
    draw = random.Random(seed)
    for _ in range(count):
        yield tuple("".join(draw.choices(pieces, k=draw.randint(1, 5))) for _ in range(2))


def check_exact(tokenizer, pairs):
    """Both ways, for each pair: the laws, by the tokenizer's own encoding and by the text."""
    decoder = TextDecoder(tokenizer)
    for prompt, response in pairs:
        asked = tokens_of(tokenizer, prompt).ids
        row = tokens_of(tokenizer, prompt, response)
        answer = row.ids[len(asked) :]
        assert row.ids[: len(asked)] == asked, (prompt, response)
        assert row.in_loss == [False] * len(asked) + [True] * len(answer)
        assert decoder.text(asked, answer) == response, (prompt, response)
        whole = tokenizer(prompt + response, add_special_tokens=False)["input_ids"]
        whole = whole if whole[:1] == decoder.leading else decoder.leading + whole
        if whole[: len(asked)] == asked:  # no token spans the border
            assert row.ids == whole
        chunks = decode_stream(tokenizer, answer, asked)
        assert "".join(chunks) == response


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_response_are_exact_both_ways(kind):
    pieces = PIECES + HARD * (kind in ("llama", "bytes"))
    check_exact(make_tokenizer(kind), made_up(pieces, 300, seed=0))


@pytest.mark.parametrize(("kind", "first"), [("llama", "▁"), ("first", ""), ("never", "")])
def test_behind_a_special_token_a_text_begins_anew_or_goes_on(kind, first):
    tokenizer = make_tokenizer(kind)
    check_exact(tokenizer, made_up([*PIECES, "<|user|>", "</s>"], 300, seed=1))
    row = tokens_of(tokenizer, "a<|user|>", "is")
    answer = [i for i, learned in zip(*row, strict=True) if learned]
    assert "".join(tokenizer.convert_ids_to_tokens(answer)) == f"{first}is"


@pytest.mark.parametrize("kind", ["always", "bytes"])
def test_where_two_texts_have_the_same_tokens_a_word_is_told_as_the_tokenizer_tells_it(kind):
    """Behind a special token these put a space before a word, unless there is one."""
    tokenizer = make_tokenizer(kind)
    rows = [tokens_of(tokenizer, "a<|user|>", text).ids for text in ("is", " is")]
    assert rows[0] == rows[1]
    asked = tokens_of(tokenizer, "a<|user|>").ids
    text = TextDecoder(tokenizer).text(asked, rows[0][len(asked) :])
    assert text == tokenizer.decode(tokenizer("is")["input_ids"], skip_special_tokens=True)


@pytest.mark.parametrize("name", REAL)
def test_released_tokenizers_are_exact(name, tmp_path):
    tokenizer = real_tokenizer(name, tmp_path)
    special = tokenizer.all_special_tokens[:3]
    # Not with U+FFFD: what stands for bytes that are no text.
    check_exact(tokenizer, made_up(PIECES + HARD + special, 500, seed=2))


def test_a_space_at_the_border_is_of_the_word_behind_it():
    llama = make_tokenizer("llama")
    assert names_of(llama, "The film is", " good.") == "<s> ▁The ▁film ▁is ▁good .".split()
    row = tokens_of(llama, "The film", " is", " good", ".")
    assert row.in_loss == [False] * 3 + [True, False, True]
    # What the model would write behind these prompts is not what the whole text has.
    assert "|".join(names_of(llama, "The film is ", "good.")[4:]) == "▁|go|od|."
    assert names_of(llama, "The fi", "lm is good")[-3:] == ["lm", "▁is", "▁good"]


def test_neighbours_of_one_kind_are_one_text():
    plain = train_tokenizer(TEXTS, 300)
    (row,) = encode.token_rows(
        [[("The fi", False), ("lm is", False), (" go", True), ("od", True)]],
        plain,
        append_eos=True,
    )
    assert row.ids == plain("The film is good")["input_ids"] + [plain.eos_token_id]
    assert row.in_loss == [False] * 3 + [True] * 2


def test_the_rest_of_a_text_behind_a_border_within_a_token_is_again_a_whole():
    bpe = train_tokenizer(TEXTS, 300)
    segments = ("The fi", "lm", " is", " good", " and")
    parts = [bpe(text)["input_ids"] for text in segments]
    assert tokens_of(bpe, *segments).ids == sum(parts, [])
    llama = make_tokenizer("llama")
    assert names_of(llama, *segments)[-4:] == ["lm", "▁is", "▁good", "▁and"]


def rows_of_text(tokenizer, prompts, responses, stop_ids=()):
    """`decode_rows` of rows of token ids."""
    asked = encode.pad_prompts(prompts, max(map(len, prompts)))
    tokens, mask = encode.pad_right(responses, max(map(len, responses)))
    return decode_rows(tokenizer, tokens, mask, asked, stop_ids)


def test_only_the_stop_token_at_the_end_is_not_shown():
    end, start = ids("<|im_end|>")[0], ids("<|im_start|>")[0]
    written = [
        [*ids("Ho, ,Hi"), end],
        [*ids("Ho"), start, *ids("user"), end],
        [*ids("Ho"), end, *ids("Hi")],  # one that ends nothing here
        [end],
        [*ids("Ho"), ids("</s>")[0]],
        [*ids("Ho"), end, end],
    ]
    shown = ["Ho Hi", "Ho<|im_start|>user", "Ho<|im_end|>Hi", "", "Ho</s>", "Ho<|im_end|>"]
    assert rows_of_text(CHAT, [ids("Hi")] * 6, written, [end]) == shown
    assert "".join(decode_stream(CHAT, written[1], ids("Hi"), [end])) == shown[1]
    word = ids("Ho")[0]  # a stop token need not be special
    assert rows_of_text(CHAT, [ids("Hi")], [[*ids("Hi"), word]], [end, word]) == ["Hi"]


def test_spaces_before_points_stay_whatever_the_tokenizer_would_clean():
    tokenizer = train_tokenizer(["do n't . , it 's"] * 3, 300)
    tokenizer.clean_up_tokenization_spaces = True
    text = " do n't . , it 's !"
    prompt, response = (tokenizer(x)["input_ids"] for x in ("it", text))
    assert rows_of_text(tokenizer, [prompt], [response]) == [text]


def test_prompts_of_any_length_leave_the_text_of_a_response():
    llama = make_tokenizer("llama")
    prompts, texts = ["a", "The film is", ""], [" film", " good.", "It"]
    rows = [tokens_of(llama, p, t).ids for p, t in zip(prompts, texts, strict=True)]
    asked = [tokens_of(llama, p).ids for p in prompts]
    written = [row[len(p) :] for row, p in zip(rows, asked, strict=True)]
    assert rows_of_text(llama, asked, written) == texts
    padded = Prompts(tokens=np.zeros((1, 4), int), mask=np.zeros((1, 4), bool))
    good = np.array([llama.convert_tokens_to_ids(["▁good", "."])])
    assert decode_rows(llama, good, good > 0, padded, ()) == ["good."]


def test_a_character_that_is_cut_off_takes_no_whole_one_with_it():
    llama = make_tokenizer("llama")
    prompt, text = "\U0001f3ac", "東\U0001f3ac"
    asked, row = tokens_of(llama, prompt).ids, tokens_of(llama, prompt, text).ids
    for count, whole in ((3, "東"), (4, "東"), (5, "東"), (6, "東"), (7, text), (1, ""), (2, "")):
        written = row[len(asked) :][:count]
        (shown,) = rows_of_text(llama, [asked], [written])
        assert shown.rstrip("\ufffd") == whole
        assert "".join(decode_stream(llama, written, asked)) == shown


def test_a_stream_waits_for_no_more_tokens_than_a_character_needs():
    llama, read = make_tokenizer("llama"), []
    asked = tokens_of(llama, "The film is").ids
    answer = tokens_of(llama, "The film is", " good 東").ids[len(asked) :]
    chunks = decode_stream(llama, (read.append(i) or i for i in answer), asked)
    assert (next(chunks), len(read)) == (" good", 1)
    assert list(chunks) == [" ", "東", ""]


def test_tokens_without_a_text_have_none():
    """Ids of a table that is larger than its tokenizer can be sampled, too."""
    tokenizer = train_tokenizer(TEXTS, 300)
    film = tokenizer(" film")["input_ids"]
    assert rows_of_text(tokenizer, [film], [[len(tokenizer) + 5, *film]]) == [" film"]


def test_what_moves_a_cursor_or_turns_text_is_spelt_out_and_what_joins_letters_is_not():
    family = "\U0001f468\u200d\U0001f469"
    assert printable(f"{family}\u3000\xa0é\n") == f"{family}\u3000\xa0é\n"
    text = "\x00\x07\b\x7f\x9b2J\u2028\u202e\u2066\ud800"
    spelt = r"\x00\x07\x08\x7f\x9b2J\u2028\u202e\u2066\ud800"
    assert printable(text) == spelt
