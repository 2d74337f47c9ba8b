"""Stage folders: what they hold, what is refused, how they are computed with."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.config.run import ModelSettings
from ppo_jax.io import tokenizers as vocabulary
from ppo_jax.io.checkpoints import Checkpoints
from ppo_jax.io.stage_folder import (
    Model,
    begin_stage,
    config_values,
    load_model,
    load_source,
    missing_steps,
    model_config,
)
from ppo_jax.models.build import policy_apply, policy_network
from ppo_jax.models.config import LayerKind
from ppo_jax.models.partition import split_params
from ppo_jax.models.rope import (
    SCALINGS,
    DynamicScaling,
    LinearScaling,
    LongRopeScaling,
    RopeScaling,
    YarnScaling,
)
from ppo_jax.training.stage import check_settings
from tests.support import tiny

SETTINGS = {"path": "nowhere", "dtype": "float32"}


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """A stage of five steps that was stopped after the third; its top layer is trained."""
    tokenizer = vocabulary.train_tokenizer(["a film of few words"] * 3, 300)
    config = tiny.model_config(vocab_size=300)
    params = jax.tree.map(np.asarray, policy_network(config).init(jax.random.key(0)))
    model = Model(kind="policy", config=config, params=params, tokenizer=tokenizer)
    parts = split_params(config, params, 1, 1)
    folder = tmp_path_factory.mktemp("run") / "sft"
    settings = {"kl_control": "adaptive", "kl_coef": 0.1, "vf_coef": 0.1}
    begin_stage(folder, model, parts, {"stage": "sft", "num_steps": 5, "settings": settings})
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(3, {"params": parts.trained}, {})
    checkpoints.close()
    return folder, model


def test_a_stage_gives_back_the_whole_model(stage):
    folder, model = stage
    tiny.leaves_close(load_model(folder).params, model.params, rtol=0.0)


@pytest.mark.parametrize("shape", sorted(tiny.SHAPES))
def test_a_stage_keeps_the_shape_of_its_model(shape):
    config = tiny.model_config(**tiny.SHAPES[shape])
    assert model_config(json.loads(json.dumps(config_values(config)))) == config


def test_half_of_a_stage_is_not_a_source_of_the_next(stage):
    folder, _ = stage
    assert missing_steps(folder) == "it has 3 of 5 steps"
    with pytest.raises(ValueError, match="sft is not complete: it has 3 of 5 steps"):
        load_source("sft", folder.parent, "base", ModelSettings(**SETTINGS))


def test_a_stage_is_computed_as_the_settings_say(stage):
    folder, model = stage
    settings = ModelSettings(path="nowhere", dtype="bfloat16", scan_layers=True)
    scanned = load_model(folder, settings)
    assert scanned.config.scan_layers and scanned.config.dtype == "bfloat16"
    tokens, mask = jnp.array([[5, 6, 7]]), jnp.ones((1, 3), bool)
    a = policy_apply(model.config, model.params, tokens, mask)
    b = policy_apply(scanned.config, scanned.params, tokens, mask)
    np.testing.assert_allclose(a, b, atol=0.05)


def test_packing_may_change_where_it_changes_no_number(stage):
    folder, _ = stage
    for name in ("ppo", "sft"):
        settings = {"packing": True, "kl_control": "adaptive", "kl_coef": 0.1}
        if name == "ppo":
            check_settings(folder, {"stage": name, "settings": settings})
        else:  # the order of its data
            with pytest.raises(ValueError, match="packing: False -> True"):
                check_settings(folder, {"stage": name, "settings": settings})


def test_where_adaptive_control_began_cannot_change_later(stage):
    folder, _ = stage
    settings = {"kl_control": "adaptive", "kl_coef": 0.1, "vf_coef": 0.5}
    check_settings(folder, {"stage": "ppo", "settings": settings})
    with pytest.raises(ValueError, match="kl_coef: 0.1 -> 0.2"):
        check_settings(folder, {"stage": "ppo", "settings": settings | {"kl_coef": 0.2}})


# --- what stage.json keeps of a model -------------------------------------------------------------


LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_length=64)
KINDS = [
    RopeScaling(**LLAMA3),
    LinearScaling(factor=3.0),
    DynamicScaling(factor=3.0, original_max_length=16),
    YarnScaling(factor=4.0, original_max_length=16, truncate=False, attention_factor=1.2),
    LongRopeScaling(
        short_factor=(1.0,) * 4, long_factor=(2.0, 3.0, 4.0, 5.0), original_max_length=16
    ),
]


@pytest.mark.parametrize("scaling", KINDS, ids=lambda scaling: scaling.kind)
def test_every_scaling_and_kind_of_layer_is_kept(scaling):
    assert {kind.kind for kind in KINDS} == set(SCALINGS)
    kinds = (LayerKind(window=5, rope_theta=50.0), LayerKind(rotary=False))
    shape = dict(num_layers=2, head_dim=8, qk_norm="whole", residual="both", score_cap=5.0)
    config = tiny.model_config(rope_scaling=scaling, layer_kinds=kinds, family="olmo3", **shape)
    again = model_config(json.loads(json.dumps(config_values(config))))
    assert again == config and again.family == "olmo3"


LATER_FIELDS = ("rotary_dim", "residual", "embed_scale", "residual_scale", "score_scale")
LATER_FIELDS += ("logits_divisor", "score_cap", "logits_cap", "layer_kinds", "experts", "family")


@pytest.mark.parametrize("normed", [False, True])
def test_a_stage_of_before_the_newer_families_loads(normed):
    """Norms of queries and keys were a flag, the only scaling that of Llama 3, and has no kind."""
    scaling = RopeScaling(**LLAMA3)
    config = tiny.model_config(rope_scaling=scaling, qk_norm="head" if normed else "none")
    old = json.loads(json.dumps(config_values(config)))
    old = {name: value for name, value in old.items() if name not in LATER_FIELDS}
    old["qk_norm"] = normed
    del old["rope_scaling"]["kind"], old["rope_scaling"]["attention_factor"]
    again = model_config(old)
    assert again == config and again.family == ""
