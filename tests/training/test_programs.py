"""What a run computes: frozen layers once, stages as whole models, text from any of them."""

import contextlib
import dataclasses
import functools
import json
import re

import jax
import numpy as np
import pytest

from ppo_jax.algorithms import ppo
from ppo_jax.algorithms.supervised import sft_step
from ppo_jax.config.mesh import MeshSettings
from ppo_jax.config.parsing import load_function
from ppo_jax.config.run import from_config_dict
from ppo_jax.config.stages import OptimizerSettings, SFTSettings
from ppo_jax.core.network import merge_params
from ppo_jax.distributed import runtime as compilation
from ppo_jax.distributed.layout import init_sharded, make_layouts
from ppo_jax.inference.generate import generate
from ppo_jax.io.checkpoints import load_checkpoint_item
from ppo_jax.io.stage_folder import load_model, resolve
from ppo_jax.models.build import policy_network
from ppo_jax.models.config import LayerKind
from ppo_jax.models.partition import split_params
from ppo_jax.pipeline import run as pipeline
from ppo_jax.rollout.sampling import Sampling
from ppo_jax.training import ppo as ppo_loop
from ppo_jax.training import ppo_setup
from ppo_jax.training.common import init_train_state, make_optimizer
from ppo_jax.training.reward import init_reward_model
from ppo_jax.training.sft import as_text_batch, router_coef, sft_data
from tests.support import tiny, tiny_run


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("run")
    pipeline.run(tiny_run.config(), folder)
    return folder


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


# --- frozen layers, computed once -----------------------------------------------------------------


def sft_settings(workdir, **changes):
    values = tiny_run.config()
    del values["prepare"]
    values["sft"] |= {"trainable": "1", "optimizer": tiny_run.optimizer(eps=1e-4)} | changes
    values["model"] = {"path": str(workdir / "base")}
    values = {name: values[name] for name in ("model", "sft")}
    return json.loads(json.dumps(values).replace("{workdir}", str(workdir)))


def train_with_the_whole_network(workdir, settings):
    """The oracle: no trunk, no cache; the frozen layers run in every step."""
    config = from_config_dict(settings)
    model = load_model(workdir / "base")
    texts, _ = sft_data(config.sft, config.seed, model.tokenizer)
    parts = split_params(model.config, model.params, 1, None)
    optimizer = make_optimizer(config.sft.optimizer, 6)
    state = init_train_state(parts.trained, optimizer)
    step = jax.jit(functools.partial(sft_step, network=policy_network(model.config)))
    order = np.random.default_rng((config.seed, 0)).permutation(48)
    for rows in order.reshape(6, 8):
        batch = as_text_batch(texts, lambda rows, width: texts.tokens[rows, :width], rows)
        state, _ = step(state, batch, optimizer, frozen=parts.frozen)
    return state.params


