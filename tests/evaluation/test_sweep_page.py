"""sweep.html is whole, safe and self-contained, whatever the points of a sweep have."""

import html.parser
import json
import re

import pytest
from matplotlib.figure import Figure

from ppo_jax.evaluation.report import sweep_plots
from ppo_jax.evaluation.report.sweep_page import MOST_CURVES, write_sweep_page
from ppo_jax.evaluation.sweep_table import by_setting
from tests.support.run_files import write_run

WIN = "gold/win_rate_ppo_vs_sft"
SHARED = [{"stage": "sft", "step": i, "sft/validation_loss": 3.0 - i} for i in (1, 2)]


def ppo_rows(coef, seed=0):
    return [
        {
            "stage": "ppo",
            "step": i,
            "reward/score_mean": i / (1 + coef) + seed,
            "kl/ref": i * (1 - coef),
            "policy/entropy": 5.0 - i,
        }
        for i in range(1, 15)
    ]


def write_point(folder, values, metrics, rows=(), status="complete", **more):
    name = ",".join(f"{k.rsplit('.')[-1]}={v}" for k, v in values.items())
    write_run(folder / name, metrics=[*SHARED, *rows])
    (folder / name / "report.html").write_text("<html></html>")
    row = {"point": values, "workdir": str(folder / name), "status": status, "metrics": metrics}
    return row | more


@pytest.fixture
def rows(tmp_path):
    return [
        write_point(
            tmp_path,
            {"ppo.kl_coef": coef, "ppo.seed": seed},
            {WIN: 0.5 + coef + 0.01 * seed, "kl/ref": 3.0, "time/total_s": 60.0},
            ppo_rows(coef, seed),
        )
        for coef in (0.0, 0.1, 0.2)
        for seed in (0, 1)
    ]


def page_of(folder, rows):
    text = write_sweep_page(folder, rows).read_text()
    html.parser.HTMLParser().feed(text)
    assert not re.search(r'(src|href)="https?:', text)
    return text


def data_of(text):
    return json.loads(re.search(r"const DATA = (.*);\n", text).group(1))


def test_the_page_of_a_sweep_has_its_parts(tmp_path, rows):
    text = page_of(tmp_path, rows)
    verdict = "Take kl_coef 0.2: win rate of PPO over SFT 70.5% (64.1% to 76.9% over 2 seeds)"
    assert verdict in text and "nothing was tried above kl_coef 0.2" in text
    titles = re.findall(r"<h3>(.*?)</h3>", text)
    assert titles[:2] == ["Win rate of PPO over SFT by setting", "Score against KL"]
    assert titles[2:] == ["Score", "KL from the reference policy", "Entropy"]  # SFT's is shared
    assert text.count('href="kl_coef=') == 6
    data = data_of(text)
    assert data["main"] == WIN and data["columns"][0] == WIN
    assert [row["seeds"] for row in data["rows"]] == ["2", "2", "2"]
    assert [row["best"] for row in data["rows"]] == [False, False, True]
    mean, shown, interval = data["rows"][0]["metrics"][WIN]
    assert mean == pytest.approx(0.505) and shown == "50.5%" and " to " in interval


def test_a_failed_point_is_told_and_takes_no_part(tmp_path, rows):
    values = {"ppo.kl_coef": 0.3, "ppo.seed": 0}
    failed = write_point(
        tmp_path, values, {WIN: 0.99}, status="failed", error="value/loss is nan <b>"
    )
    text = page_of(tmp_path, [*rows, failed])
    assert "1 of 7 points failed: kl_coef 0.3, seed 0" in text
    assert "value/loss is nan &lt;b&gt;" in text
    assert 0.99 not in [row["metrics"].get(WIN, [0])[0] for row in data_of(text)["rows"]]


def test_a_name_cannot_end_the_script(tmp_path):
    evil = "</script><script>alert(1)</script>"
    rows = [
        write_point(tmp_path, {"ppo.seed": i}, {WIN: 0.5}) | {"point": {"ppo.x": evil + str(i)}}
        for i in (0, 1)
    ]
    text = page_of(tmp_path, rows)
    assert "alert(1)</script>" not in text and "<script>alert" not in text


def test_nothing_has_come_to_an_end_yet(tmp_path):
    text = page_of(tmp_path, [])
    assert "No point has come to a result yet." in text and "<svg" not in text


def test_a_moved_sweep_still_has_its_curves(tmp_path, rows):
    (tmp_path / "sub").mkdir()
    for path in list(tmp_path.iterdir()):
        if path.name != "sub":
            path.rename(tmp_path / "sub" / path.name)
    assert "Score against KL" in page_of(tmp_path / "sub", rows)


