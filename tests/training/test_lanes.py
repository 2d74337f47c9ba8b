"""Lanes of PPO in their folders: each is the ordinary run, saved and resumed as one."""

import contextlib
import dataclasses
import io
import json
import shutil

import jax
import numpy as np
import pytest

from ppo_jax.config.ppo import PPOSettings
from ppo_jax.config.run import ModelSettings
from ppo_jax.core.types import Hyperparameters
from ppo_jax.data.records import write_jsonl
from ppo_jax.distributed.layout import make_layouts, over_lanes
from ppo_jax.io.checkpoints import Checkpoints, load_checkpoint_item
from ppo_jax.io.critics import load_critic
from ppo_jax.io.tokenizers import train_tokenizer
from ppo_jax.pipeline import run as pipeline
from ppo_jax.pipeline.lanes import make_lanes, run_lanes
from ppo_jax.training import lane_runs, lanes
from tests.support import tiny, tiny_run
from tests.support.tiny_hf import torch_model

RATE = 1e-2
FLOAT32 = ModelSettings(path="nowhere", dtype="float32")
NUMBERS = (
    {"kl_coef": 0.0, "seed": 0},
    {"kl_coef": 0.1, "seed": 0, "temperature": 0.8},
    {"kl_coef": 0.1, "seed": 1},
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a run whose SFT and reward model all start from."""
    folder, config = tmp_path_factory.mktemp("lanes"), tiny_run.config()
    stages = {name: config[name] for name in ("prepare", "model", "sft", "reward")}
    pipeline.run(stages, folder / "start")
    return folder


def settings(root, ppo, **changes):
    start = root / "start"
    sources = {"init_from": str(start / "sft"), "reward_model": str(start / "reward")}
    fixed = dict(kl_control="fixed", num_samples=2, **sources)
    fixed["optimizer"] = tiny_run.optimizer(schedule="constant")
    return tiny_run.on_base(start, ppo=fixed | ppo) | changes


def points(root, name, numbers=NUMBERS, **ppo):
    return [(settings(root, ppo | own), root / f"{name}{i}") for i, own in enumerate(numbers)]


def rows(folder, name="metrics.jsonl"):
    lines = (folder / name).read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["stage"] == "ppo"]


def params(folder, step=None):
    return load_checkpoint_item(folder / "ppo" / "checkpoints", "policy_params", step)


def assert_same_start(lane, other_run, rate=RATE):
    """Samples as they are; parameters to a tenth of the learning rate after three iterations."""
    one, other = (rows(folder, "samples.jsonl")[0] for folder in (lane, other_run))
    assert one == other | {"score": pytest.approx(other["score"], abs=1e-5)}
    for x, y in zip(*(jax.tree.leaves(params(f, 3)) for f in (lane, other_run)), strict=True):
        np.testing.assert_allclose(x, y, atol=0.1 * rate)


def assert_same_run(lane, alone, rate=RATE):
    """Besides the start: the checkpoints, and the metrics of three iterations."""
    assert_same_start(lane, alone, rate)
    kept = [Checkpoints(x / "ppo" / "checkpoints").steps() for x in (lane, alone)]
    assert kept[0] == kept[1]
    for one, other in zip(rows(lane)[:3], rows(alone)[:3], strict=True):
        assert one.keys() - {"time/compile_s"} == other.keys() - {"time/compile_s"}
        for name in ("response/length", "response/eos_fraction", "kl/coef"):
            assert one[name] == other[name]


@pytest.fixture(scope="module")
def one_program(root):
    """(three lanes as one program, what it told). A fixture of the module: it is made before
    `all_devices` of a test, on one device whichever test asks first."""
    chosen = points(root, "lane")
    with contextlib.redirect_stdout(io.StringIO()) as told:
        assert run_lanes(chosen) == {}
    return chosen, told.getvalue()


def test_each_lane_is_the_run_alone_in_its_folder(root, one_program):
    chosen, told = one_program
    assert "3 as one program, which differ in kl_coef, seed, temperature" in told
    assert "lanes share" in told and "reference, reward model, trunk" in told
    config, folder = chosen[2]
    pipeline.run(config, root / "alone")
    assert_same_run(folder, root / "alone")
    assert (folder / "report.html").is_file()
    critics = [load_critic(str(x / "ppo"), x, "", FLOAT32) for x in (folder, root / "alone")]
    assert critics[0].config == critics[1].config
    tiny.leaves_close(critics[0].params, critics[1].params, rtol=0.0, atol=0.1 * RATE)
    results = json.loads((chosen[0][1] / "results.json").read_text())
    steps = sum(row["time/step_s"] for row in rows(chosen[0][1]))
    assert 0.5 * steps < results["time/ppo_s"]  # a lane's share of both


def test_a_lane_goes_on_alone_and_a_group_is_resumed_as_one(root, one_program, capsys):
    chosen, _ = one_program
    copies = [(config, root / f"copy{i}") for i, (config, _) in enumerate(chosen)]
    for (_, folder), (_, copy) in zip(chosen, copies, strict=True):
        shutil.copytree(folder, copy)
    # A kill while step 6 was saved: one lane has it already, the others go on from step 3.
    for _, copy in copies[1:]:
        shutil.rmtree(copy / "ppo" / "checkpoints" / "6")
    longer = [
        ({**config, "ppo": {**config["ppo"], "num_iterations": 7}}, x) for config, x in copies
    ]
    assert run_lanes(longer) == {}
    told = capsys.readouterr().out
    assert "set back to step 3" in told and "copy0" in told and "resuming after step 3" in told
    for (_, folder), (_, copy) in zip(chosen, copies, strict=True):
        assert [row["step"] for row in rows(copy)] == list(range(1, 8))
        for x, y in zip(*map(rows, (folder, copy)), strict=False):
            assert (x["step"], x["policy/loss"]) == (y["step"], y["policy/loss"])
    # Alone to the eighth: an ordinary run.
    config, folder = longer[1]
    pipeline.run({**config, "ppo": {**config["ppo"], "num_iterations": 8}}, folder)
    assert [row["step"] for row in rows(folder)] == list(range(1, 9))


@pytest.mark.slow
def test_eight_lanes_on_eight_devices_are_those_of_one_device(
    root, one_program, all_devices, monkeypatch
):
    """Lanes over `data`, two in each of its four places, and each of those over two devices."""
    states = []
    restore = lane_runs.LaneRuns.restore

    def watched(*args):
        states.append(restore(*args))
        return states[-1]

    monkeypatch.setattr(lane_runs.LaneRuns, "restore", watched)
    numbers = (*NUMBERS, *({"kl_coef": 0.2, "seed": seed} for seed in range(2, 7)))
    many = points(root, "many", numbers, num_iterations=3)
    whole = {"vocab": ()}  # 317 tokens
    mesh = {"data": 4, "model": 2, "rules": whole, "rollout_rules": whole}
    many = [({**config, "mesh": mesh}, folder) for config, folder in many]
    assert run_lanes(many) == {}
    (leaf, *_) = jax.tree.leaves(states[0].policy_params)
    assert leaf.sharding.spec[0] == "data" and len(leaf.sharding.device_set) == 8
    for (_, folder), (_, one_device) in zip(many[:3], one_program[0], strict=True):
        assert_same_start(folder, one_device)


def test_lanes_that_share_little_take_turns_on_each_device(root, all_devices, capsys):
    """Whole policies are trained: two turns of four lanes, one in each place of the mesh."""
    numbers = (*NUMBERS, *({"kl_coef": 0.2, "seed": seed} for seed in range(2, 7)))
    every = {"trainable": "all", "value_trainable": "all", "num_iterations": 3}
    one = points(root, "turn", numbers, **every)
    whole = {"vocab": ()}  # 317 tokens
    mesh = {"data": 4, "model": 2, "rules": whole, "rollout_rules": whole}
    one = [({**config, "mesh": mesh}, folder) for config, folder in one]
    assert run_lanes(one) == {}
    assert "lanes at once         4" in capsys.readouterr().out
    config, lane = one[2]
    pipeline.run(config, root / "turn_alone")
    assert_same_run(lane, root / "turn_alone")


def test_lanes_that_are_far_apart_are_two_programs():
    assert lane_runs.go_together([[0, 20, 40], [0], [0, 20, 40]]) == [[1], [0, 2]]
    assert lane_runs.go_together([[0, 3], [0], [0, 3]]) == [[0, 1, 2]]


def test_a_lane_that_diverges_leaves_the_others(root, capsys):
    numbers = (NUMBERS[0], NUMBERS[1] | {"max_ref_kl": 1e-6}, NUMBERS[2])
    chosen = points(root, "brake", numbers)
    failed = run_lanes(chosen)
    assert list(failed) == [chosen[1][1]] and "above ppo.max_ref_kl" in failed[chosen[1][1]]
    assert "2 of 3 lanes go on" in capsys.readouterr().out
    assert len(rows(chosen[0][1])) == len(rows(chosen[2][1])) == 6
    stopped = rows(chosen[1][1])
    assert len(stopped) < 6 and not Checkpoints(chosen[1][1] / "ppo" / "checkpoints").steps()


def test_a_lane_whose_loss_is_not_finite_leaves_the_others(root, one_program, capsys):
    """What is not a number stays in its lane: the others are those of the program without it."""
    rate = tiny_run.optimizer(learning_rate=1e38, schedule="constant")
    chosen = points(root, "nan", (NUMBERS[0], {"optimizer": rate}, NUMBERS[2]))
    failed = run_lanes(chosen)
    assert list(failed) == [chosen[1][1]] and "loss is nan" in failed[chosen[1][1]]
    assert "2 of 3 lanes go on" in capsys.readouterr().out
    three, _ = one_program
    for lane, whole in ((chosen[0], three[0]), (chosen[2], three[2])):
        assert_same_run(lane[1], whole[1])


def letters_of_a_column(prompts, responses, response_tokens, letter):
    """A score for each token: how often the response has the row's letter, at the last one."""
    counts = [text.count(x) for text, x in zip(responses, letter, strict=True)]
    return [
        [0.01 * (token % 7) for token in tokens[:-1]] + [float(count)]
        for tokens, count in zip(response_tokens, counts, strict=True)
    ]


def token_scores(root):
    """A reward function of tokens that asks for a column, and prompts that have it."""
    prompts = root / "letters.jsonl"
    rows = [{"prompt": f"the {x} is", "letter": x[0]} for x in tiny_run.THINGS]
    write_jsonl(prompts, rows)
    function = f"{__name__}:letters_of_a_column"
    return {"reward_model": "", "reward_function": function, "prompts": str(prompts)}


def text_reward(root):
    """A reward model with a tokenizer of its own, which reads text."""
    folder = root / "classifier"
    tokenizer = train_tokenizer(["my good film had a bad end"] * 3, 280)
    size = dict(vocab_size=len(tokenizer), hidden_size=48, num_hidden_layers=3)
    labels = dict(num_labels=1, pad_token_id=5)
    model = torch_model("qwen3", "SequenceClassification", **size, **labels)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"reward_model": str(folder)}


