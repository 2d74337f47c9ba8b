"""The tables of docs/studies.md and its heat map, from the figures that are kept in results/.

    python experiments/study_tables.py --keep=runs/over_optimisation   # after a study has run
    python experiments/study_tables.py                                 # write the page again

A study keeps its points, their status and the figures that the tables show; every number of a table
is a mean over seeds with its 95% interval (Student's t).
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from film_reviews.panels import REFERENCE
from method_tables import (
    COST,
    EQUAL,
    EXPLAINED,
    LENGTH,
    SHARE,
    best_of_each,
    with_curves,
    with_ends,
)
from studies import (
    late_reward,
    methods,
    methods_acting,
    methods_equal_cpu,
    over_optimisation,
    ppo_choices,
    rate_and_kl,
    reward_data,
    reward_ensemble,
    shared_critic,
    value_updates,
)

from ppo_jax import cli
from ppo_jax.evaluation.report.plots import save_png
from ppo_jax.evaluation.report.sweep_plots import heat_map
from ppo_jax.evaluation.sweep_table import (
    Setting,
    by_setting,
    figure,
    interval,
    ranked,
    short_value,
)
from ppo_jax.io.run_folder import read_record

RESULTS = Path(__file__).parent / "studies" / "results"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "studies.md"
FIGURES = PAGE.parent / "figures"
KEPT = (
    r"gold/win_rate_ppo_vs_sft|policy/kl_per_response|reward/score_mean|text/distinct2_ratio|"
    r"response/length|reward_model/validation_accuracy|eval/\w+|time/total_s|time/cpu_s_per_iteration"
)
STUDIES = {
    "over_optimisation": over_optimisation,
    "reward_data": reward_data,
    "ppo_choices": ppo_choices,
    "rate_and_kl": rate_and_kl,
    "methods": methods,
    "methods_acting": methods_acting,
    "methods_equal_cpu": methods_equal_cpu,
    "late_reward": late_reward,
    "value_updates": value_updates,
    "shared_critic": shared_critic,
    "reward_ensemble": reward_ensemble,
}
WIN, KL, PROXY = "gold/win_rate_ppo_vs_sft", "policy/kl_per_response", "reward/score_mean"
REF_KL = "kl/ref"
ACCURACY, RATE = "reward_model/validation_accuracy", "ppo.optimizer.learning_rate"


def keep(folder: Path) -> Path:
    """Keep the figures of a study that has run.

    Raises:
        ValueError: the folder is not the sweep of a study.
    """
    table = folder / "sweep.json"
    if folder.name not in STUDIES or not table.is_file():
        raise ValueError(f"--keep must be the sweep of one of {list(STUDIES)}, got {folder}")
    rows = json.loads(table.read_text())
    record = read_record(folder / Path(rows[0]["workdir"]).name)
    of = {"model": record["config"]["model"]["path"] or "tiny", "devices": record["devices"]}
    folders = [folder / Path(row["workdir"]).name for row in rows]
    kept = [
        row | {"metrics": shown(row["metrics"])} for row in with_curves(rows, folder.name, folders)
    ]
    for row in kept:
        del row["workdir"]
    path = RESULTS / f"{folder.name}.json"
    lines = ",\n".join(json.dumps(row) for row in kept)
    path.write_text(f'{{"of": {json.dumps(of)},\n"rows": [\n{lines}\n]}}\n')
    return path


def shown(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The figures that the tables show, with six digits."""
    kept = {name: x for name, x in metrics.items() if re.fullmatch(KEPT, name)}
    return {name: float(f"{x:.6g}") for name, x in kept.items() if x is not None}


def page(text: str) -> str:
    """The page with its tables made from results/."""
    for name in STUDIES:
        path, start, end = RESULTS / f"{name}.json", f"<!-- table: {name} -->\n", "<!-- end -->"
        made = "\nNot run yet.\n\n"
        if path.is_file():
            made = table(name, json.loads(path.read_text()))
        before, rest = text.split(start)
        text = before + start + made + end + rest.split(end, 1)[1]
    return text


def table(name: str, study: Mapping[str, Any]) -> str:
    """A study's table, with what it is of."""
    rows = with_ends(study["rows"])
    settings = by_setting(rows)
    planned, done = (
        len(list(STUDIES[name].sweep())),
        sum(len(s.numbers(METRIC[name])) for s in settings),
    )
    model = study["of"]["model"].removeprefix("package:")
    which = "the tiny model" if model == "tiny" else model
    note = f"{done} of {planned} points, {which}, {study['of']['devices']['kind']}."
    made = of_rows(name, rows) if name in COLUMNS else TABLES[name](settings)
    return f"\n{note}\n\n{made}\n"


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def cell(setting: Setting, metric: str) -> str:
    """A mean with its interval; "" where there is none."""
    estimate = setting.estimate(metric)
    if estimate is None:
        return ""
    between = interval(metric, estimate)
    wide = len(set(between.split(" to "))) > 1  # not one number that all seeds have
    return figure(metric, estimate.mean) + (f" ({between})" if wide else "")


def best_of(settings: Sequence[Setting], metric: str, rate: str) -> list[tuple[Setting, float]]:
    """Of settings that differ in the learning rate alone the best one, with its rate."""
    groups: dict[str, list[Setting]] = {}
    for setting in settings:
        rest = {k: v for k, v in setting.values.items() if k != rate}
        groups.setdefault(json.dumps(rest, sort_keys=True), []).append(setting)
    order = (ranked(group, metric) for group in groups.values())
    return [(found[0][0], found[0][0].values[rate]) for found in order if found]