def search(count, **more):
    points = [{"ppo.a": 10.0 ** -(i % 4), "ppo.b": i / 7, **more} for i in range(count)]
    return by_setting(
        {"point": p, "workdir": "", "status": "complete", "metrics": {WIN: 0.5 + 0.01 * i}}
        for i, p in enumerate(points)
    )


def grid_of(columns, rows, missing=0):
    points = [(x, y) for x in range(columns) for y in range(rows)]
    return by_setting(
        {
            "point": {"ppo.a": x, "ppo.b": y},
            "workdir": "",
            "status": "complete",
            "metrics": {WIN: x + 10 * y},
        }
        for x, y in points[missing:]
    )


def half_without_b():
    """Three values of one number, with and without another."""
    points = [{"ppo.a": x} | more for x in range(3) for more in ({}, {"ppo.b": 4})]
    rows = [{"point": point, "workdir": "", "status": "complete"} for point in points]
    return by_setting(row | {"metrics": {WIN: 0.5}} for row in rows)


def drawn(draw):
    axes = Figure(layout="constrained").subplots()
    draw(axes)
    axes.figure.draw_without_rendering()
    return axes


def test_a_heat_map_has_each_pair_in_its_place():
    axes = drawn(sweep_plots.heat_map(grid_of(4, 3), WIN, "win rate"))
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert texts[3, 2] == "23" and texts[0, 0] == "0.0%" and texts[1, 0] == "100.0%"
    assert axes.get_xlabel() == "a" and axes.get_ylabel() == "b"
    axes = drawn(sweep_plots.heat_map(grid_of(2, 5), WIN, "win rate"))
    assert axes.get_xlabel() == "b"  # the longer axis lies across


@pytest.mark.parametrize(
    "settings", [grid_of(4, 3, missing=1), grid_of(6, 1), search(9), half_without_b()]
)
def test_there_is_no_heat_map_of_what_is_no_grid(settings):
    assert sweep_plots.heat_map(settings, WIN, "win rate") is None


def test_parallel_coordinates_have_a_line_a_setting():
    settings = search(8)
    axes = drawn(sweep_plots.parallel_coordinates(settings, WIN, "win rate"))
    assert len(axes.lines) == 8 + 3
    places = [line.get_ydata() for line in axes.lines[:8]]
    assert all(0 <= y <= 1 for line in places for y in line)
    assert sorted(line[-1] for line in places)[::7] == [0, 1]
    assert sweep_plots.parallel_coordinates(search(3), WIN, "win rate") is None


def test_a_scale_is_logarithmic_where_numbers_span_magnitudes():
    place, ticks = sweep_plots.scale([1e-5, 1e-4, 1e-3])
    assert place(1e-4) == pytest.approx(0.5)
    assert [text for _, text in sorted(ticks)] == ["1e-05", "0.0001", "0.001"]
    place, _ = sweep_plots.scale([0.0, 0.1, 0.2])
    assert place(0.05) == pytest.approx(0.25)
    place, ticks = sweep_plots.scale(["gae", "leave_one_out", "gae"])
    assert (place("gae"), place("leave_one_out")) == (0, 1)
    place, _ = sweep_plots.scale([3, 3])
    assert place(3) == 0


def test_many_settings_are_ranked_and_the_best_are_shown(tmp_path):
    axes = drawn(sweep_plots.estimates(search(40), WIN, "win rate"))
    assert len(axes.get_yticklabels()) == sweep_plots.MOST_RANKED
    assert axes.get_ylabel() == "a  ·  b"


def test_long_values_leave_room_for_the_figure():
    paths = tuple(f"runs/of_a_long_name/reward_models/{i}/reward" for i in range(4))
    settings = search(3)
    for setting in settings:
        setting.values["ppo.other_reward_models"] = paths[: len(paths) - settings.index(setting)]
    axes = drawn(sweep_plots.estimates(settings, WIN, "win rate"))
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert max(map(len, labels)) <= 60 and len(set(labels)) == 3


def test_six_curves_at_most(tmp_path):
    every = {name: 1.0 for name in ("eval/gold_score", "value/explained_variance")}
    every |= {"eval/kl": 2.0, "response/length": 2.0, "policy/clip_fraction": 0.1}
    rows = [
        write_point(tmp_path, {"ppo.x": i}, {WIN: 0.5}, [row | every for row in ppo_rows(0.1 * i)])
        for i in (0, 1)
    ]
    text = page_of(tmp_path, rows)
    assert len(re.findall(r"<h3>", text)) == 2 + MOST_CURVES
