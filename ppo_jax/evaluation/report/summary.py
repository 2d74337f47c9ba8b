"""Summary of a finished run: headline metrics and a one-sentence verdict."""

import datetime
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from ppo_jax.evaluation.report.charts import compared, display_name, series
from ppo_jax.evaluation.statistics import share_interval
from ppo_jax.io.metric_names import with_new_names
from ppo_jax.io.run_folder import read_object, read_record, read_results, read_rows
from ppo_jax.io.stage_folder import DESCRIPTION
from ppo_jax.training.stages import TRAINING_STAGES

EXPLAINED = "value/explained_variance"
FILES = ("config.json", "metrics.jsonl", "samples.jsonl", "results.json")


class Run(NamedTuple):
    """What the files of a run hold; an absent file is an empty list or dict."""

    name: str
    date: str
    config: dict
    metrics: list[dict]
    samples: list[dict]
    results: dict
    num_steps: dict[str, int]  # of each stage that has begun
    left_out: list[str]  # lines of the files that are no rows, and why

    def rows(self, stage: str) -> list[dict]:
        """The metrics of one stage, in the order they were written."""
        return [row for row in self.metrics if row["stage"] == stage]

    def points(self, stage: str, name: str) -> list[tuple[int, float]]:
        """(step, value) wherever a metric is finite."""
        both = zip(*series(self.rows(stage), name), strict=True)
        return [(step, value) for step, value in both if math.isfinite(value)]

    def ends(self, stage: str, name: str) -> list[float]:
        """The first and last finite value of a metric; [] when there are not two."""
        values = [value for _, value in self.points(stage, name)]
        return [values[0], values[-1]] if len(values) > 1 else []


def read_run(workdir: str | Path) -> Run:
    """Reads the files of a workdir; lines that are no rows, edited by hand, are left out.

    Args:
        workdir: the folder of a run, with any of config.json, metrics.jsonl, samples.jsonl and
            results.json.

    Raises:
        ValueError: the folder holds none of them, or one is not as a run writes it.
    """
    workdir = Path(workdir)
    paths = [workdir / name for name in FILES]
    if not any(path.is_file() for path in paths):
        raise ValueError(f"{workdir} is not a run's workdir: it holds none of {', '.join(FILES)}.")
    newest = max(path.stat().st_mtime for path in paths if path.is_file())
    date = datetime.datetime.fromtimestamp(newest, datetime.UTC).strftime("%d %B %Y, %H:%M UTC")
    names = [stage.name for stage in TRAINING_STAGES]
    stages = {name: read_object(workdir / name / "stage.json", DESCRIPTION) for name in names}
    (metrics, not_metrics), (samples, not_samples) = (
        read_rows(workdir / name) for name in ("metrics.jsonl", "samples.jsonl")
    )
    return Run(
        name=workdir.resolve().name,
        date=date,
        config=with_new_names(read_record(workdir)),
        metrics=metrics,
        samples=samples,
        results=read_results(workdir),
        num_steps={name: stage.get("num_steps", 0) for name, stage in stages.items() if stage},
        left_out=not_metrics + not_samples,
    )


def unfinished(run: Run) -> str:
    """What the stages of the config have yet to do, as far as the files tell; "" is nothing. One
    that has not begun before a later one has is no part of this run: that starts from elsewhere."""
    wanted, todo = run.config.get("config", run.config), []
    stages = [stage.name for stage in TRAINING_STAGES]
    steps = {stage: max((row["step"] for row in run.rows(stage)), default=0) for stage in stages}
    begun = [i for i, stage in enumerate(stages) if steps[stage] or stage in run.num_steps]
    left = stages[begun[-1] + 1 :] if begun else stages
    for stage, step in steps.items():
        if step < run.num_steps.get(stage, 0):
            todo.append(f"{stage} is at step {step} of {run.num_steps[stage]}")
        elif wanted.get(stage) and stage in left:
            todo.append(f"{stage} has not begun")
    if wanted.get("evaluate") and "evaluated" not in run.results:
        todo.append("nothing is evaluated yet")
    return ", ".join(todo)


def verdict(run: Run) -> str:
    """The strongest statement that the files of the run support, in one sentence."""
    if (rate := _win_rate(run.results)) is not None:
        sentence = _preference(rate, run.results) + _at_kl(run)
    else:
        sentence = _ppo_reached(run) or _reward_reached(run) or _sft_reached(run)
    return f"{sentence or 'There is no result to report yet'}."


