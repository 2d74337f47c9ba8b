"""Whole runs with a reward model that is none of ours: its own tokenizer, width and depth."""

import json
import shutil

import numpy as np
import pytest

from ppo_jax.data.records import write_jsonl
from ppo_jax.distributed.trees import named_leaves
from ppo_jax.io.checkpoints import load_checkpoint_item
from ppo_jax.io.stage_folder import describe_stage
from ppo_jax.io.tokenizers import load_tokenizer, train_tokenizer
from ppo_jax.pipeline import run as pipeline
from ppo_jax.pipeline.export import export_stage
from tests.support import tiny_run, two_processes
from tests.support.command_line import run_script
from tests.support.run_files import read_jsonl
from tests.support.tiny_hf import torch, torch_model

# Some responses end and some are cut off.
STOPS = dict(stop_tokens=list("abcdefghijklmnopqrstuvwxyz"), num_samples=6)
STATE = ("policy_params", "value_params", "opt_state")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run up to its reward model; nothing may change it."""
    folder = tmp_path_factory.mktemp("run")
    pipeline.run(tiny_run.config(), folder, only=["sft", "reward"])
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """(torch model, its folder): three layers of width 48 with a tokenizer of other words."""
    folder = tmp_path_factory.mktemp("classifier")
    texts = [f"my {word} film had a {word} end" for word in tiny_run.GOOD + tiny_run.BAD] * 3
    tokenizer = train_tokenizer(texts, 290)
    size = dict(vocab_size=len(tokenizer), hidden_size=48, num_hidden_layers=3)
    labels = dict(num_labels=1, pad_token_id=5)
    model = torch_model("qwen3", "SequenceClassification", **size, **labels)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, folder


def torch_score(classifier, text):
    model, folder = classifier
    with torch.no_grad():
        return model(**load_tokenizer(folder)(text, return_tensors="pt")).logits.item()


def kinds_of_scores(rows, classifier):
    """The scores of responses are those of transformers: without EOS, or with one behind them."""
    kinds = set()
    for row in rows:
        text = row["prompt"] + row["response"]
        scores = {
            kind: torch_score(classifier, text + end)
            for kind, end in (("cut off", ""), ("ended", "<|endoftext|>"))
        }
        distances = {kind: abs(score - row["score"]) for kind, score in scores.items()}
        assert min(distances.values()) < 1e-4 < max(distances.values())
        kinds.add(min(distances, key=distances.get))
    return kinds


def settings(workdir, reward_model, **ppo):
    """PPO on the policy of a run, with a checkpoint every three of six iterations."""
    values = tiny_run.on_base(
        workdir, ppo={"init_from": str(workdir / "sft"), "reward_model": str(reward_model)}
    )
    values["ppo"] |= ppo
    values["ppo"]["optimizer"] |= {"schedule": "constant"}
    return values


def metrics(folder):
    """The metrics of every iteration, but for times."""
    rows = [row for row in read_jsonl(folder / "metrics.jsonl") if row["stage"] == "ppo"]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def state(folder):
    parts = {x: load_checkpoint_item(folder / "ppo" / "checkpoints", x) for x in STATE}
    return {name: np.asarray(leaf) for name, leaf in named_leaves(parts).items()}


@pytest.fixture(scope="module")
def finished(workdir, classifier, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ppo")
    values = settings(workdir, classifier[1], **STOPS)
    values["evaluate"] = tiny_run.on_base(workdir, evaluate={})["evaluate"]
    pipeline.run(values, folder)
    return folder


def test_responses_have_the_scores_of_transformers_for_their_text(finished, classifier):
    """With EOS where a response ended and without where it was cut off."""
    rows = read_jsonl(finished / "samples.jsonl")
    assert kinds_of_scores(rows, classifier) == {"cut off", "ended"}


def test_the_evaluation_scores_by_its_tokenizer(finished, classifier):
    sample = json.loads((finished / "results.json").read_text())["samples"][0]
    theirs = torch_score(classifier, sample["prompt"] + sample["ppo"] + "<|endoftext|>")
    np.testing.assert_allclose(sample["scores"]["ppo"], theirs, atol=1e-4)


def test_a_run_that_goes_on_ends_bit_for_bit_as_one_that_was_not_stopped(
    finished, workdir, classifier, tmp_path
):
    for num_iterations in (3, 6):
        changes = dict(
            stop_tokens=list("abcdefghijklmnopqrstuvwxyz"), num_iterations=num_iterations
        )
        pipeline.run(settings(workdir, classifier[1], **changes), tmp_path)
    assert metrics(tmp_path) == metrics(finished) and len(metrics(finished)) == 6
    ours, theirs = state(tmp_path), state(finished)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)


@pytest.mark.slow
def test_a_run_on_eight_devices_and_one_of_two_processes_is_that_of_one_device(
    workdir, classifier, tmp_path, all_devices
):
    values = settings(workdir, classifier[1], rollout_batch_size=16, num_iterations=3)
    pipeline.run(values, tmp_path / "one")
    values["mesh"] = two_processes.CUBE
    pipeline.run(values, tmp_path / "eight")
    processes = two_processes.start(values, tmp_path / "two")
    for code, output in two_processes.finish(processes):
        assert code == 0, output
    one = tmp_path / "one"
    for other in (tmp_path / "eight", tmp_path / "two"):
        for name in ("reward/score_mean", "value/loss", "kl/ref"):
            ours, theirs = ([row[name] for row in metrics(folder)] for folder in (one, other))
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
        first, same = (read_jsonl(folder / "samples.jsonl")[:3] for folder in (one, other))
        assert [row["response"] for row in first] == [row["response"] for row in same]


def test_the_table_and_the_dry_run_say_what_is_read(workdir, classifier, tmp_path, capsys):
    pipeline.dry_run(settings(workdir, classifier[1]), tmp_path)
    out = capsys.readouterr().out
    assert "reward model          a reward model of " in out and "3 layers x 48, 2" in out
    assert "text, as it has a tokenizer of its own: 8 responses an iteration are decoded" in out
    assert "critic starts as      the policy with a head of zeros" in out
    assert "ppo: the reward model reads ⟦...⟧ by its own tokenizer\n  prompt 1: " in out
    assert "prompts have" not in out
    pipeline.dry_run(settings(workdir, workdir / "reward"), tmp_path)
    out = capsys.readouterr().out
    assert "by its own tokenizer" not in out and "reward model reads" not in out


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        (dict(reference_responses=3), "20 responses"),  # to each of four prompts, besides eight
        (dict(advantage="remax"), "12 responses"),
        (dict(advantage="rloo", max_rollouts=3), "at most 24 responses"),
    ],
)
def test_all_responses_that_are_tokenised_again_are_counted(
    workdir, classifier, tmp_path, capsys, chosen, told
):
    values = settings(workdir, classifier[1], samples_per_prompt=2, **chosen)
    pipeline.dry_run(values, tmp_path)
    assert f"tokenizer of its own: {told} an iteration are decoded" in capsys.readouterr().out


def test_what_it_cannot_see_of_the_prompts_is_told(workdir, classifier, tmp_path, capsys):
    policy, reward = tmp_path / "policy", tmp_path / "reward"
    for source, folder, length in ((workdir / "base", policy, 48), (classifier[1], reward, 16)):
        folder.mkdir()
        for path in source.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(raw | {"max_position_embeddings": length}))
    tokenizer = load_tokenizer(policy)
    raw = json.loads((policy / "tokenizer.json").read_text())
    word = next(x for x in raw["model"]["vocab"] if len(x) > 3 and x.isalpha())
    tokenizer.add_special_tokens({"additional_special_tokens": [word]})
    tokenizer.save_pretrained(policy)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"the {word} is"}, {"prompt": "a"}])
    values = settings(workdir, reward, prompts=str(tmp_path / "prompts.jsonl"))
    values["ppo"]["init_from"] = str(policy)
    pipeline.dry_run(values, tmp_path / "run")
    out = capsys.readouterr().out
    assert f"ppo: the prompts have {word}, which the reward model's tokenizer does not know" in out
    assert "ppo: 1 of 2 prompts have over 8 tokens of the reward model's" in out


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"critic_init_from": "reward_model"}, "critic_init_from must be 'policy' or ''.*own"),
        ({"score_at": "last"}, "ppo.score_at must be 'eos', got 'last'"),
        ({"value_trainable": "3"}, "ppo.value_trainable must be at most 2"),
        ({"response_length": 64, "max_prompt_length": 4}, "at most 48"),
    ],
    ids=str,
)
def test_what_does_not_go_with_it_is_refused(workdir, classifier, tmp_path, changes, match):
    with pytest.raises(ValueError, match=match):
        pipeline.run(settings(workdir, classifier[1], **changes), tmp_path)
    assert not (tmp_path / "ppo").exists()


# --- our own exports, and models to go on from ----------------------------------------------------


def test_an_export_of_our_own_gives_the_numbers_of_its_stage(workdir, tmp_path):
    """Scores and critic: it reads the policy's tokens."""
    export_stage(workdir, "reward", tmp_path / "out")
    for name, reward_model in (("stage", workdir / "reward"), ("export", tmp_path / "out")):
        pipeline.run(settings(workdir, reward_model, num_iterations=2), tmp_path / name)
    stage, export = (metrics(tmp_path / name) for name in ("stage", "export"))
    for ours, theirs in zip(stage, export, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"stage"}:
            np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-3, atol=1e-4, err_msg=key)


