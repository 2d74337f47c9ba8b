"""PPO without a critic: no such network is built, and a run is like any other."""

import json
import math

import jax.numpy as jnp
import pytest

from ppo_jax import gae, make_experience
from ppo_jax.core.critic_free import rloo_advantages
from ppo_jax.pipeline import run as pipeline
from tests.support import tiny, tiny_run

FREE = dict(advantage="rloo", samples_per_prompt=2)
FROM_BASE = dict(
    init_from="base", reward_function="tests.support.tiny_run:letters", reward_model=""
)
CONSTANT = dict(optimizer=tiny_run.optimizer(schedule="constant"))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of all stages, evaluation and report included."""
    folder = tmp_path_factory.mktemp("run")
    values = tiny_run.config()
    values["ppo"] |= FREE
    pipeline.run(values, folder)
    return folder


def rows(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in lines if row["stage"] == "ppo"]


def test_a_whole_run_has_no_critic(workdir):
    metrics = rows(workdir)
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5, 6]
    assert not [name for name in metrics[-1] if name.startswith("value/")]
    assert all(math.isfinite(row["ppo/loss"]) for row in metrics)
    saved = [str(path) for path in (workdir / "ppo" / "checkpoints").rglob("*")]
    assert saved and not [path for path in saved if "value" in path]
    page = (workdir / "report.html").read_text()
    assert "kl/ref" in page or "KL" in page
    assert "explained variance" not in page.lower()


def test_the_table_at_the_start_has_no_critic(workdir, tmp_path, capsys):
    values = tiny_run.on_base(workdir, ppo=FREE | FROM_BASE)
    pipeline.dry_run(values, tmp_path)
    table = capsys.readouterr().out
    assert "memory, policy" in table and "memory, critic" not in table
    assert "without a critic" in table and "vf_coef" in table


def test_a_run_resumes_as_if_it_had_not_stopped(workdir, tmp_path):
    def run(folder, num_iterations):
        shape = FREE | FROM_BASE | CONSTANT | dict(num_iterations=num_iterations)
        pipeline.run(tiny_run.on_base(workdir, ppo=shape), folder)
        return rows(folder)

    run(tmp_path / "parts", 3)
    parts, whole = run(tmp_path / "parts", 6), run(tmp_path / "whole", 6)
    for mine, one in zip(parts, whole, strict=True):
        differ = [name for name in one if mine[name] != one[name]]
        assert not [name for name in differ if not name.startswith("time/")]


def test_the_advantages_and_the_networks_must_agree():
    run = tiny.Run("whole")
    rollout = run.rollout()
    args = rollout, jnp.zeros(len(rollout.tokens)), run.state, run.numbers
    networks, options = run.parts["networks"], run.parts["options"]
    changes = [
        ("gae needs a critic: see networks", dict(networks=networks._replace(value=None))),
        (
            "rloo_advantages needs no critic: see networks",
            dict(options=tiny.options(advantage=rloo_advantages)),
        ),
        (
            "rloo_advantages needs no critic: see state",
            dict(
                options=tiny.options(advantage=rloo_advantages),
                networks=networks._replace(value=None),
            ),
        ),
    ]
    for message, change in changes:
        with pytest.raises(ValueError, match=message):
            make_experience(*args, **run.parts | change)
    assert options.advantage is gae


def test_the_seed_of_ppo_varies_ppo_alone(workdir, tmp_path):
    """A run of seed 0 whose PPO has the seed 1 is not that of 0, and is PPO of a run of seed 1."""

    def first(name, **seeds):
        shape = FREE | FROM_BASE | dict(num_iterations=1) | seeds
        settings = tiny_run.on_base(workdir, ppo={k: v for k, v in shape.items() if k != "run"})
        settings["seed"] = shape.get("run", 0)
        pipeline.run(settings, tmp_path / name)
        return {k: v for k, v in rows(tmp_path / name)[0].items() if not k.startswith("time/")}

    plain, own, whole = first("0"), first("own", seed=1), first("whole", run=1)
    assert own == whole != plain
