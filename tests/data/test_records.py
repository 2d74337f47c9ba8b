"""Readers of JSON lines name file and line of every mistake; splits share no text."""

import json
from dataclasses import asdict

import pytest

from ppo_jax.data import records as data
from ppo_jax.data.preferences import RankedResponses, load_preferences
from ppo_jax.data.records import Demonstration, RatedText
from tests.support.run_files import read_jsonl


def written(tmp_path, *lines):
    path = tmp_path / "some.jsonl"
    path.write_bytes("".join(line + "\n" for line in lines).encode())
    return path


def test_each_reader_reads_its_forms(tmp_path):
    path = written(tmp_path, '{"text": "a b"}', "", '{"prompt": "p", "completion": " c"}')
    text, completion = data.load_texts(path)
    assert text == Demonstration((("a b", True),)) and text.text == "a b"
    assert completion == Demonstration((("p", False), (" c", True)))
    assert completion.text == "p c"
    path = written(tmp_path, '{"prompt": "", "chosen": "x", "rejected": "y"}')
    assert load_preferences(path) == [RankedResponses("", ("x", "y"), (1.0, 0.0))]
    path = written(tmp_path, '{"text": "x", "ratings": [1, -2.5]}', '{"text": "y", "rating": 3}')
    assert data.load_ratings(path) == [RatedText("x", (1.0, -2.5)), RatedText("y", (3.0,))]
    assert data.load_ratings(path)[0].mean == -0.75
    path = written(tmp_path, '{"prompt": "one"}', '{"prompt": ""}')
    assert data.load_prompts(path) == ["one", ""]


def test_what_is_written_is_read_again(tmp_path):
    records = [RatedText("é\u2028\n“x”", (1.0, 0.1)), RatedText("y", (-4.0,))]
    path = tmp_path / "new" / "ratings.jsonl"
    data.write_jsonl(path, [{"text": "old", "rating": 0}])
    data.write_jsonl(path, map(asdict, records))
    assert data.load_ratings(path) == records
    assert [file.name for file in path.parent.iterdir()] == ["ratings.jsonl"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    data.write_jsonl(path, [{"a": 1}])
    with pytest.raises(ValueError):
        data.write_jsonl(path, [{"a": 2}, {"a": float("nan")}])
    assert read_jsonl(path) == [{"a": 1}]


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}')
    assert data.load_prompts(path) == ["a", "b"]


def test_a_missing_and_an_empty_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match="none.jsonl: there is no such file"):
        data.load_prompts(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="some.jsonl: the file is empty"):
        data.load_prompts(written(tmp_path, "", "  "))


GOOD = {
    data.load_texts: {"text": "good"},
    load_preferences: {"prompt": "p", "chosen": "c", "rejected": "r"},
    data.load_ratings: {"text": "good", "ratings": [1]},
    data.load_prompts: {"prompt": "p"},
}


