"""Preferences and rankings: every form gives the same records, and all pairs but the ties."""

import dataclasses

import numpy as np
import pytest

from ppo_jax.config.stages import OptimizerSettings, RewardSettings
from ppo_jax.data import encode
from ppo_jax.data.comparisons import RewardData, reward_data
from ppo_jax.data.preferences import RankedResponses, load_preferences
from ppo_jax.data.records import write_jsonl
from ppo_jax.io.tokenizers import train_tokenizer
from ppo_jax.pipeline.preflight import check_rankings
from ppo_jax.training.resume import checksum
from tests.support.chats import TOKENIZER, ids, turns

OPENED = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
GOOD_PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
SIDES = ("Yes<|im_end|>", "No<|im_end|>")
HI, YES, NO = turns("Hi"), turns("Hi", "Yes")[1:], turns("Hi", "No")[1:]


def loaded(tmp_path, *rows):
    path = tmp_path / "pairs.jsonl"
    write_jsonl(path, rows)
    return load_preferences(path, TOKENIZER)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": HI, "chosen": YES, "rejected": NO},
        {"prompt": HI, "chosen": "Yes", "rejected": "No"},
        {"prompt": "Hi", "chosen": YES, "rejected": NO},
        {"prompt": "Hi", "chosen": HI + YES, "rejected": HI + NO},
        {"chosen": HI + YES, "rejected": HI + NO},
        {"prompt": HI, "chosen": YES, "rejected": NO, "margin": 0},
        {"prompt": HI, "responses": [YES, "No"]},
    ],
    ids=lambda row: "-".join(f"{key}:{type(value).__name__}" for key, value in row.items()),
)
def test_messages_in_all_their_forms_give_the_same_preference(tmp_path, row):
    (record,) = loaded(tmp_path, row)
    assert (record.prompt, record.responses, record.pairs) == (OPENED, SIDES, [(0, 1)])


def test_texts_stay_as_they_are(tmp_path):
    (record,) = loaded(tmp_path, {"prompt": "p", "chosen": " c", "rejected": ""})
    assert (record.prompt, record.responses, record.scores) == ("p", (" c", ""), (1.0, 0.0))


def test_conversations_part_where_the_assistant_says_something_else(tmp_path):
    before = turns("Hi", "Yes", "Ho")
    chosen, rejected = turns("Hi", "Yes", "Ho", "No", "Hi", "Yes"), turns("Hi", "Yes", "Ho", "Yes")
    (record,) = loaded(tmp_path, {"chosen": chosen, "rejected": rejected})
    assert record.prompt == TOKENIZER.apply_chat_template(
        before, tokenize=False, add_generation_prompt=True
    )
    assert record.responses == ("No<|im_end|>\n" + OPENED + "Yes<|im_end|>", "Yes<|im_end|>")


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "responses"),
    [
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: c", 1, (" b", " c")),
        # One answer begins as the other, and "Assistant:" inside a line is no turn.
        (
            "\n\nHuman: a\n\nAssistant: b Assistant: c",
            "\n\nHuman: a\n\nAssistant: b Assistant: d",
            1,
            (" b Assistant: c", " b Assistant: d"),
        ),
        # The common turns are the prompt, however much of the last ones agrees.
        (
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: de",
            2,
            (" d", " de"),
        ),
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: b", 1, (" b", " b")),
        # They part at a turn of the human's: what the assistant said before is judged too.
        (
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: x\n\nAssistant: d",
            1,
            (" b\n\nHuman: c\n\nAssistant: d", " b\n\nHuman: x\n\nAssistant: d"),
        ),
    ],
)
def test_transcripts_have_their_common_turns_for_a_prompt(
    tmp_path, chosen, rejected, prompt, responses
):
    (record,) = loaded(tmp_path, {"chosen": chosen, "rejected": rejected})
    assert record.responses == responses
    assert [record.prompt + response for response in responses] == [chosen, rejected]
    assert record.prompt.count("\n\nAssistant:") == prompt and record.prompt.endswith("Assistant:")


