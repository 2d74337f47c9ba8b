"""The state that a plan has is that of a run: with adapters, top layers, a shared trunk."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from ppo_jax.algorithms.ppo import init_ppo
from ppo_jax.algorithms.supervised import accumulate
from ppo_jax.config.ppo import names_critic
from ppo_jax.config.stages import LoRASettings
from ppo_jax.core.network import merge_params
from ppo_jax.distributed.layout import Layout, init_sharded, make_mesh
from ppo_jax.distributed.trees import named_leaves
from ppo_jax.io.stage_folder import Model, load_model
from ppo_jax.models.build import policy_network, reward_network
from ppo_jax.models.lora import init_lora
from ppo_jax.planner import flops, iteration, phases, planner
from ppo_jax.planner import report as plan_report
from ppo_jax.planner.hlo.cost import cost_analysis
from ppo_jax.planner.models import common_layers
from ppo_jax.training.ppo_setup import begin_models, make_setup
from tests.support import tiny, tiny_plan
from tests.support.tiny_hf import edit_config, torch_model
from tests.support.tiny_plan import TARGET, settings
from tests.support.tiny_stage import word_tokenizer
from tests.training.test_ppo_setup import BY_FUNCTION, TOKENIZER

REWARD = dict(data="pairs.jsonl", init_from="base", trainable=1, optimizer=dict(learning_rate=1e-5))
LORA = dict(trainable="lora", value_trainable="lora")
TOP = dict(trainable=1, value_trainable=1)
RUNS = {
    "all": {},
    "adapters": dict(ppo=LORA),
    "adapters on one body": dict(ppo=LORA | dict(critic_init_from="policy")),
    "adapters, frozen in bfloat16": dict(ppo=LORA, model=dict(frozen_dtype="bfloat16")),
    "adapters beside top layers": dict(ppo=dict(trainable="lora", value_trainable=1)),
    "one trunk": dict(ppo=BY_FUNCTION | dict(trainable=1, value_trainable=2)),
    "one trunk and the head": dict(ppo=BY_FUNCTION | dict(trainable=1, value_trainable="head")),
    "all three on the trunk": dict(ppo=TOP, reward=REWARD),
    "a reward model from elsewhere": dict(ppo=TOP),
    "the critic's top alone": dict(ppo=dict(value_trainable=1)),
    "a critic from elsewhere": dict(ppo=TOP | dict(critic_init_from="elsewhere")),
    "a critic with bins": dict(
        ppo=TOP | dict(value_bins=8, value_range=(-1.0, 1.0)), reward=REWARD
    ),
    "two critics": dict(ppo=TOP | dict(num_critics=2), reward=REWARD),
    "a shared critic": dict(ppo=dict(shared_critic=True, value_bins=8, value_range=(-1.0, 1.0))),
    "a shared critic on a trunk": dict(ppo=TOP | dict(value_trainable="all", shared_critic=True)),
    "a shared critic on adapters": dict(ppo=dict(trainable="lora", shared_critic=True)),
    "no critic": dict(ppo=dict(advantage="rloo", samples_per_prompt=2)),
    "no critic, one trunk": dict(
        ppo=BY_FUNCTION | dict(trainable=1, advantage="rloo", samples_per_prompt=2)
    ),
}


def three_layers(run, **model):
    sections = dict(RUNS[run])
    scratch = tiny_plan.SCRATCH | dict(num_layers=3)
    sections["model"] = dict(scratch=scratch) | sections.get("model", {}) | model
    return settings(**sections)


def begun(config, models, layouts):
    """What a run makes of models with numbers: (its setup, its state at the start).

    Those of the reward model are its own, but for the layers that its stage leaves as they are.
    """
    layout = layouts[0]

    def model(kind, shape, seed):
        network = (policy_network if kind == "policy" else reward_network)(shape)
        params = layout.shard_params(jax.tree.map(np.asarray, tiny.random_params(network, seed)))
        return Model(kind=kind, config=shape, params=params, tokenizer=TOKENIZER)

    policy = model("policy", models.policy, 0)
    reward = models.reward and model("reward", models.reward, 1)
    if config.reward:
        tops = jax.tree.map(lambda x: np.arange(len(x)) >= len(x) - 1, reward.params["layers"])
        layers = jax.tree.map(
            lambda own, old, top: np.where(top.reshape(-1, *[1] * (own.ndim - 1)), own, old),
            *(reward.params["layers"], policy.params["layers"], tops),
        )
        params = {**reward.params, "layers": layers, "embed": policy.params["embed"]}
        reward = dataclasses.replace(reward, params=layout.shard_params(params))
    named = model("reward", models.critic, 2) if names_critic(config.ppo) else None
    found = begin_models(config.ppo, policy, reward, config.seed, layout, named=named)
    setup, *start = make_setup(config.ppo, *found, layouts, config.model.frozen_dtype)
    return setup, init_sharded(layout, init_ppo, *start, setup.hyperparameters)


def described(tree):
    """{name: what the compiler has to know of a leaf}"""
    return {
        name: (leaf.shape, leaf.dtype, leaf.sharding) for name, leaf in named_leaves(tree).items()
    }


@pytest.mark.parametrize("run", RUNS)
def test_the_planned_state_is_the_state_of_a_run(run):
    config = three_layers(run)
    models = planner.read_models(config)
    mesh = make_mesh(config.mesh, TARGET.devices)
    layouts = Layout(mesh, config.mesh.rules), Layout(mesh, config.mesh.rollout_rules)
    setup, state = begun(config, models, layouts)
    planned = phases.AbstractArguments(config, models, layouts)
    assert described(planned.state) == described(state)
    assert described(planned.frozen) == described(setup.frozen)
    assert described(planned.hyperparameters) == described(setup.hyperparameters)
    for field in ("value_on_trunk", "value_on_policy", "reward_on_trunk"):
        assert getattr(planned.networks, field) == getattr(setup.networks, field), field
    assert (planned.networks.trunk is None) == (setup.networks.trunk is None)


ON_TRUNK = {
    "one trunk": (1, 1, None),
    "one trunk and the head": (2, 2, None),
    "all three on the trunk": (2, 2, 2),
    "a reward model from elsewhere": (2, None, None),
    "the critic's top alone": (None, None, None),
    "a shared critic": (None, None, None),
    "a shared critic on a trunk": (2, 2, None),
    "no critic": (None, None, None),
    "no critic, one trunk": (2, None, None),
}


@pytest.mark.parametrize("run", ON_TRUNK)
def test_where_the_networks_of_a_plan_leave_the_trunk(run):
    config = three_layers(run)
    mesh = make_mesh(config.mesh, TARGET.devices)
    layouts = Layout(mesh, config.mesh.rules), Layout(mesh, config.mesh.rollout_rules)
    args = phases.AbstractArguments(config, planner.read_models(config), layouts)
    assert args.starts == ON_TRUNK[run]


OPTIMIZER = dict(optimizer=dict(learning_rate=1e-5))
STAGES = {  # layers that policy and reward model have in common, of three
    "both from the base": (dict(reward=REWARD), 2),
    "both from sft": (
        dict(sft=dict(data="x", **OPTIMIZER), reward=REWARD | dict(init_from="sft")),
        2,
    ),
    "sft trained more of it": (
        dict(sft=dict(data="x", trainable=2, **OPTIMIZER), reward=REWARD),
        1,
    ),
    "sft trained all of it": (dict(sft=dict(data="x", **OPTIMIZER), reward=REWARD), 0),
    "fewer layers": (dict(reward=REWARD | dict(num_layers=2)), 1),
    "adapters in the weights": (dict(reward=REWARD | dict(trainable="lora")), 0),
    "a stage of another run": (dict(ppo=dict(reward_model="runs/reward/reward")), 0),
}


@pytest.mark.parametrize("stages", STAGES)
def test_what_policy_and_reward_model_have_in_common_by_the_stages_before(stages):
    sections, expected = STAGES[stages]
    scratch = tiny_plan.SCRATCH | dict(num_layers=3)
    ppo = sections.get("ppo", {}) | dict(init_from="sft" if "sft" in sections else "base")
    config = settings(**sections | dict(model=dict(scratch=scratch), ppo=ppo))
    assert common_layers(config, planner.read_models(config), config.ppo.reward_model) == expected


def test_adapters_need_less_memory_than_all_parameters():
    whole, config = tiny_plan.make_plan(), settings(ppo=LORA)
    lora = planner.make_plan(config, TARGET)
    for less, more in zip(lora.costs, whole.costs, strict=True):
        mine, theirs = less.program_cost.memory, more.program_cost.memory
        assert mine.arguments < 0.7 * theirs.arguments and mine.peak < 0.9 * theirs.peak
    values = plan_report.figures(lora)
    for name, figures in values["phases"].items():
        # The narrow products are computed by all devices that share the heads.
        assert figures["analytic_flops_ratio"] == pytest.approx(1, abs=0.15), name
    assert (
        values["fits"] and lora.costs[2].phase.model_flops < 0.9 * whole.costs[2].phase.model_flops
    )


def test_a_critic_on_the_policy_costs_a_head_in_the_update():
    config = settings(ppo=dict(shared_critic=True, num_critics=4, response_length=8))
    values = plan_report.figures(planner.make_plan(config, TARGET))
    for name, figures in values["phases"].items():
        assert figures["analytic_flops_ratio"] == pytest.approx(1, abs=0.1), name
    counted = [
        phases.analytic_flops(x.ppo, planner.read_models(x))
        for x in (config, settings(ppo=dict(advantage="rloo", samples_per_prompt=2)), settings())
    ]
    shared, free, own = (x["update"] for x in counted)
    assert free < shared < free + 0.1 * (own - free)
    assert counted[1]["scoring"] < counted[0]["scoring"] < 1.1 * counted[2]["scoring"]


def measured_training(make, config, params, frozen, first_output=3):
    """Flops of the gradient of a network's outputs to its trained leaves, as they are computed."""
    network = make(config)

    def gradient(params, frozen, batch):  # no constants: XLA would fold products with them
        def loss(params, piece):
            outputs = network.apply(merge_params(frozen, params), *piece, first_output=first_output)
            return (outputs**2).sum(), {}

        return accumulate(jax.grad(loss, has_aux=True), params, batch, 1)

    lowered = jax.jit(gradient).lower(params, frozen, tiny.tokens_and_mask(0, 4, 12))
    return cost_analysis(lowered.compile()).flops


