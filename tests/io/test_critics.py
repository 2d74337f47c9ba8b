"""The critic of a PPO stage comes back whole, whatever of it was trained and where it started."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from ppo_jax.config.run import ModelSettings
from ppo_jax.core.network import merge_params
from ppo_jax.io import tokenizers as vocabulary
from ppo_jax.io.checkpoints import Checkpoints
from ppo_jax.io.critics import FROZEN, keep_critic, load_critic
from ppo_jax.io.model_spec import read_critic_shape
from ppo_jax.io.stage_folder import Model, begin_stage, describe_stage
from ppo_jax.models.build import policy_network, value_network
from ppo_jax.models.lora import init_lora, merge_lora
from ppo_jax.models.partition import layer_range, split_params
from tests.support import tiny

SETTINGS = ModelSettings(path="nowhere", dtype="float32")


def host(tree):
    return jax.tree.map(np.asarray, tree)


def begun(folder, trainable, trunk, scan_layers=False, adapters=False):
    """A PPO stage of one step whose policy trains its top layer; (its folder, its critic whole)."""
    tokenizer = vocabulary.train_tokenizer(["a film of few words"] * 3, 300)
    config = tiny.model_config(vocab_size=300, num_layers=3, scan_layers=scan_layers)
    params = host(policy_network(config).init(jax.random.key(0)))
    model = Model(kind="policy", config=config, params=params, tokenizer=tokenizer)
    parts = split_params(config, params, 1, 2)
    begin_stage(folder, model, parts, {"stage": "ppo", "num_steps": 1, "settings": {}})
    value = host(tiny.random_params(value_network(config), 1))
    if trunk:  # which is the policy's
        lower = layer_range(config, params["layers"], 0, trunk)
        upper = layer_range(config, value["layers"], trunk, 3)
        layers = host(merge_params({"layers": lower}, {"layers": upper}))
        value = {**value, **layers, "embed": params["embed"]}
    if adapters:
        how = dict(targets=("query",), rank=2)
        lora = host(init_lora(jax.random.key(2), config, value, **how))
        lora = jax.tree.map(lambda x: np.ones_like(x) / 8, lora)
        value, config = merge_params(value, lora), dataclasses.replace(config, lora_alpha=4.0)
    critic = split_params(config, value, trainable, trunk)
    keep_critic(folder, config, critic.frozen, trunk)
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(1, {"policy_params": parts.trained, "value_params": critic.trained}, {})
    checkpoints.close()
    return value if not adapters else host(merge_lora(config, value))


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize(
    ("trainable", "trunk", "keeps_frozen"),
    [("all", None, False), (1, 1, True), (2, 1, False), (1, None, True), ("head", 1, True)],
)
def test_a_critic_comes_back_whole(tmp_path, trainable, trunk, keeps_frozen, scan_layers):
    folder = tmp_path / "ppo"
    critic = begun(folder, trainable, trunk, scan_layers)
    settings = dataclasses.replace(SETTINGS, scan_layers=scan_layers)
    got = load_critic(str(folder), tmp_path, "", settings)
    assert got.kind == "reward" and got.step == 1
    assert jax.tree.structure(dict(got.params)) == jax.tree.structure(dict(critic))
    jax.tree.map(np.testing.assert_array_equal, dict(got.params), dict(critic))
    assert (folder / FROZEN).exists() == keeps_frozen
    shape = read_critic_shape(str(folder), settings)
    assert shape.kind == "reward" and shape.config == got.config


def test_adapters_are_in_the_weights_of_a_critic_that_is_loaded(tmp_path):
    critic = begun(tmp_path / "ppo", "lora", None, adapters=True)
    got = load_critic(str(tmp_path / "ppo"), tmp_path, "", SETTINGS)
    assert got.config.lora_alpha == 0.0
    tiny.leaves_close(dict(got.params), dict(critic), rtol=0.0)


def test_a_stage_that_goes_on_keeps_its_critic_as_it_began(tmp_path):
    begun(tmp_path / "ppo", "all", None)
    before = describe_stage(tmp_path / "ppo")
    keep_critic(tmp_path / "ppo", tiny.model_config(), {}, None)
    assert describe_stage(tmp_path / "ppo") == before


def test_a_stage_without_a_critic_is_refused(tmp_path):
    begun(tmp_path / "ppo", "all", None)
    description = tmp_path / "ppo" / "stage.json"
    values = json.loads(description.read_text())
    del values["critic"]
    description.write_text(json.dumps(values))
    for read in (
        lambda path: load_critic(path, tmp_path, "", SETTINGS),
        lambda path: read_critic_shape(path, SETTINGS),
    ):
        with pytest.raises(ValueError, match="ppo has no critic to start from"):
            read(str(tmp_path / "ppo"))
