"""The update learns from the best and the worst samples of a prompt alone."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ppo_jax.algorithms.experience import make_experience
from ppo_jax.algorithms.ppo import update_from_rollout
from ppo_jax.config.run import from_config_dict
from ppo_jax.core.critic_free import rloo_advantages
from ppo_jax.core.rewards import token_scores
from ppo_jax.pipeline import run as pipeline
from tests.support import tiny, tiny_run
from tests.support.finished_run import finished_run
from tests.support.run_files import read_jsonl
from tests.support.tiny_config import changed

SCORES = np.array([0.3, 2.0, -1.0, 0.5, 4.0, 3.0, 5.0, 4.5], np.float32)
KEPT = np.array([1, 2, 5, 6])  # the best and the worst of each four


def options(samples=4, **changes):
    """Two groups of four."""
    return tiny.options(sampling=tiny.sampling(samples_per_prompt=samples), **changes)


def responses():
    """Eight of them, four to each of two prompts."""
    run, prompts = tiny.Run("whole", options()), tiny.prompts(batch_size=2)
    return tiny.sample_responses(run.state, run.numbers, prompts, tiny.RUN_KEY, **run.parts)


def of_rows(tree, rows):
    return jax.tree.map(lambda x: x[rows], tree)


@pytest.mark.parametrize("of_tokens", [False, True])
@pytest.mark.parametrize("old_logprobs", ["rollout", "recompute"])
def test_the_experience_is_that_of_a_rollout_of_the_kept_responses(of_tokens, old_logprobs):
    """As in the paper, whose buffer holds no others: their advantages alone are whitened."""
    run = tiny.Run("whole", options(keep_samples=2, old_logprobs=old_logprobs))
    rollout, scores = responses(), jnp.asarray(SCORES)
    if of_tokens:
        scores = token_scores(scores, rollout.response_mask)
    got, metrics = run.experience(rollout, scores)
    run.parts["options"] = options(samples=2, old_logprobs=old_logprobs)
    expected, of_kept = run.experience(of_rows(rollout, KEPT), scores[KEPT])
    run.parts["options"] = options(old_logprobs=old_logprobs)
    chex.assert_trees_all_equal_shapes(got, expected)
    tiny.leaves_close(got, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(expected.advantages).max() > 0.1
    # What is measured is of all responses, but for the critic, of those that it learns.
    assert metrics["reward/score_mean"] == pytest.approx(SCORES.mean())
    _, whole = run.experience(rollout, scores)
    whole |= {name: x for name, x in of_kept.items() if name.startswith("value/")}
    tiny.leaves_close(metrics, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_an_update_is_that_of_the_kept_responses(num_micro_batches):
    chosen = dict(num_micro_batches=num_micro_batches, packing=num_micro_batches > 1)
    run = tiny.Run("whole", options(keep_samples=2, **chosen))
    rollout, scores = responses(), jnp.asarray(SCORES)
    state, _ = run.update_from_rollout(rollout, scores)
    run.parts["options"] = options(samples=2, **chosen)
    expected, _ = run.update_from_rollout(of_rows(rollout, KEPT), scores[KEPT])
    tiny.leaves_close(state.policy_params, expected.policy_params, rtol=1e-4, atol=1e-6)
    tiny.leaves_close(state.value_params, expected.value_params, rtol=1e-4, atol=1e-6)
    assert state.episodes == len(SCORES) and expected.episodes == len(KEPT)


def test_an_estimator_that_compares_samples_compares_all_of_them():
    run = tiny.Run("whole", kl_coef=0.0)
    networks = run.parts["networks"]._replace(value=None)
    state = dataclasses.replace(run.state, value_params=None)
    parts = dict(frozen=run.setup.frozen, networks=networks)
    rollout = responses()
    got, _ = make_experience(
        rollout,
        jnp.asarray(SCORES),
        state,
        run.numbers,
        options=options(keep_samples=2, advantage=rloo_advantages),
        **parts,
    )
    groups = SCORES.reshape(2, 4)
    others = (groups.sum(axis=1, keepdims=True) - groups) / 3
    expected = (groups - others).reshape(-1)[KEPT]
    mask = np.asarray(rollout.response_mask)[KEPT]
    np.testing.assert_allclose(got.advantages, expected[:, None] * mask, rtol=1e-5)


def test_lanes_keep_their_own_responses():
    run = tiny.Run("whole", options(keep_samples=2))
    rollout = responses()

    def lane(scores):
        return update_from_rollout(
            run.state, run.numbers, rollout, scores, tiny.RUN_KEY, **run.parts
        )[0].policy_params

    every = jnp.stack([SCORES, -(SCORES**2)])
    got = jax.jit(jax.vmap(lane))(every)
    alone = [run.update_from_rollout(rollout, scores)[0].policy_params for scores in every]
    expected = jax.tree.map(lambda *x: jnp.stack(x), *alone)
    tiny.leaves_close(got, expected, rtol=1e-3, atol=2e-5)


def test_eight_devices_keep_what_one_keeps():
    run = tiny.Run("whole", options(keep_samples=2, num_minibatches=1))
    rollout, scores = responses(), jnp.asarray(SCORES)
    expected, _ = run.update_from_rollout(rollout, scores)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, replicated = (NamedSharding(mesh, PartitionSpec(*x)) for x in (("data",), ()))
    rollout, scores = jax.device_put((rollout, scores), rows)
    run.state, run.numbers, run.parts["frozen"] = jax.device_put(
        (run.state, run.numbers, run.setup.frozen), replicated
    )
    state, _ = run.update_from_rollout(rollout, scores)
    tiny.leaves_close(state.policy_params, expected.policy_params, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_samples": 2}, r"from 2 to below samples_per_prompt \(1\), got 2"),
        ({"keep_samples": 4, "samples_per_prompt": 4}, r"below samples_per_prompt \(4\), got 4"),
        ({"keep_samples": 3, "samples_per_prompt": 4}, "an even number from 2"),
        ({"keep_samples": -2, "samples_per_prompt": 4}, "an even number from 2"),
        (
            {"keep_samples": 2, "samples_per_prompt": 8, "num_minibatches": 32},
            r"multiple of num_minibatches x num_micro_batches \(32\); it is 16, got 2",
        ),
        (
            {"keep_samples": 2, "samples_per_prompt": 8, "value_num_minibatches": 32},
            r"multiple of value_num_minibatches x num_micro_batches \(32\); it is 16",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_kept_is_one_line(changes, message):
    with pytest.raises(ValueError, match="ppo.keep_samples must be .*" + message):
        from_config_dict(changed({f"ppo.{name}": value for name, value in changes.items()}))


@pytest.mark.parametrize("kept", [3, 4, -2])
def test_options_refuse_it_too(kept):
    with pytest.raises(ValueError, match=f"keep_samples must be 0, or even .*got {kept}"):
        options(keep_samples=kept)


def test_a_run_learns_from_half_of_its_samples_and_its_table_says_so(
    tmp_path_factory, tmp_path, capsys
):
    workdir = finished_run(tmp_path_factory)
    chosen = dict(samples_per_prompt=4, keep_samples=2, num_iterations=2, num_samples=0)
    sources = {"init_from": str(workdir / "sft"), "reward_model": str(workdir / "reward")}
    pipeline.run(tiny_run.on_base(workdir, ppo=sources | chosen), tmp_path)
    out = capsys.readouterr().out
    assert "the 1 best and the 1 worst of 4 responses to a prompt" in out
    assert "4 optimizer steps of 2 episodes" in out
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["reward/episodes"] for row in rows] == [8, 16]
