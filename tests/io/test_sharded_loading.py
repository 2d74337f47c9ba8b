"""Models, checkpoints and stages are read straight into the pieces of a mesh, bit for bit."""

import json
import warnings

import jax
import numpy as np
import pytest

from ppo_jax.config.mesh import ROLLOUT_RULES, RULES, AxisRules
from ppo_jax.config.run import ModelSettings
from ppo_jax.io import huggingface as hf
from ppo_jax.io import tokenizers as vocabulary
from ppo_jax.io.checkpoints import Checkpoints, load_checkpoint_item, load_params, save_params
from ppo_jax.io.stage_folder import Model, begin_stage, load_model, load_source
from ppo_jax.models.build import policy_network
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.partition import split_params
from tests.support import chats
from tests.support.meshes import MESHES, layout_of
from tests.support.tiny_hf import assert_same_tree
from tests.support.weight_files import MODELS, SIZES, count_reads, saver


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saver(tmp_path_factory.mktemp)


def assert_laid_out(params, layout, host):
    """The arrays of the host's tree bit for bit, and each where the layout says."""
    assert_same_tree(jax.tree.map(np.asarray, params), host)
    expected = layout.shardings(host)
    assert jax.tree.map(lambda x: x.sharding, params) == expected
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}


# --- pretrained models ----------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_the_same_in_pieces_and_on_the_host(saved, name, mesh):
    folder, written, _ = saved(name)
    assert json.loads((folder / "config.json").read_text())["model_type"] == name.split("-")[0]
    assert_same_tree(hf.load_policy(folder)[1], written)
    for scan_layers in (False, True):
        for rules in (RULES, ROLLOUT_RULES):
            layout = layout_of(mesh, rules)
            config, host = hf.load_policy(folder, scan_layers=scan_layers)
            again, params = hf.load_policy(
                folder, scan_layers=scan_layers, shardings=layout.shardings
            )
            assert again == config
            assert_laid_out(params, layout, host)


def test_scanned_layers_may_be_cut_as_well(saved):
    folder, *_ = saved("gpt2")
    layout = layout_of((2, 2, 2), AxisRules(layers=("data",)))
    _, host = hf.load_policy(folder, scan_layers=True)
    _, params = hf.load_policy(folder, scan_layers=True, shardings=layout.shardings)
    assert params["layers"]["stack"]["mlp"]["up"]["kernel"].addressable_shards[0].data.shape[0] == 1
    assert_laid_out(params, layout, host)


def test_what_was_loaded_may_be_donated(saved):
    """The copies of a parameter have no memory in common that a program may write to."""
    folder, written, _ = saved("llama-tied")
    layout = layout_of((8, 1, 1))
    _, params = hf.load_policy(folder, shardings=layout.shardings)
    double = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree), donate_argnums=0)
    doubled = double(params)
    for x, y in zip(jax.tree.leaves(doubled), jax.tree.leaves(written), strict=True):
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(shard.data, 2 * y)


def test_a_mesh_that_does_not_fit_is_named_before_anything_is_read(saved, monkeypatch):
    folder, *_ = saved("llama")
    layout = layout_of((1, 1, 8), AxisRules(embed=("model",)))
    reads = count_reads(monkeypatch)
    with pytest.raises(ValueError, match="twice over the mesh axis model"):
        hf.load_policy(folder, shardings=layout.shardings)
    assert not reads


# --- checkpoints and stages -----------------------------------------------------------------------


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_checkpoints_are_restored_into_pieces(saved, tmp_path, mesh):
    params, layout = saved("qwen3")[1], layout_of(mesh)
    save_params(tmp_path / "params", params)
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save(3, {"policy_params": params, "kl_coef": np.float32(0.5)})
    checkpoints.close()
    assert_laid_out(load_params(tmp_path / "params", layout.shardings), layout, params)
    for step in (None, 3):
        field = load_checkpoint_item(
            tmp_path / "run", "policy_params", step, shardings=layout.shardings
        )
        assert_laid_out(field, layout, params)


def test_a_mesh_that_does_not_fit_is_no_damage_of_a_checkpoint(saved, tmp_path):
    params, layout = saved("qwen3")[1], layout_of((1, 1, 8), AxisRules(embed=("model",)))
    save_params(tmp_path / "params", params)
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save(3, {"params": params})
    checkpoints.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a step that is passed over is told in a warning
        for load in (
            lambda: load_params(tmp_path / "params", layout.shardings),
            lambda: load_checkpoint_item(tmp_path / "run", "params", shardings=layout.shardings),
        ):
            with pytest.raises(ValueError, match="^(params/)?embed/tokens: the rules shard it"):
                load()


@pytest.fixture(scope="module")
def tokenizer():
    return vocabulary.train_tokenizer(["a film of few words"] * 3, 304)


def trained_stage(folder, tokenizer, *, scan_layers):
    """A complete stage, of whose two layers the upper one is trained."""
    sizes = SIZES | {"vocab_size": 304, "num_layers": 2, "max_length": 32}
    config = ModelConfig(**sizes, scan_layers=scan_layers)
    network = policy_network(config)
    params = jax.tree.map(np.asarray, network.init(jax.random.key(0)))
    model = Model(kind="policy", config=config, params=params, tokenizer=tokenizer)
    parts = split_params(config, params, 1, 1)
    begin_stage(folder, model, parts, {"stage": "sft", "num_steps": 3, "settings": {}})
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(3, {"params": parts.trained})
    checkpoints.close()


@pytest.mark.parametrize("asked", [None, False, True])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_stage_is_loaded_into_pieces_and_stays_there(tmp_path, tokenizer, scan_layers, asked):
    trained_stage(tmp_path / "sft", tokenizer, scan_layers=scan_layers)
    layout, settings = layout_of((2, 2, 2)), None
    if asked is not None:
        settings = ModelSettings(path="x", dtype="bfloat16", scan_layers=asked, remat="dots")
    host = load_model(tmp_path / "sft", settings)
    model = load_model(tmp_path / "sft", settings, layout)
    assert model.config == host.config
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(host.params))
    assert_laid_out(model.params, layout, host.params)
    assert host.config.remat == ("none" if asked is None else "dots")
    if settings is not None:
        again = load_source("sft", tmp_path, "base", settings, layout)
        assert_laid_out(again.params, layout, host.params)


def test_a_pretrained_model_is_loaded_into_pieces(saved, tmp_path, monkeypatch):
    folder, *_ = saved("qwen2")
    layout = layout_of((2, 2, 2))
    settings = ModelSettings(path="x", scan_layers=True, remat="full")
    monkeypatch.setattr(vocabulary, "load_tokenizer", lambda path: chats.TOKENIZER)
    host = load_model(folder, settings)
    model = load_source("base", tmp_path, str(folder), settings, layout)
    assert model.config == host.config and model.config.remat == "full"
    assert_laid_out(model.params, layout, host.params)
