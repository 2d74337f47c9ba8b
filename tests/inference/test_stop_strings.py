"""Stop tokens and stop strings: a response ends with the first token that completes one."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers

from ppo_jax.inference.generate import generate, make_sampling, stream
from ppo_jax.inference.stop_strings import (
    MAX_BYTES,
    make_stop_strings,
    stop_ids,
    stop_strings,
    token_bytes,
)
from ppo_jax.io.tokenizers import load_tokenizer, save_tokenizer, set_declared_stops
from ppo_jax.models.build import policy_network
from ppo_jax.rollout.rollout import rollout
from ppo_jax.rollout.sampling import Sampling
from tests.support import tiny
from tests.support.meshes import WIDE, layout_of
from tests.support.tiny_stage import byte_tokenizer, random_model, word_tokenizer

KEY = jax.random.key(5)
SETTINGS = dict(response_length=40, top_k=0, top_p=1.0, min_p=0.0)


def metaspace_tokenizer():
    """As Llama 2 has it: spaces are marks, a text begins with one, other characters are bytes."""
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "a", "b", "H", "u", ":", "▁a", "ab", "Hu", "▁b"]
    merges = [("▁", "a"), ("a", "b"), ("H", "u"), ("▁", "b")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>")


TOKENIZERS = {
    "bytes": byte_tokenizer,
    "metaspace": metaspace_tokenizer,
    "words": lambda: word_tokenizer(30),
}


def first_complete(texts, written):
    """How many tokens it takes until a text has occurred, by plain search; None if it has not."""
    for count in range(1, len(written) + 1):
        if any(text.encode() in b"".join(written[:count]) for text in texts):
            return count
    return None


def step_by_step(strings, tokens):
    """The same by the automaton."""
    states = jnp.zeros(1, jnp.int32)
    for count, token in enumerate(tokens, 1):
        states, complete = strings.advance(states, jnp.array([token]))
        if complete[0]:
            return count
    return None


# --- the automaton --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "written", "expected"),
    [
        (["\n\nHuman:"], [b"ok", b"\n", b"\nHu", b"man: I", b"x"], 4),  # in the middle of a token
        (["aab"], [b"a", b"a", b"a", b"b"], 4),  # it overlaps itself
        (["abab"], [b"ab", b"a", b"a", b"b", b"ab"], 5),
        (["abcd", "bc"], [b"a", b"b", b"c", b"d"], 3),  # one inside of another
        (["ab", "abcd"], [b"abcd"], 1),
        (["x", "yz"], [b"y", b"", b"z", b"x"], 3),  # a token that writes nothing
        (["東"], [b"\xe6\x9d", b"\xb1!"], 2),  # a character of two tokens
        (["ab"], [b"a", b"c", b"b"], None),
    ],
)
def test_a_text_is_complete_with_the_token_that_completes_it(texts, written, expected):
    assert first_complete(texts, written) == expected
    tokens = list(dict.fromkeys(written))
    found = step_by_step(make_stop_strings(texts, tokens), [tokens.index(x) for x in written])
    assert found == expected


def test_the_automaton_finds_what_a_search_finds():
    """Few letters and short tokens, so that texts are in each other and overlap themselves."""
    rng = np.random.default_rng(0)
    counts = []
    for _ in range(60):
        tokens = [
            rng.choice([97, 98, 10], size=rng.integers(4)).astype(np.uint8).tobytes()
            for _ in range(9)
        ]
        texts = ["".join(rng.choice([*"ab\n"], size=rng.integers(1, 7))) for _ in range(3)]
        strings = make_stop_strings(texts[: rng.integers(1, 4)], tokens)
        for _ in range(3):
            ids = rng.integers(9, size=25).tolist()
            expected = first_complete(strings.texts, [tokens[i] for i in ids])
            assert step_by_step(strings, ids) == expected, (strings.texts, tokens, ids)
            counts.append(expected)
    assert None in counts and max(x for x in counts if x) > 5


def test_the_table_is_small_for_a_large_vocabulary():
    rng = np.random.default_rng(0)
    tokens = [
        rng.integers(256, size=rng.integers(1, 12)).astype(np.uint8).tobytes()
        for _ in range(20_000)
    ]
    strings = make_stop_strings(["\n\nHuman:", "\n\nAssistant:"], tokens)
    assert len(strings.token_classes) == 20_000
    assert len(strings.transitions) <= len("\n\nHuman:\n\nAssistant:")
    assert len(strings.transitions[0]) < 40
    with pytest.raises(ValueError, match=f"at most {MAX_BYTES} bytes together, got 600"):
        make_stop_strings(["a" * 300, "b" * 300], tokens)


def test_an_id_beyond_the_tokenizer_writes_nothing():
    strings = make_stop_strings(["ab"], [b"a", b"b"])
    assert step_by_step(strings, [0, 7, 1]) == 3


# --- what tokens write ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokens_write_what_the_tokenizer_decodes(kind):
    tokenizer = TOKENIZERS[kind]()
    tokenizer.add_tokens(["<|turn|>", "two words"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    written = token_bytes(tokenizer)
    decode = tokenizer.backend_tokenizer.decode
    before = tokenizer("w1" if kind == "words" else "a", add_special_tokens=False)["input_ids"]
    start = decode(before, skip_special_tokens=False)
    rng, compared = np.random.default_rng(0), 0
    for _ in range(600):
        ids = rng.integers(len(written), size=3).tolist()
        try:
            text = b"".join(written[i] for i in ids).decode()
        except UnicodeDecodeError:
            continue
        assert start + text == decode(before + ids, skip_special_tokens=False)
        compared += 1
    assert compared > 50


def test_an_id_without_a_token_writes_nothing():
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 3}, unk_token="a"))
    tokenizer = type(byte_tokenizer())(tokenizer_object=backend, eos_token="b")
    assert [bool(x) for x in token_bytes(tokenizer)] == [True, False, False, True]


# --- which tokens and texts stop ------------------------------------------------------------------


def test_a_stop_is_a_token_where_it_is_spelled_as_one_and_else_a_text():
    tokenizer = byte_tokenizer()
    newline = tokenizer.convert_tokens_to_ids("Ċ")
    assert stop_ids(tokenizer, ("Ċ", "\n")) == (0, newline)
    assert stop_strings(tokenizer, ("Ċ",)) is None and stop_strings(tokenizer, ()) is None
    strings = stop_strings(tokenizer, ("Ċ", "\n", "\n\nHuman:"))
    assert strings.texts == ("\n", "\n\nHuman:")
    assert step_by_step(strings, tokenizer("a few\n\nHuman:")["input_ids"]) == len(
        tokenizer("a few\n")["input_ids"]
    )


@pytest.mark.parametrize("text", ["", "東京", "x w1"])
def test_a_text_that_no_tokens_write_is_refused(text):
    with pytest.raises(ValueError, match="ppo.stop_tokens must be tokens of the tokenizer or"):
        stop_strings(word_tokenizer(30), (text,))


def test_the_stop_tokens_of_a_models_files_stop_and_stay_with_the_tokenizer(tmp_path):
    tokenizer = byte_tokenizer()
    save_tokenizer(tokenizer, tmp_path)
    for file, value, expected in (
        ("config.json", [0, 9], (0, 9)),
        ("config.json", [0, 99_999], (0,)),  # a default that remains in many files
        ("generation_config.json", 8, (0, 8)),
        ("generation_config.json", [7, 8, 0], (0, 7, 8)),
    ):
        (tmp_path / file).write_text(json.dumps({"eos_token_id": value}))
        found = load_tokenizer(tmp_path)
        assert stop_ids(found) == expected
    save_tokenizer(found, tmp_path / "again")
    assert stop_ids(load_tokenizer(tmp_path / "again")) == (0, 7, 8)
    for wrong in ([0, 99_999], "0", [True], [-1]):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id must be"):
            load_tokenizer(tmp_path)


# --- responses ------------------------------------------------------------------------------------


def written_by(num_tokens):
    rng = np.random.default_rng(1)
    return [
        rng.choice([97, 98, 10], size=rng.integers(3)).astype(np.uint8).tobytes()
        for _ in range(num_tokens)
    ]


WRITTEN = written_by(tiny.VOCAB)
STRINGS = make_stop_strings(["aab", "b\nb", "\n\n\n"], WRITTEN)


def sample(**changes):
    sampling = tiny.sampling(**dict(eos_ids=(1,), response_length=16) | changes)
    policy = policy_network(tiny.model_config())
    params = tiny.random_params(policy)
    prompts = tiny.prompts(batch_size=13)
    return tiny.sample(policy=policy, params=params, prompts=prompts, key=KEY, sampling=sampling)


def test_a_response_ends_with_the_token_that_completes_a_string():
    free = np.asarray(sample(eos_ids=()).response_tokens)
    stopped = sample(stop_strings=STRINGS)
    endings = []
    for row, tokens, mask, ended in zip(
        free, stopped.response_tokens, stopped.response_mask, stopped.has_eos, strict=True
    ):
        by_string = first_complete(STRINGS.texts, [WRITTEN[i] for i in row])
        by_token = np.flatnonzero(row == 1)[0] + 1 if 1 in row else None
        length = min((x for x in (by_string, by_token) if x), default=None)
        assert mask.sum() == (length or 16) and ended == (length is not None)
        assert tokens[mask].tolist() == row[: mask.sum()].tolist()
        assert not tokens[~mask].any()
        endings.append(None if length is None else length == by_string)
    assert {True, None} <= set(endings)


@pytest.mark.parametrize(("slots", "refill"), [(1, 1), (4, 1), (5, 5), (12, 0)])
def test_stop_strings_do_not_depend_on_the_slots(slots, refill):
    """A slot forgets what the response before had of a string."""
    expected = sample(stop_strings=STRINGS)
    found = sample(stop_strings=STRINGS, max_concurrent=slots, min_free_slots=refill)
    for name in ("response_tokens", "response_mask", "has_eos"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_stop_strings_do_not_depend_on_the_mesh(shape):
    config = tiny.model_config(**WIDE)
    params = tiny.random_params(policy_network(config))
    sampling = tiny.sampling(eos_ids=(), stop_strings=STRINGS)

    def responses(shape):
        layout = layout_of(shape)
        policy = policy_network(config, constrain=layout.constrain)
        prompts = layout.shard_batch(jax.tree.map(np.asarray, tiny.prompts(batch_size=16)))
        args = layout.shard_params(params), prompts, layout.replicate(KEY)
        return jax.device_get(jax.jit(lambda *x: rollout(policy, *x, sampling=sampling))(*args))

    found, expected = responses(shape), responses((1, 1, 1))
    np.testing.assert_array_equal(found.response_tokens, expected.response_tokens)
    assert 0 < expected.has_eos.sum() < 16


def test_without_stop_strings_the_program_is_as_before():
    """Nothing is carried for them; an automaton that finds nothing changes no response."""
    plain = Sampling(response_length=4, eos_ids=(1,))
    assert plain.stop_strings is None
    never = make_stop_strings(["zz"], WRITTEN)
    for name, expected in vars(sample()).items():
        if expected is not None:
            np.testing.assert_array_equal(getattr(sample(stop_strings=never), name), expected)


def test_a_stream_ends_as_a_rollout_does():
    model = random_model(max_length=160)
    stops = ("ilm", "e", "s o", "\n")
    sampling = make_sampling(SETTINGS | {"stop_tokens": stops}, model.tokenizer)
    lengths = []
    for seed in range(6):
        _, [whole] = generate(model, ["a film"], sampling=sampling, seed=seed, batch_size=1)
        mask = np.asarray(whole.response_mask[0])
        tokens = np.asarray(whole.response_tokens[0])[mask].tolist()
        ids = model.tokenizer("a film")["input_ids"]
        how = {"sampling": sampling, "temperature": 1.0}
        assert list(stream(model, ids, jax.random.key(seed), **how)) == tokens
        written = [token_bytes(model.tokenizer)[i] for i in tokens]
        if whole.has_eos[0] and tokens[-1] not in sampling.eos_ids:
            assert first_complete(stops[:1] + stops[2:], written) == len(tokens)
        lengths.append(len(tokens))
    assert min(lengths) < 40


@pytest.mark.parametrize("begin", [0, 7])
def test_a_stream_ends_with_a_string_that_two_tokens_write(begin):
    model = random_model(max_length=160)
    ids, key = model.tokenizer("a film")["input_ids"], jax.random.key(1)

    def tokens(*stops):
        sampling = make_sampling(SETTINGS | {"stop_tokens": stops}, model.tokenizer)
        return list(stream(model, ids, key, sampling=sampling, temperature=1.0))

    free = tokens()
    written = [token_bytes(model.tokenizer)[i] for i in free]
    borders = [a[-1:] + b[:1] for a, b in itertools.pairwise(written)]
    place = next(
        i
        for i, border in enumerate(borders)
        if i >= begin and border.isalpha() and border not in b"".join(written[: i + 1])
        if border not in written[i + 1] and border.decode() not in model.tokenizer.get_vocab()
    )
    assert tokens(borders[place].decode()) == free[: place + 2]


def test_declared_stops_and_strings_shape_the_sampling():
    tokenizer = byte_tokenizer()
    set_declared_stops(tokenizer, ["w", "<|endoftext|>"])
    sampling = make_sampling(SETTINGS | {"stop_tokens": ("\n\nHuman:", "f")}, tokenizer)
    ids = {0, *(tokenizer.convert_tokens_to_ids(x) for x in "wf")}
    assert sampling.eos_ids == tuple(sorted(ids))
    assert sampling.stop_strings.texts == ("\n\nHuman:",)
    assert hash(sampling) == hash(
        make_sampling(SETTINGS | {"stop_tokens": ("\n\nHuman:", "f")}, tokenizer)
    )
