"""GGUF files: the models and tokenizers that they hold, and what is wrong with the others."""

import itertools
import json
import random
import re

import gguf
import numpy as np
import pytest

from ppo_jax.io import hub
from ppo_jax.io import huggingface as hf
from ppo_jax.io.gguf.architectures import ARCHITECTURES, places_of
from ppo_jax.io.gguf.convert import (
    convert_gguf,
    find_place,
    read_metadata,
    rope_scaling,
)
from ppo_jax.io.gguf.tokenizer import build_tokenizer
from ppo_jax.io.tokenizers import load_tokenizer
from tests.support.gguf_files import (
    bpe_metadata,
    random_model,
    refused,
    small_tokenizer,
    write_gguf,
)
from tests.support.tiny_hf import LLAMA3_ROPE, torch

KIND = gguf.GGUFValueType


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PPO_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="module")
def llama():
    return random_model("llama")


def test_a_file_gives_the_tokens_of_its_tokenizer(llama, tokenizer, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", llama, tokenizer)
    hf.load_policy(path)
    again = load_tokenizer(path)
    assert again.eos_token == "<|endoftext|>" and again.get_vocab() == tokenizer.get_vocab()
    text = "It isn't 1999, but a film.<|endoftext|> \n"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert len(list(hub.cache_dir().iterdir())) == 1  # the tokenizer came from the same folder


def test_a_head_that_repeats_the_embedding_is_tied(tokenizer, tmp_path):
    """As llama.cpp converts GPT-2."""
    model = random_model("gpt2")
    model.config.tie_word_embeddings = False  # so that the head is written
    config, params = hf.load_policy(write_gguf(tmp_path / "tiny.gguf", model, tokenizer))
    assert config.tie_embeddings and "head" not in params


def test_the_scaling_of_llama_3_is_that_of_its_divisors():
    scaling = {**LLAMA3_ROPE, "original_max_position_embeddings": 8192, "factor": 32.0}
    theta, size = 500_000.0, 128
    frequencies = theta ** -(np.arange(0, size, 2) / size)
    wavelengths = 2 * np.pi / frequencies
    smooth = (8192 / wavelengths - 1) / (4 - 1)
    scaled = np.where(
        wavelengths < 8192 / 4,
        frequencies,
        np.where(
            wavelengths > 8192,
            frequencies / 32,
            (1 - smooth) * frequencies / 32 + smooth * frequencies,
        ),
    )
    divisors = (frequencies / scaled).astype(np.float32)
    del scaling["rope_theta"]
    assert rope_scaling(divisors, theta) == scaling
    assert rope_scaling(np.ones(64, np.float32), theta) is None
    with pytest.raises(ValueError, match=r"rope_freqs\.weight is no scaling of Llama 3"):
        rope_scaling(np.linspace(1, 8, 64, dtype=np.float32), theta)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_weights_are_as_the_gguf_package_reads_them(llama, tokenizer, tmp_path, kind):
    number = gguf.GGMLQuantizationType[kind]
    path = write_gguf(tmp_path / "q.gguf", llama, tokenizer, quantise=number)
    stored = {x.name: x for x in gguf.GGUFReader(path).tensors}["blk.1.ffn_up.weight"]
    _, params = hf.load_policy(path)
    up = params["layers"]["1"]["mlp"]["up"]["kernel"].T
    np.testing.assert_array_equal(up, gguf.quants.dequantize(stored.data, number))
    exact = llama.model.layers[1].mlp.up_proj.weight.detach().numpy()
    assert 0 < np.abs(up - exact).max() < 0.15 * np.abs(exact).max()


def test_all_stop_tokens_of_a_file_are_kept(llama, tokenizer, tmp_path):
    tokens = bpe_metadata(tokenizer) | {"eot_token_id": 7, "eom_token_id": 0}
    path = write_gguf(tmp_path / "tiny.gguf", llama, tokenizer, tokens=tokens)
    ends = json.loads((hub.model_folder(path) / "generation_config.json").read_text())
    assert ends == {"eos_token_id": [0, 7]}
    plain = hub.model_folder(write_gguf(tmp_path / "plain.gguf", llama, tokenizer))
    assert not (plain / "generation_config.json").exists()


# --- tokenizers -----------------------------------------------------------------------------------


def metadata_of(ggml):
    keys = {f"tokenizer.ggml.{key}": value for key, value in ggml.items()}
    return {"general.architecture": "llama", "llama.context_length": 64, **keys}


# As the tokenizers of Llama 3.1 and Qwen 3 split it; Ġ is a space, Ċ a line break.
SPLIT = "I'll pay 12345,67 ,!?\n\n   x"
PIECES = {
    "llama-bpe": "I 'll Ġpay Ġ 123 45 , 67 Ġ,!?ĊĊ ĠĠ Ġx",
    "qwen2": "I 'll Ġpay Ġ 1 2 3 4 5 , 6 7 Ġ,!?ĊĊ ĠĠ Ġx",
    "olmo": "I 'll Ġpay Ġ12345 , 67 Ġ,!? ĊĊĠĠ Ġx",
    "refact": "I 'll Ġpay Ġ 1 2 3 4 5 , 6 7 Ġ,!? ĊĊĠĠ Ġx",
}
PIECES |= dict.fromkeys(("dbrx", "smaug-bpe"), PIECES["llama-bpe"])


@pytest.mark.parametrize("pre", PIECES)
def test_texts_are_split_as_by_the_models_own_tokenizers(tokenizer, pre):
    metadata = metadata_of(bpe_metadata(tokenizer, pre) | {"bos_token_id": 0})
    backend = build_tokenizer(metadata, 300).backend_tokenizer
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(SPLIT)]
    assert pieces == PIECES[pre].split()
    accents = backend.encode("e\u0301").ids == backend.encode("\u00e9").ids
    assert accents == (pre in ("qwen2", "olmo"))  # which compose them


