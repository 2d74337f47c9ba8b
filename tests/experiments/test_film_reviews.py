"""What judges and test prompts are made of has no part in the training. Real texts (2.5 MB)."""

import collections
import string

import film_reviews
import jax
import numpy as np
import pytest
from film_reviews import scorers
from film_reviews.data import PARTS as SHARES
from film_reviews.data import PROMPT_WORDS
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ppo_jax.data.encode import encode_texts
from ppo_jax.io.stage_folder import Model
from ppo_jax.models.build import policy_network, trunk_network
from ppo_jax.models.partition import split_params
from tests.support import tiny
from tests.support.run_files import read_jsonl

PARTS = ("train", "judge", "test", "validation")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """{file: rows} of everything that the task writes."""
    folder = tmp_path_factory.mktemp("data")
    film_reviews.prepare(folder)
    return {path.stem: read_jsonl(path) for path in folder.iterdir()}


def normalised(rows, key="text"):
    return [" ".join(row[key].casefold().split()) for row in rows]


def test_the_files_are_those_that_the_configs_name(data):
    ratings = [f"{part}_ratings" for part in PARTS]
    names = ["sft", "prompts", "test_prompts", "validation_prompts", "vocabulary", *ratings]
    assert sorted(data) == sorted(names)


def test_no_text_is_in_two_parts_or_twice_in_one(data):
    texts = [text for part in PARTS for text in normalised(data[f"{part}_ratings"])]
    twice = [text for text, count in collections.Counter(texts).items() if count > 1]
    assert not twice


def test_fine_tuning_reads_the_texts_of_the_training_part_alone(data):
    assert set(normalised(data["sft"])) <= set(normalised(data["train_ratings"]))


def test_prompts_of_unseen_parts_begin_no_training_text_and_are_their_own(data):
    training, test, validation = (
        set(normalised(data[name], "prompt"))
        for name in ("prompts", "test_prompts", "validation_prompts")
    )
    assert not training & test and not training & validation and not test & validation
    words = PROMPT_WORDS
    begins = {" ".join(text.split()[:words]) for text in normalised(data["sft"])}
    assert not begins & (test | validation)


@pytest.mark.parametrize("part", ["train", "test", "validation"])
def test_a_prompt_is_how_a_text_of_its_part_begins(data, part):
    words = PROMPT_WORDS
    begins = {" ".join(row["text"].split()[:words]) for row in data[f"{part}_ratings"]}
    found = [row["prompt"] for row in data["prompts" if part == "train" else f"{part}_prompts"]]
    assert set(found) <= begins
    assert len(found) == len(set(found))
    assert {len(prompt.split()) for prompt in found} == {words}


def test_there_is_enough_of_everything(data):
    sizes = {name: len(rows) for name, rows in data.items()}
    assert sum(sizes[f"{part}_ratings"] for part in PARTS) > 10_000
    total = sum(sizes[f"{part}_ratings"] for part in PARTS)
    for part, share in SHARES.items():
        assert abs(sizes[f"{part}_ratings"] / total - share) < 0.02
    assert 3_000 < sizes["sft"] <= sizes["train_ratings"]
    assert sizes["prompts"] > 3_000
    assert min(sizes["test_prompts"], sizes["validation_prompts"]) > 800


def test_every_text_has_many_human_ratings_between_minus_four_and_four(data):
    for part in PARTS:
        ratings = [row["ratings"] for row in data[f"{part}_ratings"]]
        assert min(map(len, ratings)) >= 10
        assert all(-4 <= rating <= 4 for row in ratings for rating in row)


def test_the_parts_are_the_same_every_time(data, tmp_path):
    film_reviews.prepare(tmp_path)
    assert {path.stem: read_jsonl(path) for path in tmp_path.iterdir()} == data


def test_the_test_prompts_are_shuffled(data):
    """The first 256 stand for all of them: they do not all begin with the same letter."""
    first = {row["prompt"][0].casefold() for row in data["test_prompts"][:256]}
    assert len(first) > 10


# --- the gold judge -------------------------------------------------------------------------------


def letters():
    """A tokenizer of small letters, with an EOS and no BOS."""
    vocabulary = {"</s>": 1} | {letter: 5 + i for i, letter in enumerate(string.ascii_lowercase)}
    backend = Tokenizer(models.BPE(vocabulary, []))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(scorers, "JUDGE_LAYER", 1)
    config = tiny.model_config()
    params = tiny.random_params(policy_network(config))
    params = jax.tree.map(np.asarray, params)
    return Model(kind="policy", config=config, params=params, tokenizer=letters())


def test_hidden_features_are_the_mean_and_the_last_state_of_the_judges_layer(model):
    """Whatever the other texts are: 35 of them, in two batches of several lengths."""
    texts = ["a" * (1 + n % 9) + "bcd" * (n % 4) for n in range(35)]
    got = scorers.hidden_features(model, scorers.make_trunk(model), texts)
    trunk = trunk_network(model.config, end_layer=1)
    params = split_params(model.config, model.params, 1, 1).trunk
    for text, features in zip(texts[::12], got[::12], strict=True):
        row = encode_texts([text], model.tokenizer, max_length=32)
        tokens, mask = (x[:, : row.mask.sum()] for x in (row.tokens, row.mask))
        states = np.asarray(jax.jit(trunk.apply)(params, tokens, mask))[0]
        expected = np.concatenate([states.mean(axis=0), states[-1]])
        np.testing.assert_allclose(features, expected, atol=1e-5)


def test_the_gold_judge_learns_what_its_ratings_say_and_keeps_the_features(
    model, tmp_path, monkeypatch
):
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdef"), size=8)) for _ in range(200)]
    ratings = np.array([text.count("a") - text.count("b") for text in texts], float)
    asked = []
    features = scorers.hidden_features
    monkeypatch.setattr(
        scorers, "hidden_features", lambda *x: asked.append(len(x[2])) or features(*x)
    )
    how = dict(rated=texts[150:175], folder=tmp_path / "judge")
    judge = scorers.gold_judge(model, texts[:150], ratings[:150], **how)
    first = judge(texts[150:])
    assert np.corrcoef(first, ratings[150:])[0, 1] > 0.8
    assert asked == [175, 25]  # those of the folder, and those that nobody knew of
    again = scorers.gold_judge(model, texts[:150], ratings[:150], **how)
    np.testing.assert_array_equal(again(texts[150:]), first)
    assert asked == [175, 25, 25]


# --- the verifiable task --------------------------------------------------------------------------


def test_speaking_of_the_acting_is_what_is_rewarded():
    responses = ["the ACTING is fine", "an actor's film", "actors", "the casting", "broadcast", ""]
    assert film_reviews.mentions_acting([""] * 6, responses) == [1, 1, 1, 0, 0, 0]
    assert film_reviews.mentions_acting(["great acting"], ["and plot"]) == [0]
