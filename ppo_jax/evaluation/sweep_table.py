"""The points of a sweep as settings: means and intervals over seeds, the best of them, and what
follows for the next run.

A row is one of sweep.json: {"point": {dotted name: value}, "workdir": .., "status": "complete" or
"failed", "metrics": {name: number}}. A setting is all points that differ in seeds alone.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from ppo_jax.io.stage_folder import LOWER_IS_BETTER

# What a sweep is about: the first of these that its points have.
MAIN_METRICS = (
    r"gold/win_rate_\w+(?<!_interval)",
    r"eval/gold_score",
    r"reward/score_mean",
    r"reward_model/accuracy_margin1",
    r"reward_model/validation_accuracy",
    r"reward_model/accuracy",
    r"sft/validation_perplexity",
    r"sft/validation_loss",
    r"\w+/loss",
)
KL_METRICS = ("policy/kl_per_response", "kl/ref")
SHARES = re.compile(r"win_rate|accuracy|fraction|distinct2_ratio")
LEVEL = 0.95


class Estimate(NamedTuple):
    """A mean over seeds; `low` and `high` are None where there is one seed alone."""

    mean: float
    low: float | None
    high: float | None
    values: tuple[float, ...]


class Setting(NamedTuple):
    """The points of a sweep that differ in seeds alone."""

    values: dict[str, Any]  # what they have in common of what the sweep changes
    rows: list[dict]

    @property
    def name(self) -> str:
        """See `title_of`."""
        return title_of(self.values)

    def numbers(self, metric: str) -> list[float]:
        """A metric of each complete point that has it."""
        done = [row["metrics"] for row in self.rows if row["status"] == "complete"]
        return [x for metrics in done if (x := number(metrics.get(metric))) is not None]

    def estimate(self, metric: str) -> Estimate | None:
        """See `student_interval`; None where no point has the metric."""
        values = self.numbers(metric)
        return student_interval(values) if values else None


def title_of(values: Mapping[str, Any]) -> str:
    """What a point or a setting changes, with short names, for a reader.

    >>> title_of({"ppo.kl_coef": 0.05, "ppo.seed": 1})
    'kl_coef 0.05, seed 1'
    """
    return ", ".join(f"{field_name(k)} {short_value(v)}" for k, v in values.items()) or "all"


def number(value: Any) -> float | None:
    """A finite number, or None.

    >>> number(2), number(True), number(float("nan")), number("2")
    (2.0, None, None, None)
    """
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if plain and math.isfinite(value) else None


def student_interval(values: Sequence[float]) -> Estimate:
    """Mean of n independent numbers and its 95% interval, mean ± t(n - 1) s / sqrt(n).

    Args:
        values: n of them, finite; s is their sample standard deviation (over n - 1).

    Reference: Student 1908, https://doi.org/10.1093/biomet/6.1.1.

    >>> estimate = student_interval([0.8, 0.9])
    >>> [round(x, 3) for x in estimate[:3]]
    [0.85, 0.215, 1.485]
    """
    x = np.array(values, np.float64)
    if len(x) < 2:
        return Estimate(float(x.mean()), None, None, tuple(values))
    middle = float(x.mean())
    reach = float(stats.t.ppf((1 + LEVEL) / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    return Estimate(middle, middle - reach, middle + reach, tuple(values))


def differ(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two means differ by more than chance at the 5% level, by Welch's test.

    Args:
        a: two numbers or more, of seeds.
        b: likewise.

    Reference: Welch 1947, https://doi.org/10.1093/biomet/34.1-2.28.

    >>> differ([0.80, 0.82, 0.81], [0.70, 0.72, 0.71]), differ([0.8, 0.6], [0.7, 0.5])
    (True, False)
    """
    if np.ptp(a) == np.ptp(b) == 0:  # the test divides by their spread
        return a[0] != b[0]
    moments = [y for x in (a, b) for y in (np.mean(x), np.std(x, ddof=1), len(x))]
    return bool(stats.ttest_ind_from_stats(*moments, equal_var=False).pvalue < 1 - LEVEL)


def is_seed(name: str) -> bool:
    """Whether a field is a seed: "seed", "ppo.seed"."""
    return name.rsplit(".", 1)[-1] == "seed"


def field_name(name: str) -> str:
    """The last part of a dotted name.

    >>> field_name("ppo.optimizer.learning_rate")
    'learning_rate'
    """
    return name.rsplit(".", 1)[-1]


def short_value(value: Any) -> str:
    """A value for a reader: numbers short.

    >>> short_value(0.00031622776601683794), short_value([1, 2]), short_value(True)
    ('0.000316', '[1, 2]', 'true')
    """
    if isinstance(value, float):
        return f"{value:.3g}"
    return value if isinstance(value, str) else json.dumps(value)


def by_setting(rows: Iterable[Mapping[str, Any]]) -> list[Setting]:
    """The settings of a sweep, each with its points: by their numbers, or else as the rows come."""
    settings: dict[str, Setting] = {}
    for row in rows:
        values = {k: v for k, v in row["point"].items() if not is_seed(k)}
        key = json.dumps(values, sort_keys=True, default=str)
        settings.setdefault(key, Setting(values, [])).rows.append(dict(row))
    found = list(settings.values())
    keys = [tuple(number(v) for v in setting.values.values()) for setting in found]
    if any(x is None for key in keys for x in key) or len(set(map(len, keys))) > 1:
        return found
    return [found[i] for i in sorted(range(len(found)), key=keys.__getitem__)]


