"""Reward models from elsewhere: sequence classifications of transformers, with equal scores."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers
from safetensors.numpy import load_file, save_file

from ppo_jax.algorithms.supervised import text_scores
from ppo_jax.config.run import ModelSettings
from ppo_jax.evaluation.judges import NamedJudge, check_judge, rate_label
from ppo_jax.inference.responses import Responses
from ppo_jax.inference.score import encode_responses, score_responses, score_texts
from ppo_jax.io import huggingface as hf
from ppo_jax.io.model_spec import read_shape, reread_reason
from ppo_jax.io.stage_folder import Model, load_model
from ppo_jax.io.tokenizers import load_tokenizer
from ppo_jax.models.build import reward_network
from tests.support import tiny
from tests.support.meshes import layout_of
from tests.support.run_files import write_run
from tests.support.tiny_hf import (
    LENGTH,
    MIXED_LAYERS,
    TINY_MODELS,
    UNCLASSIFIED,
    VOCAB,
    assert_same_tree,
    edit_config,
    edit_weights,
    torch,
    torch_model,
)
from tests.support.tiny_stage import exported, random_model, word_tokenizer

PADDING = VOCAB - 1
CLASSIFIER = dict(task="SequenceClassification", num_labels=1, pad_token_id=PADDING)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> (torch model, its folder with a tokenizer), each made once."""
    made = {}

    def get(name, **changes):
        key = name, *changes.items()
        if key not in made:
            folder = tmp_path_factory.mktemp(name)
            model = torch_model(name, **{**CLASSIFIER, **changes})
            model.save_pretrained(folder)
            word_tokenizer(VOCAB).save_pretrained(folder)
            made[key] = model, folder
        return made[key]

    return get


def texts(side):
    """(ids, mask) of four texts of 3 to LENGTH tokens; none has the padding token in it."""
    rng = np.random.default_rng(0)
    lengths = np.array([LENGTH, 3, 11, LENGTH - 1])
    mask = np.arange(LENGTH) < lengths[:, None]
    mask = mask if side == "right" else mask[:, ::-1]
    ids = rng.integers(1, PADDING, (len(lengths), LENGTH))
    return np.where(mask, ids, PADDING), mask


def torch_scores(model, ids, mask):
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    with torch.no_grad():
        return model(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask.astype(np.int64)),
            position_ids=torch.tensor(positions),
        ).logits.numpy()[:, 0]


def our_scores(config, params, ids, mask):
    network = reward_network(config)
    return np.asarray(text_scores(network, params, jnp.asarray(ids, jnp.int32), jnp.asarray(mask)))


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [name for name in TINY_MODELS if name not in UNCLASSIFIED])
def test_scores_equal_those_of_torch(saved, name, side, scan_layers):
    model, folder = saved(name)
    scanned = scan_layers and name not in MIXED_LAYERS
    config, params = hf.load_reward_model(folder, scan_layers=scanned)
    ids, mask = texts(side)
    theirs = torch_scores(model, ids, mask)
    np.testing.assert_allclose(our_scores(config, params, ids, mask), theirs, rtol=1e-5, atol=1e-5)
    assert np.ptp(theirs) > 0.1


@pytest.mark.parametrize("name", UNCLASSIFIED)
def test_scores_of_a_family_without_a_classification_are_of_its_last_states(tmp_path, name):
    """No factor of the logits is in them: transformers has it beside the head of tokens."""
    model = torch_model(name)
    model.save_pretrained(tmp_path)
    head = np.random.default_rng(0).normal(size=(1, model.config.hidden_size)).astype(np.float32)
    tensors = load_file(tmp_path / "model.safetensors") | {"score.weight": head}
    tensors.pop("lm_head.weight", None)
    save_file(tensors, tmp_path / "model.safetensors")
    names = [type(model).__name__.replace("CausalLM", "SequenceClassification")]
    folder = tmp_path / "classifier"
    folder.mkdir()
    edit_config(tmp_path, folder, architectures=names, num_labels=1, pad_token_id=PADDING)
    ids, mask = texts("right")
    with torch.no_grad():
        states = model.model(torch.tensor(ids), torch.tensor(mask.astype(np.int64)))[0].numpy()
    theirs = states[np.arange(len(ids)), mask.sum(axis=1) - 1] @ head[0]
    ours = our_scores(*hf.load_reward_model(folder), ids, mask)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification"])
