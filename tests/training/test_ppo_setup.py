"""From settings and models to networks and numbers: what starts where, and what is shared."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from ppo_jax.algorithms.ppo import init_ppo
from ppo_jax.config.mesh import MeshSettings
from ppo_jax.config.ppo import LEFT_OUT
from ppo_jax.config.run import from_config_dict
from ppo_jax.distributed.layout import abstract, make_layouts
from ppo_jax.distributed.trees import named_leaves
from ppo_jax.inference.stop_strings import make_stop_strings
from ppo_jax.io.stage_folder import Model
from ppo_jax.models.build import policy_network, reward_network
from ppo_jax.models.rope import LongRopeScaling
from ppo_jax.training import ppo_setup
from ppo_jax.training.ppo_setup import (
    begin_models,
    find_trunk,
    make_critic,
    make_hyperparameters,
    make_options,
    make_setup,
)
from tests.support import tiny
from tests.support.tiny_config import changed

LAYERS = 3
TOKENIZER = types.SimpleNamespace(eos_token_id=1, get_vocab=dict)
BY_FUNCTION = {"reward_model": "", "reward_function": "module:function"}


def ppo_settings(**changes):
    """A policy whose top layer is trained, and a critic whose top two are."""
    small = dict(
        rollout_batch_size=tiny.BATCH,
        num_epochs=1,
        response_length=tiny.RESPONSE_LENGTH,
        trainable=1,
        value_trainable="2",
    )
    fields = {f"ppo.{name}": value for name, value in (small | changes).items()}
    return from_config_dict(changed(fields)).ppo


def model(kind="policy", seed=0, **changes):
    config = tiny.model_config(num_layers=LAYERS, **changes)
    network = policy_network(config) if kind == "policy" else reward_network(config)
    params = jax.tree.map(np.asarray, tiny.random_params(network, seed))
    return Model(kind=kind, config=config, params=params, tokenizer=TOKENIZER)


def test_the_critic_is_the_reward_model_or_the_body_of_the_policy():
    policy, reward = model(), model("reward", seed=1)
    for source in ("", "reward_model"):
        assert make_critic(ppo_settings(critic_init_from=source), policy, reward) is reward
    chosen = make_critic(ppo_settings(critic_init_from="policy"), policy, reward)
    without = make_critic(ppo_settings(**BY_FUNCTION), policy, None)
    for critic in (chosen, without):
        assert critic.kind == "reward" and critic.config == policy.config
        body = {name: tree for name, tree in critic.params.items() if name != "head"}
        assert not tiny.leaves_differ(body, {name: policy.params[name] for name in body})
        shapes = jax.eval_shape(reward_network(policy.config).init, jax.random.key(0))
        assert jax.tree.structure(critic.params) == jax.tree.structure(shapes)
        assert not any(leaf.any() for leaf in jax.tree.leaves(critic.params["head"]))


@pytest.mark.parametrize("is_long", [False, True])
def test_all_networks_turn_rows_as_the_longest_prompt_and_response_are(monkeypatch, is_long):
    """Whatever their rows are padded to or packed with; an EOS may be behind the longest."""
    settings, made = ppo_settings(), []
    total = settings.max_prompt_length + settings.response_length
    factors = dict(short_factor=(1.0,) * 4, long_factor=(2.0,) * 4)
    longrope = LongRopeScaling(original_max_length=total - is_long, **factors)
    models = [model(kind, rope_scaling=longrope) for kind in ("policy", "reward", "reward")]
    monkeypatch.setattr(ppo_setup, "make_networks", lambda *args: made.extend(args[:3]))
    layouts = make_layouts(MeshSettings())
    ppo_setup.setup_of(settings, *models, layouts, starts=(None,) * 3, frozen=None)
    scaling = longrope.for_rows(total)
    assert scaling.long_factor == scaling.short_factor == ((2.0 if is_long else 1.0),) * 4
    assert [config.rope_scaling for config in made] == [scaling] * 3


def test_a_critic_from_scratch_has_the_policys_shape_and_none_of_its_weights():
    policy, reward = model(), model("reward", seed=1)
    settings = ppo_settings(critic_init_from="scratch", value_trainable="all")
    layout = make_layouts(MeshSettings())[0]
    critics = [begin_models(settings, policy, reward, seed, layout)[2] for seed in (0, 0, 1)]
    first, same, other = (named_leaves(critic.params) for critic in critics)
    of_policy = named_leaves(policy.params)
    assert critics[0].kind == "reward" and critics[0].config == policy.config
    for name, leaf in first.items():
        np.testing.assert_array_equal(leaf, same[name])
        if name.startswith("head"):
            assert not leaf.any()
        elif np.ptp(leaf):  # scales begin at 1, biases at 0
            assert not np.allclose(leaf, other[name]) and not np.allclose(leaf, of_policy[name])
    planned = begin_models(settings, policy, reward, 0, layout, abstract)[2]
    assert jax.tree.map(np.shape, planned.params) == jax.tree.map(np.shape, critics[0].params)


def test_several_critics_differ_in_their_heads_alone():
    policy, reward = model(), model("reward", seed=1)
    settings, layouts = ppo_settings(num_critics=2), make_layouts(MeshSettings())
    made = []
    for seed in (0, 0, 1):
        models = begin_models(settings, policy, reward, seed, layouts[0])
        made.append(make_setup(settings, *models, layouts)[2])
    first, same, other = map(named_leaves, made)
    for name, leaf in first.items():
        assert len(leaf) == 2
        np.testing.assert_array_equal(leaf, same[name])
        random = name == "head/kernel"
        assert np.array_equal(leaf[0], leaf[1]) != random
        assert np.array_equal(leaf, other[name]) != random
    assert 0.5 < first["head/kernel"].std() * np.sqrt(policy.config.embed_dim + 1) < 2


def test_networks_that_leave_the_trunk_at_different_layers_compute_what_they_do_alone(monkeypatch):
    policy = model()
    reward = make_critic(ppo_settings(**BY_FUNCTION), policy, None)
    head = tiny.random_params(reward_network(policy.config), 1)["head"]
    reward = dataclasses.replace(reward, params={**reward.params, "head": head})
    settings, layouts = ppo_settings(), make_layouts(MeshSettings())

    def iteration():
        setup, *start = make_setup(settings, policy, reward, reward, layouts)
        state = init_ppo(*start, setup.hyperparameters)
        parts = dict(frozen=setup.frozen, networks=setup.networks, options=setup.options)
        prompts, key = tiny.prompts(), jax.random.key(0)
        state, metrics = tiny.iterate(state, setup.hyperparameters, prompts, key, **parts)
        return setup, metrics, state

    setup, metrics, state = iteration()
    assert find_trunk(settings, policy, [(reward, 2), (reward, "head")]) == (2, [1, 2])
    assert setup.networks.trunk is not None
    monkeypatch.setattr(ppo_setup, "find_trunk", lambda *_: (None, [None, None]))
    setup, plain, alone = iteration()
    assert setup.networks.trunk is None
    tiny.leaves_close(metrics, plain, rtol=1e-4, atol=1e-5)
    for name in ("policy_params", "value_params"):
        tiny.leaves_close(getattr(state, name), getattr(alone, name), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("source", ["reward model", "function"])
def test_a_critic_on_the_policys_body_shares_the_trunk_and_starts_at_zero(source, scan_layers):
    policy, reward = model(scan_layers=scan_layers), None
    settings = ppo_settings(**BY_FUNCTION)
    if source == "reward model":  # of other weights: it reads tokens
        reward = model("reward", seed=1, scan_layers=scan_layers)
        settings = ppo_settings(critic_init_from="policy")
    critic = make_critic(settings, policy, reward)
    # The policy trains layer 2, the critic layers 1 and 2.
    starts = (1, [1]) if scan_layers else (2, [1])  # scanned layers have one exit
    assert find_trunk(settings, policy, [(critic, settings.value_trainable)]) == starts
    layouts = make_layouts(MeshSettings())
    setup, policy_params, value_params = make_setup(settings, policy, reward, critic, layouts)
    assert setup.networks.value_on_trunk and not setup.networks.reward_on_trunk
    size = sum(leaf.size for leaf in jax.tree.leaves(policy.params["layers"]))
    trees = (setup.frozen.trunk, value_params, policy_params)
    for tree, count in zip(trees, (starts[0], 2, 1), strict=True):
        own = sum(leaf.size for leaf in jax.tree.leaves(tree["layers"]))
        assert own == size * count // LAYERS

    state = init_ppo(policy_params, value_params, setup.hyperparameters)
    parts = dict(frozen=setup.frozen, networks=setup.networks, options=setup.options)
    numbers, key = setup.hyperparameters, jax.random.key(0)
    rollout = tiny.sample_responses(state, numbers, tiny.prompts(), key, **parts)
    assert rollout.hidden_states is not None
    scores = np.arange(tiny.BATCH, dtype=np.float32)
    experience, _ = tiny.make_experience(rollout, scores, state, numbers, **parts)
    assert not experience.values.any() and experience.value_inputs.ndim == 3
    state, _ = tiny.update_from_rollout(state, numbers, rollout, scores, key, **parts)
    experience, _ = tiny.make_experience(rollout, scores, state, numbers, **parts)
    assert experience.values.any()


def test_the_upper_clip_is_the_lower_one_unless_it_is_given():
    numbers = make_hyperparameters(ppo_settings(clip_range=0.1))
    assert numbers.clip_range_high == numbers.clip_range == np.float32(0.1)
    numbers = make_hyperparameters(ppo_settings(clip_range=0.1, clip_range_high=0.3))
    assert numbers.clip_range_high == np.float32(0.3) and numbers.clip_range == np.float32(0.1)


def test_the_numbers_of_the_settings_are_float32_on_the_device():
    settings = ppo_settings(num_iterations=7)
    numbers = make_hyperparameters(settings)
    assert {leaf.dtype for leaf in jax.tree.leaves(numbers)} == {np.dtype("float32")}
    assert numbers.optimizer.total_steps == 7
    own = {field.name for field in dataclasses.fields(numbers)} - {"optimizer", "clip_range_high"}
    off = LEFT_OUT.keys() | {"value_optimizer", "baseline_decay"}  # of another estimator
    for name in off:  # what is off is not in the program
        assert getattr(numbers, name) is None
    for name in own - off:
        assert getattr(numbers, name) == np.float32(getattr(settings, name)), name


def test_a_critic_has_an_optimizer_of_its_own_where_something_of_it_is_given():
    own = make_hyperparameters(ppo_settings(**{"value_optimizer.b1": 0.5}))
    shared = ppo_settings().optimizer
    assert own.value_optimizer.b1 == np.float32(0.5)
    assert own.value_optimizer.eps == np.float32(shared.eps)
    assert own.value_optimizer.learning_rate == own.value_learning_rate
    assert own.value_optimizer.schedule == shared.schedule
    for steps in (dict(value_updates=2), dict(value_num_minibatches=2)):
        assert make_hyperparameters(ppo_settings(**steps)).value_optimizer is not None


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ({"eos_ids": (1,)}, None),  # as all texts of the reward model end
        ({"eos_ids": (1, 2)}, 1),
        ({"eos_ids": (1,), "stop_strings": make_stop_strings(["ab"], [b"", b"", b"a", b"b"])}, 1),
    ],
)
def test_a_score_is_read_at_eos_where_responses_may_end_otherwise_unless_the_settings_say_last(
    ends, expected
):
    sampling = tiny.sampling(**ends)
    assert make_options(ppo_settings(), sampling, 1).score_eos == expected
    assert make_options(ppo_settings(score_at="last"), sampling, 1).score_eos is None


def on_device(kind, seed, **changes):
    found = model(kind, seed, **changes)
    return dataclasses.replace(found, params=jax.tree.map(jax.numpy.asarray, found.params))


SHARING = {
    "reward model": {},
    "body of the policy": {"critic_init_from": "policy", "trainable": "all"},
    "token table": {"value_trainable": "all"},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("source", SHARING)
def test_what_networks_share_is_shared_in_every_dtype_of_frozen_parameters(source, dtype):
    settings = ppo_settings(**SHARING[source])
    policy, reward = on_device("policy", 0), on_device("reward", 1)
    critic = make_critic(settings, policy, reward)
    layouts = make_layouts(MeshSettings())
    setup, *_ = make_setup(settings, policy, reward, critic, layouts, dtype)
    frozen = setup.frozen
    one, other = {
        "reward model": (frozen.reward, frozen.value),
        "body of the policy": (frozen.ref_policy, frozen.value),
        "token table": (frozen.trunk, frozen.policy),
    }[source]
    one, other = named_leaves(one), named_leaves(other)
    assert other and all(leaf is one[name] for name, leaf in other.items())
    leaves = jax.tree.leaves(frozen)
    assert {leaf.dtype for leaf in leaves} == {np.dtype(dtype)}
    held = {leaf.unsafe_buffer_pointer(): leaf.size for leaf in leaves}
    sources = {id(leaf): leaf.size for m in (policy, reward) for leaf in jax.tree.leaves(m.params)}
    assert sum(held.values()) == sum(sources.values())