def varied(settings: Sequence[Setting]) -> dict[str, list[Any]]:
    """{dotted name: its values in order} of what differs between the settings."""
    names = dict.fromkeys(name for setting in settings for name in setting.values)
    found = {}
    for name in names:
        values = [setting.values.get(name) for setting in settings]
        unlike = list({json.dumps(v, default=str): v for v in values}.values())
        if len(unlike) > 1:
            found[name] = sorted(unlike) if all(number(v) is not None for v in unlike) else unlike
    return found


def metric_names(settings: Sequence[Setting]) -> list[str]:
    """Every metric that is a number in some complete point."""
    names = {name for s in settings for row in s.rows for name in row["metrics"]}
    return sorted(name for name in names if any(s.numbers(name) for s in settings))


def main_metric(settings: Sequence[Setting]) -> str:
    """What the sweep is about, the first of `MAIN_METRICS`; "" where no point has one."""
    names = metric_names(settings)
    found = (name for like in MAIN_METRICS for name in names if re.fullmatch(like, name))
    return next(found, "")


def ranked(settings: Sequence[Setting], metric: str) -> list[tuple[Setting, Estimate]]:
    """The settings that have a metric, the best mean first."""
    sign = 1.0 if LOWER_IS_BETTER.search(metric) else -1.0
    both = [(s, e) for s in settings if (e := s.estimate(metric)) is not None]
    return sorted(both, key=lambda pair: sign * pair[1].mean)


def conclusion(settings: Sequence[Setting], metric: str, label: str) -> str:
    """What follows for the next run, in one sentence.

    Args:
        settings: of a sweep.
        metric: by which they are compared.
        label: the metric for a reader.
    """
    order = ranked(settings, metric) if metric else []
    if not order:
        return "No point has come to a result yet."
    best, top = order[0]
    value = figure(metric, top.mean)
    if len(order) == 1:
        return f"One setting has come to a result: {label} {value}; there is nothing to compare."
    if len(top.values) < 2:
        return (
            f"{best.name} has the best {label}, {value}, in one run each: repeat the best settings "
            "with other seeds before a choice, for instance ppo.seed=0:3."
        )
    seeds = f"{interval(metric, top)} over {len(top.values)} seeds"
    alike = [s for s, e in order[1:] if len(e.values) < 2 or not differ(top.values, e.values)]
    if not alike:
        told = f"Take {best.name}: {label} {value} ({seeds}), better than every other setting"
        return f"{told}{beyond(best, settings)}."
    told = f"{best.name} has the best {label}, {value} ({seeds}), but chance may explain its lead"
    if len(alike) == len(order) - 1:
        every = "every other setting" if len(alike) > 1 else "the other setting"
        return f"{told} over {every}: add seeds before a choice{beyond(best, settings)}."
    others = f"{len(alike)} of the {len(order) - 1} others"
    return f"{told} over {others}: {cheaper(best, alike)}{beyond(best, settings)}."


def cheaper(best: Setting, alike: Sequence[Setting]) -> str:
    """Which of some settings that cannot be told apart to take: that with the least KL."""
    name = next((k for k in KL_METRICS if best.estimate(k)), None)
    kls = [(e.mean, s) for s in (best, *alike) if name and (e := s.estimate(name))]
    if len(kls) < 2:
        return "add seeds to tell them apart"
    kl, least = min(kls, key=lambda pair: pair[0])
    if least is best:
        return f"take it, which also has the least KL ({kl:z.1f} nats), or add seeds"
    return f"take {least.name}, which has the least KL ({kl:z.1f} nats), or add seeds"


def beyond(best: Setting, settings: Sequence[Setting]) -> str:
    """The axes on which the best setting lies at an end: there may be better ones outside."""
    ends = []
    for name, values in varied(settings).items():
        if len(values) < 3 or not all(number(v) is not None for v in values):
            continue
        if best.values.get(name) == values[-1]:
            ends.append(f"above {field_name(name)} {short_value(values[-1])}")
        elif best.values.get(name) == values[0] and values[0] > 0:
            ends.append(f"below {field_name(name)} {short_value(values[0])}")
    return f"; nothing was tried {' or '.join(ends)}" if ends else ""


def figure(metric: str, value: float) -> str:
    """A number for a reader: shares in percent, seconds as they are, others with three digits.

    >>> figure("gold/win_rate_ppo_vs_sft", 0.8437), figure("kl/ref", 7.66), figure("a/b", 1234.5)
    ('84.4%', '7.66', '1234')
    """
    if SHARES.search(metric) and abs(value) <= 2:
        return f"{value:.1%}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{round(value, 6) + 0.0:.3g}"


def interval(metric: str, estimate: Estimate) -> str:
    """The interval of an estimate for a reader, "" without one; that of a rate ends at 0 and 1,
    that of a ratio or a time at 0.

    >>> interval("gold/win_rate_ppo_vs_sft", student_interval([0.7, 0.8, 0.9]))
    '55.2% to 100.0%'
    """
    if estimate.low is None or estimate.low == estimate.high:
        return ""
    ends = np.array([estimate.low, estimate.high])
    if re.search(r"win_rate|accuracy|fraction", metric):
        ends = np.clip(ends, 0, 1)
    elif re.search(r"_ratio$|^time/", metric):
        ends = np.maximum(ends, 0)
    return " to ".join(figure(metric, float(x)) for x in ends)