def test_a_ranking_has_all_pairs_but_ties(tmp_path):
    best_first, scored, same_text = loaded(
        tmp_path,
        {"prompt": "p", "responses": ["a", "b", "c"]},
        {"prompt": "p", "responses": ["a", "b", "c", "d"], "scores": [1, 3, 1, 2.5]},
        {"prompt": "p", "responses": ["a", "b", "a"]},
    )
    assert best_first.pairs == [(0, 1), (0, 2), (1, 2)]
    # Scores 1, 3, 1, 2.5: b over all, d over a and c, a and c equal.
    assert scored.pairs == [(1, 0), (1, 2), (1, 3), (3, 0), (3, 2)]
    assert same_text.pairs == [(0, 1), (1, 2)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "a", "rejected": "b"}, "without a prompt.*'a' and 'b'"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "c"}, "without a prompt"),
        ({"chosen": HI + YES, "rejected": "No"}, "chosen must go on from the prompt"),
        ({"chosen": HI + YES, "rejected": turns("Ho", "No")}, "must go on from the prompt"),
        ({"prompt": HI, "chosen": YES + HI, "rejected": NO}, "end with one"),
        ({"prompt": "Ho", "chosen": HI + YES, "rejected": NO}, "leave prompt out"),
        ({"prompt": HI + YES, "chosen": YES, "rejected": NO}, "a turn of the assistant's must"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "prompt must be a string or a list"),
        ({"prompt": "p", "chosen": 1, "rejected": "b"}, "chosen must be a string or a list"),
        ({"prompt": "p", "chosen": "a"}, "the keys must be"),
        (GOOD_PAIR | {"margin": -1}, "margin must be at least 0, got -1: by how much"),
        (GOOD_PAIR | {"margin": "much"}, "margin must be a finite number up to 1e30, got 'much'"),
        ({"prompt": "p", "responses": ["a"]}, "responses must be a list of two or more"),
        ({"prompt": "p", "responses": "ab"}, "responses must be a list of two or more"),
        ({"prompt": "p", "responses": ["a", 3]}, r"responses\[1\] must be a string or a list"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1]}, "scores must be a list of 2"),
        (
            {"prompt": "p", "responses": ["a", "b"], "scores": [1, None]},
            "a score must be a finite number up to 1e30, got None",
        ),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=rf"(?s)pairs\.jsonl:2: .*{message}"):
        loaded(tmp_path, GOOD_PAIR, row)


def test_margins_go_with_their_pairs_into_the_batches(tmp_path):
    texts = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    records = loaded(
        tmp_path,
        GOOD_PAIR,
        {"prompt": HI, "chosen": YES, "rejected": NO, "margin": 2},
        texts | {"margin": 0.5},
        {"prompt": "p", "responses": ["a", "b", "c"], "margin": 7},  # not read
    )
    assert [record.margin for record in records] == [0.0, 2.0, 0.5, 0.0]
    _, groups = encode.encode_preferences(records[:2] + records[3:], TOKENIZER, max_length=40)
    assert groups.margins.tolist() == [[0, 0, 0], [2, 0, 0], [0, 0, 0]]
    encoded, groups = encode.encode_preferences(records[:2], TOKENIZER, max_length=40)
    data = RewardData(texts=encoded, groups=groups)
    rows, pairs, valid, margins = data.batch(0, 0, settings(batch_size=4))
    assert margins.dtype == np.float32 and valid.all()
    assert dict(zip(rows[pairs[:, 0]].tolist(), margins.tolist(), strict=True)) == {0: 0.0, 2: 2.0}


def test_without_a_margin_the_checksum_is_that_of_runs_from_before(tmp_path):
    texts, groups = encode.encode_preferences(loaded(tmp_path, GOOD_PAIR), TOKENIZER, max_length=8)
    assert groups.margins is None
    before = 0
    for part in (groups.rows, groups.pairs, groups.valid):
        before = checksum(part, before)
    assert checksum(groups) == before
    with_margin = dataclasses.replace(groups, margins=np.ones((1, 1), np.float32))
    assert checksum(with_margin) != before


def rankings():
    return [
        RankedResponses("Hi", ("Yes", "No"), (1.0, 0.0)),
        RankedResponses("Hi", ("Yes", "Ho", "No"), (1.0, 2.0, 1.0)),
        RankedResponses("Hi", ("Yes", "No"), (1.0, 0.0)),
        RankedResponses("Hi", ("Yes", "Yes"), (1.0, 0.0)),
        RankedResponses("Hi", ("Yes", " "), (1.0, 0.0)),
        RankedResponses("Hi", ("Yes", "No Yes No Yes No"), (1.0, 0.0)),
        RankedResponses("Ho", ("No", "Yes"), (0.0, 1.0)),
    ]