def letters_alone(prompts, responses, letter):
    return [text.count(x) for text, x in zip(responses, letter, strict=True)]


def against_the_reference(root):
    """A reward function that asks for a column, for responses of the reference, too."""
    own = {"reward_function": f"{__name__}:letters_alone", "reference_responses": 2}
    return token_scores(root) | own


@pytest.mark.parametrize("source", [token_scores, text_reward, against_the_reference])
def test_rewards_from_outside_the_program_are_those_of_the_run_alone(root, source):
    chosen = points(root, source.__name__, NUMBERS[:2], **source(root))
    assert run_lanes(chosen) == {}
    for config, lane in chosen:
        alone = lane.with_name(lane.name + "_alone")
        pipeline.run(config, alone)
        assert_same_run(lane, alone)
        for one, other in zip(rows(lane), rows(alone), strict=True):
            for name in ("reward/score_mean", "reward/adjusted_score_mean"):
                assert one[name] == pytest.approx(other[name], abs=1e-4)
        if source is against_the_reference:
            assert rows(lane)[0]["reward/reference_score_mean"] > 0
            assert 0 < rows(lane)[0]["reward/adjusted_score_mean"] < 1


def test_lanes_with_a_critic_on_the_policy_are_the_runs_alone(root):
    on_policy = dict(shared_critic=True, trainable=1, value_trainable="all", num_iterations=3)
    chosen = points(root, "on_policy", NUMBERS[:2], **on_policy)
    assert run_lanes(chosen) == {}
    for config, lane in chosen:
        alone = lane.with_name(lane.name + "_alone")
        pipeline.run(config, alone)
        assert_same_run(lane, alone)
        ours, theirs = (
            load_checkpoint_item(x / "ppo" / "checkpoints", "value_params", 3)
            for x in (lane, alone)
        )
        assert list(ours) == ["value_head"] and np.ptp(ours["value_head"]["kernel"]) > RATE
        tiny.leaves_close(ours, theirs, atol=0.1 * RATE, rtol=0)


