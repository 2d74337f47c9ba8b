"""The examples of a dry run show what is learned, and the lines on data what became of it."""

import re

import pytest

from ppo_jax.config.run import from_config_dict
from ppo_jax.data import encode, packing
from ppo_jax.data.chat import Chat
from ppo_jax.data.comparisons import RewardData
from ppo_jax.data.encode import TokenRow
from ppo_jax.data.preferences import RankedResponses
from ppo_jax.data.prompts import PromptData, prompt_data
from ppo_jax.data.records import Demonstration, write_jsonl
from ppo_jax.io.model_spec import ModelSpec
from ppo_jax.pipeline import preview
from ppo_jax.pipeline import preview as accounts
from ppo_jax.training.ppo import read_ppo
from tests.support import tiny
from tests.support.chats import TOKENIZER, ids, turns
from tests.support.tiny_config import changed

TWO_CHATS = """\
sft: the loss is on what is ⟦marked⟧
  text 1: 23 tokens, 4 marked
    | <|im_start|>user
    | Hi<|im_end|>
    | <|im_start|>assistant
    | ⟦Yes<|im_end|>⟧
    | <|im_start|>user
    | Ho<|im_end|>
    | <|im_start|>assistant
    | ⟦No<|im_end|>⟧
    ids 1 8 5 10 2 5 1 9 ... 11 2 5 1 9 5 13 2
  text 2: 3 tokens, 2 marked
    | Ho⟦Hi<|im_end|>⟧
    ids 11 10 2"""

RANKED = """\
reward: the score of a response, ⟦marked⟧, is read at its last token
  prompt 1, response 1, better than 3: 3 tokens, 2 marked
    | Hi⟦Yes<|im_end|>⟧
    ids 10 12 2
  prompt 1, response 2, better than 1, 3: 3 tokens, 2 marked
    | Hi⟦No<|im_end|>⟧
    ids 10 13 2
  prompt 1, response 3: 3 tokens, 2 marked
    | Hi⟦Ho<|im_end|>⟧
    ids 10 11 2
  prompt 2, response 1, better than 2: 3 tokens, 2 marked
    | Ho⟦Yes<|im_end|>⟧
    ids 11 12 2
  prompt 2, response 2: 3 tokens, 2 marked
    | Ho⟦No<|im_end|>⟧
    ids 11 13 2"""


def chats():
    several = Demonstration(Chat(TOKENIZER).parts(turns("Hi", "Yes", "Ho", "No"), "a:1"))
    completion = Demonstration((("Ho", False), ("Hi", True)))
    others = [Demonstration(((word, True),)) for word in ("Hi Ho", "Ho Hi")]
    records = [several, completion, *others]
    return encode.encode_demonstrations(records, TOKENIZER, max_length=64)


def test_the_learned_tokens_of_texts_are_marked():
    # 23 tokens: two turns of the user of 6, two openings of 3, two answers of 2, a line break.
    assert preview.sft_preview(chats(), TOKENIZER, preview.brackets) == TWO_CHATS


def test_packed_texts_are_shown_one_by_one():
    single, packed = chats(), packing.pack(chats(), max_length=64)
    assert len(packed.mask) == 1

    def rows(texts):
        return sorted((row.ids, row.in_loss) for row in preview.text_rows(texts))

    assert rows(packed) == rows(single) and len(rows(packed)) == 4


def test_all_responses_of_a_ranking_are_shown_in_their_order():
    rankings = [
        RankedResponses("Hi", ("Yes", "No", "Ho"), (1.0, 2.0, 0.0)),
        RankedResponses("Ho", ("Yes", "No"), (1.0, 0.0)),
        RankedResponses("Yes", ("Yes", "No"), (1.0, 0.0)),
    ]
    texts, groups = encode.encode_preferences(rankings, TOKENIZER, max_length=8)
    data = RewardData(texts=texts, groups=groups)
    assert preview.reward_preview(data, TOKENIZER, preview.brackets) == RANKED


