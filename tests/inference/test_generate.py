"""generate.py: how a model is sampled, streams, the chat, files of prompts."""

import collections
import dataclasses
import io
import json
import os
import sys

import jax
import numpy as np
import pytest

from ppo_jax.config.mesh import ROLLOUT_RULES
from ppo_jax.data.records import load_texts, write_jsonl
from ppo_jax.inference import terminal
from ppo_jax.inference.generate import (
    BATCHES,
    compiled_rollout,
    compiled_stream,
    decode_stream,
    find_sampling,
    generate,
    make_sampling,
    program_size,
    stream,
)
from ppo_jax.inference.score import score_ids
from ppo_jax.inference.terminal import (
    best_demonstrations,
    chat,
    newest_turns,
    respond_to_file,
)
from ppo_jax.io import tokenizers as vocabulary
from ppo_jax.models.build import policy_network, reward_network
from ppo_jax.rollout.sampling import Sampling
from tests.support.command_line import run_script
from tests.support.meshes import layout_of
from tests.support.run_files import read_jsonl
from tests.support.tiny_stage import TEMPLATE, byte_tokenizer, random_model, write_stage

SHORT = Sampling(response_length=10, eos_ids=(0,))
HOW = {"sampling": SHORT, "temperature": 1.0, "seed": 0}
WORDS = ["a film", "a film of few words", "few words of a film " * 4]


@pytest.fixture(scope="module")
def model():
    return random_model(max_length=160)


# --- how a model is sampled -----------------------------------------------------------------------


def test_a_stage_is_sampled_as_its_run_does_but_for_what_is_asked(tmp_path, model):
    settings = {"response_length": 5, "temperature": 0.5, "top_k": 7, "stop_tokens": ["w"]}
    word = model.tokenizer.convert_tokens_to_ids("w")
    write_stage(tmp_path, "ppo", model, **settings)
    write_stage(tmp_path, "sft", model)
    for stage in ("ppo", "sft"):
        how = find_sampling(str(tmp_path / stage), model.tokenizer)
        assert how["sampling"] == Sampling(response_length=5, eos_ids=(0, word), top_k=7)
        assert how["temperature"] == 0.5
    asked = {"top_k": 0, "temperature": 0.0, "response_length": None, "min_p": 0.1}
    how = find_sampling(str(tmp_path / "ppo"), model.tokenizer, **asked)
    assert how["sampling"] == Sampling(response_length=5, eos_ids=(0, word), top_k=0, min_p=0.1)
    assert how["temperature"] == 0.0


def test_a_folder_is_sampled_with_the_defaults_and_its_stop_tokens(tmp_path, model):
    plain = Sampling(response_length=64, eos_ids=(0,))
    default = {"sampling": plain, "temperature": 1.0}
    assert find_sampling(str(tmp_path), model.tokenizer) == default
    for ids, eos_ids in ((9, (0, 9)), ([8, 0], (0, 8)), (None, (0,))):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        assert find_sampling(str(tmp_path), model.tokenizer)["sampling"].eos_ids == eos_ids
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 99999]}')
    message = r"generation_config\.json: eos_token_id must be ids of the tokenizer.*\[0, 99999\]"
    with pytest.raises(ValueError, match=message):
        find_sampling(str(tmp_path), model.tokenizer)
    write_stage(tmp_path, "sft", model)
    assert find_sampling(str(tmp_path / "sft"), model.tokenizer) == default


# --- batches and slots ----------------------------------------------------------------------------

STOPS = dict(stop_tokens=("ilm", "e", "s o"), top_k=0, top_p=0.9, min_p=0.0)


def compare(model, count, batch_size, layout=None, **how):
    """A call of `generate` gives the responses of one batch without slots; their lengths."""
    prompts = (WORDS * count)[:count]
    how = dict(seed=3, max_prompt_length=150) | how
    expected, [whole] = generate(model, prompts, batch_size=count, **how)
    got, rollouts = generate(model, prompts, batch_size=batch_size, layout=layout, **how)
    assert got == expected
    for name in ("prompt_tokens", "response_tokens", "response_mask", "has_eos"):
        values = np.concatenate([getattr(rollout, name) for rollout in rollouts])[:count]
        np.testing.assert_array_equal(values, getattr(whole, name)[:count], name)
    logprobs = np.concatenate([rollout.logprobs for rollout in rollouts])[:count]
    np.testing.assert_allclose(logprobs, whole.logprobs[:count], atol=1e-5)
    return np.asarray(whole.response_mask).sum(axis=1)


