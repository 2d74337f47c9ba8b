"""The states of a text below the trained layers are computed once for SFT and the reward model."""

import jax
import numpy as np
import pytest

from ppo_jax.data import hidden_states
from ppo_jax.data.shared_states import FOLDER, SharedStates
from ppo_jax.pipeline import run as pipeline
from tests.support import tiny_run
from tests.support.finished_run import read_lines


def settings(num_layers=3, sft=(), reward=()):
    values = tiny_run.config()
    values["model"]["scratch"]["num_layers"] = num_layers
    values["sft"] |= {"num_epochs": 1.0} | dict(sft)
    values["reward"] |= {"num_epochs": 1.0} | dict(reward)
    return {name: values[name] for name in ("prepare", "model", "sft", "reward")}


def counted(values, folder, monkeypatch):
    """(texts whose states each stage computed, whether the states of SFT were on disk)."""
    computed, were_kept = [], []
    packed_outputs, load = hidden_states.packed_outputs, SharedStates.load

    def count(texts, run, context, layout, used):
        found = list(packed_outputs(texts, run, context, layout, used))
        numbers = texts.segment_ids
        computed.append(sum(1 if numbers is None else numbers[row].max() for row, _ in found))
        return found

    def loaded(states):
        were_kept.append(states.path.is_file())
        return load(states)

    monkeypatch.setattr(hidden_states, "packed_outputs", count)
    monkeypatch.setattr(SharedStates, "load", loaded)
    pipeline.run(values, folder)
    assert not (folder / FOLDER).exists()
    return computed, any(were_kept)


@pytest.mark.parametrize(
    ("sft", "reward"),
    [
        ({}, {}),
        ({}, {"trainable": "2"}),
        ({}, {"num_layers": 2}),
        ({"packing": True}, {"trainable": "2"}),
    ],
    ids=["one layer", "a lower one", "a model of fewer layers", "packed"],
)
def test_states_of_a_text_are_computed_once(tmp_path, monkeypatch, sft, reward):
    computed, were_kept = counted(settings(sft=sft, reward=reward), tmp_path, monkeypatch)
    # SFT: to train on, to validate on; the reward model: the same, and the texts to score 0.
    assert computed == [48, 16, 0, 0, 0] and were_kept


@pytest.mark.parametrize(
    ("sft", "reward"),
    [
        ({"trainable": "2"}, {}),
        ({"hidden_cache_gb": 0.0}, {}),
        ({"trainable": "all"}, {}),
    ],
    ids=["SFT trains one of the layers", "states that do not fit", "no frozen layer"],
)
def test_states_that_sft_has_not_are_computed(tmp_path, monkeypatch, sft, reward):
    computed, were_kept = counted(settings(sft=sft, reward=reward), tmp_path, monkeypatch)
    assert computed[-3:] == [48, 16, 16] and not were_kept


@pytest.mark.parametrize("change", ["a layer", "the embeddings"])
def test_states_of_other_layers_are_not_read(tmp_path, monkeypatch, change):
    """SFT's frozen layers are the base model's; a reward model of another one has others."""
    pipeline.run(settings(), tmp_path / "a", only="sft")
    assert len(list((tmp_path / "a" / FOLDER).iterdir())) == 1

    def changed(path, values):
        values = jax.tree.map(np.array, values)
        leaf = values["layers"]["0"] if change == "a layer" else values["embed"]
        jax.tree.leaves(leaf)[0].flat[0] += 1.0
        return values

    from ppo_jax.training import reward as module

    freeze = module.freeze
    monkeypatch.setattr(
        module,
        "freeze",
        lambda params, *how: freeze((changed("trunk", params[0]), params[1]), *how),
    )
    computed, were_kept = counted(settings(), tmp_path / "a", monkeypatch)
    assert computed == [48, 16, 16] and not were_kept


def test_the_loss_is_that_without_shared_states(tmp_path, monkeypatch):
    values = settings(reward={"trainable": "2"})
    pipeline.run(values, tmp_path / "shared")
    monkeypatch.setattr(SharedStates, "load", lambda states: None)
    pipeline.run(values, tmp_path / "alone")
    names = ("sft/loss", "reward_model/loss")

    def losses(folder):
        return [row[n] for row in read_lines(folder / "metrics.jsonl") for n in names if n in row]

    shared, alone = losses(tmp_path / "shared"), losses(tmp_path / "alone")
    assert len(shared) == 12
    np.testing.assert_allclose(shared, alone, rtol=1e-4)
