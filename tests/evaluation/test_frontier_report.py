"""The picture, the figures and the sentences of several runs, from their folders; the command."""

import json
import re

import pytest
from matplotlib.figure import Figure

from ppo_jax.evaluation.frontier import Curve, Point
from ppo_jax.evaluation.report.frontier_plots import frontier
from ppo_jax.evaluation.report.frontier_report import write_frontier
from ppo_jax.evaluation.report.report import write_report
from tests.support.command_line import run_script
from tests.support.run_files import read_jsonl

POOL = {
    "n": [1, 2, 4, 8, 16],
    "kl_bound": [0.0, 0.19, 0.64, 1.2, 1.9],
    "score": {"mean": [0.0, 0.5, 1.0, 1.5, 2.0], "stderr": [0.1] * 5},
    "judges": {"gold": {"mean": [1.0, 1.2, 1.3, 1.3, 1.2], "stderr": [0.1] * 5}},
}


def make_run(folder, kl_coef, gold):
    """A run that was evaluated at every tenth step."""
    folder.mkdir(parents=True)
    config = {"config": {"ppo": {"kl_coef": kl_coef}, "model": {}}}
    (folder / "config.json").write_text(json.dumps(config))
    rows = [
        {"stage": "ppo", "step": 10 * i, "eval/kl": float(i * i), "eval/gold_score": 1.0 + value}
        | {"eval/proxy_score": 0.5 * i}
        for i, value in enumerate(gold)
    ]
    rows.insert(1, {"stage": "ppo", "step": 1, "kl/ref": 0.1, "reward/score_mean": 0.2})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def runs(tmp_path):
    make_run(tmp_path / "kl" / "a", 0.0, [0.0, 1.0, 2.0, 1.5, 1.0, 0.5])
    make_run(tmp_path / "kl" / "b", 0.0, [0.0, 1.0, 2.2, 1.5, 1.0, 0.7])
    make_run(tmp_path / "kl" / "c", 0.1, [0.0, 0.5, 1.0, 1.2, 1.3, 1.4])
    (tmp_path / "kl" / "log").mkdir()
    (tmp_path / "bon").mkdir()
    text = json.dumps({"settings": {"reference": "sft"}, "best_of_n": {"sft": POOL, "ppo": POOL}})
    (tmp_path / "bon" / "evaluation.json").write_text(text)
    return tmp_path


def test_the_command_writes_a_picture_and_the_figures(runs):
    how = [f"--runs={runs}/kl", f"--evaluation={runs}/bon", f"--out={runs}/new/frontier.png"]
    ended = run_script("frontier", *how)
    assert ended.code == 0, ended.err
    said = ended.out.splitlines()
    assert said[0].startswith("The gold score was highest with kl_coef 0: +2.10 against the start")
    assert said[1].startswith(
        "kl_coef 0, mean of 2 runs: the gold score peaked 2.10 above the start"
    )
    assert "(step 20) and lost 1.50 (71%) of that by 25.0 nats of KL (step 50), while" in said[1]
    assert said[2].startswith("kl_coef 0.1: the gold score did not fall")
    assert said[3].startswith("best of n (sft): the gold score peaked 0.30 above the start at 0.6")
    assert said[4:] == ["left out: best of n of ppo, whose KL from sft is not known"]
    assert (runs / "new" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((runs / "new" / "frontier.json").read_text())
    assert [x["kind"] for x in figures["curves"].values()] == ["rl", "rl", "bon"]
    assert figures["curves"]["kl_coef 0"]["fit"]["over"] == "runs"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--runs={}/none"], "--runs must have a run with eval/gold_score from step 0 on"),
        (["--runs={}/kl", "--by=ppo.clip"], "--by=ppo.clip: .*/a/config.json has no such setting"),
        (
            ["--runs={}/kl", "--evaluation={}/kl"],
            "--evaluation must have best-of-n of its reference policy in ",
        ),
    ],
)
def test_what_cannot_be_drawn_is_one_line(runs, flags, message):
    ended = run_script("frontier", *(x.format(runs) for x in flags), f"--out={runs}/out")
    assert ended.code == 2 and len(ended.err.splitlines()) == 1
    assert not list(runs.glob("out*"))
    assert re.search(message, ended.err)


def test_a_run_without_evaluations_is_no_curve(runs):
    lines = [x for x in read_jsonl(runs / "kl" / "a" / "metrics.jsonl") if "kl/ref" in x]
    (runs / "kl" / "a" / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\n")
    said = write_frontier([f"{runs}/kl/*"], runs / "out").splitlines()
    assert said[1].startswith("kl_coef 0: ")  # of one run now
    assert said[-1] == "left out, not evaluated from step 0 on: a"
    assert (runs / "out.png").exists() and (runs / "out.json").exists()


def test_two_judges_of_gold_are_not_one_scale(runs):
    path = runs / "bon" / "evaluation.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"judges": {"gold": {"note": "of texts"}}}))
    judges = [{"judge": "tf-idf", "note": "of words"}]
    (runs / "kl" / "a" / "results.json").write_text(json.dumps({"judges": judges}))
    said = write_frontier([f"{runs}/kl"], runs / "out", evaluation=str(runs / "bon"))
    assert "not one scale: gold is by the judge tf-idf in the runs and by another one, gold" in said
    judges[0]["note"] = "of texts"
    (runs / "kl" / "a" / "results.json").write_text(json.dumps({"judges": judges}))
    assert "not one scale" not in write_frontier(
        [f"{runs}/kl"], runs / "out", evaluation=str(runs / "bon")
    )


def test_gold_is_solid_and_proxy_dashed_and_the_peak_has_a_ring():
    way = [(0, 0), (1, 1), (4, 2), (9, 1.5), (16, 1), (25, 0.5)]
    points = [Point(kl, gold, kl / 5, step=i) for i, (kl, gold) in enumerate(way)]
    axes = Figure().subplots()
    frontier([Curve("x", points)])(axes)
    lines = {line.get_linestyle() for line in axes.lines if len(line.get_xdata()) == 6}
    assert lines == {"-", "--"}
    [gold] = [x for x in axes.lines if len(x.get_xdata()) == 6 and x.get_linestyle() == "-"]
    assert gold.get_xdata().tolist() == [0, 1, 2, 3, 4, 5]  # sqrt of the KL
    assert list(gold.get_ydata()) == [0, 1, 2, 1.5, 1, 0.5]
    assert [len(x.get_offsets()) for x in axes.collections] == [6, 1]
    assert axes.collections[1].get_offsets().tolist() == [[2, 2]]
    assert [text.get_text() for text in axes.texts] == ["iteration 2"]
    rising = [Point(kl, kl**2, step=i) for i, (kl, _) in enumerate(way)]
    frontier([Curve("x", rising)])(other := Figure().subplots())
    assert len(other.lines) == 2 < len(axes.lines)  # no proxy, no fit of what bends upward
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["x", "gold", "proxy", "fit of gold"]
    assert frontier([Curve("x", points[:1])]) is None


def test_the_report_of_a_run_has_its_own_frontier(runs):
    page = write_report(runs / "kl" / "a").read_text()
    assert "Over-optimisation" in page
    assert (
        "This run: the gold score peaked 2.00 above the start at 4.0 nats of KL (step 20)" in page
    )
    (runs / "kl" / "a" / "metrics.jsonl").write_text("")
    assert "Over-optimisation" not in write_report(runs / "kl" / "a").read_text()
