"""Points share what depends on nothing in which they differ, and nothing else."""

import os

import pytest

from ppo_jax.config.parsing import filled_in
from ppo_jax.config.points import apply_point
from ppo_jax.config.run import Config, from_config_dict
from ppo_jax.pipeline.shared_stages import Work, link_parts, shared_parts
from tests.support import tiny_run

ALL = {"data", "base", "sft", "reward"}


def parts_of(workdir, changes=None, settings=None):
    """{part: its folder's name}"""
    settings = filled_in(Config, settings or tiny_run.config())
    config = from_config_dict(apply_point(settings, changes or {}))
    stages = [name for name in ("sft", "reward", "ppo", "evaluate") if getattr(config, name)]
    return {part.name: part.folder.name for part in shared_parts(config, workdir, stages)}


@pytest.mark.parametrize(
    ("changes", "shared"),
    [
        ({"ppo.kl_coef": 0.5, "ppo.seed": 3, "evaluate.num_prompts": 2, "mesh.data": 1}, ALL),
        ({"reward.batch_size": 4}, ALL - {"reward"}),
        ({"sft.optimizer.learning_rate": 0.5}, {"data", "base"}),
        ({"seed": 1}, {"data"}),
        ({"model.scratch.num_layers": 1}, {"data"}),
        ({"model.chat_date": "2026-01-01"}, {"data"}),
        ({"prepare": "tests.support.users_code:prepare"}, set()),
    ],
)
def test_what_two_points_share(tmp_path, changes, shared):
    first, second = parts_of(tmp_path), parts_of(tmp_path, changes)
    assert first.keys() == second.keys() == ALL
    assert {name for name in first if first[name] == second[name]} == shared


def test_a_reward_model_that_starts_from_the_base_model_does_not_depend_on_sft(tmp_path):
    settings = tiny_run.config()
    settings["reward"]["init_from"] = "base"
    other = {"sft.batch_size": 4}
    first, second = parts_of(tmp_path, None, settings), parts_of(tmp_path, other, settings)
    assert {name for name in ALL if first[name] == second[name]} == ALL - {"sft"}


def test_the_last_stage_is_the_points_own(tmp_path):
    settings = {name: tiny_run.config()[name] for name in ("prepare", "model", "sft", "reward")}
    assert parts_of(tmp_path, None, settings).keys() == {"data", "base", "sft"}


def test_files_that_have_changed_make_other_parts(tmp_path):
    tiny_run.prepare(tmp_path / "data")
    (tmp_path / "base").mkdir()
    settings = tiny_run.on_base(tmp_path, sft={}, reward={}, ppo={})
    first = parts_of(tmp_path, None, settings)
    with open(tmp_path / "data" / "train_ratings.jsonl", "a") as file:
        file.write('{"text": "the film", "ratings": [1]}\n')
    second = parts_of(tmp_path, None, settings)
    assert first["sft"] == second["sft"] and first["reward"] != second["reward"]


def make_work(workdir, digest="a"):
    """A point that shares an SFT stage of five steps."""
    folder = workdir / "shared" / f"sft-{digest}"
    (folder / "sft").mkdir(parents=True)
    lines = [f'{{"stage": "sft", "step": {step}, "sft/loss": 1.5}}' for step in range(3)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"stage": "sf']))
    (folder / "results.json").write_text('{"time/sft_s": 4.5, "time/prepare_s": 1.0}')
    part = Work(name="sft", folder=folder, settings={}, stages=("sft",))
    point = workdir / "kl_coef=1"
    point.mkdir(exist_ok=True)
    return Work(
        name="kl_coef=1", folder=point, settings={}, stages=("ppo",), needs=(part,), point={}
    )


def test_a_point_has_relative_links_and_the_lines_of_its_shared_stages(tmp_path):
    (tmp_path / "sweep").mkdir()
    work = make_work(tmp_path / "sweep")
    own = '{"stage": "ppo", "step": 1, "kl/ref": 0.5}\n'
    (work.folder / "metrics.jsonl").write_text(own)
    (work.folder / "results.json").write_text('{"time/ppo_s": 2.0, "note": "kept"}')
    for _ in range(2):  # a start that was killed, and another
        link_parts(work)
        assert os.readlink(work.folder / "sft") == "../shared/sft-a/sft"
        lines = (work.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        assert len(lines) == 4 and lines[3] == own and '"step": 2' in lines[2]
        results = (work.folder / "results.json").read_text()
        assert '"time/total_s": 6.5' in results and '"note": "kept"' in results
    (tmp_path / "sweep").rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "kl_coef=1" / "sft").is_dir()


def test_a_link_to_another_part_is_made_anew_only_before_the_point_has_begun(tmp_path, monkeypatch):
    link_parts(make_work(tmp_path, "a"))
    link_parts(work := make_work(tmp_path, "b"))
    assert os.readlink(work.folder / "sft") == "../shared/sft-b/sft"
    monkeypatch.setattr("ppo_jax.pipeline.shared_stages.has_begun", lambda folder: True)
    with pytest.raises(ValueError, match="sft-b/sft, made from other settings or data than now"):
        link_parts(make_work(tmp_path, "c"))


def test_a_points_own_folder_stays(tmp_path):
    work = make_work(tmp_path)
    (work.folder / "sft").mkdir()
    link_parts(work)
    assert not (work.folder / "sft").is_symlink()
