"""Tokenizers of models, from scratch and trimmed: any text is written, ended and padded.

A trimmed vocabulary gives the same texts, the same tokens, the same logits.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from film_reviews.data import film_ratings
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ppo_jax.io.stage_folder import check_tokenizer
from ppo_jax.io.tokenizers import (
    declared_stops,
    load_tokenizer,
    save_tokenizer,
    set_declared_stops,
    table_size,
    train_tokenizer,
    trim_params,
    trim_vocabulary,
    with_padding,
)
from ppo_jax.models.build import policy_apply, policy_network, reward_network
from ppo_jax.models.config import ModelConfig
from tests.support import tiny

FOREIGN = ["Grüße aus 東京 \U0001f3ac\u2028zero\x00width\u200b", "  \n\t", "x" * 50, "0123 4.5e-6"]
KEY = jax.random.key(0)


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


def with_hole(tokenizer, last):
    """The same tokenizer, with the id `last` for its last token."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = spec["model"]["vocab"]
    vocab[max(vocab, key=vocab.get)] = last
    backend = Tokenizer.from_str(json.dumps(spec))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tokenizer.eos_token)


def test_the_largest_id_must_be_in_the_token_table_however_few_tokens_there_are(tmp_path):
    tokenizer = with_hole(train_tokenizer(["a film of few words"] * 3, 300), 320)
    count = len(tokenizer)
    assert count < 300 and table_size(tokenizer) == 321
    last = tokenizer.convert_ids_to_tokens(320)
    for size in (count, 320):
        message = (
            rf"has ids up to 320 \({re.escape(repr(last))}\), for 321 tokens, the model {size}$"
        )
        with pytest.raises(ValueError, match=message):
            check_tokenizer(tokenizer, tiny.model_config(vocab_size=size), tmp_path)
    check_tokenizer(tokenizer, tiny.model_config(vocab_size=321), tmp_path)
    # The new token gets the number of tokens as its id: a hole, or the token behind a hole.
    assert with_padding(tokenizer, (0,)).pad_token_id == count
    with pytest.raises(ValueError, match=f"its ids have holes, and .* get the id {count}, which"):
        with_padding(with_hole(tokenizer, count), (0,))


def test_a_tokenizer_without_eos_is_refused_unless_the_model_names_one(full, tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=full.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 4000}))
    assert load_tokenizer(tmp_path).eos_token == "<|turn|>"


def test_a_folder_without_tokenizer_json_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_trimmed_tokenizer_encodes_its_texts_as_the_full_one(full, films):
    texts = films[:300]
    small, kept = trim_vocabulary(full, texts)
    assert len(small) == len(kept) < 0.8 * len(full)
    assert np.all(np.diff(kept) > 0)  # the old order
    for old, new in zip(encode(full, texts), encode(small, texts), strict=True):
        assert kept[new].tolist() == old


def test_a_trimmed_tokenizer_still_writes_any_other_text(full, films):
    small, _ = trim_vocabulary(full, films[:300])
    others = films[300:600] + FOREIGN
    for text, ids in zip(others, encode(small, others), strict=True):
        assert small.decode(ids) == text


def test_a_trimmed_tokenizer_keeps_special_tokens_and_chat_template(full, films):
    small, kept = trim_vocabulary(full, films[:10])
    assert small.eos_token == full.eos_token and kept[small.eos_token_id] == full.eos_token_id
    assert encode(small, ["<|turn|>"]) == [[len(small) - 1]] and kept[-1] == len(full) - 1
    messages = [{"role": "user", "content": "Hi"}]
    assert small.apply_chat_template(messages, tokenize=False) == "<|turn|>Hi"


def test_a_trimmed_tokenizer_keeps_what_ends_a_response(full, films):
    """As words of the vocabulary, which the texts need not use."""
    declaring = PreTrainedTokenizerFast(
        tokenizer_object=full.backend_tokenizer, eos_token="<|endoftext|>"
    )
    [rare] = encode(full, [" masterpiece"])[0]
    assert rare not in trim_vocabulary(declaring, films[:10])[1]
    set_declared_stops(declaring, declaring.convert_ids_to_tokens([rare]))
    small, kept = trim_vocabulary(declaring, films[:10])
    assert declared_stops(small) == declared_stops(declaring) and rare in kept
    assert small.convert_tokens_to_ids(declared_stops(small)) == [kept.tolist().index(rare)]
    assert small.decode(encode(small, [" masterpiece"])[0]) == " masterpiece"


def test_trimming_renumbers_tokens_that_the_tokenizer_adds_itself(full, films):
    backend = Tokenizer.from_str(full.backend_tokenizer.to_str())
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="$0 <|turn|>", special_tokens=[("<|turn|>", 4000)]
            ),
        ]
    )
    closing = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|turn|>")
    small, kept = trim_vocabulary(closing, films[:10])
    (ids,) = encode(small, films[:1])
    assert ids[-1] == small.eos_token_id
    assert kept[ids].tolist() == encode(closing, films[:1])[0]