def test_reward_training_goes_on_from_a_classifier(workdir, classifier, tmp_path):
    values = tiny_run.on_base(workdir, reward={"init_from": str(classifier[1])})
    pipeline.run(values, tmp_path)
    description = describe_stage(tmp_path / "reward")
    assert description["kind"] == "reward" and description["model"]["num_layers"] == 3
    first = read_jsonl(tmp_path / "metrics.jsonl")[0]["reward_model/validation_accuracy"]
    scores = {1: [], -1: []}
    for text, ratings in tiny_run.sentences("unseen"):
        scores[int(np.sign(ratings[0]))].append(torch_score(classifier, text + "<|endoftext|>"))
    right = np.array(scores[1])[:, None] > np.array(scores[-1])
    assert right.size == 64 and first == right.mean() != 0.5


@pytest.mark.parametrize("field", ["model.path", "ppo.init_from"])
def test_a_classifier_is_no_policy(workdir, classifier, tmp_path, field):
    values = settings(workdir, workdir / "reward")
    section, name = field.split(".")
    values[section][name] = str(classifier[1])
    values["ppo"]["init_from"] = "base" if section == "model" else str(classifier[1])
    with pytest.raises(ValueError, match=f"{field} must be a policy, got '{classifier[1]}'"):
        pipeline.run(values, tmp_path / "run")


def test_generate_scores_by_a_classifier_with_eos_where_a_response_ended(
    workdir, classifier, tmp_path
):
    policy = tmp_path / "policy"
    shutil.copytree(workdir / "base", policy)
    ids = load_tokenizer(policy).convert_tokens_to_ids(STOPS["stop_tokens"])
    (policy / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    write_jsonl(tmp_path / "in.jsonl", [{"prompt": f"the {thing} is"} for thing in tiny_run.THINGS])
    files = (f"--prompts={tmp_path / 'in.jsonl'}", f"--out={tmp_path / 'out.jsonl'}")
    model = (f"--model={policy}", f"--reward_model={classifier[1]}", "--response_length=8")
    done = run_script("generate", *model, *files)
    assert done.code == 0, done.err
    assert kinds_of_scores(read_jsonl(tmp_path / "out.jsonl"), classifier) == {"cut off", "ended"}
