"""Whole runs with two reward models, against each of them alone."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest

from ppo_jax.algorithms.experience import sample_responses
from ppo_jax.config.mesh import MeshSettings
from ppo_jax.config.run import ModelSettings, from_config_dict
from ppo_jax.data.records import write_jsonl
from ppo_jax.distributed.layout import make_layouts
from ppo_jax.io.checkpoints import load_checkpoint_item
from ppo_jax.io.stage_folder import describe_stage, load_model
from ppo_jax.pipeline import run as pipeline
from ppo_jax.planner import phases
from ppo_jax.planner.models import read_models
from ppo_jax.training.ppo_models import find_models
from ppo_jax.training.ppo_setup import split_models, starts_of
from tests.support import tiny, tiny_plan, tiny_run
from tests.support.finished_run import assert_same_bits, finished_run, read_lines
from tests.support.tiny_config import changed

FLOAT32 = ModelSettings(path="nowhere", dtype="float32")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return finished_run(tmp_path_factory)


def trained(workdir, folder, **reward):
    """Another reward model on the same SFT model, of another seed."""
    values = tiny_run.on_base(workdir, reward={"init_from": str(workdir / "sft")} | reward)
    pipeline.run(values | {"seed": 5}, folder)
    return folder / "reward"


@pytest.fixture(scope="module")
def other(workdir, tmp_path_factory):
    return trained(workdir, tmp_path_factory.mktemp("rm1"))


@pytest.fixture(scope="module")
def shallow(workdir, tmp_path_factory):
    """One of another shape."""
    return trained(workdir, tmp_path_factory.mktemp("rm2"), num_layers=1)


def settings(workdir, reward_model, *others, **ppo):
    sources = {"init_from": str(workdir / "sft"), "reward_model": str(reward_model)}
    sources |= {"other_reward_models": [str(x) for x in others], "critic_init_from": "policy"}
    values = tiny_run.on_base(workdir, ppo=sources | {"num_iterations": 1} | ppo)
    values["ppo"]["optimizer"] |= {"schedule": "constant"}
    return values


def run(values, folder):
    """(metrics of its iterations, samples of before the first)."""
    pipeline.run(values, folder)
    samples = [row for row in read_lines(folder / "samples.jsonl") if row["step"] == 0]
    return read_lines(folder / "metrics.jsonl"), samples


@pytest.fixture(scope="module")
def alone(workdir, other, shallow, tmp_path_factory):
    """{reward model: `run` with it alone}; the first responses are the same in all."""
    models = {"reward": workdir / "reward", "other": other, "shallow": shallow}
    return {
        name: run(settings(workdir, path), tmp_path_factory.mktemp(name))
        for name, path in models.items()
    }


@pytest.mark.parametrize("second", ["other", "shallow"])  # in one pass, and one after another
def test_scores_are_the_rule_of_those_of_the_models_alone(
    workdir, alone, second, request, tmp_path, capsys
):
    chosen = dict(reward_rule="mean_minus_std", reward_rule_coef=0.5)
    path = request.getfixturevalue(second)
    rows, samples = run(settings(workdir, workdir / "reward", path, **chosen), tmp_path)
    assert "mean_minus_std of 2 reward models" in capsys.readouterr().out
    singles = [alone[name] for name in ("reward", second)]
    for number, (own, _) in enumerate(singles):
        assert rows[0][f"reward/score_{number}"] == pytest.approx(
            own[0]["reward/score_mean"], abs=1e-5
        )
    each = np.array([[row["score"] for row in own] for _, own in singles])
    assert [row["response"] for row in samples] == [row["response"] for row in singles[0][1]]
    expected = each.mean(axis=0) - 0.5 * each.std(axis=0)
    np.testing.assert_allclose([row["score"] for row in samples], expected, atol=1e-5)
    assert rows[0]["reward/disagreement"] > 1e-3
    sources = describe_stage(tmp_path / "ppo")["sources"]
    assert sources["reward_model"] == sources["other_reward_models.0"] == 6


def test_by_a_threshold_the_score_of_safety_counts_where_it_is_low(
    workdir, alone, other, tmp_path, capsys
):
    each = [[row["score"] for row in alone[name][1]] for name in ("reward", "other")]
    helpful, safe = np.array(each)
    threshold = float(np.median(safe)) + 1e-3
    chosen = dict(reward_rule="threshold", reward_rule_threshold=threshold)
    _, samples = run(settings(workdir, workdir / "reward", other, **chosen), tmp_path)
    assert "threshold of 2 reward models" in capsys.readouterr().out
    expected = np.where(safe < threshold, safe, helpful)
    assert 0 < (safe < threshold).sum() < len(safe)
    np.testing.assert_allclose([row["score"] for row in samples], expected, atol=1e-5)


@pytest.mark.parametrize(("threshold", "share"), [(-1e3, 0), (1e3, 1)])
def test_the_share_of_scores_of_safety_is_that_of_those_below_the_threshold(
    workdir, other, tmp_path, threshold, share
):
    """Of none or of all: the scores are those of the one model or of the other."""
    chosen = dict(reward_rule="threshold", reward_rule_threshold=threshold)
    rows, _ = run(settings(workdir, workdir / "reward", other, **chosen), tmp_path)
    found = rows[0]
    assert found["reward/safety_fraction"] == share
    assert found["reward/score_mean"] == pytest.approx(found[f"reward/score_{share}"], abs=1e-5)
    assert abs(found["reward/score_0"] - found["reward/score_1"]) > 1e-3


def test_prompts_of_safety_have_the_score_of_safety(workdir, alone, other, tmp_path):
    """With a threshold that no score is below; and a column that is not one of flags."""
    prompts, texts = tmp_path / "prompts.jsonl", [f"the {thing} is" for thing in tiny_run.THINGS]
    flagged = [{"prompt": x, "is_safety": i % 2 == 0} for i, x in enumerate(texts)]
    write_jsonl(prompts, flagged)
    chosen = dict(reward_rule="threshold", reward_rule_threshold=-1e3, prompts=str(prompts))
    values = settings(workdir, workdir / "reward", other, **chosen)
    rows, samples = run(values, tmp_path / "run")
    assert [row["prompt"] for row in samples] == texts[: len(samples)]
    helpful, safe = np.array([[row["score"] for row in alone[x][1]] for x in ("reward", "other")])
    expected = np.where(np.arange(len(samples)) % 2 == 0, safe, helpful)
    np.testing.assert_allclose([row["score"] for row in samples], expected, atol=1e-5)
    assert 0 < rows[0]["reward/safety_fraction"] < 1
    for row, message in (
        ({"is_safety": 1}, "'is_safety' must be true or false, got 1 for the prompt 'the"),
        ({}, "there is no 'is_safety', which other rows have"),
    ):
        write_jsonl(prompts, [*flagged[1:], {"prompt": texts[0]} | row])
        with pytest.raises(ValueError, match=message):
            pipeline.dry_run(values, tmp_path / "refused")


def test_averaged_weights_are_one_model(workdir, other, tmp_path):
    values = settings(workdir, workdir / "reward", other, reward_rule="average_weights")
    rows, samples = run(values, tmp_path)
    assert len(samples) == 3
    assert not {"reward/score_0", "reward/disagreement"} & rows[0].keys()
    config = from_config_dict(values)
    models = find_models(config, tmp_path, "", make_layouts(config.mesh)[0])
    starts = starts_of(config.ppo, *models)
    reward = split_models(config.ppo, *models, starts)[0].reward
    members = [load_model(path, FLOAT32).params for path in (workdir / "reward", other)]
    mean = jax.tree.map(lambda x, y: (np.asarray(x, np.float64) + y) / 2, *members)
    tiny.leaves_close(reward, mean, rtol=1e-6, atol=1e-7)
    assert tiny.leaves_differ(*members)


def test_a_run_with_two_goes_on_bit_for_bit_with_the_steps_that_it_began_with(
    workdir, other, tmp_path
):
    source = tmp_path / "rm" / "reward"
    shutil.copytree(other, source)
    chosen = dict(reward_rule="min", num_samples=0, critic_init_from="reward_model")
    start = functools.partial(settings, workdir, workdir / "reward", source, **chosen)
    pipeline.run(start(num_iterations=6), tmp_path / "one")
    for num_iterations in (3, 6):
        pipeline.run(start(num_iterations=num_iterations), tmp_path / "two")
    for name in ("policy_params", "value_params", "opt_state"):
        assert_same_bits(
            *(
                load_checkpoint_item(tmp_path / which / "ppo" / "checkpoints", name)
                for which in ("one", "two")
            )
        )
    assert read_lines(tmp_path / "one" / "metrics.jsonl") == read_lines(
        tmp_path / "two" / "metrics.jsonl"
    )
    shutil.rmtree(source / "checkpoints" / "6")
    with pytest.raises(ValueError, match="rm/reward had taken 6 steps when this run began"):
        pipeline.run(start(num_iterations=7), tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("second", ["other", "shallow"])
def test_eight_devices_score_as_one(workdir, second, request, tmp_path, all_devices):
    whole = {"rules": {"vocab": ()}, "rollout_rules": {"vocab": ()}}  # of 317 tokens
    rows = []
    for name, mesh in (("one", {}), ("eight", {"data": 2, "fsdp": 2, "model": 2, **whole})):
        path = request.getfixturevalue(second)
        sizes = dict(rollout_batch_size=16, num_minibatches=2, reward_rule="min", num_samples=0)
        values = settings(workdir, workdir / "reward", path, **sizes) | {"mesh": mesh}
        pipeline.run(values, tmp_path / name)
        rows += read_lines(tmp_path / name / "metrics.jsonl")
    one, eight = rows
    for metric in ("reward/score_0", "reward/score_1", "reward/disagreement", "reward/score_mean"):
        assert eight[metric] == pytest.approx(one[metric], abs=1e-4), metric


OF_STD = {"other_reward_models": ["a"], "reward_rule": "mean_minus_std"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"other_reward_models": ["reward"]}, "each once and none that of reward_model"),
        ({"other_reward_models": ["a", "a"]}, "each once"),
        ({"reward_rule": "min"}, "'mean' without other_reward_models"),
        ({"other_reward_models": ["a"], "reward_rule": "max"}, "one of"),
        ({"other_reward_models": ["a"], "reward_rule_coef": 2.0}, "1 with reward_rule='mean'"),
        (OF_STD | {"reward_rule_coef": -1.0}, ">= 0"),
        (OF_STD | {"reward_rule_threshold": 0.0}, "-1.73 with reward_rule='mean_minus_std'"),
        ({"reward_rule": "threshold"}, "'mean' without other_reward_models"),
        (
            {"other_reward_models": ["a", "b"], "reward_rule": "threshold"},
            "other_reward_models must be one name with reward_rule='threshold'",
        ),
        (
            {"other_reward_models": ["a"], "reward_rule": "threshold", "reward_rule_coef": 2.0},
            "reward_rule_coef must be 1 with reward_rule='threshold'",
        ),
        (
            {"other_reward_models": ["a"], "reward_model": "", "reward_function": "m:f"},
            r"\(\) without a reward_model",
        ),
    ],
    ids=str,
)
def test_rules_that_say_nothing_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        from_config_dict(changed({f"ppo.{name}": value for name, value in changes.items()}))


def refused(workdir, other, **changes):
    values = settings(workdir, workdir / "reward", other, **changes)
    with pytest.raises(ValueError) as caught:
        pipeline.dry_run(values, workdir.parent / "refused")
    return str(caught.value)


def test_models_that_do_not_go_together_are_refused(workdir, other, shallow, tmp_path):
    message = refused(workdir, shallow, reward_rule="average_weights")
    assert "ppo.reward_rule must be another than 'average_weights'" in message
    assert "has another shape" in message
    assert "must be reward models, got the policy" in refused(workdir, workdir / "sft")
    assert "there is no folder" in refused(workdir, tmp_path / "nowhere")
    text = tmp_path / "text"
    shutil.copytree(other, text)
    path = text / "tokenizer" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokens = tokenizer["model"]["vocab"]
    tokens["Ġgoodness"] = tokens.pop(max(tokens, key=tokens.get))
    tokenizer["model"]["merges"] = []
    path.write_text(json.dumps(tokenizer))
    message = refused(workdir, text)
    assert "ppo.other_reward_models must be () where a reward model reads text" in message


@pytest.mark.parametrize("rule", ["min", "average_weights"])
def test_a_plan_has_the_parameters_and_the_work_of_both(rule):
    planned, found = tiny_plan.settings(), []
    for others in ((), ("runs/rm1/reward",)):
        chosen = dict(other_reward_models=others, reward_rule=rule if others else "mean")
        ppo = dataclasses.replace(planned.ppo, **chosen)
        config = dataclasses.replace(planned, ppo=ppo, mesh=MeshSettings())
        models, layouts = read_models(config), make_layouts(config.mesh)
        flops = phases.analytic_flops(config.ppo, models)["scoring"]
        args = phases.AbstractArguments(config, models, layouts)
        size = sum(x.size for x in jax.tree.leaves(args.frozen.reward))
        parts = dict(networks=args.networks, options=phases.abstract_options(config.ppo))

        def scored(frozen, start, prompts, key, parts=parts):
            rollout = sample_responses(*start, prompts, key, frozen=frozen, **parts)
            return phases.score(*start, rollout, frozen=frozen, **parts)[1]

        start = args.state, args.hyperparameters
        metrics = jax.eval_shape(scored, args.frozen, start, args.prompts, args.key)
        found.append((flops, size, metrics.keys()))
    (flops, size, names), (more, both, of_both) = found
    assert both == (2 * size if rule == "min" else size)
    assert (more > flops) == (rule == "min")
    assert names == of_both