def adapter_parts(make, config, targets):
    """(adapters, the parameters below them, what the planner says is trained)."""
    params = tiny.random_params(make(config), 0)
    adapters = init_lora(jax.random.key(0), config, params, targets=targets, rank=4)
    trained = dict(adapters) if make is policy_network else adapters | {"head": params["head"]}
    head = "logits" if make is policy_network else "scalar"
    of = iteration.trained_parts(config, "lora", 0, LoRASettings(rank=4, targets=targets), head)
    return trained, params, of


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("make", [policy_network, reward_network])
def test_training_of_adapters_is_counted(make, remat):
    config = tiny.model_config(scan_layers=True, remat=remat, num_layers=4)
    trained, params, of = adapter_parts(make, config, ("query", "key", "up", "down"))
    config = dataclasses.replace(config, lora_alpha=8.0)
    head = "logits" if make is policy_network else "scalar"
    where = dict(sequences=4, positions=12, outputs=9, head=head)
    expected = flops.training_flops(config, trained=of, **where)
    assert expected < 0.9 * flops.training_flops(config, **where)
    assert measured_training(make, config, trained, params) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("targets", [("query", "value"), ("query", "output")])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_adapters_of_the_last_layer_are_counted_where_it_is_read(remat, targets):
    """By the difference that more outputs make: the lowest layer needs less than is counted."""
    config = tiny.model_config(remat=remat, num_layers=3)
    trained, params, of = adapter_parts(reward_network, config, targets)
    config = dataclasses.replace(config, lora_alpha=8.0)
    got, expected = (
        [count(outputs) for outputs in (9, 12)]
        for count in (
            lambda n: measured_training(reward_network, config, trained, params, 12 - n),
            lambda n: flops.training_flops(
                config, trained=of, sequences=4, positions=12, outputs=n, head="scalar"
            ),
        )
    )
    assert got[1] - got[0] == pytest.approx(expected[1] - expected[0], rel=0.02)


