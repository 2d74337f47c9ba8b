"""Exported stages: transformers loads them, with equal outputs, for every family."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from ppo_jax.algorithms.supervised import text_scores
from ppo_jax.config.run import ModelSettings
from ppo_jax.inference.generate import find_sampling, generate
from ppo_jax.io import huggingface as hf
from ppo_jax.io.stage_folder import Model, compute_as, load_model
from ppo_jax.io.tokenizers import load_tokenizer, set_declared_stops
from ppo_jax.models.build import policy_apply, reward_network
from ppo_jax.pipeline.export import export_stage, write_weights
from ppo_jax.rollout.sampling import Sampling
from tests.support import tiny
from tests.support.command_line import run_script
from tests.support.run_files import write_run
from tests.support.tiny_hf import (
    LENGTH,
    TINY_MODELS,
    UNCLASSIFIED,
    VOCAB,
    assert_same_tree,
    saver,
    torch,
)
from tests.support.tiny_stage import TEMPLATE, exported, random_model, word_tokenizer, write_stage

BIAS = 1.5  # of the reward heads


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saver(tmp_path_factory.mktemp)


@pytest.fixture
def workdir(tmp_path):
    return write_run(tmp_path / "run", config={})


def policy(saved, name, **tokens):
    config, params = hf.load_policy(saved(name)[1])
    tokenizer = word_tokenizer(VOCAB, **tokens)
    return Model(kind="policy", config=config, params=params, tokenizer=tokenizer)


def reward(saved, name, **tokens):
    model = policy(saved, name, **tokens)
    kernel = np.random.default_rng(1).normal(size=(model.config.embed_dim, 1)).astype(np.float32)
    head = {"kernel": kernel, "bias": np.array([BIAS], np.float32)}
    return dataclasses.replace(model, kind="reward", params={**model.params, "head": head})


def loaded(auto_class, folder, **how):
    """The model as transformers loads it, every tensor of the files used and none made up."""
    # Its grouped products of experts refuse odd widths.
    how = {"experts_implementation": "eager", **how}
    model, info = auto_class.from_pretrained(folder, output_loading_info=True, **how)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def architectures(folder):
    return json.loads((folder / "config.json").read_text())["architectures"]


def logits_of_both(model, theirs):
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, LENGTH))
    with torch.no_grad():
        out = theirs(input_ids=torch.tensor(tokens)).logits.float().numpy()
    mask = jnp.ones(tokens.shape, bool)
    return np.asarray(policy_apply(model.config, model.params, jnp.asarray(tokens), mask)), out


def scores_of_both(model, folder):
    """Scores of three texts of different lengths, each ended by EOS, by ours and by theirs."""
    theirs = loaded(transformers.AutoModelForSequenceClassification, folder)
    assert architectures(folder) == [type(theirs).__name__]
    tokenizer = load_tokenizer(folder)
    texts = ["w5 w6 w7 w8 w9", "w10", "w11 w12 w13"]
    rows = [text + tokenizer.eos_token for text in texts]
    batch = tokenizer(rows, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = theirs(**batch).logits[:, 0].float().numpy() + theirs.config.score_bias
    ids = model.tokenizer(rows, padding=False)["input_ids"]
    assert all(row[-1] == model.tokenizer.eos_token_id for row in ids)
    tokens, mask = np.zeros((3, 8), np.int32), np.zeros((3, 8), bool)
    for i, row in enumerate(ids):
        tokens[i, : len(row)], mask[i, : len(row)] = row, True
    network = reward_network(model.config)
    return np.asarray(text_scores(network, model.params, jnp.asarray(tokens), mask)), out


# --- equal outputs --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_policy_gives_equal_logits_and_loads_here_again(saved, workdir, name):
    model = policy(saved, name)
    out = exported(workdir, "ppo", model)
    theirs = loaded(transformers.AutoModelForCausalLM, out)
    assert theirs.dtype == torch.float32
    assert theirs.config.model_type == TINY_MODELS[name][0]
    assert architectures(out) == [type(theirs).__name__]
    ours, other = logits_of_both(model, theirs)
    assert np.abs(ours - other).max() <= 1e-4 < 1.0 < np.abs(ours).max()
    config, params = hf.load_policy(out)
    assert config == model.config
    assert_same_tree(params, model.params)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_policy_in_bfloat16_has_the_rounded_weights(saved, workdir, name):
    model = policy(saved, name)
    folder = exported(workdir, "ppo", model, dtype="bfloat16")
    theirs = loaded(transformers.AutoModelForCausalLM, folder)
    expected = saved(name)[0].state_dict()
    assert theirs.dtype == torch.bfloat16
    assert theirs.state_dict().keys() == expected.keys()
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, expected[key].to(torch.bfloat16)), key
    # The rounded weights, computed with in float32 by both.
    rounded = jax.tree.map(
        lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32), model.params
    )
    theirs = loaded(transformers.AutoModelForCausalLM, folder, dtype=torch.float32)
    ours, other = logits_of_both(dataclasses.replace(model, params=rounded), theirs)
    assert np.abs(ours - other).max() <= 1e-4 * max(1.0, np.abs(ours).max())


ONE_OF_EACH = {family: name for name, (family, _) in TINY_MODELS.items()}  # the last of a family


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ONE_OF_EACH.values())
def test_greedy_responses_are_those_of_transformers(saved, workdir, name, dtype):
    """Both read the exported folder; prompts of several lengths, so padded on the left."""
    model = policy(saved, name)
    folder = exported(workdir, "ppo", model, dtype=dtype)
    theirs = loaded(transformers.AutoModelForCausalLM, folder).float()
    prompts = ["w5 w6 w7 w8 w9 w10 w11", "w12", "w13 w14 w15"]
    again = load_model(folder)
    sampling = Sampling(response_length=8, eos_ids=())
    _, (rollout,) = generate(again, prompts, sampling=sampling, temperature=0, batch_size=3)
    how = dict(do_sample=False, max_new_tokens=8, min_new_tokens=8, eos_token_id=None)
    for prompt, ours in zip(prompts, rollout.response_tokens, strict=True):
        ids = torch.tensor([again.tokenizer(prompt)["input_ids"]])
        # Nothing ends a response here, and no token is chosen by less than rounding.
        out = theirs.generate(ids, **how, top_k=None, top_p=None, temperature=None, min_p=None)
        assert out[0, ids.shape[1] :].tolist() == np.asarray(ours).tolist()


CLASSIFIED = [name for name in TINY_MODELS if name not in UNCLASSIFIED]


@pytest.mark.parametrize("name", CLASSIFIED)
def test_a_reward_model_gives_equal_scores_with_right_padding(saved, workdir, name):
    model = reward(saved, name)
    ours, theirs = scores_of_both(model, exported(workdir, "reward", model))
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
    assert np.ptp(ours) > 0.1


@pytest.mark.parametrize("name", ["gpt2", "llama-biases", "qwen2", "qwen3"])
def test_a_reward_model_in_bfloat16_gives_nearly_equal_scores(saved, workdir, name):
    model = reward(saved, name)
    ours, theirs = scores_of_both(model, exported(workdir, "reward", model, dtype="bfloat16"))
    np.testing.assert_allclose(theirs, ours, atol=0.1 * np.abs(ours).max())


def test_layernorm_takes_up_the_bias_of_the_head_and_rmsnorm_leaves_it_over(saved, workdir):
    for name, bias in (("gpt2", 0.0), ("llama", BIAS)):
        run = write_run(workdir / name, config={})
        out = exported(run, "reward", reward(saved, name))
        assert json.loads((out / "config.json").read_text())["score_bias"] == bias


def test_scanned_layers_are_exported_as_the_unrolled_ones(saved, workdir):
    model = policy(saved, "qwen3")
    scanned = compute_as(model, ModelSettings(path="x", scan_layers=True))
    _, params = hf.load_policy(exported(workdir, "sft", scanned))
    assert_same_tree(params, model.params)


def test_every_file_may_be_read_by_those_who_may_read_a_new_one(saved, workdir):
    out = exported(workdir, "sft", policy(saved, "llama-biases"))
    (workdir / "new").touch()
    mode = (workdir / "new").stat().st_mode
    assert {path.name: path.stat().st_mode for path in out.iterdir()} == dict.fromkeys(
        (path.name for path in out.iterdir()), mode
    )


def test_large_models_are_written_in_shards(saved, workdir):
    model = policy(saved, "llama-biases")
    folder = exported(workdir, "sft", model)
    tensors = hf.params_to_hf(model.config, "llama", model.params)
    (folder / "model.safetensors").unlink()
    write_weights(folder, tensors, dtype="float32", shard_bytes=20_000)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all((folder / name).stat().st_size < 25_000 for name in files)
    index = json.loads((folder / hf.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert_same_tree(hf.load_policy(folder)[1], model.params)
    ours, theirs = logits_of_both(model, loaded(transformers.AutoModelForCausalLM, folder))
    assert np.abs(ours - theirs).max() <= 1e-4


# --- what lies beside the weights -----------------------------------------------------------------


def test_tokenizer_template_and_generation_config_are_those_of_the_run(saved, workdir):
    model = policy(saved, "qwen3", chat_template=TEMPLATE)
    settings = {"response_length": 7, "temperature": 0.5, "stop_tokens": ["w9"], "top_p": 0.75}
    out = exported(workdir, "ppo", model, **settings)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    text = "w4 w9 w60<eos>"
    assert tokenizer(text)["input_ids"] == model.tokenizer(text)["input_ids"] == [4, 9, 60, 0]
    turns = [{"role": "user", "content": "w5"}]
    said = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert said == "u:w5;a:"
    how = transformers.GenerationConfig.from_pretrained(out)
    assert (how.eos_token_id, how.pad_token_id, how.max_new_tokens) == ([0, 9], 0, 7)
    assert (how.do_sample, how.temperature, how.top_k, how.top_p) == (True, 0.5, 0, 0.75)
    theirs = loaded(transformers.AutoModelForCausalLM, out)
    torch.manual_seed(0)
    answers = theirs.generate(**tokenizer(["w5 w6"] * 64, return_tensors="pt"))[:, 2:]
    assert answers.shape[1] == 7 and (answers == 9).any()
    for row in answers.tolist():  # nothing after a stop token
        assert set(row[min([i for i, x in enumerate(row) if x in (0, 9)], default=7) + 1 :]) <= {0}


def test_what_ends_a_response_goes_with_the_model(saved, workdir):
    """What the base model declares stays with stage and export, and stop strings beside it."""
    model = policy(saved, "llama")
    set_declared_stops(model.tokenizer, ["w8"])
    out = exported(workdir, "ppo", model, stop_tokens=["w9", "w3 w4"])
    stage = find_sampling(str(workdir / "ppo"), load_model(workdir / "ppo").tokenizer)["sampling"]
    assert stage.eos_ids == (0, 8, 9) and stage.stop_strings.texts == ("w3 w4",)
    again = find_sampling(str(out), load_model(out).tokenizer, response_length=64)["sampling"]
    assert again == stage
    theirs = loaded(transformers.AutoModelForCausalLM, out)
    how = theirs.generation_config
    assert (how.eos_token_id, how.stop_strings) == ([0, 8, 9], ["w3 w4"])


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "qwen3"])
def test_the_tokenizer_that_transformers_chooses_is_the_same(workdir, family):
    changes = {
        "gpt2": tiny.SHAPES["gpt2"],
        "qwen2": {"qkv_bias": True},
        "qwen3": {"qk_norm": "head"},
    }
    model = random_model(template=TEMPLATE, **changes.get(family, {}))
    out = exported(workdir, "sft", model)
    assert json.loads((out / "config.json").read_text())["model_type"] == family
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    for text in ("a film of few words<|endoftext|>", " \n\tGrüße aus 東京, it's 4.5!"):
        assert tokenizer(text)["input_ids"] == model.tokenizer(text)["input_ids"]
    assert tokenizer.chat_template == TEMPLATE and tokenizer.eos_token_id == 0


@pytest.mark.parametrize("tokens", [{}, {"pad_token": "<eos>"}, {"pad_token": "w9"}])
def test_a_reward_model_gets_a_padding_token_that_ends_no_text(saved, workdir, tokens):
    model = reward(saved, "llama", **tokens)
    write_stage(workdir, "ppo", policy(saved, "llama"), stop_tokens=["w9"])
    out = exported(workdir, "reward", model)
    tokenizer = load_tokenizer(out)
    assert tokenizer.pad_token == "<|pad|>" and tokenizer.pad_token_id == VOCAB
    assert tokenizer.padding_side == "right"
    config = transformers.AutoConfig.from_pretrained(out)
    assert (config.pad_token_id, config.eos_token_id, config.vocab_size) == (VOCAB, 0, VOCAB + 1)


def test_a_padding_token_of_its_own_is_kept(saved, workdir):
    out = exported(workdir, "reward", reward(saved, "llama", pad_token="w9"))
    config = transformers.AutoConfig.from_pretrained(out)
    assert (config.pad_token_id, config.vocab_size) == (9, VOCAB)


# --- what is refused ------------------------------------------------------------------------------


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(saved, workdir, tmp_path):
    model = policy(saved, "llama")
    write_stage(workdir, "sft", model, num_steps=3)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="sft cannot be exported: it has 1 of 3 steps"):
        export_stage(workdir, "sft", tmp_path / "out")
    with pytest.raises(ValueError, match="run has no stage ppo; it has sft"):
        export_stage(workdir, "ppo", tmp_path / "out")
    with pytest.raises(ValueError, match="full must be a new or an empty folder"):
        export_stage(workdir, "sft", full)
    with pytest.raises(ValueError, match=r"dtype must be one of .*float16'"):
        export_stage(workdir, "sft", tmp_path / "out", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "run"]
    assert (full / "mine.txt").read_text() == "mine"


def test_a_failure_halfway_leaves_nothing(saved, workdir, monkeypatch):
    write_stage(workdir, "sft", policy(saved, "llama"))
    before = sorted(workdir.iterdir())

    def fail(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr("ppo_jax.pipeline.export.write_card", fail)
    with pytest.raises(OSError, match="no space left"):
        export_stage(workdir, "sft", workdir / "out")
    assert sorted(workdir.iterdir()) == before


def test_the_script_exports_into_an_empty_folder_and_refuses_a_full_one(saved, workdir):
    write_stage(workdir, "sft", policy(saved, "qwen2"))
    (workdir / "out").mkdir()
    flags = (f"--workdir={workdir}", "--stage=sft", f"--out={workdir / 'out'}", "--dtype=bfloat16")
    first, second = (run_script("export_hf", *flags) for _ in range(2))
    assert first.code == 0 and "its README.md says how to load it" in first.out
    assert hf.load_config(workdir / "out").qkv_bias
    assert second.code == 2 and "but it holds something already" in second.err
