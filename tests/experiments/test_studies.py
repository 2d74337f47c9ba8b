"""The studies: their points are valid, and the tables of the docs are those of the kept figures."""

import json
import math

import pytest
import study_tables
from studies import ppo_choices, reward_data

from ppo_jax.config.run import from_config_dict
from ppo_jax.data.records import RatedText

STUDIES = study_tables.STUDIES


@pytest.mark.parametrize("name", STUDIES)
def test_every_point_of_a_study_is_a_valid_config(name):
    study = STUDIES[name]
    for variant in ("tiny", "default"):
        for point in list(study.sweep())[:: 3 if variant == "tiny" else 9]:
            values = study.get_config(variant).lock()
            values.update_from_flattened_dict(point)
            assert from_config_dict(values)


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_opens_with_its_command_which_the_page_has(name):
    page = study_tables.PAGE.read_text()
    command = f"python experiments/sweep.py --config=experiments/studies/{name}.py:tiny"
    assert command in STUDIES[name].__doc__ and command in page
    assert f"--workdir=runs/{name}" in STUDIES[name].__doc__
    assert f"<!-- table: {name} -->" in page


def test_every_choice_gets_the_same_search():
    points = [json.dumps(point, default=str) for point in ppo_choices.sweep()]
    assert len(set(points)) == len(points) == len(ppo_choices.CHOICES) * 9
    assert {"ppo.value_clip_range": math.inf} in ppo_choices.CHOICES.values()


def test_the_tables_of_the_page_are_those_of_the_kept_figures():
    text = study_tables.PAGE.read_text()
    assert study_tables.page(text) == text, "write it: python experiments/study_tables.py"


def test_a_smaller_set_of_comparisons_is_the_beginning_of_a_larger():
    records = [RatedText(f"text {i}", (float(i % 5), float(i % 3))) for i in range(50)]
    rows = reward_data.comparisons(records, 40, seed=0)
    assert rows[:10] == reward_data.comparisons(records, 10, seed=0)
    ratings = {record.text: record.ratings for record in records}
    assert all(max(ratings[r["chosen"]]) > min(ratings[r["rejected"]]) for r in rows)


def row(point, **metrics):
    return {"point": point, "status": "complete", "metrics": metrics}


def test_a_method_is_judged_at_its_best_learning_rate():
    rows = [
        row(
            change | {"ppo.optimizer.learning_rate": rate, "ppo.seed": seed},
            **{study_tables.WIN: w},
        )
        for change, wins in (({}, (0.6, 0.7, 0.5)), ({"ppo.num_epochs": 4}, (0.8, 0.2, 0.1)))
        for rate, w in zip((1e-4, 1e-3, 1e-2), wins, strict=True)
        for seed in (0, 1, 2)
    ]
    text = study_tables.of_choices(study_tables.by_setting(rows))
    assert "| the quickstart | 0.001 | 70.0%" in text and "| 4 epochs | 0.0001 | 80.0%" in text


def test_what_did_not_finish_is_said():
    rows = [row({"ppo.kl_coef": 0.1, "ppo.seed": 0}, **{study_tables.WIN: 0.6})]
    study = {"of": {"model": "tiny", "devices": {"kind": "cpu"}}, "rows": rows}
    assert "1 of 12 points, the tiny model, cpu." in study_tables.table("over_optimisation", study)


def test_the_figures_of_another_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--keep must be the sweep of one of"):
        study_tables.keep(tmp_path)
