"""The examples of docs/how-to/ and of the page on the papers run as they stand and are right."""

import contextlib
import io
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.core.kl import ESTIMATORS
from ppo_jax.models import families
from tests.laws.test_docs import load_script
from tests.support.documents import DOCS, PAGES, python_blocks


@pytest.fixture(autouse=True)
def tables_as_they_were():
    """An example may add a line to a table of the library."""
    before, known = dict(ESTIMATORS), families.FAMILIES
    yield
    families.FAMILIES = known
    ESTIMATORS.clear()
    ESTIMATORS.update(before)


def run(page):
    """(the names that the blocks of a page leave, the lines that they print)"""
    names, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        for code in python_blocks(PAGES[page]):
            exec(compile(code, f"docs/{page}", "exec"), names)
    return names, printed.getvalue().splitlines()


def numbers(line):
    return [float(x) for x in re.findall(r"-?\d+(?:\.\d*)?(?:e-?\d+)?", line)]


def fades_out_as_the_ratio_leaves_1(names, lines):
    gate = 1 / (1 + np.exp(-2))  # at a ratio of 3: 4 σ'(2) x 3, of two tokens
    assert numbers(lines[0]) == pytest.approx([-0.5, -4 * gate * (1 - gate) * 3 / 2, 0], abs=1e-5)


def is_a_score_against_a_mean_by_length(names, lines):
    # Of 1, 0, 0 with 2, 1, 1 tokens: 2 / 4.
    expected = np.array([[0.5, 0.5], [-0.5, 0], [-0.5, 0], [0, 0], [0, 0], [0, 0]])
    np.testing.assert_allclose(names["advantages"], expected, atol=1e-6)
    again = names["length_weighted"](3 * names["rewards"], names["mask"], group_size=3)
    np.testing.assert_allclose(again, 3 * expected, atol=1e-6)


def shows_the_bias_of_each_estimator(names, lines):
    bias = {line.split()[0]: float(line.split()[1]) for line in lines}
    assert set(bias) == set(ESTIMATORS) and "abs" in bias
    assert abs(bias["k1"]) < 1e-6 and abs(bias["k3"]) < 1e-6
    assert bias["k2"] > 0.01 and bias["abs"] > 0.01


def is_the_share_that_weighting_leaves(names, lines):
    assert [float(line) for line in lines] == pytest.approx([1.0, 0.8])


def stays_and_then_falls(names, lines):
    rows = np.array([numbers(line) for line in lines])
    np.testing.assert_allclose(rows[:, 1], [1, 1, 1, 0.55, 0.1], atol=1e-6)
    np.testing.assert_allclose(rows[:, 2], 1 - 0.9 * rows[:, 0] / 100, atol=1e-6)


def reads_tabs_and_instructions(names, lines):
    row = {"prompt": "The film is", "completion": " a delight."}
    assert lines[0] == f"['id', 'prompt', 'completion'] [{row}]"
    assert lines[1] == '{"prompt": "Name a colour.\\n", "completion": "Blue."}'


def refuses_by_name_what_it_does_not_compute(names, lines):
    assert "'camel' is not supported" in lines[0]
    assert lines[1].startswith("ModelConfig(vocab_size=40,")
    assert "sliding_window=4096, which is what a config.json without it means" in lines[2]


def prefers_the_shorter(names, lines):
    (row,) = names["table"]
    assert row["judge"] == "brevity" and row["win_rate_ppo_vs_sft"] == 0.75
    assert names["panel"].headline == "brevity" and "0.75" in lines[0]


def agrees_with_the_equations(names, lines):
    assert [float(line) for line in lines] == pytest.approx([0.0, 0.0], abs=1e-5)
    assert jnp.abs(names["advantages"]).max() > 0.1


DOES = {
    "how-to/loss.md": fades_out_as_the_ratio_leaves_1,
    "how-to/advantage.md": is_a_score_against_a_mean_by_length,
    "how-to/kl-estimator.md": shows_the_bias_of_each_estimator,
    "how-to/metric.md": is_the_share_that_weighting_leaves,
    "how-to/schedule.md": stays_and_then_falls,
    "how-to/data-format.md": reads_tabs_and_instructions,
    "how-to/model-family.md": refuses_by_name_what_it_does_not_compute,
    "how-to/judge.md": prefers_the_shorter,
    "from-paper-to-code.md": agrees_with_the_equations,
}


def test_every_page_with_code_is_tested():
    elsewhere = {"using-the-parts.md", "data.md", "training.md", "from-python.md", "evaluation.md"}
    elsewhere |= {"methods.md"}
    with_code = {page for page, text in PAGES.items() if python_blocks(text)}
    assert with_code - elsewhere == set(DOES)


@pytest.mark.parametrize("page", DOES)
def test_an_example_does_what_its_page_says(page):
    DOES[page](*run(page))


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_the_figure_of_the_clip_is_equation_7(advantage):
    clip = load_script(DOCS / "figures" / "clip.py")
    ratios, values, gradients = (np.asarray(x) for x in clip.curves(advantage))
    limits = 1 - clip.CLIP_RANGE, 1 + clip.CLIP_RANGE
    expected = np.minimum(ratios * advantage, np.clip(ratios, *limits) * advantage)
    np.testing.assert_allclose(values, expected, atol=1e-6)
    flat = ratios > limits[1] if advantage > 0 else ratios < limits[0]
    np.testing.assert_allclose(gradients, np.where(flat, 0.0, advantage), atol=1e-5)
    assert flat.any() and not flat.all() and clip.PAGE.exists()


def test_the_figure_of_the_fixed_points_is_what_its_page_says():
    figure = load_script(DOCS / "figures" / "fixed_points.py")
    betas = jnp.array([0.5, 2.0])
    right, standard, unweighted = figure.curves(betas).values()
    expected = np.asarray(jax.vmap(figure.tilted)(betas))
    np.testing.assert_allclose(right, expected, atol=1e-3)
    assert standard[0, 0] > 0.99 and standard[1, 0] > expected[1, 0] + 0.1
    # E[r] - β KL(reference || policy) is highest where π (r - E r) = β (π - reference).
    probs, reference = np.asarray(unweighted), np.exp(np.asarray(figure.REF[:, 0]))
    centred = np.asarray(figure.SCORES) - (probs @ np.asarray(figure.SCORES))[:, None]
    slope = probs * centred - np.asarray(betas)[:, None] * (probs - reference)
    np.testing.assert_allclose(slope, 0.0, atol=1e-4)
    assert figure.PAGE.exists()