@pytest.mark.parametrize(
    ("load", "line", "message"),
    [
        (data.load_texts, '{"text": "half', "not a JSON object"),
        (data.load_texts, "[" * 100_000, "not a JSON object"),
        (data.load_texts, '["text"]', "must be a JSON object"),
        (data.load_texts, '{"text": "a", "text": "b"}', "a key is repeated"),
        (
            data.load_texts,
            "{}",
            r"must be \['text'\] or \['prompt', 'completion'\] or \['messages'\], got",
        ),
        (data.load_texts, '{"body": "a", "source": 1}', r"got \['body', 'source'\]"),
        (data.load_texts, '{"prompt": "b"}', "the keys must be"),
        (data.load_texts, '{"text": 7}', "text must be a string, got 7"),
        (data.load_texts, '{"text": "\\ud800"}', "text must be valid Unicode"),
        (
            data.load_texts,
            '{"prompt": "a", "completion": 3}',
            "completion must be a string",
        ),
        (load_preferences, '{"chosen": "a", "rejected": "b"}', "without a prompt"),
        (load_preferences, '{"prompt": null, "chosen": "a", "rejected": "b"}', "a string"),
        (data.load_ratings, '{"text": "a", "ratings": []}', "ratings must be a list"),
        (data.load_ratings, '{"text": "a", "ratings": 1}', "ratings must be a list"),
        (data.load_ratings, '{"text": "a", "ratings": [1, NaN]}', "finite number.*got nan"),
        (data.load_ratings, '{"text": "a", "rating": -Infinity}', "finite number.*got -inf"),
        (data.load_ratings, '{"text": "a", "rating": 1e999}', "finite number.*got inf"),
        (data.load_ratings, '{"text": "a", "rating": 1%s}' % ("0" * 400), "finite number"),
        (data.load_ratings, '{"text": "a", "rating": true}', "finite number.*got True"),
        (data.load_ratings, '{"text": "a", "rating": "5"}', "finite number.*got '5'"),
        (data.load_prompts, '{"prompt": ["a"]}', r"prompt\[0\] must have role and content"),
        (
            data.load_prompts,
            '{"text": "a"}',
            r"must be \['prompt'\] or \['messages'\], got \['text'\]",
        ),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_number(tmp_path, load, line, message):
    path = written(tmp_path, json.dumps(GOOD[load]), "", line)
    with pytest.raises(ValueError, match=rf"(?s)some\.jsonl:3: .*{message}"):
        load(path)


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xe9"}\n')
    with pytest.raises(ValueError, match="latin.jsonl:2: not a JSON object"):
        data.load_prompts(path)


def texts(numbers):
    return [RatedText(f"Text {number}", (float(number),)) for number in numbers]


SHARES = {"train": 0.7, "unused": 0.0, "test": 0.3}


def test_splits_are_disjoint_whole_and_near_their_shares():
    records = texts(range(2000))
    splits = data.split_by_text(records, SHARES, seed=0)
    assert sorted(sum(splits.values(), []), key=lambda r: r.mean) == records
    assert len(set(splits["train"]) & set(splits["test"])) == 0
    # Four standard deviations of a binomial: 4 sqrt(2000 x 0.7 x 0.3) = 82.
    assert abs(len(splits["train"]) - 1400) < 82
    assert splits["unused"] == []


def test_adding_records_moves_none_of_the_others():
    few = data.split_by_text(texts(range(0, 200, 2)), SHARES, seed=1)
    many = data.split_by_text(texts(reversed(range(200))), SHARES, seed=1)
    assert all(set(few[name]) <= set(many[name]) for name in SHARES)
    other_seed = data.split_by_text(texts(range(0, 200, 2)), SHARES, seed=2)
    assert other_seed != few


def test_texts_that_differ_in_case_and_spacing_are_one_text():
    records = texts(range(50)) + [RatedText(f" TEXT\t{n}\n", (-1.0,)) for n in range(50)]
    splits = data.split_by_text(records, SHARES, seed=0)
    assert sorted(sum(splits.values(), []), key=lambda r: r.mean) == records[:50]


def test_preferences_over_one_prompt_stay_together_and_all_are_kept():
    records = [RankedResponses(f"p{n // 3}", (f"c{n}", "r"), (1.0, 0.0)) for n in range(90)]
    splits = data.split_by_text(
        records, SHARES, seed=0, key=lambda record: record.prompt, duplicates="keep"
    )
    prompts = [{record.prompt for record in splits[name]} for name in SHARES]
    assert sum(map(len, splits.values())) == 90
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 30


def test_shares_that_do_not_sum_to_one_are_refused():
    for fractions in ({"a": 0.5}, {"a": 1.5, "b": -0.5}, {"a": float("nan")}, {}):
        with pytest.raises(ValueError, match="fractions must not be negative and sum to 1"):
            data.split_by_text(texts(range(3)), fractions, seed=0)
    with pytest.raises(ValueError, match="duplicates must be 'drop' or 'keep', got 'all'"):
        data.split_by_text(texts(range(3)), {"a": 1.0}, seed=0, duplicates="all")


@pytest.mark.parametrize(
    ("record", "reject_reason"),
    [
        (Demonstration((("p", False), (" c", True))), ""),
        (Demonstration((("p", False), (" \n", True))), "blank"),
        (Demonstration(()), "blank"),
        (RatedText("\t", (1.0,)), "blank"),
        (RankedResponses("", ("a", "b"), (1.0, 0.0)), ""),
        (RankedResponses("p", ("a", " "), (1.0, 0.0)), "blank"),
        (RankedResponses("p", ("a", "b"), (2.0, 2.0)), "tied"),
        (RankedResponses("p", ("a", "a"), (1.0, 0.0)), "tied"),
    ],
)
def test_a_record_says_why_nothing_can_be_learned_from_it(record, reject_reason):
    assert record.reject_reason == reject_reason