def test_a_trimmed_tokenizer_survives_saving(full, films, tmp_path):
    small, _ = trim_vocabulary(full, films[:300])
    save_tokenizer(small, tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.get_vocab() == small.get_vocab() and again.eos_token_id == small.eos_token_id
    assert again.chat_template == small.chat_template and again.pad_token is None
    assert encode(again, films[:20] + FOREIGN) == encode(small, films[:20] + FOREIGN)


def test_only_bpe_over_bytes_is_trimmed():
    word_level = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    word_level.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="WordLevel"):
        trim_vocabulary(PreTrainedTokenizerFast(tokenizer_object=word_level), ["a"])
    characters = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    with pytest.raises(ValueError, match="over bytes"):
        trim_vocabulary(PreTrainedTokenizerFast(tokenizer_object=characters), ["ab"])


def test_trimmed_parameters_give_the_kept_logits():
    for tied in (True, False):
        config = model_config(vocab_size=40, tie_embeddings=tied)
        params = policy_network(config).init(KEY)
        kept = np.array([0, 3, 4, 17, 39])
        small = trim_params(params, kept)
        tokens, mask = jnp.array([[1, 4, 2, 3]]), jnp.ones((1, 4), bool)
        expected = policy_apply(config, params, jnp.asarray(kept)[tokens], mask)[:, :, kept]
        actual = policy_apply(model_config(vocab_size=5, tie_embeddings=tied), small, tokens, mask)
        np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_a_scalar_head_is_not_trimmed():
    params = reward_network(model_config(vocab_size=40)).init(KEY)
    small = trim_params(params, np.array([2, 5]))
    assert small["embed"]["tokens"].shape == (2, 16)
    assert small["head"]["kernel"] is params["head"]["kernel"]


def test_kept_ids_beyond_the_token_table_are_refused():
    params = policy_network(model_config(vocab_size=40)).init(KEY)
    with pytest.raises(ValueError, match=r"0\.\.39, got 40"):
        trim_params(params, np.array([0, 40]))


@pytest.mark.slow
def test_the_film_sentences_use_less_than_half_of_smollm2s_vocabulary(films):
    tokenizer = load_tokenizer("package:smollm2-135m-instruct")
    assert tokenizer.eos_token == "<|im_end|>" and len(tokenizer) == 49_152
    small, kept = trim_vocabulary(tokenizer, films)
    assert len(kept) < 49_152 / 2
    for old, new in zip(encode(tokenizer, films), encode(small, films), strict=True):
        assert kept[new].tolist() == old


@pytest.fixture
def folder(tmp_path):
    """A tokenizer on disk, as small as one can be."""
    save_tokenizer(train_tokenizer(["a film " * 9], 257), tmp_path)
    return tmp_path


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder, name):
    """What is told of a folder: one line that names a file of it."""
    with pytest.raises(ValueError) as error:
        load_tokenizer(folder)
    message = str(error.value)
    assert message.startswith(str(folder / name)) and len(message.splitlines()) == 1, message
    return message


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"[" * 10**5, b"\xff", b'{"a": 1'])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_file_that_is_no_object_is_named(folder, name, content):
    (folder / name).write_bytes(content)
    refused(folder, name)


@pytest.mark.parametrize("content", ["{}", '{"model": 3}', '{"model": {"type": "BPE"}}'])
def test_an_object_that_is_no_tokenizer_is_named(folder, content):
    (folder / "tokenizer.json").write_text(content)
    refused(folder, "tokenizer.json")


def test_tokens_with_one_id_are_refused(folder):
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["model"]["vocab"] = dict.fromkeys(spec["model"]["vocab"], 0)
    spec["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    assert "257 tokens have 1 ids" in refused(folder, "tokenizer.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"eos_token": 3},
        {"eos_token": ["a"]},
        {"model_max_length": "512"},
        {"padding_side": "up"},
        {"added_tokens_decoder": {"0": "a"}},
        {"added_tokens_decoder": []},
        {"extra_special_tokens": 3},
        {"fast_tokenizer_files": ["../tokenizer.1.0.json"]},
        {"fast_tokenizer_files": ["/etc/tokenizer.1.0.json"]},
        {"gguf_file": "../model.gguf"},
    ],
    ids=str,
)
def test_a_setting_that_no_tokenizer_has_is_refused(folder, changes):
    edit(folder / "tokenizer_config.json", **changes)
    refused(folder, "tokenizer_config.json")


def test_paths_of_the_machine_that_wrote_a_tokenizer_are_not_opened(folder):
    paths = {"tokenizer_file": "/gone/tokenizer.json", "vocab_file": "/etc/passwd"}
    edit(folder / "tokenizer_config.json", **paths, special_tokens_map_file="/gone/a.json")
    assert len(load_tokenizer(folder)) == 257


@pytest.mark.parametrize("eos", ["2", -1, 10**30, 2.0, True, [], [999], {"a": 1}])
def test_an_end_of_sequence_that_is_no_id_is_told(folder, eos):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(ValueError, match="the tokenizer has no end-of-sequence token"):
        load_tokenizer(folder)


def model_config(**changes):
    return ModelConfig(
        **{
            "num_layers": 1,
            "embed_dim": 16,
            "num_heads": 2,
            "num_kv_heads": 1,
            "head_dim": 8,
            "mlp_dim": 24,
            "max_length": 16,
            **changes,
        }
    )