@pytest.mark.parametrize(
    ("count", "batch_size"),
    [(1, 4), (3, 4), (4, 4), (5, 4), (13, 4), (3 * BATCHES + 5, 3), (2 * BATCHES + 1, 1)],
)
def test_a_response_does_not_depend_on_what_is_decoded_beside_it(model, count, batch_size):
    """Fewer prompts than a batch, no multiple of it, and more than one program takes."""
    sampling = make_sampling(STOPS | {"response_length": 12}, model.tokenizer)
    sampling = dataclasses.replace(sampling, eos_ids=(0, *range(40, 60)))
    lengths = compare(model, count, batch_size, sampling=sampling)
    assert len(set(lengths.tolist())) > 1 or count == 1


def test_slots_are_those_that_the_sampling_allows_and_greedy_is_greedy(model):
    sampling = Sampling(response_length=12, eos_ids=tuple(range(40, 60)), max_concurrent=2)
    compare(model, 9, 4, sampling=sampling, temperature=0.0)
    with pytest.raises(ValueError, match="batch_size must be at least 1 and whole, got 0"):
        generate(model, WORDS, batch_size=0)


def test_slots_on_a_mesh_are_a_multiple_of_its_pieces(model):
    sampling = Sampling(response_length=12, eos_ids=(0, *range(40, 60)))
    layout = layout_of((8, 1, 1), ROLLOUT_RULES)
    compare(model, 21, 5, layout, sampling=sampling)


def test_nobody_waits_for_the_longest_response_of_a_batch(model, monkeypatch):
    """The program's steps are far fewer than those of batches that wait for their longest one."""
    calls: collections.Counter = collections.Counter()

    def counted(config, **how):
        network = policy_network(config, **how)

        def decode(params, tokens, mask, cache, **where):
            kind = "step" if tokens.shape[1] == 1 else "prefill"
            jax.debug.callback(lambda: calls.update({kind: 1, f"{kind} rows": len(tokens)}))
            return network.decode(params, tokens, mask, cache, **where)

        return network._replace(decode=decode)

    monkeypatch.setattr("ppo_jax.inference.generate.policy_network", counted)
    compiled_rollout.cache_clear()
    sampling = Sampling(response_length=48, eos_ids=(0, *range(40, 60)))
    _, [rollout] = generate(model, ["a film"] * 48, sampling=sampling, batch_size=8)
    jax.effects_barrier()
    compiled_rollout.cache_clear()
    lengths = np.asarray(rollout.response_mask).sum(axis=1)
    static = (lengths.reshape(-1, 8).max(axis=1) - 1).sum()
    assert calls["step"] < 0.7 * static and calls["step rows"] < 0.6 * 8 * static
    assert calls["prefill rows"] == 48