def test_a_word_of_llama_3_that_no_merges_make_is_one_token(tokenizer):
    ids = {}
    for pre in ("llama-bpe", "gpt-2"):
        ggml = bpe_metadata(tokenizer, pre) | {"bos_token_id": 0, "add_bos_token": False}
        ggml["tokens"] = [*ggml["tokens"][:-1], "zqzq"]
        ggml["merges"] = [x for x in ggml["merges"] if x.replace(" ", "") in ggml["tokens"]]
        ids[pre] = build_tokenizer(metadata_of(ggml), 300)("zqzq")["input_ids"]
    assert ids["llama-bpe"] == [299] and len(ids["gpt-2"]) == 4


def test_bos_and_eos_are_put_around_a_text_where_the_file_says_so(tokenizer):
    ggml = bpe_metadata(tokenizer) | {"bos_token_id": 5}
    plain = tokenizer("A film")["input_ids"]
    for options, expected in (
        ({}, plain),
        ({"add_bos_token": True}, [5, *plain]),
        ({"add_eos_token": True}, [*plain, 0]),
        ({"add_bos_token": True, "add_eos_token": True}, [5, *plain, 0]),
    ):
        assert build_tokenizer(metadata_of(ggml | options), 300)("A film")["input_ids"] == expected
    llama3 = bpe_metadata(tokenizer, "llama-bpe") | {"bos_token_id": 5}
    assert build_tokenizer(metadata_of(llama3), 300)("A film")["input_ids"][0] == 5
    with pytest.raises(ValueError, match="add_bos_token needs a bos_token_id"):
        build_tokenizer(metadata_of(bpe_metadata(tokenizer) | {"add_bos_token": True}), 300)


def sentencepiece_metadata(seed):
    """Pieces of random scores, each of which can be merged from shorter ones."""
    draw = random.Random(seed)
    pieces = list("▁abcé")
    while len(pieces) < 60:
        piece = draw.choice(pieces) + draw.choice(pieces)
        if len(piece) < 8 and piece not in pieces:
            pieces.append(piece)
    scores = draw.sample(range(-1000, 0), len(pieces))
    special = ["<unk>", "<s>", "</s>"]
    data = [f"<0x{byte:02X}>" for byte in range(256)]
    return {
        "model": "llama",
        "tokens": special + data + pieces,
        "scores": [0.0] * 259 + [float(score) for score in scores],
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }


