"""Whole runs whose scores are shaped: what is moved with the state goes on bit for bit."""

import numpy as np
import pytest

from ppo_jax.config.run import from_config_dict
from ppo_jax.io.checkpoints import load_checkpoint_item
from ppo_jax.pipeline import run as pipeline
from tests.support import tiny_run
from tests.support.finished_run import assert_same_bits, finished_run, read_lines
from tests.support.tiny_config import changed


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return finished_run(tmp_path_factory)


def settings(workdir, **ppo):
    sources = {"init_from": str(workdir / "sft"), "reward_model": str(workdir / "reward")}
    values = tiny_run.on_base(workdir, ppo=sources | {"num_samples": 0} | ppo)
    values["ppo"]["optimizer"] |= {"schedule": "constant"}
    return values


def test_normalized_scores_go_on_bit_for_bit(workdir, tmp_path):
    chosen = dict(score_normalization=True, length_penalty=0.1, length_penalty_free=4)
    pipeline.run(settings(workdir, **chosen, num_iterations=6), tmp_path / "one")
    for num_iterations in (3, 6):
        part = settings(workdir, **chosen, num_iterations=num_iterations)
        pipeline.run(part, tmp_path / "two")
    for name in ("policy_params", "value_params", "opt_state", "score_moments"):
        pair = (
            load_checkpoint_item(tmp_path / which / "ppo" / "checkpoints", name)
            for which in ("one", "two")
        )
        assert_same_bits(*pair)
    rows = read_lines(tmp_path / "one" / "metrics.jsonl")
    assert rows == read_lines(tmp_path / "two" / "metrics.jsonl") and len(rows) == 6
    # The mean of all scores is that of the means so far: iterations are of one size.
    means = np.cumsum([row["reward/score_mean"] for row in rows]) / np.arange(1, 7)
    np.testing.assert_allclose([row["reward/running_score_mean"] for row in rows], means, rtol=1e-4)
    other = settings(workdir, num_iterations=6)
    with pytest.raises(ValueError, match="other settings: score_normalization: True -> False"):
        pipeline.run(other, tmp_path / "two")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length_penalty": -0.1}, "ppo.length_penalty must be >= 0"),
        ({"length_penalty_free": 4}, "ppo.length_penalty_free must be 0 without length_penalty"),
        (
            {"length_penalty": 0.1, "length_penalty_free": 64},
            r"from 0 to below response_length \(64\)",
        ),
    ],
    ids=str,
)
def test_penalties_that_say_nothing_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        from_config_dict(changed({f"ppo.{name}": value for name, value in changes.items()}))
