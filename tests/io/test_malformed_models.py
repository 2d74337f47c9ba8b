"""Model folders with one file changed at random: a model, or one line that names what is wrong."""

import json
import os
import random
import shutil

import pytest

from ppo_jax.cli import raised_by_us
from ppo_jax.config.run import ModelSettings
from ppo_jax.inference.generate import find_sampling
from ppo_jax.io.model_spec import read_shape
from ppo_jax.io.stage_folder import load_model
from tests.support.gguf_files import random_model, small_tokenizer

VALUES = [None, [], {}, "", "x", -1, 0, 1.5, True, 10**30, 1e308, float("nan"), [[]], {"a": 1}]
VALUES += [["a"], [0, 0], "\ud800", "../../etc/passwd", "é" * 500, float("inf")]
CONTENTS = [b"", b"null", b"[]", b"3", b"{}", b"[" * 60_000, b'{"a":' * 60_000, b"\xff\xfe", b"\0"]
FILES = {  # how often each is changed
    "config.json": 6,
    "tokenizer.json": 6,
    "tokenizer_config.json": 6,
    "generation_config.json": 3,
    "model.safetensors.index.json": 3,
    "special_tokens_map.json": 2,
    "model-00002-of-00006.safetensors": 4,
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A small Llama with all the files that a folder may have."""
    folder = tmp_path_factory.mktemp("good")
    tokenizer = small_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    random_model("llama-tied").save_pretrained(folder, max_shard_size="60KB")
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0]}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    assert set(FILES) <= set(os.listdir(folder))
    return folder


def places(value, path=()):
    """The paths of all values of a JSON file, the first of long lists and objects."""
    yield path
    if isinstance(value, dict):
        for key in list(value)[:40]:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for i in range(min(len(value), 6)):
            yield from places(value[i], (*path, i))


def other_value(draw, content):
    """JSON with one of its values replaced or removed."""
    root = {"": json.loads(content)}
    path = ("", *draw.choice(list(places(root[""]))))
    parent = root
    for key in path[:-1]:
        parent = parent[key]
    if draw.random() < 0.2 and len(path) > 1:
        del parent[path[-1]]
    else:
        parent[path[-1]] = draw.choice(VALUES)
    return json.dumps(root[""]).encode()


def other_bytes(draw, content):
    """A file cut short, replaced, or with a few bytes changed."""
    kind = draw.random()
    if kind < 0.25:
        return content[: draw.randrange(len(content))]
    if kind < 0.4:
        return draw.choice(CONTENTS)
    damaged = bytearray(content)
    end = min(len(content), draw.choice([200, 2000, len(content)]))
    for _ in range(draw.choice([1, 1, 3, 10])):
        damaged[draw.randrange(end)] = draw.randrange(256)
    return bytes(damaged)


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_folder_loads_or_is_told_in_one_line(good, tmp_path, seed):
    draw = random.Random(seed)
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    name = draw.choices(list(FILES), list(FILES.values()))[0]
    change = other_value if name.endswith(".json") and draw.random() < 0.7 else other_bytes
    (folder / name).write_bytes(change(draw, (good / name).read_bytes()))

    def load():
        tokenizer = load_model(folder).tokenizer
        find_sampling(str(folder), tokenizer)
        tokenizer.decode(tokenizer("A film <|endoftext|> is é\n good.")["input_ids"])

    for read in (load, lambda: read_shape(folder, ModelSettings(path=str(folder)))):
        try:
            read()
        except ValueError as error:
            message = str(error)
            assert message.startswith(str(folder)) and len(message.splitlines()) == 1, message
            assert raised_by_us(error) and len(message) < 1000