@pytest.mark.parametrize("count", [1, 2])
def test_training_of_the_top_layers_is_counted(count):
    config = tiny.model_config(num_layers=4)
    params = tiny.random_params(reward_network(config), 0)
    tops = {str(layer): params["layers"][str(layer)] for layer in range(4 - count, 4)}
    trained = {name: params[name] for name in ("final_norm", "head")} | {"layers": tops}
    where = dict(sequences=4, positions=12, outputs=9, head="scalar")
    of = flops.TrainedParts(frozen_layers=4 - count)
    expected = flops.training_flops(config, trained=of, **where)
    got = measured_training(reward_network, config, trained, params)
    assert got == pytest.approx(expected, rel=0.02)


# --- a reward model that reads text ---------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path):
    """A policy and a classifier of another width in folders, each with a tokenizer of its own."""
    size = dict(vocab_size=64, hidden_size=64, num_attention_heads=4, num_key_value_heads=4)
    for name, task, words in (("policy", "CausalLM", 64), ("reward", "SequenceClassification", 60)):
        size |= {} if task == "CausalLM" else dict(num_labels=1, hidden_size=128, pad_token_id=3)
        torch_model("llama", task, **size).save_pretrained(tmp_path / name)
        word_tokenizer(words).save_pretrained(tmp_path / name)
    return tmp_path