def test_the_kind_of_problem_changes_no_score(saved, problem_type):
    model, folder = saved("qwen2")
    other, elsewhere = saved("qwen2", problem_type=problem_type)
    assert other.config.problem_type == problem_type != model.config.problem_type
    assert_same_tree(*(hf.load_reward_model(x)[1] for x in (folder, elsewhere)))
    ids, mask = texts("right")
    np.testing.assert_array_equal(*(torch_scores(x, ids, mask) for x in (model, other)))


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("mesh", [(2, 2, 2), (1, 8, 1)], ids=str)
def test_a_mesh_holds_the_same_numbers(tmp_path, mesh, scan_layers):
    """Read from several files in half precision."""
    sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_key_value_heads=8)
    model = torch_model("llama-biases", **CLASSIFIER, **sizes, num_attention_heads=8)
    model.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    how = dict(scan_layers=scan_layers)
    _, host = hf.load_reward_model(tmp_path, **how)
    np.testing.assert_array_equal(
        host["head"]["kernel"][:, 0], model.score.weight[0].detach().float().numpy()
    )
    layout = layout_of(mesh)
    _, params = hf.load_reward_model(tmp_path, shardings=layout.shardings, **how)
    leaves = zip(jax.tree.leaves(params), jax.tree.leaves(layout.shardings(params)), strict=True)
    assert all(leaf.sharding == sharding for leaf, sharding in leaves)
    assert_same_tree(jax.tree.map(np.asarray, params), host)


# --- our own exports ------------------------------------------------------------------------------


FAMILIES = {
    "gpt2": tiny.SHAPES["gpt2"],
    "llama": tiny.SHAPES["llama"],
    "qwen2": dict(qkv_bias=True),
    "qwen3": dict(qk_norm="head", head_dim=16, tie_embeddings=False),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_reward_model_loads_here_again_and_reads_the_policys_tokens(tmp_path, family):
    model = random_model("reward", **FAMILIES[family])
    assert model.params["head"]["bias"][0] != 0
    out = exported(write_run(tmp_path / "run", config={}), "reward", model)
    again = load_model(out)
    assert again.kind == "reward" and again.config.vocab_size == model.config.vocab_size + 1
    words = ["a film", "few words of a film", "of"]
    np.testing.assert_allclose(score_texts(again, words), score_texts(model, words), atol=1e-5)
    assert len(again.tokenizer) == len(model.tokenizer) + 1  # its padding
    spec = read_shape(out, ModelSettings(path="x"))
    for scorer in (again, spec):
        assert scorer.padding_id == again.tokenizer.pad_token_id
        assert not reread_reason(random_model(), scorer)
    if family != "gpt2":
        assert_same_tree(again.params["head"], model.params["head"])


# --- where a score is read ------------------------------------------------------------------------


def own_tokenizer(folder):
    """A tokenizer of words that puts <s> before a text, and whose EOS is </s>."""
    words = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


PROMPTS = ["w5 w6", "w7", "w8 w9 w10 w11"]
RESPONSES = [" w12 w13", " w14", " w15 w16 w17"]


@pytest.mark.parametrize("pad_token_id", [None, 1, PADDING])
def test_text_is_scored_where_transformers_reads_it(tmp_path, pad_token_id):
    """With EOS for padding before EOS, with another at EOS; one by one where there is none."""
    model = torch_model("llama", **CLASSIFIER | {"pad_token_id": pad_token_id})
    model.save_pretrained(tmp_path)
    tokenizer, ours = own_tokenizer(tmp_path), load_model(tmp_path)
    whole = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]

    def theirs(texts):
        batch = [tokenizer(text, return_tensors="pt") for text in texts]
        with torch.no_grad():
            return [model(**row).logits.item() for row in batch]

    stopped = theirs([text + "</s>" for text in whole])
    cut_off = theirs(whole)
    how = dict(rtol=1e-5, atol=1e-5)
    assert np.allclose(stopped, cut_off, **how) == (pad_token_id == 1)
    np.testing.assert_allclose(score_texts(ours, whole), stopped, **how)
    for ended in (True, False):
        scores = score_responses(ours, PROMPTS, RESPONSES, [ended] * 3)
        np.testing.assert_allclose(scores, stopped if ended else cut_off, **how)


