"""Reward models from elsewhere: sequence classifications of transformers, with equal scores."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.algorithms.supervised import text_scores
from ppo_jax.io import huggingface as hf
from ppo_jax.io.stage_folder import load_model
from ppo_jax.models.build import reward_network
from ppo_jax.pipeline.export import export_stage
from tests.support.meshes import layout_of
from tests.support.tiny_hf import (
    LENGTH,
    TINY_MODELS,
    VOCAB,
    assert_same_tree,
    edit_config,
    edit_weights,
    torch,
    torch_model,
)
from tests.support.tiny_stage import random_model, word_tokenizer, write_stage
from tests.support.run_files import write_run

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
@pytest.mark.parametrize("name", TINY_MODELS)
def test_scores_equal_those_of_torch(saved, name, side, scan_layers):
    model, folder = saved(name)
    config, params = hf.load_reward_model(folder, scan_layers=scan_layers)
    ids, mask = texts(side)
    theirs = torch_scores(model, ids, mask)
    np.testing.assert_allclose(our_scores(config, params, ids, mask), theirs, rtol=1e-5, atol=1e-5)
    assert np.ptp(theirs) > 0.1


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_mesh_holds_the_same_numbers(saved, scan_layers):
    _, folder = saved("qwen3")
    _, host = hf.load_reward_model(folder, scan_layers=scan_layers)
    layout = layout_of((2, 2, 2))
    shardings = layout_of((2, 2, 1)).shardings if VOCAB % 2 else layout.shardings
    _, params = hf.load_reward_model(folder, scan_layers=scan_layers, shardings=shardings)
    assert_same_tree(jax.tree.map(np.asarray, params), host)