def test_a_reward_model_that_reads_text_is_a_program_of_its_own(elsewhere):
    paths = dict(init_from="base", reward_model=str(elsewhere / "reward"))
    model = dict(scratch=None, vocabulary_data="", path=str(elsewhere / "policy"))
    config = settings(ppo=paths, model=model)
    models = planner.read_models(config)
    assert models.reads_text and models.critic == models.policy != models.reward
    mesh = make_mesh(config.mesh, TARGET.devices)
    layouts = Layout(mesh, config.mesh.rules), Layout(mesh, config.mesh.rollout_rules)
    load = functools.partial(load_model, settings=config.model, layout=layouts[0])
    found = begin_models(
        config.ppo, load(elsewhere / "policy"), load(elsewhere / "reward"), 0, layouts[0]
    )
    setup, *start = make_setup(config.ppo, *found, layouts)
    state = init_sharded(layouts[0], init_ppo, *start, setup.hyperparameters)
    planned = phases.AbstractArguments(config, models, layouts)
    assert described(planned.state) == described(state)
    assert described(planned.frozen) == described(setup.frozen)
    assert planned.networks.reward is setup.networks.reward is None is not setup.text_reward
    programs = planner.prepare(config, TARGET)[2]
    names = ["rollout", "reward model", "scoring", "update"]
    assert [phase.name for phase in programs] == names
    cost = planner.compile_phase(programs[1], TARGET, {})
    assert cost.program_cost.flops * 8 == pytest.approx(programs[1].flops, rel=0.05)


def test_a_plan_compares_the_tokenizers_that_are_here(elsewhere):
    def reads_text(policy, reward, **model):
        model = dict(scratch=None, vocabulary_data="", path=str(policy)) | model
        paths = dict(init_from="base", reward_model=str(reward))
        return planner.read_models(settings(ppo=paths, model=model)).reads_text

    policy, reward = elsewhere / "policy", elsewhere / "reward"
    assert reads_text(policy, reward)
    word_tokenizer(64).save_pretrained(reward)
    assert not reads_text(policy, reward)
    (reward / "tokenizer.json").unlink()
    assert not reads_text(policy, reward)  # as many tokens
    edit_config(reward, reward, vocab_size=32)
    assert reads_text(policy, reward)
    assert not reads_text(policy, "reward")