def test_few_programs_are_compiled_whatever_the_number_of_prompts():
    sizes = {program_size(count, 64, 1) for count in range(1, 5000)}
    assert len(sizes) < 40
    for count in range(1, 5000, 7):
        rows, slots = program_size(count, 64, 1)
        programs = -(-count // rows)
        assert slots == min(rows, 64) or count <= 64 and slots == rows
        assert programs == -(-count // (64 * BATCHES)) and programs * rows <= 1.25 * count + 2


# --- streams --------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_has_the_tokens_of_a_rollout(model, temperature):
    endings = []
    for seed, prompt in enumerate(WORDS * 3):
        sampling = Sampling(response_length=10, eos_ids=(0, *range(40, 60)), top_p=0.9)
        how = {"sampling": sampling, "temperature": temperature}
        _, [rollout] = generate(
            model, [prompt], seed=seed, batch_size=1, max_prompt_length=150, **how
        )
        ids = model.tokenizer(prompt)["input_ids"]
        tokens = list(stream(model, ids, jax.random.key(seed), **how))
        mask = np.asarray(rollout.response_mask[0])
        assert tokens == np.asarray(rollout.response_tokens[0])[mask].tolist()
        endings.append(len(tokens))
    if temperature:  # some were stopped by a token, others by the length, in the middle of a chunk
        assert min(endings) < 10 == max(endings)


def test_turns_of_like_length_compile_once(model):
    prefill, decode = compiled_stream(model.config, SHORT)
    prefill.clear_cache(), decode.clear_cache()
    for length in (1, 10, 64):
        list(stream(model, [5] * length, jax.random.key(0), sampling=SHORT, temperature=length))
    assert prefill._cache_size() == decode._cache_size() == 1
    list(stream(model, [5] * 65, jax.random.key(0), sampling=SHORT, temperature=1.0))
    assert prefill._cache_size() == decode._cache_size() == 2


def test_a_prompt_may_fill_the_positions_of_the_model():
    model = random_model(positions="learned", max_length=20)
    how = {"sampling": SHORT, "temperature": 0.0}
    ids = [5, 6, 7, 8, 9] * 2
    tokens = list(stream(model, ids, jax.random.key(0), **how))
    prompt = model.tokenizer.decode(ids)
    _, [rollout] = generate(model, [prompt], seed=0, batch_size=1, max_prompt_length=10, **how)
    assert tokens == np.asarray(rollout.response_tokens[0])[: len(tokens)].tolist()


def test_text_comes_piece_by_piece_and_characters_whole():
    tokenizer = byte_tokenizer()
    for text in ("a film of few words", "Grüße aus 東京 \U0001f3ac!", "", "x\ufffd"):
        chunks = list(decode_stream(tokenizer, tokenizer(text)["input_ids"]))
        assert "".join(chunks) == text
        assert all("\ufffd" not in chunk for chunk in chunks) or "\ufffd" in text
    read = []
    chunks = decode_stream(tokenizer, (read.append(i) or i for i in tokenizer("few")["input_ids"]))
    next(chunks)
    assert len(read) == 1  # it waits for no more tokens than it needs
    torn = tokenizer("東")["input_ids"][:-1]
    assert "".join(decode_stream(tokenizer, torn)) == tokenizer.decode(torn)


# --- the chat -------------------------------------------------------------------------------------


def conversation(model, lines, **changes):
    """What a chat shows, in one string."""
    chunks = []
    chat(model, lines, chunks.append, **{**HOW, **changes})
    return "".join(chunks)


@pytest.fixture
def scripted(monkeypatch):
    """A model with a template that answers "ok", and the list of the prompts that it got."""
    model, prompts = random_model(template=TEMPLATE, max_length=60), []

    def answer(model, ids, key, *, sampling, temperature):
        prompts.append(model.tokenizer.decode(ids))
        yield from model.tokenizer("ok")["input_ids"]

    monkeypatch.setattr(terminal, "stream", answer)
    return model, prompts


def test_turns_build_up_by_the_template_until_a_new_conversation(scripted):
    model, prompts = scripted
    said = conversation(model, ["hi", "", "  ", "so", "/new", "bye"])
    assert prompts == ["u:hi;a:", "u:hi;a:ok;u:so;a:", "u:bye;a:"]
    assert said.count("ok\n") == 3 and said.startswith("A conversation")


def test_the_oldest_turns_make_room_and_a_line_without_room_is_told(scripted):
    model, prompts = scripted
    said = conversation(model, ["x" * 20, "y" * 20, "z" * 70, "so"])
    assert prompts == [f"u:{'x' * 20};a:", f"u:{'y' * 20};a:", f"u:{'y' * 20};a:ok;u:so;a:"]
    assert "(the line has 75 tokens, allowed are 1 to 50)\n" in said


def test_the_newest_turns_are_those_that_fit():
    model = random_model(template=TEMPLATE)
    turns = [{"role": role, "content": "x" * 5} for role in ("user", "assistant") * 2 + ("user",)]
    whole, ids = newest_turns(turns, model, 1000, use_template=True)
    assert whole == turns and len(ids) == 5 * 8 + 2
    assert newest_turns(turns, model, 41, use_template=True) == (turns[2:], ids[16:])


def test_without_a_template_each_line_is_continued(scripted):
    model, prompts = scripted
    said = conversation(model, ["hi", "so"], use_template=False)
    assert prompts == ["hi", "so"] and said.startswith("Without a chat template: each line is con")
    model.tokenizer.chat_template = None
    assert conversation(model, ["hi"]).startswith("Without a chat template")
    assert "allowed are 1 to 50" in conversation(model, ["z" * 51])


def test_ctrl_c_ends_an_answer_and_keeps_what_was_said(scripted, monkeypatch):
    model, prompts = scripted

    def interrupted(model, ids, key, **how):
        prompts.append(model.tokenizer.decode(ids))
        yield from model.tokenizer("o")["input_ids"]
        raise KeyboardInterrupt

    monkeypatch.setattr(terminal, "stream", interrupted)
    said = conversation(model, ["hi", "so"])
    assert prompts == ["u:hi;a:", "u:hi;a:o;u:so;a:"] and said.endswith("o\no\n")


def test_a_chat_repeats_with_its_seed_and_its_turns_differ(model):
    first, again = (conversation(model, ["a film", "a film"]) for _ in range(2))
    other = conversation(model, ["a film", "a film"], seed=1)
    assert first == again != other
    assert conversation(model, ["", "a film"]) != conversation(model, ["a film"])  # another turn


def test_a_response_that_the_context_cuts_is_refused_and_the_default_fits(model):
    sampling = Sampling(response_length=model.config.max_length, eos_ids=())
    with pytest.raises(ValueError, match="must be at most .* tokens together"):
        generate(model, ["a film"], sampling=sampling)
    _, (rollout,) = generate(model, ["a film"])
    assert rollout.mask.shape[1] <= model.config.max_length
    with pytest.raises(ValueError, match="prompts must be a list of texts, got the text 'a film'"):
        generate(model, "a film")
    with pytest.raises(ValueError, match="temperature must be >= 0, got -1"):
        generate(model, ["a film"], temperature=-1.0)


def test_no_room_and_no_policy_are_refused(model):
    with pytest.raises(ValueError, match="response_length must be below the model's 160 tokens"):
        conversation(model, [], sampling=Sampling(response_length=160, eos_ids=(0,)))
    with pytest.raises(ValueError, match="must be a policy"):
        conversation(random_model("reward"), [])


# --- files of prompts -----------------------------------------------------------------------------


def test_a_file_of_prompts_gives_a_file_of_scored_responses(tmp_path, model):
    asked, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_jsonl(asked, [{"prompt": prompt} for prompt in WORDS])
    scorer = random_model("reward", max_length=160)
    respond_to_file(model, scorer, prompts=asked, out=out, copies=2, **HOW)
    rows = read_jsonl(out)
    assert [row["prompt"] for row in rows] == [prompt for prompt in WORDS for _ in range(2)]
    assert all(row.keys() == {"prompt", "response", "finished", "score"} for row in rows)
    assert len({row["response"] for row in rows}) == 6

    with pytest.raises(ValueError, match="is there already"):
        respond_to_file(model, None, prompts=asked, out=out, copies=1, **HOW)
    with pytest.raises(ValueError, match="scores come from a reward model, got a policy"):
        respond_to_file(model, model, prompts=asked, out=tmp_path / "b", copies=1, **HOW)
    respond_to_file(model, None, prompts=asked, out=tmp_path / "b", copies=1, **HOW)
    assert [row.keys() for row in read_jsonl(tmp_path / "b")] == [{"prompt", "response"}] * 3


def test_a_score_is_that_of_the_tokens_that_were_sampled(tmp_path, model):
    """Read at EOS, put behind another stop token; where a response was cut off, at its last one."""
    scorer, asked, out = random_model("reward", max_length=160), tmp_path / "in", tmp_path / "out"
    write_jsonl(asked, [{"prompt": prompt} for prompt in WORDS * 4])
    sampling = Sampling(response_length=10, eos_ids=(0, *range(40, 60)))
    how = HOW | {"sampling": sampling}
    respond_to_file(model, scorer, prompts=asked, out=out, copies=1, **how)
    rows = read_jsonl(out)
    responses, [rollout] = generate(model, WORDS * 4, max_prompt_length=150, batch_size=12, **how)
    network, expected = reward_network(scorer.config), []
    for prompt, ids, mask in zip(
        WORDS * 4, rollout.response_tokens, rollout.response_mask, strict=True
    ):
        read = [*model.tokenizer(prompt)["input_ids"], *np.asarray(ids)[mask].tolist()]
        ended = read[-1] in sampling.eos_ids
        read = np.array([[*read, 0] if ended and read[-1] != 0 else read])
        scores = network.apply(scorer.params, read, np.ones(read.shape, bool), first_output=0)
        expected.append((ended, float(scores[0, -1])))
    finished, scores = zip(*expected, strict=True)
    assert [row["finished"] for row in rows] == list(finished) and len(set(finished)) == 2
    np.testing.assert_allclose([row["score"] for row in rows], scores, atol=1e-5)
    assert [row["response"] for row in rows] == responses


def test_a_scorer_of_other_tokens_reads_the_text_and_eos_where_there_was_one(tmp_path, model):
    scorer, asked, out = random_model("reward", max_length=160), tmp_path / "in", tmp_path / "out"
    own = vocabulary.train_tokenizer(["words of a film"] * 3, 290)
    scorer = dataclasses.replace(scorer, tokenizer=own)
    write_jsonl(asked, [{"prompt": prompt} for prompt in WORDS * 4])
    how = HOW | {"sampling": Sampling(response_length=10, eos_ids=(0, *range(40, 60)))}
    respond_to_file(model, scorer, prompts=asked, out=out, copies=1, **how)
    for row in read_jsonl(out):
        ids = own(row["prompt"] + row["response"])["input_ids"] + [0] * row["finished"]
        assert row["score"] == pytest.approx(score_ids(scorer, [ids])[0], abs=1e-5)


def test_what_would_control_a_terminal_is_spelt_out_there_alone(capsys):
    text = "a\n\033]0;title\a\r\N{RIGHT-TO-LEFT OVERRIDE}\u200d\N{NO-BREAK SPACE}東"
    terminal.write(text)
    assert capsys.readouterr().out == text
    outer, inner = os.openpty()
    with open(inner, "w") as stdout, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        terminal.write(text)
    shown = "a\r\n\\x1b]0;title\\x07\\r\\u202e\u200d\N{NO-BREAK SPACE}東"
    assert os.read(outer, 1000).decode() == shown
    os.close(outer)


def test_a_file_of_messages_is_answered_as_the_template_writes_them(tmp_path):
    messages = [{"role": "user", "content": "hi"}]
    write_jsonl(tmp_path / "in.jsonl", [{"messages": messages}])
    files = {"prompts": tmp_path / "in.jsonl", "out": tmp_path / "out.jsonl"}
    respond_to_file(random_model(template=TEMPLATE), None, copies=1, **files, **HOW)
    assert [row["prompt"] for row in read_jsonl(tmp_path / "out.jsonl")] == ["u:hi;a:"]


def test_the_script_chats_and_answers_files(tmp_path, monkeypatch):
    write_stage(tmp_path, "ppo", random_model(template=TEMPLATE), response_length=8)
    write_stage(tmp_path, "reward", random_model("reward"))
    stage = (f"--workdir={tmp_path}", "--stage=ppo")
    monkeypatch.setattr(sys, "stdin", io.StringIO("a film\n/new\nfew words\n"))
    talk = run_script("generate", *stage, "--interactive")
    assert talk.code == 0 and talk.out.startswith("A conversation"), talk.err
    assert talk.out.count("> ") >= 4
    write_jsonl(tmp_path / "in.jsonl", [{"prompt": "a film"}])
    files = (f"--prompts={tmp_path / 'in.jsonl'}", f"--out={tmp_path / 'out.jsonl'}")
    batch = run_script("generate", *stage, *files, f"--reward_model={tmp_path / 'reward'}")
    assert batch.code == 0, batch.err
    row = read_jsonl(tmp_path / "out.jsonl")[0]
    assert row.keys() == {"prompt", "response", "finished", "score"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt=a"], "give either --model, or --workdir and --stage"),
        (["--model=x"], "give --prompt, or --prompts and --out, or --interactive"),
        (["--model=x", "--prompt=a", "--interactive"], "give --prompt, or"),
        (["--model=x", "--prompts=a"], "give --prompt, or"),
        (["--model=x", "--prompt=a", "--out=b"], "give --prompt, or"),
        (["--model=x", "--reward_model=a"], "give --prompt, or"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, message):
    ended = run_script("generate", *flags)
    assert ended.code == 2 and ended.err.startswith(f"generate.py: {message}")


class Sampled(Exception):
    """A rollout was about to begin."""


def test_what_the_reward_model_cannot_read_is_refused_before_anything_is_sampled(
    tmp_path, model, monkeypatch
):
    asked, files = tmp_path / "in", {"prompts": tmp_path / "in", "out": tmp_path / "out"}
    write_jsonl(asked, [{"prompt": prompt} for prompt in WORDS])
    longest = max(len(model.tokenizer(prompt)["input_ids"]) for prompt in WORDS)
    stops = HOW | {"sampling": Sampling(response_length=10, eos_ids=(0, 40))}
    # (context, how, where scores are read, whether it fits)
    rows = [
        (longest + 10, HOW, "eos", True),
        (longest + 9, HOW, "eos", False),
        (longest + 11, stops, "eos", True),
        (longest + 10, stops, "eos", False),
        (longest + 10, stops, "last", True),
    ]

    def begins_to_sample(*_):
        raise Sampled

    monkeypatch.setattr("ppo_jax.inference.generate.compiled_rollout", begins_to_sample)
    for context, how, score_at, fits in rows:
        scorer = random_model("reward", max_length=context)
        with pytest.raises(Sampled if fits else ValueError) as error:
            respond_to_file(model, scorer, copies=1, score_at=score_at, **files, **how)
        if not fits:
            assert f"{longest}" in str(error.value)
    short = random_model("reward", max_length=10)
    message = "response_length must be below the reward model's 10 tokens, got 10"
    with pytest.raises(ValueError, match=message):
        respond_to_file(model, short, copies=1, **files, **HOW)
    with pytest.raises(ValueError, match="10 tokens, with an EOS put behind, got 9"):
        how = stops | {"sampling": Sampling(response_length=9, eos_ids=(0, 40))}
        respond_to_file(model, short, copies=1, **files, **how)


def test_the_best_responses_are_data_for_sft(tmp_path, model):
    """The highest score of those that ended, of a text or of messages."""
    scorer, asked = random_model("reward", max_length=160), tmp_path / "in.jsonl"
    write_jsonl(asked, [{"prompt": prompt} for prompt in WORDS])
    how = HOW | {"sampling": Sampling(response_length=10, eos_ids=(0, *range(40, 60)))}
    files = dict(prompts=asked, copies=4)
    respond_to_file(model, scorer, out=tmp_path / "all", **files, **how)
    respond_to_file(model, scorer, out=tmp_path / "best", keep_best=True, **files, **how)
    expected = []
    for prompt in WORDS:
        rows = [row for row in read_jsonl(tmp_path / "all") if row["prompt"] == prompt]
        if ended := [row for row in rows if row["finished"]]:
            best = max(ended, key=lambda row: row["score"])
            kept = {"completion": best["response"], "score": best["score"]}
            expected.append({"prompt": prompt, **kept})
    assert read_jsonl(tmp_path / "best") == expected and expected
    assert load_texts(tmp_path / "best", left_out=[])[0].text.startswith(WORDS[0])
    with pytest.raises(ValueError, match="the best responses are those of a reward model"):
        respond_to_file(model, None, out=tmp_path / "c", keep_best=True, **files, **how)


def test_the_best_response_to_messages_is_their_next_turn():
    user, answer = {"role": "user", "content": "well?"}, {"role": "assistant", "content": "old"}
    said = [
        {"response": "cut", "finished": False, "score": 9.0},
        {"response": "no", "finished": True, "score": 1.0},
        {"response": "first", "finished": True, "score": 2.0},
        {"response": "second", "finished": True, "score": 2.0},
    ]
    new = {"role": "assistant", "content": "first"}
    for row in ({"messages": [user, answer]}, {"prompt": [user]}):
        assert best_demonstrations([row], said, 4) == [{"messages": [user, new], "score": 2.0}]
    assert best_demonstrations([{"prompt": "a"}], said[:1], 1) == []