def headlines(run: Run) -> list[tuple[str, str, str]]:
    """The cards of the report: (figure, what it is, what to compare it with)."""
    cards = [*_ppo_cards(run), *_reward_cards(run)]
    if (ratio := run.results.get("text/distinct2_ratio")) is not None:
        cards.append(
            (f"{ratio:.0%}", f"of {_reference(run)}'s distinct-2", "variety of word pairs")
        )
    if (points := run.points("sft", "sft/validation_perplexity")) and not _evaluated(run):
        step, first = points[0]
        before = f"{_perplexity(first)} at step {step}, {points[-1][0]} steps in all"
        cards.append((_perplexity(points[-1][1]), "validation perplexity after SFT", before))
    if "time/total_s" in run.results:
        cards.append((duration(run.results["time/total_s"]), "in all", "wall clock"))
    return cards


def duration(seconds: float) -> str:
    """Seconds for a reader.

    >>> [duration(s) for s in (8.24, 95, 7325)]
    ['8.2 s', '1 min 35 s', '2 h 2 min']
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


# The result of each stage


def _evaluated(run: Run) -> bool:
    return "policy/kl_per_response" in run.results


def _reference(run: Run) -> str:
    """The policy that the candidate of the evaluation began from."""
    return display_name(compared(run.results)[1])


def _win_rate(results: dict, of: str = "") -> Any:
    """Of the candidate over its reference, by the headline judge; `_interval` is its interval."""
    return results.get("gold/win_rate_{}_vs_{}".format(*compared(results)) + of)


def _preference(rate: float, results: dict) -> str:
    ours, theirs = map(display_name, compared(results))
    prompts = next((row["num_prompts"] for row in results.get("judges", [])), "the")
    interval = _win_rate(results, "_interval")
    low, high = interval or (rate, rate)
    between = f" (95% interval {low:.0%} to {high:.0%})" if interval else ""
    judge = results.get("headline_judge", "gold")
    share = f"in {rate:.0%} of {prompts} unseen prompts by the {judge} judge{between}"
    if low > 0.5:
        return f"{ours} is preferred to {theirs} {share}"
    if high < 0.5:
        return f"{ours} lost to {theirs}: it is preferred {share}"
    difference = f"The difference between {ours} and {theirs} is not significant"
    return f"{difference}: {ours} is preferred {share}"


def _window(values: Sequence[float]) -> int:
    """Over how many iterations a mean stands for an end of PPO: a single one is noisy."""
    return min(5, max(1, len(values) // 4))


def critic_alone(run: Run) -> bool:
    """Whether PPO has trained the critic and left the policy as it was: value pretraining."""
    rows = run.rows("ppo")
    rates = [row.get("policy/learning_rate") for row in rows]
    return any(EXPLAINED in row for row in rows) and all(rate == 0 for rate in rates)


def _ends(run: Run, metric: str) -> tuple[int, float, float] | None:
    """(n, mean of a metric over the first n iterations, over the last n); see `_window`."""
    values = [value for _, value in run.points("ppo", metric)]
    if not values:
        return None
    n = _window(values)
    return n, mean(values[:n]), mean(values[-n:])


def _kl(run: Run) -> float | None:
    """Nats per response: of the evaluation, or else of the last iterations."""
    if _evaluated(run):
        return run.results["policy/kl_per_response"]
    values = [value for _, value in run.points("ppo", "kl/ref")]
    return mean(values[-_window(values) :]) if values else None


def _at_kl(run: Run) -> str:
    kl = _kl(run)
    return "" if kl is None else f", at {kl:z.1f} nats of KL per response"


def _ppo_reached(run: Run) -> str:
    alone = critic_alone(run)
    if (ends := _ends(run, EXPLAINED if alone else "reward/score_mean")) is None:
        return ""
    n, first, last = ends
    early, late = (f"{n} iterations", f" {n}") if n > 1 else ("iteration", "")
    change = f"from {first:z.2f} in the first {early} to {last:z.2f} in the last{late}"
    if alone:
        return f"PPO trained the critic alone: its explained variance went {change}"
    return f"PPO took the mean score {change}{_at_kl(run)}"


def _ppo_cards(run: Run) -> list[tuple[str, str, str]]:
    cards, results, alone = [], run.results, critic_alone(run) and not _evaluated(run)
    if (rate := _win_rate(results)) is not None:
        interval = _win_rate(results, "_interval")
        between = "95% interval {:.1%} to {:.1%}".format(*interval) if interval else "win rate"
        ours, theirs = map(display_name, compared(results))
        cards.append((f"{rate:.1%}", f"prefer {ours} to {theirs}", between))
    elif ends := _ends(run, EXPLAINED if alone else "reward/score_mean"):
        n, first, last = ends
        late, early = (f"{n} iterations", f" {n}") if n > 1 else ("iteration", "")
        what = "explained variance of the critic" if alone else "mean score"
        cards.append((f"{last:z.2f}", f"{what}, last {late}", f"{first:z.2f} in the first{early}"))
    if not alone and (kl := _kl(run)) is not None:
        policy = f"the {_reference(run)} policy" if _evaluated(run) else "the reference policy"
        cards.append((f"{kl:z.1f} nats", "KL per response", f"from {policy}"))
    return cards


def _accuracies(run: Run) -> dict[str, float]:
    """{"": of all unseen pairs, "_margin1": of pairs that differ by 1 or more, "_margin2": 2}."""
    accuracies = {}
    for suffix in ("", "_margin1", "_margin2"):
        validated = run.points("reward", f"reward_model/validation_accuracy{suffix}")
        if (value := run.results.get(f"reward_model/accuracy{suffix}")) is not None:
            accuracies[suffix] = value
        elif validated:
            accuracies[suffix] = validated[-1][1]
    return accuracies


def _measured_on(run: Run, suffix: str, accuracy: float) -> str:
    """How many unseen pairs an accuracy is of; its interval, where they are independent."""
    counts = [count for _, count in run.points("reward", f"reward_model/validation_pairs{suffix}")]
    count = run.results.get(f"reward_model/pairs{suffix}", counts[-1] if counts else None)
    if count is None:
        return "unseen pairs"
    pairs = f"{round(count):,} unseen pairs"
    if settings_of(run, "reward").get("format") != "preferences":
        return pairs  # drawn many times from the same texts
    return pairs + "; 95% interval {:.1%} to {:.1%}".format(*share_interval(accuracy, count))


def settings_of(run: Run, section: str) -> dict:
    """The settings of a section; {} where they are unknown."""
    return run.config.get("config", run.config).get(section) or {}


def _pairs_a_step(run: Run) -> str:
    """How many pairs a step of reward-model training compares; "" where the config is unknown."""
    settings = settings_of(run, "reward")
    if settings.get("format") == "ratings" and "pairs_per_batch" in settings:
        return f"up to {settings['pairs_per_batch']} pairs"  # pairs of equal ratings are left out
    return f"{settings['batch_size'] // 2} pairs" if "batch_size" in settings else ""


def _reward_reached(run: Run) -> str:
    accuracies = _accuracies(run)
    if "" not in accuracies:
        return ""
    sentence = f"The reward model puts {accuracies['']:.1%} of the unseen pairs in the right order"
    gaps = [
        f"{accuracies[suffix]:.1%} at {gap} or more"
        for suffix, gap in (("_margin1", "a gap in rating of 1"), ("_margin2", "2"))
        if suffix in accuracies
    ]
    sentence += f" ({', '.join(gaps)})" if gaps else ""
    if rows := run.rows("reward"):
        pairs = _pairs_a_step(run)
        sentence += f", after {rows[-1]['step']} steps" + (f" of {pairs}" if pairs else "")
    return sentence


def _reward_cards(run: Run) -> list[tuple[str, str, str]]:
    accuracies, what = _accuracies(run), "reward-model accuracy"
    human = run.results.get("reference", {}).get("human rater")
    if _evaluated(run) and "_margin1" in accuracies:
        pairs = _measured_on(run, "_margin1", accuracies["_margin1"])
        of = "" if pairs == "unseen pairs" else f"{pairs} with a "
        note = f"{of}gap of 1 or more" + (f"; a human rater {human:.1%}" if human else "")
        return [(f"{accuracies['_margin1']:.1%}", what, note)]
    if "" not in accuracies:
        return []
    note = f"on {_measured_on(run, '', accuracies[''])}"
    if "_margin1" in accuracies:
        note += f"; {accuracies['_margin1']:.1%} at a gap of 1 or more"
    cards = [(f"{accuracies['']:.1%}", what, note)]
    if (rows := run.rows("reward")) and not _evaluated(run):
        each = f"{pairs} each" if (pairs := _pairs_a_step(run)) else "of the optimizer"
        cards.append((f"{rows[-1]['step']}", "reward-model steps", each))
    return cards


def _sft_reached(run: Run) -> str:
    if not (points := run.points("sft", "sft/validation_perplexity")):
        return ""
    (begin, first), (end, last) = points[0], points[-1]
    if len(points) == 1:
        return f"SFT reached a validation perplexity of {_perplexity(last)} at step {end}"
    ends = f"from {_perplexity(first)} (step {begin}) to {_perplexity(last)} (step {end})"
    return f"SFT took the validation perplexity {ends}"


def _perplexity(value: float) -> str:
    """A model from scratch begins at the size of its vocabulary, a diverged one at any number."""
    return f"{value:.1f}" if value < 1e5 else f"{value:.1e}"