def sentencepiece(ggml, text):
    """BPE as SentencePiece defines it: again and again the adjacent pair of the highest score."""
    score = dict(zip(ggml["tokens"], ggml["scores"], strict=True))
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        both = [a + b for a, b in itertools.pairwise(symbols)]
        pairs = [(score.get(pair, -np.inf), -i) for i, pair in enumerate(both)]
        best, place = max(pairs, default=(-np.inf, 0))
        if best == -np.inf:
            break
        symbols[-place : 2 - place] = ["".join(symbols[-place : 2 - place])]
    ids = {token: i for i, token in enumerate(ggml["tokens"])}
    return [
        i
        for symbol in symbols
        for i in ([ids[symbol]] if symbol in ids else [3 + byte for byte in symbol.encode()])
    ]


@pytest.mark.parametrize("seed", range(5))
def test_pieces_are_merged_as_sentencepiece_merges_them(seed):
    ggml = sentencepiece_metadata(seed)
    rebuilt = build_tokenizer(metadata_of(ggml), len(ggml["tokens"]))
    draw = random.Random(seed)
    for _ in range(200):
        text = "".join(draw.choices("aabbcé z漢", k=draw.randint(1, 25)))
        ids = rebuilt(text)["input_ids"]
        assert ids == [1, *sentencepiece(ggml, text)], text
        assert rebuilt.decode(ids[1:]) == text
    assert rebuilt("a</s>")["input_ids"][-1] == 2


def test_a_sentencepiece_file_loads(llama, tmp_path):
    ggml = sentencepiece_metadata(0)
    ggml["tokens"], ggml["scores"] = ggml["tokens"][:300], ggml["scores"][:300]
    ggml["token_type"] = ggml["token_type"][:300]
    path = write_gguf(tmp_path / "spm.gguf", llama, None, tokens=ggml)
    assert load_tokenizer(path)("a b")["input_ids"][0] == 1


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "kind", "words"),
    [
        ("llama.expert_count", 8, KIND.UINT32, "its metadata lack ['llama.expert_used_count']"),
        ("llama.rope.scaling.type", "yarn", KIND.STRING, "rope.scaling.type='yarn'"),
        ("llama.rope.scaling.factor", 4.0, KIND.FLOAT32, "a factor of 4.0"),
        ("llama.rope.dimension_count", 8, KIND.UINT32, "must be the head size, 16"),
        ("split.count", 3, KIND.UINT16, "one of the 3 parts (split.no=0) of a split file"),
        ("tokenizer.ggml.bos_token_id", 300, KIND.UINT32, "the id of one of 300 tokens, got 300"),
        ("tokenizer.ggml.padding_token_id", -1, KIND.INT32, "padding_token_id must be the id"),
        ("tokenizer.ggml.eot_token_id", 9999, KIND.UINT32, "eot_token_id must be the id"),
        ("tokenizer.ggml.add_space_prefix", True, KIND.BOOL, "add_space_prefix=True is not"),
        ("tokenizer.ggml.add_bos_token", 1, KIND.UINT32, "add_bos_token must be a boolean"),
        ("tokenizer.chat_template", 3, KIND.UINT32, "chat_template must be a text"),
        ("general.alignment", 0, KIND.UINT32, "general.alignment must be a number of bytes"),
    ],
)
def test_an_option_that_is_not_understood_is_refused(
    llama, tokenizer, tmp_path, key, value, kind, words
):
    path = write_gguf(tmp_path / "a.gguf", llama, tokenizer, extra=[(key, value, kind)])
    assert words in refused(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eos_token_id": 300}, "eos_token_id must be the id of one of 300 tokens, got 300"),
        ({"pre": "tekken"}, "'gpt2' with pre-tokenizer 'tekken' is not supported"),
        ({"model": "t5"}, "GGUF tokenizer 't5'"),
        ({"tokens": ["a"] * 300}, "tokens must be different texts"),
        ({"tokens": [f"t{i}" for i in range(200)]}, "token_type must be 200 numbers"),
        ({"merges": ["ab"]}, "cannot be read"),
        ({"merges": ["no token"]}, "cannot be read"),
        ({"model": "llama"}, "scores must be 300 numbers"),
        ({"model": "llama", "scores": [float("nan")] * 300}, "scores must be finite"),
    ],
)
def test_a_tokenizer_that_cannot_be_rebuilt_is_refused(llama, tokenizer, tmp_path, changes, words):
    tokens = bpe_metadata(tokenizer) | changes
    assert words in refused(write_gguf(tmp_path / "a.gguf", llama, tokenizer, tokens=tokens))