def test_the_rows_of_a_ranking_stand_together_and_why_others_do_not():
    texts, groups = encode.encode_preferences(rankings(), TOKENIZER, max_length=8)
    rows = [row[mask].tolist() for row, mask in zip(texts.tokens, texts.mask, strict=True)]
    end = ids("<|im_end|>")
    assert rows == [
        ids(words) + end for words in ("Hi,Yes", "Hi,No", "Hi,Yes", "Hi,Ho", "Hi,No")
    ] + [ids("Ho,No") + end, ids("Ho,Yes") + end]
    assert texts.records.tolist() == [0, 0, 1, 1, 1, 6, 6]
    assert dict(texts.dropped) == {
        "repeated": 1,
        "tied": 1,
        "blank": 1,
        "too long (over 8 tokens)": 1,
    }
    # The pairs of two responses take one of three places, the third row is the first again.
    assert groups.rows.tolist() == [[0, 1, 0], [2, 3, 4], [5, 6, 5]]
    assert groups.valid.tolist() == [
        [True, False, False],
        [True, True, False],
        [True, False, False],
    ]
    assert groups.row_pairs.tolist() == [[0, 1], [3, 2], [3, 4], [6, 5]]


def settings(**changes):
    optimizer = OptimizerSettings(learning_rate=1e-3)
    return RewardSettings(data="x", optimizer=optimizer, **changes)


def test_a_batch_holds_whole_rankings_with_all_their_pairs():
    texts, groups = encode.encode_preferences(rankings(), TOKENIZER, max_length=8)
    data = RewardData(texts=texts, groups=groups)
    assert data.num_rows == 9
    seen = []
    for step in range(3):  # an epoch: a ranking a step
        rows, pairs, valid, margins = data.batch(0, step, settings(batch_size=3 * 2))
        assert margins is None
        assert rows.shape == (6,) and pairs.shape == (6, 2) and valid.shape == (6,)
        assert (pairs[:3] < 3).all() and (pairs[3:][valid[3:]] >= 3).all()
        seen += rows[pairs[valid]].tolist()
    assert sorted(seen) == sorted(2 * [[0, 1], [3, 2], [3, 4], [6, 5]])


def test_accuracy_counts_every_pair_of_every_ranking():
    texts, groups = encode.encode_preferences(rankings(), TOKENIZER, max_length=8)
    # Pairs of rows (0, 1), (3, 2), (3, 4), (6, 5): right, wrong, right, tied.
    scores = np.array([1.0, 0.0, 5.0, 4.0, 3.0, 2.0, 2.0])
    metrics = RewardData(texts=texts, groups=groups).accuracy(scores, 0)
    name = "reward_model/validation_"
    assert metrics == {f"{name}accuracy": 2.5 / 4, f"{name}pairs": 4}


def test_a_split_leaves_the_rankings_of_a_prompt_together(tmp_path):
    words = ["Hi", "Ho", "Yes", "No", "user", "system", "Hi Ho", "Ho Hi", "Yes Yes", "No No"]
    rows = [
        {"prompt": prompt, "responses": [better, "Ho", "user"]}
        for prompt in words
        for better in ("Yes", "No")
    ]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    named = settings(validation_fraction=0.4, batch_size=6)
    named = RewardSettings(**{**vars(named), "data": str(tmp_path / "pairs.jsonl")})
    parts = reward_data(named, 0, TOKENIZER, 32)
    prompts = [
        {
            TOKENIZER.decode(row[row_mask & ~learned])
            for row, row_mask, learned in zip(
                part.texts.tokens, part.texts.mask, part.texts.loss_mask, strict=True
            )
        }
        for part in parts
    ]
    assert prompts[0] | prompts[1] == set(words) and not prompts[0] & prompts[1]
    assert sum(len(part.groups.rows) for part in parts) == 20
    assert [part.groups.rows.shape[1] for part in parts] == [3, 3]


def test_the_file_that_leaves_nothing_to_use_is_named(tmp_path):
    good, tied = ({"prompt": "Hi", "chosen": "Yes", "rejected": x} for x in ("No", "Yes"))
    write_jsonl(tmp_path / "good.jsonl", [good])
    write_jsonl(tmp_path / "tied.jsonl", [tied])
    files = {"data": str(tmp_path / "good.jsonl"), "validation_data": str(tmp_path / "tied.jsonl")}
    named = RewardSettings(**{**vars(settings()), **files})
    message = r"^reward\.validation_data: .*tied\.jsonl: none of the 1 records can be used: 1 tied$"
    with pytest.raises(ValueError, match=message):
        reward_data(named, 0, TOKENIZER, 32)


@pytest.mark.parametrize(
    ("changes", "context", "message"),
    [
        ({"max_length": 2}, 32, r"^reward\.data: .*1 too long \(over 2 tokens\), .*reward.max_len"),
        ({}, 2, r"^reward\.data, held out: .*1 too long .* has 3; see the model's context$"),
    ],
)
def test_the_limit_that_leaves_nothing_to_use_is_named(tmp_path, changes, context, message):
    path = tmp_path / "good.jsonl"
    write_jsonl(path, [{"prompt": x, "chosen": "Yes", "rejected": "No"} for x in ("Hi", "Ho")])
    changed = {**vars(settings()), **changes, "data": str(path), "validation_fraction": 0.4}
    with pytest.raises(ValueError, match=message):
        reward_data(RewardSettings(**changed), 2, TOKENIZER, context)