def test_a_critic_of_another_size_is_planned_with_its_size(tmp_path):
    torch_model("qwen3", "CausalLM", hidden_size=48, num_hidden_layers=3).save_pretrained(tmp_path)
    config = settings(ppo=TOP | dict(critic_init_from=str(tmp_path)))
    models = planner.read_models(config)
    assert (models.critic.num_layers, models.critic.embed_dim) == (3, 48)
    assert models.policy.embed_dim == models.reward.embed_dim != 48
    same = planner.read_models(settings(ppo=TOP))
    own, plain = (phases.analytic_flops(config.ppo, x) for x in (models, same))
    assert own["scoring"] > plain["scoring"] and own["rollout"] == plain["rollout"]


def test_the_greedy_rollout_of_remax_is_planned():
    """32 responses to 8 prompts, and 8 more that the reward model reads, too."""
    plain, config = (
        settings(ppo=dict(advantage=name, samples_per_prompt=4)) for name in ("rloo", "remax")
    )
    models = planner.read_models(config)
    mesh = make_mesh(config.mesh, TARGET.devices)
    layouts = Layout(mesh, config.mesh.rules), Layout(mesh, config.mesh.rollout_rules)
    planned = {phase.name: phase for phase in phases.phases(config, models, layouts)}
    assert list(planned) == ["rollout", "greedy rollout", "scoring", "update"]
    lengths = dict(prompt_length=8, response_length=8)
    expected = flops.rollout_flops(models.policy, sequences=8, **lengths)
    assert planned["greedy rollout"].flops == expected
    assert planned["greedy rollout"].max_trip_counts == 7
    one, other = (phases.analytic_flops(x.ppo, models) for x in (plain, config))
    reads = flops.scoring_flops(
        models.policy, None, models.reward, sequences=8, policy_passes=0, **lengths
    )
    assert other["scoring"] - one["scoring"] == pytest.approx(reads)
    assert one["rollout"] == other["rollout"] and one["update"] == other["update"]
    few = settings(ppo=dict(advantage="remax", samples_per_prompt=4, max_concurrent=4)).ppo
    slots = phases.analytic_flops(few, models)["greedy rollout"]
    assert slots == flops.rollout_flops(models.policy, sequences=8, slots=4, group=1, **lengths)


@pytest.mark.parametrize("reward_model", ["reward", ""])
def test_the_rollout_of_the_reference_is_planned(reward_model):
    """32 responses to 8 prompts, and 24 of the reference, which a reward model reads, too."""
    scorer = {} if reward_model else dict(reward_model="", reward_function="a:b")
    plain, config = (
        settings(ppo=dict(samples_per_prompt=4, reference_responses=count, **scorer))
        for count in (0, 3)
    )
    models = planner.read_models(config)
    mesh = make_mesh(config.mesh, TARGET.devices)
    layouts = Layout(mesh, config.mesh.rules), Layout(mesh, config.mesh.rollout_rules)
    planned = {phase.name: phase for phase in phases.phases(config, models, layouts)}
    assert list(planned) == ["rollout", "reference rollout", "scoring", "update"]
    lengths = dict(prompt_length=8, response_length=8)
    how = dict(sequences=24, samples_per_prompt=3, **lengths)
    assert planned["reference rollout"].flops == flops.rollout_flops(models.policy, **how)
    assert planned["reference rollout"].max_trip_counts == 7
    one, other = (phases.analytic_flops(x.ppo, models) for x in (plain, config))
    reads = 0.0
    if reward_model:
        of_reward = dict(sequences=24, samples=3, policy_passes=0, **lengths)
        reads = flops.scoring_flops(models.policy, None, models.reward, **of_reward)
    assert other["scoring"] - one["scoring"] == pytest.approx(reads)
    assert one["rollout"] == other["rollout"] and one["update"] == other["update"]