def test_a_tensor_of_another_shape_is_told_by_its_name_in_the_file(llama, tokenizer, tmp_path):
    path = write_gguf(tmp_path / "a.gguf", llama, tokenizer)
    content = path.read_bytes()
    at = content.index(b"llama.feed_forward_length") + len("llama.feed_forward_length") + 4
    path.write_bytes(content[:at] + (80).to_bytes(4, "little") + content[at + 4 :])
    message = "blk.0.ffn_down.weight has shape (64, 96), but the file asks for (64, 80)"
    assert refused(path) == message


def test_weights_that_are_not_finite_are_refused(tokenizer, tmp_path):
    model = random_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("inf")
    path = write_gguf(tmp_path / "a.gguf", model, tokenizer)
    assert refused(path) == "blk.1.ffn_up.weight holds NaN or infinity"


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "a.gguf"
    for content in (b"", b"GGUF", b"not a model, but long enough to be looked at" * 9):
        path.write_bytes(content)
        assert refused(path).startswith("it is not a readable GGUF file: ")
    with pytest.raises(ValueError, match="architecture 'mamba' is not supported; choose from"):
        read_metadata({"general.architecture": "mamba"})
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_gate_inp\.weight"):
        find_place("blk.0.ffn_gate_inp.weight", (4, 8), places_of(ARCHITECTURES["llama"]))


@pytest.mark.parametrize("place", ["tensor_count", "kv_count", "key", "list", "text", "tensor"])
def test_a_length_beyond_the_file_is_refused_before_memory_is_taken(
    llama, tokenizer, tmp_path, place
):
    path = write_gguf(tmp_path / "a.gguf", llama, tokenizer)
    content = bytearray(path.read_bytes())

    def after(text, more):
        return content.index(text) + len(text) + more

    at = {
        "tensor_count": 8,
        "kv_count": 16,
        "key": 24,
        "list": after(b"tokenizer.ggml.tokens", 8),
        "text": after(b"tokenizer.ggml.model", 4),
        "tensor": after(b"token_embd.weight", 4),  # rows of it
    }[place]
    for size in (2**63, 2**40, 2**32):
        content[at : at + 8] = size.to_bytes(8, "little")
        path.write_bytes(content)
        assert re.search(r"the header declares|leads beyond the end|impossible", refused(path))


def test_a_damaged_header_costs_neither_time_nor_a_traceback(llama, tokenizer, tmp_path):
    path = write_gguf(tmp_path / "a.gguf", llama, tokenizer)
    content, draw = path.read_bytes(), random.Random(0)
    header = content.index(b"blk.1.ffn_down.weight") + 60
    told = set()
    for case in range(150):
        damaged = bytearray(content)
        for _ in range(draw.choice([1, 1, 4])):
            damaged[draw.randrange(header)] = draw.randrange(256)
        if case % 5 == 0:
            damaged = damaged[: draw.randrange(len(damaged))]
        path.write_bytes(damaged)
        try:
            convert_gguf(path, tmp_path / "folder")
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            told.add(str(error)[len(str(path)) + 2 :][:40])
    assert len(told) > 10
