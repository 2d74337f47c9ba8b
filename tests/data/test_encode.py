"""Tokenised arrays hold each token once, under the right mask; each example comes once an epoch."""

import numpy as np
import pytest
import tokenizers
import transformers

from ppo_jax.data import encode
from ppo_jax.data.preferences import RankedResponses
from ppo_jax.data.prompts import prompt_data
from ppo_jax.data.records import Demonstration, RatedText, load_prompts, write_jsonl
from tests.support import chats
from tests.support.chats import turns


def make_tokenizer(template=None, **special):
    """A byte-level BPE; `template` says which special tokens it puts around a text."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>", "<bos>", "<sep>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["the film is good", "the film is bad and long"], trainer)
    if template:
        bpe.post_processor = tokenizers.processors.TemplateProcessing(
            single=template, special_tokens=[("<eos>", 0), ("<bos>", 1), ("<sep>", 2)]
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **special)


PLAIN = make_tokenizer(eos_token="<eos>", pad_token="<eos>")
WITH_BOS = make_tokenizer("<bos> $A", bos_token="<bos>", eos_token="<eos>")
WITH_BOS_AND_EOS = make_tokenizer("<bos> $A <eos>", bos_token="<bos>", eos_token="<eos>")
WITHOUT_EOS = make_tokenizer()
EOS, BOS = 0, 1


def ids(text):
    return PLAIN(text, add_special_tokens=False)["input_ids"]


def answered(prompt, text):
    return Demonstration(((prompt, False), (text, True)))


def rows_of(arrays):
    return [row[mask].tolist() for row, mask in zip(arrays.tokens, arrays.mask, strict=True)]


@pytest.mark.parametrize(
    ("tokenizer", "leading"), [(PLAIN, []), (WITH_BOS, [BOS]), (WITH_BOS_AND_EOS, [BOS])]
)
def test_a_row_is_prompt_tokens_then_completion_tokens_then_eos(tokenizer, leading):
    demonstrations = [answered("the film", " is good"), Demonstration((("bad", True),))]
    texts = encode.encode_demonstrations(demonstrations, tokenizer, max_length=32)
    prompt, completion = leading + ids("the film"), [*ids(" is good"), EOS]
    assert rows_of(texts) == [prompt + completion, [*leading, *ids("bad"), EOS]]
    assert texts.tokens[0][texts.loss_mask[0]].tolist() == completion
    prompts = encode.encode_prompts(["the film"], tokenizer, max_length=32)
    assert rows_of(prompts) == [prompt]


def test_the_first_token_of_a_row_is_never_in_the_loss():
    for tokenizer, predicted in [(PLAIN, [*ids("bad")[1:], EOS]), (WITH_BOS, [*ids("bad"), EOS])]:
        texts = encode.encode_texts(["bad"], tokenizer, max_length=8)
        assert not texts.loss_mask[:, 0].any()
        assert texts.tokens[texts.loss_mask].tolist() == predicted


def test_eos_is_in_the_loss_though_it_is_the_pad_token_too():
    assert PLAIN.pad_token_id == PLAIN.eos_token_id == EOS
    texts = encode.encode_texts(["good", "the film is bad"], PLAIN, max_length=32)
    last = texts.mask.sum(axis=1) - 1
    assert texts.loss_mask[np.arange(2), last].all()
    assert (texts.tokens[np.arange(2), last] == EOS).all()
    assert not texts.loss_mask[~texts.mask].any()


def test_eos_is_appended_once_and_only_when_asked():
    twice = encode.encode_texts(["good<eos>", "good"], PLAIN, max_length=32)
    assert rows_of(twice) == [[*ids("good"), EOS]] * 2
    (without,) = encode.token_rows([[("good", True)]], PLAIN, append_eos=False)
    assert without.ids == ids("good")


def test_lengths_are_multiples_of_eight_up_to_the_limit():
    nine_tokens = "x" * 8
    assert encode.encode_texts([nine_tokens], PLAIN, max_length=32).tokens.shape == (1, 16)
    assert encode.encode_texts([nine_tokens], PLAIN, max_length=9).tokens.shape == (1, 9)
    assert encode.encode_texts(["xy"], PLAIN, max_length=32).tokens.shape == (1, 8)


def test_long_texts_are_dropped_and_counted():
    texts = encode.encode_texts(["x", "x" * 8, "y"], PLAIN, max_length=8)
    assert rows_of(texts) == [[*ids("x"), EOS], [*ids("y"), EOS]]
    assert (texts.dropped, texts.records.tolist()) == ({"too long (over 8 tokens)": 1}, [0, 2])
    with pytest.raises(ValueError, match=r"none of the 2 .*2 too long \(over 8 tokens\).*has 9"):
        encode.encode_texts(["x" * 8, "x" * 9], PLAIN, max_length=8)


def test_arrays_have_their_types():
    texts = encode.encode_texts(["x"], PLAIN, max_length=8)
    prompts = encode.encode_prompts(["x"], PLAIN, max_length=8)
    assert (texts.tokens.dtype, prompts.tokens.dtype) == (np.int32, np.int32)
    assert (texts.mask.dtype, texts.loss_mask.dtype, prompts.mask.dtype) == (bool, bool, bool)


def test_every_segment_is_tokenised_for_itself_and_in_the_loss_or_not():
    segments = (("the film", False), (" is", True), (" good the", False), (" film", True))
    texts = encode.encode_demonstrations([Demonstration(segments)], PLAIN, max_length=32)
    encoded = [(ids(text), in_loss) for text, in_loss in segments] + [([EOS], True)]
    assert rows_of(texts) == [sum((tokens for tokens, _ in encoded), [])]
    expected = [in_loss for tokens, in_loss in encoded for _ in tokens]
    assert texts.loss_mask[0][texts.mask[0]].tolist() == expected


def test_what_is_dropped_is_counted_under_its_reason():
    records = [
        answered("the", " good"),
        answered("the", " \n"),
        answered("the", " good"),
        answered("the g", "ood"),  # the same text, but another record
        answered("the", "x" * 20),
        Demonstration(()),
        answered("the", "x" * 20),
    ]
    texts = encode.encode_demonstrations(records, PLAIN, max_length=12)
    assert texts.records.tolist() == [0, 3]
    assert texts.dropped == {"blank": 2, "repeated": 2, "too long (over 12 tokens)": 1}
    with pytest.raises(ValueError, match="none of the 3 records can be used: 2 blank, 1 too long"):
        encode.encode_demonstrations([records[i] for i in (1, 5, 4)], PLAIN, max_length=12)


def test_two_opinions_of_one_text_are_two_records():
    records = [RatedText("good", (1.0,)), RatedText("good", (2.0,)), RatedText("good", (1.0,))]
    texts = encode.encode_demonstrations(records, PLAIN, max_length=12)
    assert texts.records.tolist() == [0, 1] and texts.dropped == {"repeated": 1}


def test_texts_to_score_are_all_kept():
    texts = encode.encode_all(["good", "good", ""], PLAIN, max_length=12)
    assert rows_of(texts) == [[*ids("good"), EOS]] * 2 + [[EOS]]
    with pytest.raises(ValueError, match="at most 8 tokens, got 1 longer ones.*'xxxxxxxx'"):
        encode.encode_all(["good", "x" * 8], PLAIN, max_length=8)


def test_preferences_fill_two_rows_each_and_are_dropped_whole():
    preferences = [
        RankedResponses("the", (" good", " bad"), (1.0, 0.0)),
        RankedResponses("x", ("y" * 20, "z"), (1.0, 0.0)),
        RankedResponses("x", ("z", "y" * 20), (1.0, 0.0)),
        RankedResponses("film", ("a", "b"), (0.0, 1.0)),
    ]
    texts, groups = encode.encode_preferences(preferences, PLAIN, max_length=12)
    assert rows_of(texts) == [
        [*ids("the"), *ids(" good"), EOS],
        [*ids("the"), *ids(" bad"), EOS],
        [*ids("film"), *ids("a"), EOS],
        [*ids("film"), *ids("b"), EOS],
    ]
    assert groups.rows.tolist() == [[0, 1], [2, 3]] and groups.rows.dtype == np.int32
    assert groups.row_pairs.tolist() == [[0, 1], [3, 2]] and groups.row_pairs.dtype == np.int32
    assert texts.dropped == {"too long (over 12 tokens)": 2}
    assert texts.records.tolist() == [0, 0, 3, 3]


def test_prompts_are_padded_on_the_left():
    prompts = encode.encode_prompts(["the film is", "xyz"], PLAIN, max_length=32)
    assert rows_of(prompts) == [ids("the film is"), ids("xyz")]
    assert prompts.mask[:, -1].all()
    assert (np.diff(prompts.mask.astype(int), axis=1) >= 0).all()
    assert (prompts.tokens[~prompts.mask] == 0).all()


def test_a_prompt_that_is_too_long_or_empty_is_named():
    with pytest.raises(ValueError, match="prompt 1 has 9 tokens, allowed are 1 to 8: 'xxxx"):
        encode.encode_prompts(["x", "x" * 9], PLAIN, max_length=8)
    with pytest.raises(ValueError, match="prompt 0 has 0 tokens, allowed are 1 to 8: ''"):
        encode.encode_prompts([""], PLAIN, max_length=8)
    assert rows_of(encode.encode_prompts([""], WITH_BOS, max_length=8)) == [[BOS]]


def test_prompts_of_a_file_without_use_are_dropped_and_counted(tmp_path):
    path = tmp_path / "prompts.jsonl"
    write_jsonl(path, [{"prompt": x} for x in ("the", "", "x" * 9, "film", "the")])
    data = prompt_data(path, PLAIN, max_length=8)
    assert data.texts == ["the", "film"] and rows_of(data.prompts) == [ids("the"), ids("film")]
    assert data.dropped == {"blank": 1, "repeated": 1, "too long (over 8 tokens)": 1}
    assert prompt_data(path, WITH_BOS, max_length=8).texts == ["the", "", "film"]
    write_jsonl(path, [{"prompt": "x" * 9}])
    too_long = r"ppo\.prompts: .*1 too long .* has 9; see ppo\.max_prompt_length$"
    with pytest.raises(ValueError, match=too_long):
        prompt_data(path, PLAIN, max_length=8)
    write_jsonl(path, [{"prompt": ""}])
    blank = r"evaluate\.prompts: .*prompts\.jsonl: none of the 1 records can be used: 1 blank$"
    with pytest.raises(ValueError, match=blank):
        prompt_data(path, PLAIN, max_length=8, field="evaluate.prompts")


def test_what_a_tokenizer_puts_behind_a_text_does_not_lead_it():
    separated = make_tokenizer("<bos> $A <sep>", bos_token="<bos>", eos_token="<eos>")
    assert encode.leading_tokens(separated) == [BOS]
    behind = make_tokenizer("$A <sep>", bos_token="<bos>", eos_token="<eos>")
    assert encode.leading_tokens(behind) == []
    twice = make_tokenizer("<eos> <bos> $A <eos> <sep>", bos_token="<bos>", eos_token="<eos>")
    assert encode.leading_tokens(twice) == [EOS, BOS]
    assert rows_of(encode.encode_prompts(["good"], behind, max_length=8)) == [ids("good")]
    assert rows_of(encode.encode_texts(["good"], behind, max_length=8)) == [[*ids("good"), EOS]]


def test_equal_prompts_with_other_columns_are_two_and_the_columns_travel(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [("the", 1), ("the", 2), ("x" * 9, 3), ("film", 1), ("the", 2)]
    write_jsonl(path, [{"prompt": p, "answer": [a]} for p, a in rows])
    data = prompt_data(path, PLAIN, max_length=8)
    assert data.texts == ["the", "the", "film"] and data.gaps == {}
    assert data.columns == {"prompt": data.texts, "answer": [[1], [2], [1]]}
    assert data.dropped == {"repeated": 1, "too long (over 8 tokens)": 1}
    write_jsonl(path, [{"prompt": "the", "id": 1}, {"prompt": "film"}, {"prompt": "the", "x": 0}])
    data = prompt_data(path, PLAIN, max_length=8)
    assert len(data.texts) == 3 and list(data.columns) == ["prompt"]
    assert data.gaps == {"id": f"{path}:2", "x": f"{path}:1"}
    rows = [{"messages": turns("Hi", "Yes"), "prompt": "Ho"}, {"messages": turns("Hi", "No")}]
    write_jsonl(path, rows)
    data = prompt_data(path, chats.TOKENIZER, max_length=16)
    # A reward function may ask for the messages, and their last answers differ.
    assert data.texts == load_prompts(path, chats.TOKENIZER) and data.dropped == {}
    assert data.columns["messages"] == [row["messages"] for row in rows]
    data = prompt_data(path, chats.TOKENIZER, max_length=16, columns=False)
    assert data.texts == load_prompts(path, chats.TOKENIZER)[:1] and data.dropped == {"repeated": 1}


def test_a_tokenizer_without_eos_and_no_text_at_all_are_refused():
    with pytest.raises(ValueError, match="the tokenizer must have an EOS token"):
        encode.encode_texts(["x"], WITHOUT_EOS, max_length=8)
    with pytest.raises(ValueError, match="at least one text"):
        encode.encode_prompts([], PLAIN, max_length=8)


@pytest.mark.parametrize(("num_examples", "batch_size"), [(10, 4), (12, 4), (3, 8), (1, 1), (7, 7)])
def test_every_example_comes_once_an_epoch(num_examples, batch_size):
    sizes = {"num_examples": num_examples, "batch_size": batch_size}
    steps = [encode.batch_indices(5, step, **sizes) for step in range(6 * num_examples)]
    assert all(indices.shape == (batch_size,) for indices in steps)
    epochs = np.concatenate(steps).reshape(-1, num_examples)
    assert (np.sort(epochs, axis=1) == np.arange(num_examples)).all()


def test_a_batch_follows_from_seed_and_step():
    def draw(seed, step):
        return encode.batch_indices(seed, step, num_examples=1000, batch_size=8).tolist()

    assert draw(0, 3) == draw(0, 3)
    assert len({tuple(draw(seed, step)) for seed in range(3) for step in (0, 1, 125)}) == 9
    # A late step costs no more than an early one, and is no special case.
    assert len(draw(0, 10**9)) == 8


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="num_examples must be at least 1, got 0"):
        encode.batch_indices(0, 0, num_examples=0, batch_size=1)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        encode.batch_indices(0, 0, num_examples=1, batch_size=0)