def test_the_margin_of_a_pair_is_shown():
    ranking = RankedResponses("Hi", ("Yes", "No"), (1.0, 0.0), margin=0.5)
    texts, groups = encode.encode_preferences([ranking], TOKENIZER, max_length=8)
    shown = preview.reward_preview(
        RewardData(texts=texts, groups=groups), TOKENIZER, preview.brackets
    )
    assert "response 1, better than 2 by a margin of 0.5: " in shown


def test_rated_texts_are_shown_with_their_ratings():
    texts = encode.encode_texts(["Hi", "Ho", "No"], TOKENIZER, max_length=8)
    data = RewardData(texts=texts, ratings=[(1.0, -0.5), (2.0,), (3.0,)])
    shown = preview.reward_preview(data, TOKENIZER, preview.brackets).split("\n")
    assert shown[1:4] == ["  rated 1, -0.5: 2 tokens", "    | Hi<|im_end|>", "    ids 10 2"]
    assert shown[4] == "  rated 2: 2 tokens" and len(shown) == 7


def test_a_prompt_ends_where_the_response_begins(tmp_path):
    write_jsonl(
        tmp_path / "prompts.jsonl", [{"prompt": turns("Hi"), "a": 4}, {"prompt": "Ho", "a": "\n"}]
    )
    data = prompt_data(tmp_path / "prompts.jsonl", TOKENIZER, max_length=16)
    assert preview.prompt_preview("ppo", data, TOKENIZER, preview.brackets) == (
        "ppo: the response begins at ⟦...⟧\n"
        "  prompt 1: 9 tokens\n"
        "    | <|im_start|>user\n"
        "    | Hi<|im_end|>\n"
        "    | <|im_start|>assistant\n"
        "    | ⟦...⟧\n"
        "    ids 1 8 5 10 2 5 1 9 5\n"
        "    a: 4\n"
        "  prompt 2: 1 token\n"
        "    | Ho⟦...⟧\n"
        "    ids 11\n"
        "    a: '\\n'"
    )


def test_colours_begin_and_end_on_every_line():
    assert preview.colours("a\nb") == "\033[30;42ma\033[0m\n\033[30;42mb\033[0m"


