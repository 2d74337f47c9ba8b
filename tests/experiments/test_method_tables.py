"""What the studies of methods keep of their runs, and how their tables compare them."""

import collections
import json

import method_tables
import pytest
import study_tables
from method_tables import COST, EQUAL, RATE, SCORE, SHARE
from studies import late_reward, methods, methods_acting, reward_ensemble


def row(point, *, cost=None, curve=None, **metrics):
    metrics |= {} if cost is None else {COST: cost}
    return {
        "point": point,
        "status": "complete",
        "metrics": metrics,
        "curves": {} if curve is None else {SCORE: curve},
    }


@pytest.mark.parametrize("name", study_tables.ROWS)
def test_every_method_gets_the_same_search(name):
    searched = collections.defaultdict(set)
    for point in study_tables.STUDIES[name].sweep():
        searched[method_tables.method_of(point)].add((point[RATE], point["ppo.seed"]))
    of = {"methods": methods, "methods_equal_cpu": methods, "reward_ensemble": reward_ensemble}
    rates = of.get(name, methods_acting).RATES
    every = {(rate, seed) for rate in rates for seed in range(methods.SEEDS)}
    assert list(searched.values()) == [every] * len(study_tables.ROWS[name])


def test_a_run_ends_with_the_mean_of_its_last_iterations():
    rows = method_tables.with_ends([row({}, curve=[9.0, 1.0, 2.0, 3.0, 4.0, 5.0])])
    assert rows[0]["metrics"] == {SCORE: 3.0, SHARE: 3.0}


def test_at_equal_cpu_seconds_a_dearer_method_is_read_earlier():
    curve = [float(i) for i in range(10)]
    cheap, dear = {"ppo.advantage": "rloo"}, {"ppo.advantage": "gae"}
    rows = [row(cheap, cost=0.2, curve=curve), row(dear, cost=0.25, curve=curve)]
    cheap, dear = (x["metrics"][EQUAL] for x in method_tables.with_ends(rows))
    assert cheap == 7.0  # iterations 6 to 10
    assert dear == 5.0  # 10 x 0.2 s are 8 iterations of 0.25 s: 4 to 8


def write_run(folder, clock):
    folder.mkdir()
    lines = [{"stage": "sft", "step": 1, "sft/loss": 1.0}]
    for step, seconds in enumerate(clock, start=1):
        numbers = {SCORE: step / 8, "kl/ref": 1.0, method_tables.CLOCK: seconds}
        lines.append({"stage": "ppo", "step": step} | numbers)
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_the_lanes_of_a_program_share_its_cpu_seconds(tmp_path):
    clocks = {"a": [9.0, 10.0, 11.0, 15.0], "b": [9.0, 10.0, 11.0, 15.0], "c": [2.0, 4.0, 6.0]}
    folders = [write_run(tmp_path / name, clock) for name, clock in clocks.items()]
    rows = [row({}), row({}), row({}), {**row({}), "status": "failed"}]
    kept = method_tables.with_curves(rows, "methods_acting", [*folders, tmp_path / "none"])
    assert [x["metrics"].get(COST) for x in kept] == [0.5, 0.5, 2.0, None]
    assert kept[2]["curves"] == {SCORE: [0.125, 0.25, 0.375], "kl/ref": [1.0, 1.0, 1.0]}


def test_a_table_has_the_methods_in_their_order_each_at_its_best_rate():
    rows = [
        row(dict(change) | {RATE: rate, "ppo.seed": seed}, curve=[score], cost=0.5)
        for change, scores in (
            (late_reward.ROWS["lambda 1 for both"], (0.1, 0.9)),
            (late_reward.ROWS["lambda 0.95"], (0.4, 0.2)),
        )
        for rate, score in zip((1e-3, 1e-2), scores, strict=True)
        for seed in range(2)
    ]
    lines = study_tables.of_rows("late_reward", method_tables.with_ends(rows)).splitlines()[2:]
    assert [line[:34] for line in lines] == [
        "| lambda 0.95 | 0.001 | 40.0% |  |",
        "| lambda 1 for both | 0.01 | 90.0%",
    ]
