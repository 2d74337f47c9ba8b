"""Dynamic sampling where the host scores: the same batch as in one program, and resumable."""

import functools

import jax
import numpy as np
import pytest

from ppo_jax.algorithms.dynamic_sampling import gather
from ppo_jax.config.mesh import MeshSettings
from ppo_jax.config.run import from_config_dict
from ppo_jax.core.critic_free import grpo_advantages
from ppo_jax.distributed.layout import make_layouts
from ppo_jax.pipeline import run as pipeline
from ppo_jax.training.dynamic_sampling import inputs_of, make_sampled
from ppo_jax.training.lanes import Lane, check_lanes
from ppo_jax.training.ppo import make_buckets
from tests.algorithms.test_dynamic_sampling import (
    GROUP,
    B,
    numbered_prompts,
    sample_of_tables,
    tables,
)
from tests.support import tiny, tiny_run
from tests.support.run_files import read_jsonl
from tests.support.tiny_config import changed

MANY = {"ppo.max_rollouts": 3, "ppo.samples_per_prompt": 2}


def test_the_host_gathers_what_one_program_does():
    sampling = tiny.sampling(samples_per_prompt=GROUP)
    options = tiny.options(sampling=sampling, advantage=grpo_advantages, max_rollouts=5)
    layout = make_layouts(MeshSettings())[0]
    chosen, key = np.arange(5 * B).reshape(5, B), layout.key(0, 0)
    for seed, varied in ((0, 0.5), (2, 1.0), (3, 0.0)):
        scores, asked = tables(seed, varied), []

        def sample(state, numbers, prompts, key, *, frozen, scores=scores):
            return sample_of_tables(scores, prompts, key)[0]

        def score(chosen, rollout, scores=scores, asked=asked):
            asked.append(int(chosen[0]) // B)
            return scores[asked[-1]], {"reward/other": np.full(B, float(asked[-1]))}

        sampled = make_sampled(options, sample, score, layout)
        rollout, got, more, how_many = sampled(
            chosen, numbered_prompts(5), key, None, None, frozen=None
        )
        in_program = functools.partial(sample_of_tables, scores)
        expected = gather(in_program, numbered_prompts(5), key, group_size=GROUP)
        tiny.leaves_close((rollout, got), (expected.rollout, expected.scores))
        assert asked == list(range(int(expected.num_rollouts)))
        assert how_many["num_rollouts"] == expected.num_rollouts
        assert more["reward/other"].mean() == np.mean(asked)
        assert more["ppo/rollouts"] == [len(asked)]


def test_what_an_iteration_takes_depends_on_its_number_alone():
    settings = from_config_dict(changed(MANY)).ppo
    rows = tiny.prompts(0, 200)
    rows = jax.tree.map(np.asarray, rows)
    buckets, layout = make_buckets(settings, rows, 1), make_layouts(MeshSettings())[0]
    chosen, prompts, width = inputs_of(settings, buckets, rows, layout, 2)
    assert chosen.shape == (3, settings.rollout_batch_size) and width == tiny.PROMPT_LENGTH
    for own, batch, number in zip(chosen, prompts, (6, 7, 8), strict=True):
        expected, _ = buckets.batch(number)
        np.testing.assert_array_equal(own, expected.repeat(2))
        np.testing.assert_array_equal(batch.tokens, rows.tokens[expected])


def test_with_one_rollout_an_iteration_takes_what_it_took():
    settings = from_config_dict(changed({"ppo.samples_per_prompt": 2})).ppo
    rows = jax.tree.map(np.asarray, tiny.prompts(0, 200))
    buckets, layout = make_buckets(settings, rows, 1), make_layouts(MeshSettings())[0]
    chosen, prompts, _ = inputs_of(settings, buckets, rows, layout, 2)
    expected, _ = buckets.batch(2)
    np.testing.assert_array_equal(chosen, expected.repeat(2))
    np.testing.assert_array_equal(prompts.tokens, rows.tokens[expected])


def test_lanes_of_one_program_sample_once(tmp_path):
    config = from_config_dict(changed(MANY))
    with pytest.raises(ValueError, match="ppo.max_rollouts must be 1 in lanes of one program, got"):
        check_lanes([Lane(config, tmp_path, "base", None)] * 2)


def is_long(prompts, responses):
    """1 or 0: many groups agree."""
    return [float(len(response) > 12) for response in responses]


def test_a_run_that_is_resumed_takes_the_same_rollouts(tmp_path, capsys):
    start = tmp_path / "start"
    config = tiny_run.config()
    pipeline.run({name: config[name] for name in ("prepare", "model", "sft")}, start)
    how = dict(
        init_from="base",
        reward_model="",
        reward_function=f"{__name__}:is_long",
        advantage="grpo",
        samples_per_prompt=2,
        max_rollouts=3,
        num_samples=0,
        save_every=2,
        optimizer=tiny_run.optimizer(schedule="constant"),
    )

    def run(folder, num_iterations):
        ppo = how | dict(num_iterations=num_iterations)
        pipeline.run(tiny_run.on_base(start, ppo=ppo), tmp_path / folder)
        every = read_jsonl(tmp_path / folder / "metrics.jsonl")
        return [row for row in every if row["stage"] == "ppo"]

    whole = run("whole", 4)
    run("parts", 2)
    parts = run("parts", 4)
    assert "at most 3 rollouts an iteration" in capsys.readouterr().out
    assert [row["step"] for row in parts] == [1, 2, 3, 4]
    used = [row["ppo/rollouts"] for row in whole]
    assert max(used) > 1 and used == [row["ppo/rollouts"] for row in parts]
    assert whole[-1]["reward/episodes"] == 8 * sum(used)
    for one, other in zip(whole, parts, strict=True):
        for name in ("reward/score_mean", "policy/loss", "reward/sampled_score_mean"):
            np.testing.assert_allclose(one[name], other[name], atol=1e-6)
