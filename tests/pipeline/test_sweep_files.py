"""The table of a sweep is what its folders hold."""

import csv
import json

import pytest

from ppo_jax.evaluation.report import sweep_page
from ppo_jax.pipeline.sweep_files import figures, read_point, write_point, write_table


def make_point(workdir, point, status="complete", error="", **results):
    folder = workdir / "_".join(map(str, point.values()))
    write_point(folder, point, status, error)
    (folder / "results.json").write_text(json.dumps(results))
    rows = [
        {"stage": "sft", "step": 3, "sft/loss": 2.0, "time/step_s": 1.0},
        {"stage": "ppo", "step": 1, "kl/ref": 0.5, "reward/score_mean": 1.0, "time/step_s": 2.0},
        {"stage": "ppo", "step": 2, "kl/ref": 0.7, "reward/score_mean": None},
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def test_a_row_has_the_figures_and_the_last_value_of_each_metric(tmp_path):
    rate = {"gold/win_rate_ppo_vs_sft": 0.84, "gold/win_rate_ppo_vs_sft_interval": [0.8, 0.9]}
    folder = make_point(tmp_path, {"ppo.kl_coef": 0.1, "seed": 1}, judges=[{}], note="x", **rate)
    (row,) = write_table(tmp_path)
    metrics = {
        **rate,
        "kl/ref": 0.7,
        "reward/score_mean": 1.0,
        "sft/loss": 2.0,
        "time/step_s": 2.0,
    }
    assert row == {
        "point": {"ppo.kl_coef": 0.1, "seed": 1},
        "workdir": str(tmp_path / "0.1_1"),
        "status": "complete",
        "metrics": metrics,
    }
    assert json.loads((tmp_path / "sweep.json").read_text()) == [row]
    assert figures(folder) == "win rate 84%  kl 0.7"
    assert figures(make_point(tmp_path, {"seed": 9})) == "score 1.00  kl 0.7"


def test_rows_are_in_the_order_of_their_values_whoever_made_them(tmp_path):
    for kl_coef in (10.0, 9.0, float("inf")):
        make_point(tmp_path, {"ppo.stop_kl": kl_coef})
    make_point(tmp_path, {"ppo.gamma": 1.0}, "failed", "it diverged")
    make_point(tmp_path, {"seed": 1}, "running")
    rows = write_table(tmp_path)
    points = [row["point"] for row in rows]
    assert points == [{"ppo.gamma": 1.0}, *({"ppo.stop_kl": x} for x in (9.0, 10.0, "inf"))]
    assert (rows[0]["status"], rows[0]["error"]) == ("failed", "it diverged")
    with open(tmp_path / "sweep.csv", newline="") as file:
        head, *lines = csv.reader(file)
    assert head[:4] == ["ppo.gamma", "ppo.stop_kl", "workdir", "status"] and len(lines) == 4
    assert lines[0][:4] == ["1.0", "", str(tmp_path / "1.0"), "failed"]
    files = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert files == {"sweep.json", "sweep.csv", "sweep.html"}


def test_a_page_that_cannot_be_made_does_not_end_the_sweep(tmp_path, monkeypatch, capsys):
    make_point(tmp_path, {"seed": 1})
    monkeypatch.setattr(sweep_page, "write_sweep_page", lambda *_: 1 / 0)
    assert len(write_table(tmp_path)) == 1 and (tmp_path / "sweep.csv").exists()
    told = f"{tmp_path}/sweep.html cannot be made: ZeroDivisionError: division by zero\n"
    assert capsys.readouterr().out == told


def test_a_record_of_another_kind_is_named(tmp_path):
    folder = make_point(tmp_path, {"seed": 1})
    (folder / "point.json").write_text('{"point": 3}')
    with pytest.raises(ValueError, match="point.json: point must be an object, got 3"):
        read_point(folder)
