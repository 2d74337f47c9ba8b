"""Tokenizers of models and from scratch: any text is written, ended and padded."""

import json

import pytest
from film_reviews.data import film_ratings
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from ppo_jax.io.tokenizers import load_tokenizer, train_tokenizer, with_padding

FOREIGN = ["Grüße aus 東京 \U0001f3ac\u2028zero\x00width\u200b", "  \n\t", "x" * 50, "0123 4.5e-6"]


@pytest.fixture(scope="module")
def films():
    return [rated.text for rated in film_ratings()]


@pytest.fixture(scope="module")
def full(films):
    """A tokenizer of 4,000 tokens with a special token at the end and a chat template."""
    tokenizer = train_tokenizer(films, 4000)
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True)])
    tokenizer.chat_template = "{% for m in messages %}<|turn|>{{ m['content'] }}{% endfor %}"
    return tokenizer


def encode(tokenizer, texts):
    return tokenizer(list(texts))["input_ids"]


def test_training_twice_gives_the_same_tokenizer(films):
    first, second = (train_tokenizer(films[:500], 600) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert encode(first, films[500:600]) == encode(second, films[500:600])


def test_a_trained_tokenizer_writes_any_text_and_ends_it(full, films):
    assert len(full) == 4001 and full.eos_token == "<|endoftext|>" and full.eos_token_id == 0
    for text, ids in zip(films[:100] + FOREIGN, encode(full, films[:100] + FOREIGN), strict=True):
        assert full.decode(ids) == text


def test_an_impossible_vocabulary_size_and_no_text_are_refused():
    with pytest.raises(ValueError, match="vocab_size must be at least 257, got 256"):
        train_tokenizer(["text"], 256)
    with pytest.raises(ValueError, match="no text"):
        train_tokenizer([], 300)


def test_padding_gets_a_token_of_its_own_where_it_would_end_texts(full):
    assert full.pad_token is None
    own = with_padding(full, (0,))
    assert own.pad_token == "<|pad|>" and own.pad_token_id == len(full) == len(own) - 1
    assert encode(own, ["a film<|pad|>"])[0][-1] == own.pad_token_id
    assert own.chat_template == full.chat_template and own.eos_token_id == full.eos_token_id
    assert full.pad_token is None and len(full) == 4001  # a copy was changed
    assert with_padding(own, (0,)) is own
    own.pad_token = own.eos_token
    assert with_padding(own, (0,)).pad_token == "<|pad|>"
    own.pad_token = "<|turn|>"
    assert with_padding(own, (0, 4000)).pad_token_id == 4001  # a turn may end a text, too


def test_a_tokenizer_without_eos_is_refused_unless_the_model_names_one(full, tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=full.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 4000}))
    assert load_tokenizer(tmp_path).eos_token == "<|turn|>"


def test_a_folder_without_tokenizer_json_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