@pytest.mark.parametrize("batch_size", [3, 9])
def test_a_batch_holds_whole_rankings_whether_its_size_is_even_or_odd(batch_size):
    texts, groups = encode.encode_preferences(rankings(), TOKENIZER, max_length=8)
    data, chosen = RewardData(texts=texts, groups=groups), settings(batch_size=batch_size)
    check_rankings(chosen, data)
    rows, pairs, valid, _ = data.batch(0, 0, chosen)
    assert rows.shape == (batch_size,) and len(pairs) == len(valid) == batch_size
    message = (
        "reward.batch_size must be a multiple of 3, the most responses to a prompt of x, got 8"
    )
    with pytest.raises(ValueError, match=message):
        check_rankings(settings(batch_size=8), data)


def test_what_is_held_out_shares_no_conversation_with_the_training(tmp_path):
    """hh-rlhf has a row for each turn of a conversation: prompts that begin alike."""
    lines = []
    for i in range(40):
        talk = f"\n\nHuman: question {i}"
        for turn in range(3):
            talk += f"\n\nAssistant: {turn}"
            lines.append({"chosen": talk + " good", "rejected": talk + " bad"})
            talk += f"\n\nHuman: and {turn}?"
    path = tmp_path / "pairs.jsonl"
    write_jsonl(path, lines)
    optimizer = OptimizerSettings(learning_rate=1e-3)
    settings = RewardSettings(data=str(path), optimizer=optimizer, validation_fraction=0.3)
    tokenizer = train_tokenizer([line["chosen"] for line in lines], 300)
    parts = reward_data(settings, 0, tokenizer, context=512)
    read = [tokenizer.batch_decode(part.texts.tokens) for part in parts]
    first = [{text.split("\n\nAssistant")[0] for text in texts} for texts in read]
    assert first[0].isdisjoint(first[1]) and len(first[0] | first[1]) == 40
    assert sum(map(len, read)) == 240 and 40 < len(read[1]) < 120


def test_a_conversation_is_known_by_its_first_turn(tmp_path):
    long = [*turns("Hi", "Yes", "Ho"), {"role": "assistant", "content": "No"}]
    other = [*long[:-1], {"role": "assistant", "content": "Yes"}]
    talk = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    rows = [
        {"prompt": HI, "chosen": YES, "rejected": NO},
        {"chosen": long, "rejected": other},
        {"prompt": "Ho", "chosen": "Yes", "rejected": "No"},
        {"prompt": "", "chosen": "Yes", "rejected": "No"},
        {"prompt": talk, "responses": ["x", "y"]},
    ]
    known = [record.conversation for record in loaded(tmp_path, *rows)]
    assert known == ["Hi", "Hi", "Ho", "Yes", "\n\nHuman: a"]


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_transcript_that_ends_with_the_human_is_left_out_and_counted(tmp_path, side):
    start = "\n\nHuman: Hi\n\nAssistant:"
    good = {"chosen": f"{start} Yes", "rejected": f"{start} No"}
    bad = good | {side: f"{start} Ho\n\nHuman: Ho"}
    answered = good | {side: f"{start} Ho\n\nHuman: Ho\n\nAssistant: Ho"}
    prompted = {"prompt": start, "chosen": " Yes", "rejected": " No"}
    prompted[side] += "\n\nHuman: Ho"
    reason = "ends with a turn of the human's"
    records = loaded(tmp_path, good, bad, answered, prompted)
    assert [record.reject_reason for record in records] == ["", reason, "", reason]
    with pytest.raises(ValueError, match=f"none of the 1 records can be used: 1 {reason}"):
        encode.encode_preferences(records[1:2], TOKENIZER, max_length=99)


def test_rows_of_ultrafeedback_are_read_with_their_other_keys(tmp_path):
    """As HuggingFaceH4/ultrafeedback_binarized has them: whole conversations, and much beside."""
    messages = {"chosen": HI + YES, "rejected": HI + NO}
    row = {"prompt": "Hi", "prompt_id": "8f", **messages, "messages": HI + YES}
    row |= {"score_chosen": 8.5, "score_rejected": 7.0}
    (record,) = loaded(tmp_path, row)
    (same,) = loaded(tmp_path, {"prompt": HI, "chosen": YES, "rejected": NO})
    assert record == same and record.conversation == "Hi"