def test_a_response_is_read_with_eos_where_it_ended_and_without_where_it_was_cut_off(tmp_path):
    model = Model(
        kind="reward",
        config=tiny.model_config(vocab_size=VOCAB, max_length=8),
        params={},
        tokenizer=own_tokenizer(tmp_path),
    )

    def rows(*args):
        encoded, too_long = encode_responses(*args, model)
        pairs = zip(encoded.tokens, encoded.mask, strict=True)
        return [ids[mask].tolist() for ids, mask in pairs], too_long.tolist()

    found, too_long = rows(PROMPTS, RESPONSES, [True, False, True])
    assert found[:2] == [[0, 5, 6, 12, 13, 1], [0, 7, 14]]
    # The oldest tokens are left out, but for <s>: eight of nine are read.
    assert found[2] == [0, 9, 10, 11, 15, 16, 17, 1] and too_long == [False, False, True]
    assert rows(["w5"], [" w6 </s>"], [True])[0] == [[0, 5, 6, 1]]  # not twice
    assert rows(["<s> w5"], [""], [False])[0] == [[0, 5]]
    assert rows([""], [""], [False])[0] == [[0]]


def test_why_a_reward_model_reads_text(tmp_path):
    policy = Model(kind="policy", config=None, params={}, tokenizer=word_tokenizer(VOCAB))

    def reason(tokenizer, padding_id=None):
        reward = Model(
            kind="reward", config=None, params={}, tokenizer=tokenizer, padding_id=padding_id
        )
        return reread_reason(policy, reward)

    for padding_id in (None, PADDING):
        assert reason(policy.tokenizer, padding_id) == reason(word_tokenizer(VOCAB)) == ""
    assert reason(word_tokenizer(VOCAB + 1)) == ""  # more tokens, the same ids
    assert "of its own" in reason(word_tokenizer(VOCAB - 1))
    assert "of its own" in reason(own_tokenizer(tmp_path))
    assert "its padding is EOS" in reason(word_tokenizer(VOCAB), padding_id=0)
    ends = word_tokenizer(VOCAB)
    ends.eos_token = "w3"
    assert "end with another token" in reason(ends)
    leading = word_tokenizer(VOCAB)
    leading.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="w2 $A", special_tokens=[("w2", 2)]
    )
    assert "begin with other tokens" in reason(leading)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [3, 5])
def test_several_labels_are_refused_by_their_number(saved, labels):
    _, folder = saved("llama", num_labels=labels)
    for load in (hf.load_config, hf.load_reward_model, hf.load_policy, load_model):
        with pytest.raises(
            ValueError, match=rf"^{folder}/config.json: num_labels must.*got {labels}$"
        ):
            load(folder)


@pytest.mark.parametrize(("labels", "label"), [(2, "LABEL_1"), (3, "LABEL_0")])
def test_a_classifier_with_several_labels_judges_by_the_log_odds_of_one(saved, labels, label):
    """Those of torch, of texts without a stop token."""
    model, folder = saved("llama", num_labels=labels)
    judge = NamedJudge(name="label", kind="model", source=str(folder), label=label)
    prompts, texts = ["w1 w2 w3", "w4"], [" w5 w6", " w7 w8 w9"]
    none = np.zeros(2, bool)
    responses = Responses(texts=texts, rows=[], lengths=none, logprobs=none, ended=none)
    check_judge(judge, "")
    got = rate_label(judge)(None, prompts, responses)
    tokenizer, number = load_tokenizer(folder), int(label[-1])
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        ids = torch.tensor([tokenizer(prompt + text).input_ids])
        with torch.no_grad():
            p = torch.softmax(model(input_ids=ids).logits[0], dim=0)[number]
        assert got[i] == pytest.approx(float(torch.log(p / (1 - p))), abs=1e-4)
    for wrong in ("LABEL_9", "label_1"):
        with pytest.raises(ValueError, match=rf"must have several labels, '{wrong}' among them"):
            hf.load_classifier(folder, wrong)
    with pytest.raises(ValueError, match="must have several labels, 'LABEL_0' among them"):
        hf.load_classifier(saved("llama")[1], "LABEL_0")


