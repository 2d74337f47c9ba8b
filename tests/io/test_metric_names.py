"""Renamed metrics are written under both names, and read under the new one alone."""

import json

from ppo_jax.evaluation.report.summary import read_run
from ppo_jax.io.metric_names import FORMER, RENAMED, other_name, with_former_names, with_new_names
from ppo_jax.io.run_folder import read_results, write_results

OLD = {
    "policy/sampling_difference": 1,
    "policy/sampling_difference_max": 2,
    "ppo/row_fill": 3,
    "reward_model/validation_accuracy_gap1": 4,
    "reward_model/pairs_gap2": 5,
    "judges": [{"judge": "gold", "pair_accuracy_gap1": 6}],
}


def test_every_old_name_has_its_new_one_and_back():
    for name in list(OLD)[:-1]:
        new = other_name(name, FORMER)
        assert new and other_name(new, RENAMED) == name
    assert with_new_names(with_former_names(with_new_names(OLD))) == with_new_names(OLD)


def test_results_hold_both_names_and_are_read_under_the_new_one(tmp_path):
    write_results(tmp_path, {"reward_model/accuracy_margin1": 0.9, "time/total_s": 1.0})
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["reward_model/accuracy_gap1"] == written["reward_model/accuracy_margin1"] == 0.9
    assert read_results(tmp_path) == {"reward_model/accuracy_margin1": 0.9, "time/total_s": 1.0}


def test_files_of_an_older_release_are_read(tmp_path):
    row = {"stage": "ppo", "step": 1, "ppo/row_fill": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "results.json").write_text(json.dumps(OLD))
    run = read_run(tmp_path)
    assert run.points("ppo", "ppo/packing_efficiency") == [(1, 0.5)]
    assert run.results["judges"] == [{"judge": "gold", "pair_accuracy_margin1": 6}]
    assert read_results(tmp_path) == run.results