def test_cached_states_states_of_each_batch_and_the_whole_network_train_alike(workdir, tmp_path):
    trained = [train_with_the_whole_network(workdir, sft_settings(workdir))]
    for gigabytes in (4.0, 0.0):
        folder = tmp_path / str(gigabytes)
        pipeline.run(sft_settings(workdir, hidden_cache_gb=gigabytes), folder)
        trained.append(load_checkpoint_item(folder / "sft" / "checkpoints", "params"))
    for other in trained[1:]:
        for x, y in zip(jax.tree.leaves(trained[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-5)
    start = load_model(workdir / "base").params["layers"]["1"]["mlp"]["up"]["kernel"]
    moved = trained[0]["layers"]["1"]["mlp"]["up"]["kernel"] - start
    assert np.abs(moved).max() > 1e-2  # six steps of 1e-2: the agreement says something


def ppo_settings(**changes):
    settings = from_config_dict(tiny_run.config()).ppo
    return dataclasses.replace(settings, **changes)


def one_iteration(settings, policy, reward, critic):
    layouts = make_layouts(MeshSettings())
    setup, *start = ppo_setup.make_setup(settings, policy, reward, critic, layouts)
    state = init_sharded(layouts[0], ppo.init_ppo, *start, setup.hyperparameters)
    iterate = ppo_loop.make_iteration(setup, state, None, layouts[0])
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 300, size=(8, 8)).astype(np.int32)
    mask = np.arange(8) >= np.arange(8)[:, None]
    prompts = layouts[0].shard_batch(ppo.Prompts(tokens=tokens, mask=mask))
    key = layouts[0].replicate(jax.random.key(1))
    state, metrics = iterate(state, None, prompts, key)
    return setup, state, metrics


SLOW = [pytest.param(x, marks=pytest.mark.slow) for x in ("same base", "all of it trained")]


@pytest.mark.parametrize("scorers", ["fewer layers", *SLOW])
def test_a_shared_trunk_changes_no_number_of_an_iteration(workdir, monkeypatch, scorers):
    policy = load_model(workdir / "sft")
    if scorers == "all of it trained":  # shares not even the token table with the policy
        params = jax.tree.map(lambda x: x * np.float32(1.25), load_model(workdir / "reward").params)
        reward = dataclasses.replace(load_model(workdir / "reward"), params=params)
    else:
        reward = init_reward_model(policy, 1 if scorers == "fewer layers" else 0, seed=3)
    settings = ppo_settings(response_length=4, num_epochs=1)
    setup, state, metrics = one_iteration(settings, policy, reward, reward)
    # With fewer layers the critic's one layer is trained, but all of the reward model is trunk.
    expected = {"same base": (True, True), "fewer layers": (False, True)}
    on_trunk = (setup.networks.value_on_trunk, setup.networks.reward_on_trunk)
    assert on_trunk == expected.get(scorers, (False, False))
    assert setup.networks.trunk is not None and setup.frozen.trunk is not None

    monkeypatch.setattr(ppo_setup, "find_trunk", lambda *_: (None, [None, None]))
    setup, plain_state, plain = one_iteration(settings, policy, reward, reward)
    assert setup.networks.trunk is None
    assert metrics.keys() == plain.keys()
    for name in plain:
        np.testing.assert_allclose(metrics[name], plain[name], rtol=1e-4, atol=1e-5, err_msg=name)
    for x, y in zip(
        jax.tree.leaves(state.policy_params),
        jax.tree.leaves(plain_state.policy_params),
        strict=True,
    ):
        np.testing.assert_allclose(x, y, atol=1e-3)  # a tenth of the learning rate


def test_slots_change_no_number_of_a_run(workdir, tmp_path):
    """Four responses to each prompt, with all under way at once and in half as many slots."""

    def metrics(**changes):
        shape = dict(samples_per_prompt=4, num_iterations=2, rollout_batch_size=8) | changes
        source = dict(reward_function="tests.support.tiny_run:letters", reward_model="")
        folder = tmp_path / str(changes)
        pipeline.run(
            tiny_run.on_base(workdir, ppo=dict(init_from="base", **source, **shape)), folder
        )
        samples = (folder / "samples.jsonl").read_text().splitlines()
        assert len(samples) == 2 * 3  # before and after: one response to each prompt
        rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        names = ("reward/score_mean", "kl/ref", "policy/loss", "response/length")
        return [[row[name] for name in names] for row in rows if "policy/loss" in row]

    expected = metrics()
    assert len(expected) == 2 and expected[1][-1] < 8
    np.testing.assert_allclose(
        metrics(max_concurrent=4, min_free_slots=4), expected, rtol=1e-4, atol=1e-6
    )


@contextlib.contextmanager
def compiled_programs():
    """The names of the programs that are compiled, in their order."""
    names = []

    def hear(event, seconds, fun_name="", **_):
        if event == compilation.EVENT:
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(hear)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(hear)


def test_an_iteration_is_one_program_that_is_compiled_once(workdir, tmp_path):
    sources = dict(init_from=str(workdir / "sft"), reward_model=str(workdir / "reward"))
    shape = dict(num_iterations=3, num_samples=0, save_every=3)
    jax.clear_caches()
    with compiled_programs() as names:
        pipeline.run(tiny_run.on_base(workdir, ppo=sources | shape), tmp_path)
    found = [name for name in names if re.search("iteration|sample|score|learn|update|roll", name)]
    assert found == ["jit(ppo_iteration)"]


def test_buckets_of_prompts_are_few_programs_and_are_told(workdir, tmp_path, capsys):
    shape = dict(num_iterations=3, rollout_batch_size=2, max_prompt_length=16, prompt_buckets=3)
    source = dict(
        init_from="base", reward_function="tests.support.tiny_run:letters", reward_model=""
    )
    pipeline.run(tiny_run.on_base(workdir, ppo=source | shape), tmp_path)
    assert "ppo: prompts are padded to one of 3 widths, a program each: " in capsys.readouterr().out
    rows = [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    widths = [row["ppo/prompt_width"] for row in rows if "policy/loss" in row]
    assert len(widths) == 3 and set(widths) <= {4, 8, 16}


def test_packing_changes_no_number_of_a_run(workdir, tmp_path):
    """Above a trunk, with a critic and a reward model; each row of metrics, and the responses."""

    def run(packing):
        folder = tmp_path / str(packing)
        ppo = dict(init_from=str(workdir / "sft"), reward_model=str(workdir / "reward"))
        ppo |= dict(num_iterations=2, num_micro_batches=4, packing=packing)
        pipeline.run(tiny_run.on_base(workdir, ppo=ppo), folder)
        rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        metrics = [row for row in rows if "policy/loss" in row]
        return metrics, (folder / "samples.jsonl").read_text()

    (expected, samples), (metrics, same) = run(False), run(True)
    assert len(metrics) == 2 and same == samples
    for mine, one in zip(metrics, expected, strict=True):
        # The second is the name in 0.1.
        assert mine.keys() - one.keys() == {"ppo/packing_efficiency", "ppo/row_fill"}
        assert 0.3 < mine["ppo/packing_efficiency"] <= 1
        for name in one:
            if name != "stage" and not name.startswith("time/"):
                np.testing.assert_allclose(mine[name], one[name], rtol=1e-3, atol=1e-5)


def test_the_trunk_ends_where_the_first_network_departs(workdir):
    policy = load_model(workdir / "sft")
    same = init_reward_model(policy, 0, seed=3)
    changed = jax.tree.map(lambda x: x, same.params)
    changed["layers"] = {
        **changed["layers"],
        "1": jax.tree.map(lambda x: x + 1, changed["layers"]["1"]),
    }
    differs = dataclasses.replace(same, params=changed)
    settings = ppo_settings()
    local = dataclasses.replace(same.config, layer_kinds=(LayerKind(), LayerKind(window=3)))
    assert ppo_setup.shared_layers(policy, dataclasses.replace(same, config=local)) == 1
    assert ppo_setup.shared_layers(policy, same) == 2
    assert ppo_setup.shared_layers(policy, differs) == 1
    assert ppo_setup.find_trunk(settings, policy, [(same, 1), (same, "head")]) == (1, [1, 1])
    assert ppo_setup.find_trunk(settings, policy, [(same, "all")]) == (1, [None])
    assert ppo_setup.find_trunk(settings, policy, [(same, 2), (differs, "head")]) == (1, [None, 1])
    everything = dataclasses.replace(settings, trainable="all")
    assert ppo_setup.find_trunk(everything, policy, [(same, 1)]) == (None, [None])


# --- models and text ------------------------------------------------------------------------------


def test_a_stage_is_its_frozen_and_its_trained_parameters(workdir):
    base, sft = load_model(workdir / "base"), load_model(workdir / "sft")
    trained = load_checkpoint_item(workdir / "sft" / "checkpoints", "params")
    parts = split_params(base.config, base.params, 1, 1)
    assert_same_bits(sft.params, merge_params(parts.trunk, parts.frozen, trained))


def test_a_reward_model_of_the_lower_layers_is_the_lower_layers(workdir):
    policy = load_model(workdir / "sft")
    reward = init_reward_model(policy, 1, seed=0)
    assert list(reward.params["layers"]) == ["0"] and reward.config.num_layers == 1
    assert_same_bits(reward.params["layers"]["0"], policy.params["layers"]["0"])
    assert reward.params["head"]["kernel"].shape == (32, 1)
    assert_same_bits(init_reward_model(reward, 0, seed=9).params, reward.params)


def test_the_weight_of_the_loss_of_the_routers_is_the_models_own_or_the_settings():
    shape = tiny.model_config(**tiny.SHAPES["experts"])
    shape = dataclasses.replace(shape, experts=dataclasses.replace(shape.experts, aux_coef=0.02))

    def weight(shape, **changes):
        return router_coef(
            SFTSettings(data="x", optimizer=OptimizerSettings(learning_rate=1e-3), **changes), shape
        )

    assert weight(shape) == 0.02 and weight(shape, trainable=1) == 0.02
    assert weight(shape, router_coef=0.5) == 0.5 and weight(shape, router_coef=0.0) == 0.0
    dense = tiny.model_config()
    assert weight(dense) == 0.0 and weight(dense, router_coef=0.0) == 0.0
    lower = dataclasses.replace(shape, num_layers=2)  # the second layer is dense
    assert weight(lower, trainable=1) == 0.0
    for model, trainable in ((dense, "all"), (lower, 1), (shape, "head")):
        with pytest.raises(ValueError, match=rf"no layer .*trainable={trainable!r}\), got 0.5"):
            weight(model, router_coef=0.5, trainable=trainable)
    with pytest.raises(ValueError, match="sft.router_coef must be None or a number >= 0, got -1"):
        weight(shape, router_coef=-1.0)


def test_a_name_stands_for_the_base_a_stage_or_itself(tmp_path):
    assert resolve("base", tmp_path, "where/it/is") == "where/it/is"
    assert resolve("sft", tmp_path, "base") == str(tmp_path / "sft")
    assert resolve("some/sft", tmp_path, "base") == "some/sft"


def test_a_stage_without_a_checkpoint_is_no_model_yet(workdir, tmp_path):
    (tmp_path / "stage.json").write_bytes((workdir / "sft" / "stage.json").read_bytes())
    with pytest.raises(ValueError, match="no checkpoint yet: run the stage first"):
        load_model(tmp_path)


def test_a_response_depends_on_its_place_and_not_on_the_batch_size(workdir):
    model = load_model(workdir / "ppo")
    sampling = Sampling(response_length=4, eos_ids=(model.tokenizer.eos_token_id,))
    numbers = dict(sampling=sampling, temperature=1.0, seed=5, max_prompt_length=8)
    prompts = ["the film is", "a plot", "the end"]
    by_two, rollouts = generate(model, prompts, batch_size=2, **numbers)
    by_three, _ = generate(model, prompts, batch_size=3, **numbers)
    assert by_two == by_three and len(rollouts) == 1
    with pytest.raises(ValueError, match="must be a policy"):
        generate(load_model(workdir / "reward"), prompts, batch_size=3, **numbers)


@pytest.mark.parametrize("name", ["nothing", "no_such_module:f", "math:nothing", ":f", ""])
def test_a_function_is_named_by_module_and_name(name):
    with pytest.raises(ValueError, match=f"the.field must be 'module:function', got '{name}'"):
        load_function(name, "the.field")


def test_a_function_of_a_module_is_found():
    assert load_function("tests.support.tiny_run:letters", "field")([], ["ab c"]) == [3.0]