def test_scores_of_tokens_are_not_compared_with_those_of_the_reference(root):
    ((config, folder),) = points(root, "tokens", [{}], **token_scores(root), reference_responses=1)
    with pytest.raises(ValueError, match="ppo.reference_responses must be 0 where a function"):
        pipeline.run(config, folder)


def test_points_fall_into_groups_of_one_shape(root):
    changes = [{}, {"kl_coef": 0.3}, {"num_epochs": 1}, {"stop_kl": 0.1}, {"stop_kl": 0.2}]
    changes += [{"optimizer": tiny_run.optimizer(learning_rate=1.0, schedule="constant")}]
    changes += [{"optimizer": tiny_run.optimizer(schedule="cosine")}]
    changes += [{"score_clip": 5.0}, {"overlong_tokens": 4}, {"overlong_tokens": 8}]
    found = [
        pipeline.planned(*point, ("ppo",))[1:2] + (point[1],)
        for point in points(root, "shape", changes)
    ]
    assert lanes.groups_of_shape(found) == [[0, 1, 5], [2], [3, 4], [6], [7], [8, 9]]


def test_every_number_may_differ_and_nothing_else_is_one():
    settings = {f.name for f in dataclasses.fields(PPOSettings)}
    assert lanes.NUMBERS <= settings
    of_program = {f.name for f in dataclasses.fields(Hyperparameters)}
    assert lanes.NUMBERS - {"seed", "max_ref_kl"} == of_program - {"optimizer", "value_optimizer"}


def test_lanes_of_two_shapes_or_two_data_sets_are_refused(root):
    two = points(root, "two", ({}, {"num_epochs": 1}))
    with pytest.raises(ValueError, match="differ in seed and in these of ppo alone: .*kl_coef"):
        lanes.train_lanes(make_lanes(two))


def test_lanes_with_adapters_have_one_base(root):
    """N lanes take the base once, and N times the adapters."""

    def memory(count):
        numbers = [{"kl_coef": 0.1 * i} for i in range(count)]
        lora = dict(trainable="lora", value_trainable="lora")
        made = make_lanes(points(root, f"lora{count}x", numbers, **lora))
        layout = over_lanes(make_layouts(made[0].config.mesh), count)
        program, starts, _, _ = lanes.begin(made, layout)
        leaves = {id(x): x.nbytes for x in jax.tree.leaves(program.setup.frozen)}
        return sum(leaves.values()), sum(x.nbytes for x in jax.tree.leaves(starts))

    (base, adapters), (bases, many) = memory(1), memory(3)
    assert bases == base > adapters and many == 3 * adapters
