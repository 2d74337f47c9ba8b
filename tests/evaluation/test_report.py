"""The report is whole, safe and self-contained, whatever parts a run has."""

import html.parser
import os
import re
import resource
import shutil
import subprocess

import numpy as np
import pytest
from matplotlib.figure import Figure

from ppo_jax.evaluation.report import critic_plots, plots, report
from ppo_jax.evaluation.report.charts import CHARTS, Chart, series
from ppo_jax.evaluation.report.summary import read_run
from tests.support.run_files import write_run

VOID = {"meta", "br"}
SHAPES = {"g", "path", "use", "rect", "image"}  # SVG elements that may close themselves
JUDGE = {
    "judge": "gold <1>",
    "note": "a ridge",
    "num_prompts": 256,
    "pair_accuracy_margin1": 0.88,
    "mean_sft": -0.1,
    "mean_ppo": 1.9,
    "win_rate_ppo_vs_sft": 0.87,
    "win_rate_ppo_vs_sft_interval": [0.83, 0.91],
}
RESULTS = {
    "reward_model/accuracy": 0.806,
    "reward_model/accuracy_margin1": 0.912,
    "reward_model/accuracy_margin2": 0.957,
    "gold/win_rate_ppo_vs_sft": 0.87,
    "gold/win_rate_ppo_vs_sft_interval": [0.83, 0.91],
    "policy/kl_per_response": 12.31,
    "text/distinct2_ratio": 0.81,
    "time/sft_s": 310.0,
    "time/ppo_s": 700.0,
    "time/total_s": 1010.0,
    "judges": [JUDGE],
    "reference": {"human rater": 0.943, "TF-IDF ridge": 0.855},
    "samples": [
        {
            "prompt": "The <b>film",
            "base": " is <script>alert(1)</script>",
            "sft": ' & "so so"',
            "ppo": " is\nlovely",
            "scores": {"base": 0.1, "sft": -0.4, "ppo": 2.5},
        }
    ],
}


def metric_rows(stage, steps=30):
    names = [name for group in CHARTS[stage] for chart in group.charts for name in chart.metrics]
    if stage == "ppo":
        names += ["reward/score_std", *critic_plots.QUARTERS, *sum(critic_plots.FIFTHS, [])]
    return [
        {"stage": stage, "step": step}
        | {name: 1.0 + step / (i + 2) for i, name in enumerate(names)}
        for step in range(steps)
    ]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    sample = {"stage": "ppo", "prompt": "I <i>"}
    samples = [
        {**sample, "step": step, "response": f" v{step}", "score": step / 9}
        for step in range(0, 100, 10)
    ]
    metrics = [row for stage in ("sft", "reward", "ppo") for row in metric_rows(stage)]
    config = {"config": {"ppo": {"kl_coef": 0.05, "stop": ["<end>"]}}, "commit": "0123abc"}
    folder = tmp_path_factory.mktemp("runs") / "my & run"
    return write_run(folder, metrics=metrics, samples=samples, results=RESULTS, config=config)