def test_long_stretches_lose_their_middle_and_never_the_mark():
    words = ids("Hi, ") * preview.LONGEST + ids("Yes, ") * preview.LONGEST
    row = TokenRow(words, [False] * (len(words) // 2) + [True] * (len(words) // 2))
    text = preview.marked_text(row, TOKENIZER, preview.brackets)
    first, marked = re.fullmatch(r"(.*)⟦(.*)⟧", text).groups()
    half = preview.LONGEST // 2
    assert first == f"{('Hi ' * half)[:half]} [... 2,000 characters ...] {('Hi ' * half)[-half:]}"
    assert len(marked) < preview.LONGEST + 50


def test_what_would_move_the_cursor_is_spelt_out():
    assert preview.printable("é\t\033[2J\r\n ⟦") == "é\\t\\x1b[2J\\r\n ⟦"


# --- lines on data --------------------------------------------------------------------------------


def encoded(num_records, num_long, tokenizer=TOKENIZER):
    records = [Demonstration(((" ".join(["Hi"] * n), True),)) for n in range(1, num_records + 1)]
    long = [Demonstration((("Ho " * (200 + n), True),)) for n in range(num_long)]
    return encode.encode_demonstrations(records + long, tokenizer, max_length=100)


def settings(**fields):
    return from_config_dict(changed({"sft.max_length": 100, **fields}))


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The files that `settings` names, of which some rows have more than their schema."""
    monkeypatch.chdir(tmp_path)
    rows = {
        "texts.jsonl": [{"text": "a"}],
        "unseen.jsonl": [{"text": "a", "id": 1}],
        "neutral.jsonl": [{"text": "a"}, {"text": "b", "id": 1}],
        "pairs.jsonl": [{"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 1}],
        "prompts.jsonl": [{"prompt": "a", "id": 1, "answer": 2}],
        "test.jsonl": [{"prompt": "a", "answer": 2}],
        "ratings.jsonl": [{"text": "a", "rating": 1}],
    }
    for name, lines in rows.items():
        write_jsonl(tmp_path / name, lines)


@pytest.mark.usefixtures("files")
def test_one_file_has_one_line_and_two_have_two():
    parts = encoded(5, 2), encoded(3, 1)
    assert accounts.data_lines(settings(), {"sft": parts}) == [
        "sft.data: texts.jsonl: 11 read, 3 too long (over 100 tokens); 8 used, 5 to train and 3 to "
        "validate"
    ]
    config = settings(**{"sft.validation_data": "unseen.jsonl"})
    assert accounts.data_lines(config, {"sft": parts}) == [
        "sft.data: texts.jsonl: 7 read, 2 too long (over 100 tokens); 5 used",
        "sft.validation_data: unseen.jsonl: 4 read, 1 too long (over 100 tokens); "
        "columns not read: id; 3 used",
    ]


@pytest.mark.usefixtures("files")
def test_packed_texts_are_counted_as_texts():
    parts = tuple(packing.pack(part, max_length=100) for part in (encoded(5, 2), encoded(3, 1)))
    line, packed = accounts.data_lines(settings(**{"sft.packing": True}), {"sft": parts})
    assert line.endswith("8 used, 5 to train and 3 to validate")
    assert packed == "sft: packed 5 texts in 1 rows, 5.0 a row, 100% full"


@pytest.mark.usefixtures("files")
def test_every_file_that_is_read_has_its_line():
    rankings = [RankedResponses("Hi", ("Yes", "No", "Ho"), (1.0, 2.0, 0.0))]
    texts, groups = encode.encode_preferences(rankings, TOKENIZER, max_length=8)
    part = RewardData(texts=texts, groups=groups)
    nothing = encode.pad_prompts([[1]], 1)
    parts = dict(texts=["a"] * 3, prompts=nothing, dropped={"repeated": 1})
    with_answers = PromptData(**parts, columns={"answer": [2] * 3})
    config = settings(
        **{"reward.reference_data": "neutral.jsonl", "evaluate.ratings": "ratings.jsonl"}
    )
    data = {
        "reward": (part, part, encoded(2, 0)),
        "ppo": with_answers,
        "evaluate": (PromptData(**parts), [None] * 7),
    }
    assert accounts.data_lines(config, data) == [
        "reward.data: pairs.jsonl: 2 read; columns not read: score_chosen; 2 used, "
        "1 to train and 1 to validate",
        "reward: 3 comparisons to train on, among up to 3 responses to a prompt",
        "reward.reference_data: neutral.jsonl: 2 read; columns not read: id (in 1 of 2 rows); "
        "2 used",
        "ppo.prompts: prompts.jsonl: 4 read, 1 repeated; columns kept: answer; columns not read: "
        "id; 3 used",
        "evaluate.prompts: test.jsonl: 4 read, 1 repeated; columns not read: answer; 3 used",
        "evaluate.ratings: ratings.jsonl: 7 read; 7 used",
    ]


def test_a_column_of_safety_is_kept_where_the_rule_of_the_rewards_reads_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "Hi", "is_safety": True}, {"prompt": "Ho", "is_safety": False}]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    spec = ModelSpec(kind="policy", config=tiny.model_config(), tokenizer=TOKENIZER)
    for rule, told in (("threshold", "kept"), ("mean", "not read")):
        config = settings(**{"ppo.other_reward_models": ["a"], "ppo.reward_rule": rule})
        (line,) = accounts.data_lines(config, {"ppo": read_ppo(config, spec)})
        assert line == f"ppo.prompts: prompts.jsonl: 2 read; columns {told}: is_safety; 2 used"