def of_rows(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of a study that compares methods, each at its best rate."""
    headings, changes = COLUMNS[name], ROWS[name]
    best = best_of_each(rows, changes, METRIC[name])
    lines = [
        [method, short_value(setting.values[RATE]), *(cell(setting, m) for m in headings.values())]
        for method, setting in best.items()
    ]
    return markdown(["", "best learning rate", *headings], lines)


def of_kl_coef(settings: Sequence[Setting]) -> str:
    headings = ["KL coefficient", "KL, nats", "proxy score", "gold: preferred to SFT", "distinct-2"]
    metrics = (KL, PROXY, WIN, "text/distinct2_ratio")
    rows = [
        [short_value(s.values["ppo.kl_coef"]), *(cell(s, m) for m in metrics)] for s in settings
    ]
    return markdown(headings, rows)


def of_pairs(settings: Sequence[Setting]) -> str:
    rows = []
    for setting, rate in best_of(settings, ACCURACY, "reward.optimizer.learning_rate"):
        count = int(re.search(r"pairs_(\d+)", setting.values["reward.data"]).group(1))
        rows.append((count, [f"{count:,}", short_value(rate), cell(setting, ACCURACY)]))
    rows = [row for _, row in sorted(rows)]
    rows.append(["a human rater", "", figure(ACCURACY, REFERENCE["human rater"])])
    return markdown(["comparisons", "best learning rate", "accuracy on unseen pairs"], rows)


def of_choices(settings: Sequence[Setting]) -> str:
    names = {json.dumps(change, sort_keys=True): n for n, change in ppo_choices.CHOICES.items()}
    rows = {}
    for setting, rate in best_of(settings, WIN, RATE):
        change = {k: v for k, v in setting.values.items() if k != RATE}
        name = names[json.dumps(change, sort_keys=True).replace('"inf"', "Infinity")]
        rows[name] = [name, short_value(rate), *(cell(setting, m) for m in (WIN, PROXY, KL))]
    headings = ["", "best learning rate", "gold: preferred to SFT", "proxy score", "KL, nats"]
    return markdown(headings, [rows[name] for name in ppo_choices.CHOICES if name in rows])


def of_rate_and_kl(settings: Sequence[Setting]) -> str:
    found = {(s.values[RATE], s.values["ppo.kl_coef"]): cell(s, WIN) for s in settings}
    rows = [
        [short_value(rate), *(found.get((rate, kl), "") for kl in rate_and_kl.KL_COEFS)]
        for rate in rate_and_kl.RATES
    ]
    headings = [f"KL coefficient {short_value(kl)}" for kl in rate_and_kl.KL_COEFS]
    return markdown(["learning rate", *headings], rows)


def draw_heat_map():
    """The picture of the study of two numbers, from the same figures as its table."""
    path = RESULTS / "rate_and_kl.json"
    if path.is_file():
        settings = by_setting(json.loads(path.read_text())["rows"])
        draw = heat_map(settings, WIN, "gold: preferred to SFT")
        if draw is not None:
            picture = {"Learning rate and KL coefficient": draw}
            save_png(picture, FIGURES / "rate_and_kl.png", columns=1, size=(5.2, 3.4))


TABLES: dict[str, Callable[[Sequence[Setting]], str]] = {
    "over_optimisation": of_kl_coef,
    "reward_data": of_pairs,
    "ppo_choices": of_choices,
    "rate_and_kl": of_rate_and_kl,
}
METRIC = dict.fromkeys(STUDIES, WIN) | {"reward_data": ACCURACY}
ON_ACTING = ("methods_acting", "late_reward", "value_updates", "shared_critic")
METRIC |= dict.fromkeys(ON_ACTING, SHARE)
ROWS = {
    "methods": methods.METHODS,
    "methods_acting": methods.METHODS,
    "methods_equal_cpu": methods_equal_cpu.ROWS,
    "late_reward": late_reward.ROWS,
    "value_updates": value_updates.ROWS,
    "shared_critic": shared_critic.ROWS,
    "reward_ensemble": reward_ensemble.ROWS,
}
PER_ITERATION = {"CPU s an iteration": COST, "score at equal CPU s": EQUAL}
GOLD = {"gold: preferred to SFT": WIN, "proxy score": PROXY, "KL, nats": KL}
COLUMNS = {
    "methods": GOLD,
    "methods_equal_cpu": GOLD,
    "reward_ensemble": GOLD,
    "methods_acting": {"score": SHARE, "KL, nats": REF_KL} | PER_ITERATION,
    "late_reward": {
        "score": SHARE,
        "tokens of a response": LENGTH,
        "KL, nats": REF_KL,
        "explained variance": EXPLAINED,
    },
    "value_updates": {"score": SHARE, "explained variance": EXPLAINED} | PER_ITERATION,
    "shared_critic": {"score": SHARE, "explained variance": EXPLAINED} | PER_ITERATION,
}


if __name__ == "__main__":
    kept = flags.DEFINE_string("keep", None, "The workdir of a study's sweep.")

    def main():
        if kept.value:
            print(keep(Path(kept.value)))
        PAGE.write_text(page(PAGE.read_text()))
        draw_heat_map()

    cli.run(main)