class Reader(html.parser.HTMLParser):
    """Checks that elements nest, and collects tags, headings, ids and attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.headings, self.ids, self.links = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attrs = dict(attrs)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs[key] for key in ("src", "href") if key in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        assert self.open.pop() in SHAPES

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings.append(data)


@pytest.fixture(scope="module")
def whole_report(whole_run):
    return read_report(whole_run)


def read_report(folder):
    text = report.write_report(folder).read_text(encoding="utf-8")
    return Reader(text), text


def test_a_whole_run_has_every_section_and_every_chart(whole_report):
    page, text = whole_report
    for stage in CHARTS.values():
        for group in stage:
            assert {chart.title for chart in group.charts} <= set(page.headings)
    sections = ["Result", "Samples", "Stages", "Supervised fine-tuning", "Reward model", "PPO"]
    sections += ["During training", "Environment and configuration"]
    assert [heading for heading in page.headings if heading in sections] == sections
    figures = sum(len(group.charts) for stage in CHARTS.values() for group in stage) + 7
    assert page.tags.count("svg") == page.tags.count("figure") == figures
    assert "0123abc" in text and "ppo.kl_coef" in text and "16 min 50 s" in text


def test_the_report_is_one_file_that_asks_for_nothing_and_runs_nothing(whole_report):
    page, text = whole_report
    assert not re.search(r"https?:|//\w|@import|url\((?!#)", text)
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    assert all(link.startswith("#") for link in page.links)


def test_ids_of_all_figures_are_unique_and_references_meet_them(whole_report):
    page, text = whole_report
    assert len(page.ids) == len(set(page.ids))
    used = {link[1:] for link in page.links} | set(re.findall(r"url\(#(\w+)\)", text))
    assert used and used <= set(page.ids)


def test_text_of_models_judges_and_config_is_escaped(whole_report):
    _, text = whole_report
    for raw in ("<script>", "<b>film", "I <i>", "gold <1>", "<end>", "my & run"):
        assert raw not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "&amp; &#34;so so&#34;" in text and " is\nlovely" in text


def test_the_same_files_give_the_same_report(whole_run, whole_report):
    assert read_report(whole_run)[1] == whole_report[1]


def test_a_run_of_sft_alone_has_the_parts_that_it_has(tmp_path):
    folder = write_run(tmp_path / "sft", metrics=metric_rows("sft", steps=3), steps={"sft": 2})
    page, text = read_report(folder)
    assert page.headings == ["sft", "Stages", "Supervised fine-tuning", "Loss"] + [
        "Validation perplexity",
        "Loss of the routers",
    ]
    assert "has not finished" not in text
    assert "perplexity from 1.0 (step 0) to 1.5 (step 2)" in text
    write_run(folder, metrics=metric_rows("sft", steps=3), steps={"sft": 4})
    assert "This run has not finished: sft is at step 2 of 4." in read_report(folder)[1]


def test_a_chart_without_its_metric_is_left_out(tmp_path):
    rows = [{"stage": "ppo", "step": i, "kl/ref": 0.1 * i} for i in range(3)]
    page, _ = read_report(write_run(tmp_path / "run", metrics=rows))
    assert "KL from the reference policy" in page.headings
    assert "Entropy" not in page.headings and "Score against KL" not in page.headings


def headings_of(folder, rows, **ppo):
    """The headings of the report of a run of PPO with these metrics, by step, and settings."""
    rows = [{"stage": "ppo", "step": i} | row for i, row in enumerate(rows)]
    config = {"config": {"ppo": ppo}} if ppo else None
    return read_report(write_run(folder, metrics=rows, config=config))[0].headings


@pytest.mark.parametrize(
    "settings, clips",
    [
        ({}, True),  # unknown
        ({"loss": "clip", "clip_range": 0.2}, True),
        ({"loss": "clip", "clip_range": "inf"}, False),
        ({"loss": "dppo", "clip_range": "inf"}, True),  # it has a limit of its own
        ({"loss": "gspo", "clip_range": 0.2}, True),
        ({"loss": "kl_penalty", "clip_range": 0.2}, False),
        ({"loss": "policy_gradient", "clip_range": 0.2}, False),
        ({"loss": "kl_cov", "clip_range": 0.2}, False),
        ({"loss": "mine:function", "clip_range": 0.2}, True),
    ],
)
def test_a_loss_that_does_not_clip_has_no_clip_fraction(tmp_path, settings, clips):
    shown = headings_of(tmp_path / "run", [{"policy/clip_fraction": 0.0}] * 2, **settings)
    assert ("Clip fraction" in shown) == clips


@pytest.mark.parametrize("idle", [{"value_clip_range": "inf"}, {"value_bins": 51}])
def test_a_critic_that_is_not_clipped_has_no_clip_fraction(tmp_path, idle):
    rows = [{"value/clip_fraction": 0.0}] * 2
    assert "Value clip fraction" not in headings_of(tmp_path / "run", rows, **idle)
    assert "Value clip fraction" in headings_of(tmp_path / "run", rows, value_clip_range=0.2)


def test_a_coefficient_that_never_moves_has_no_chart(tmp_path):
    """A fixed coefficient of the KL, and the penalty where it is 0."""
    names = ("kl/coef", "reward/kl_penalty")
    fixed = headings_of(tmp_path / "fixed", [dict.fromkeys(names, 0.0)] * 3)
    moving = headings_of(tmp_path / "moving", [dict.fromkeys(names, x) for x in (0.1, 0.1, 0.2)])
    charts = {"KL coefficient", "KL penalty"}
    assert not charts & set(fixed) and charts <= set(moving)


@pytest.mark.parametrize(
    "adjusted, labels", [((1.0, 2.0), []), ((0.5, 2.0), ["as it came", "adjusted"])]
)
def test_the_adjusted_score_is_drawn_where_it_is_another(adjusted, labels):
    """Shaping makes it one, if only in some iterations; the raw one is not grey when alone."""
    rows = [
        {"step": i, "reward/score_mean": 1.0 + i, "reward/adjusted_score_mean": x}
        | {"reward/score_std": 0.1}
        for i, x in enumerate(adjusted)
    ]
    (chart,) = (c for group in CHARTS["ppo"] for c in group.charts if c.title == "Score")
    axes = Figure().subplots()
    plots.curves(rows, "ppo", chart)(axes)
    legend = axes.get_legend()
    shown = [text.get_text() for text in legend.get_texts()] if legend else []
    assert shown == labels
    colors = [plots.COLORS[x] for x in (["base", "ppo"] if labels else ["ppo"])]
    assert [line.get_color() for line in axes.lines] == colors
    assert len(axes.collections) == 1  # the band is that of the score as it came


def test_scores_of_other_responses_stand_beside_those_of_the_policy(tmp_path):
    row = {"reward/score_mean": 1.0}
    charts = {"reference": "Score beside the reference's", "greedy": "Score beside the greedy"}
    assert not [x for x in headings_of(tmp_path / "none", [row] * 2) if "beside" in x]
    for name, title in charts.items():
        rows = [row | {f"reward/{name}_score_mean": 0.5}] * 2
        found = [x for x in headings_of(tmp_path / name, rows) if "beside" in x]
        assert len(found) == 1 and found[0].startswith(title)


def test_lines_that_are_no_rows_are_left_out_and_told_but_for_a_torn_last_one(tmp_path):
    samples = [{"stage": "sft", "step": 1, "prompt": "a", "response": "b", "score": "<high>"}]
    folder = write_run(tmp_path / "run", metrics=metric_rows("sft", steps=2), samples=samples)
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text() + '{"stage":\n{"stage": "sft", "st')
    assert len(read_run(folder).metrics) == 2
    _, text = read_report(folder)
    assert "Left out: metrics.jsonl:3 (Expecting value" in text
    assert "Left out: samples.jsonl:1 (score must be a number or null, got &#39;&lt;high" in text


def test_a_report_that_is_torn_or_older_than_its_files_is_not_current(tmp_path):
    folder = write_run(tmp_path / "run", metrics=metric_rows("sft", steps=2), results={})
    assert not report.is_current(folder)
    path = report.write_report(folder)
    assert report.is_current(folder)
    os.utime(folder / "results.json", ns=(path.stat().st_mtime_ns + 1,) * 2)
    assert not report.is_current(folder)
    report.write_report(folder)
    os.utime(folder / "results.json", ns=(0, 0))
    assert report.is_current(folder)
    path.write_bytes(path.read_bytes()[:-20])  # as a kill tore it before it was written at once
    assert not report.is_current(folder)


def test_a_report_is_written_whole_or_the_old_one_stays(tmp_path):
    folder = write_run(tmp_path / "run", metrics=metric_rows("sft", steps=2))
    before = report.write_report(folder).read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))  # stands for a full disk
    try:
        with pytest.raises(OSError, match=f"File too large: '{folder}/report.html'"):
            report.write_report(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (folder / "report.html").read_bytes() == before
    assert {path.name for path in folder.iterdir()} == {"metrics.jsonl", "samples.jsonl"} | {
        "report.html"
    }


def test_null_nan_and_infinite_metrics_are_gaps_in_a_curve(tmp_path):
    values = [None, 1.0, float("nan"), float("inf"), 2.0]
    rows = [{"stage": "sft", "step": i, "sft/loss": value} for i, value in enumerate(values)]
    assert np.isnan(series(rows, "sft/loss")[1]).tolist() == [True, False, True, True, False]
    page, _ = read_report(write_run(tmp_path / "run", metrics=rows))
    assert "svg" in page.tags


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"not a run's workdir: it holds none of config\.json"):
        report.write_report(tmp_path)


def test_the_response_to_a_prompt_is_shown_from_first_to_last_step(whole_report):
    _, text = whole_report
    shown = [int(step) for step in re.findall(r"</i> v(\d+)</p>", text)]
    assert shown[0] == 0 and shown[-1] == 90
    assert shown == sorted(shown) and len(shown) == report.SHOWN_VERSIONS


def test_smoothing_keeps_a_constant_a_straight_middle_and_skips_nan():
    line = np.arange(100.0)
    np.testing.assert_allclose(plots.smooth(line)[20:80], line[20:80], atol=1e-6)
    line[50] = np.nan
    assert plots.smooth(line)[50] == pytest.approx(50.0)  # from its neighbours on both sides


def test_the_picture_of_a_run_is_a_png_and_needs_something_to_draw(whole_run, tmp_path):
    report.save_curves_png(whole_run, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    empty = write_run(tmp_path / "empty", results={"time/total_s": 1.0})
    with pytest.raises(ValueError, match="no curves"):
        report.save_curves_png(empty, tmp_path / "none.png")


def test_a_kl_that_is_zero_but_for_rounding_reads_as_zero(tmp_path):
    rows = [{"stage": "ppo", "step": i, "kl/ref": kl} for i, kl in enumerate((-3.4e-8, 2.5))]
    _, text = read_report(write_run(tmp_path / "run", metrics=rows))
    assert "KL per response 0.0 → 2.5 nats" in text


def test_no_figure_of_the_page_is_a_zero_with_a_sign(tmp_path):
    """What is below 0 by less than is printed, such as a mean KL of k1 over a short run."""
    row = {"kl/ref": -0.02, "reward/score_mean": -0.001}
    rows = [{"stage": "ppo", "step": i} | row for i in range(2)]
    sample = {"stage": "ppo", "prompt": "a", "response": "b", "step": 1, "score": -0.001}
    _, text = read_report(write_run(tmp_path / "run", metrics=rows, samples=[sample]))
    assert "mean score 0.00 → 0.00; KL per response 0.0 → 0.0 nats" in text
    assert "PPO took the mean score from 0.00" in text and "at 0.0 nats of KL" in text
    assert "<b>0.0 nats</b>" in text and ">+0.00</span>" in text


@pytest.mark.parametrize("exact", [False, True])
def test_what_is_set_by_a_rule_is_not_smoothed(exact):
    rows = [{"step": i, "rate": float(i == 0)} for i in range(100)]
    axes = Figure().subplots()
    plots.curves(rows, "ppo", Chart("Rate", "rate", "", {"rate": "rate"}, exact=exact))(axes)
    drawn = [line.get_ydata().max() for line in axes.lines]
    assert drawn == [1.0] if exact else drawn[1] < 0.5


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")
@pytest.mark.parametrize("width", [500, 1200])
def test_no_text_is_too_long_for_the_page_to_fit_its_window(tmp_path, width):
    results = RESULTS | {
        "judges": [{**JUDGE, "judge": "j" * 60, "note": "n" * 300}],
        "samples": [{"prompt": "p" * 300, "ppo": "r" * 300}],
    }
    samples = [
        {"stage": "ppo", "step": i, "prompt": "p" * 300, "response": "r" * 300, "score": 1.0}
        for i in range(2)
    ]
    folder = write_run(
        tmp_path / ("run_" * 30),
        metrics=metric_rows("ppo", steps=3),
        samples=samples,
        results=results,
        config={"config": {"k" * 100: "v" * 300}},
    )
    text = report.write_report(folder).read_text().replace("<details>", "<details open>")
    probe = "document.title = document.documentElement.scrollWidth + ' of ' + innerWidth"
    page = tmp_path / "page.html"
    page.write_text(text.replace("</body>", f"<script>{probe}</script></body>"))
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path / 'browser'}", f"--window-size={width},900"]
    done = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=100
    )
    assert f"<title>{width} of {width}</title>" in done.stdout