def test_labels_that_the_config_does_not_tell_are_seen_in_the_head(saved, tmp_path):
    """Two labels are what transformers takes for granted and does not write."""
    _, folder = saved("llama", num_labels=2)
    assert not {"id2label", "num_labels"} & hf.read_config_json(folder).keys()
    with pytest.raises(ValueError, match=r"score\.weight has shape \(2, 32\), but one score"):
        hf.load_reward_model(folder)
    one = edit_config(saved("llama")[1], tmp_path, id2label=None, label2id=None)
    assert_same_tree(*(hf.load_reward_model(x)[1] for x in (one, saved("llama")[1])))


@pytest.mark.parametrize("extra", ["score.bias", "lm_head.weight", "v_head.summary.weight"])
def test_a_tensor_that_a_reward_model_does_not_have_is_named(saved, tmp_path, extra):
    def add(tensors):
        tensors[extra] = np.zeros((1, 32), np.float32)

    with pytest.raises(ValueError, match=rf"hold 1 tensors .*{re.escape(extra)}"):
        hf.load_reward_model(edit_weights(saved("llama")[1], tmp_path, add))


def test_pickled_weights_are_converted_as_a_classifier(saved, tmp_path):
    folder = edit_config(saved("llama")[1], tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="AutoModelForSequenceClassification as M"):
        hf.load_reward_model(folder)


def test_a_missing_head_is_named(saved, tmp_path):
    folder = edit_weights(saved("gpt2")[1], tmp_path, lambda x: x.pop("score.weight"))
    with pytest.raises(ValueError, match=r"lack 1 tensors: score\.weight"):
        hf.load_reward_model(folder)


def test_a_reward_model_is_no_policy_and_a_policy_no_reward_model(saved, tmp_path):
    _, folder = saved("llama")
    with pytest.raises(ValueError, match=r"must be a policy.*LlamaForSequenceClass.*reward"):
        hf.load_policy(folder)
    torch_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must be a reward model.*LlamaForCausalLM.*policy"):
        hf.load_reward_model(tmp_path)


@pytest.mark.parametrize("bias", ["1.5", True, None, [1.0], float("nan"), float("inf")])
def test_a_constant_that_is_no_number_is_refused(saved, tmp_path, bias):
    folder = edit_config(saved("llama")[1], tmp_path)
    raw = hf.read_config_json(folder) | {"score_bias": bias}
    with pytest.raises(ValueError, match="score_bias must be a number"):
        hf.score_bias(raw)


@pytest.mark.parametrize("token", ["0", [0], True, 2.5])
def test_a_padding_that_is_no_token_is_refused_with_the_folder(saved, tmp_path, token):
    folder = edit_config(saved("llama")[1], tmp_path, pad_token_id=token)
    with pytest.raises(ValueError, match=rf"{folder}/config.json: pad_token_id must"):
        read_shape(folder, ModelSettings(path="x"))
    with pytest.raises(ValueError, match="pad_token_id must be a token's id"):
        load_model(folder)


def test_another_family_is_told_the_supported_ones(saved, tmp_path):
    names = ["BertForSequenceClassification"]
    folder = edit_config(saved("llama")[1], tmp_path, model_type="bert", architectures=names)
    with pytest.raises(ValueError, match=r"'bert' is not supported; choose from \[.*'gpt2'"):
        hf.load_reward_model(folder)
