"""What a run came to: its files read, its verdict in one sentence, its headline figures."""

import datetime
import json
import math
from pathlib import Path
from typing import NamedTuple

from ppo_jax.report_panels import series

FILES = ("config.json", "metrics.jsonl", "samples.jsonl", "results.json")


class Run(NamedTuple):
    """What the files of a run hold; an absent file is an empty list or dict."""

    name: str
    date: str
    config: dict
    metrics: list[dict]
    samples: list[dict]
    results: dict

    def rows(self, stage: str) -> list[dict]:
        """The metrics of one stage, in the order they were written."""
        return [row for row in self.metrics if row["stage"] == stage]

    def ends(self, stage: str, name: str) -> list[float]:
        """The first and last finite value of a metric; [] when there are not two."""
        _, values = series(self.rows(stage), name)
        finite = [value for value in values if math.isfinite(value)]
        return [finite[0], finite[-1]] if len(finite) > 1 else []


def read_run(workdir: str | Path) -> Run:
    """Reads the files of a workdir; a torn last line of a .jsonl file is left out.

    Args:
        workdir: the folder of a run, with any of config.json, metrics.jsonl, samples.jsonl and
            results.json.

    Raises:
        ValueError: the folder holds none of them, or one is not JSON (file:line).
    """
    paths = [Path(workdir) / name for name in FILES]
    if not any(path.is_file() for path in paths):
        raise ValueError(f"{workdir} is not a run's workdir: it holds none of {', '.join(FILES)}.")
    newest = max(path.stat().st_mtime for path in paths if path.is_file())
    date = datetime.datetime.fromtimestamp(newest, datetime.UTC).strftime("%d %B %Y, %H:%M UTC")
    return Run(Path(workdir).resolve().name, date, *map(_read, paths))


def verdict(run: Run) -> str:
    """The strongest statement that the files of the run support, in one sentence."""
    kl = run.results.get("policy/kl_per_response")
    at = "" if kl is None else f", at {kl:.1f} nats of KL per response"
    if (rate := run.results.get("gold/win_rate_ppo_vs_sft")) is not None:
        return f"{_preference(rate, run.results)}{at}."
    if ends := run.ends("ppo", "reward/score_mean"):
        return "PPO took the mean score from {:.2f} to {:.2f}".format(*ends) + f"{at}."
    if (accuracy := run.results.get("reward_model/accuracy_gap1")) is not None:
        return (
            f"The reward model orders {accuracy:.1%} of the unseen pairs as people do, at a gap in "
            "rating of 1 or more."
        )
    if ends := run.ends("reward", "reward_model/validation_accuracy"):
        return f"The reward model orders {ends[1]:.1%} of the validation pairs as people do."
    if ends := run.ends("sft", "sft/validation_perplexity"):
        return "SFT took the validation perplexity from {:.1f} to {:.1f}.".format(*ends)
    return "There is no result to report yet."


def headlines(run: Run) -> list[tuple[str, str, str]]:
    """The cards of the report: (figure, what it is, what to compare it with)."""
    results = run.results
    interval = results.get("gold/win_rate_ppo_vs_sft_interval")
    human = results.get("reference", {}).get("human rater")
    between = "95% interval {:.1%} to {:.1%}".format(*interval) if interval else "win rate"
    gap = "gap of 1 or more" + (f"; a human rater {human:.1%}" if human else "")
    specs = (
        ("gold/win_rate_ppo_vs_sft", "{:.1%}", "prefer PPO to SFT", between),
        ("policy/kl_per_response", "{:.1f} nats", "KL per response", "from the SFT policy"),
        ("reward_model/accuracy_gap1", "{:.1%}", "reward-model accuracy", gap),
        ("text/distinct2_ratio", "{:.0%}", "of SFT's distinct-2", "variety of word pairs"),
    )
    cards = [(form.format(results[key]), *words) for key, form, *words in specs if key in results]
    if "time/total_s" in results:
        cards.append((duration(results["time/total_s"]), "in all", "wall clock"))
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


def _preference(rate: float, results: dict) -> str:
    prompts = next((row["num_prompts"] for row in results.get("judges", [])), "the")
    interval = results.get("gold/win_rate_ppo_vs_sft_interval")
    low, high = interval or (rate, rate)
    between = f" (95% interval {low:.0%} to {high:.0%})" if interval else ""
    told = f"in {rate:.0%} of {prompts} unseen prompts by the gold judge{between}"
    if low > 0.5:
        return f"PPO is preferred to SFT {told}"
    if high < 0.5:
        return f"PPO lost to SFT: it is preferred {told}"
    return f"PPO and SFT are not told apart: PPO is preferred {told}"


def _read(path: Path) -> list | dict:
    lines = path.suffix == ".jsonl"
    if not path.is_file():
        return [] if lines else {}
    text = path.read_text(encoding="utf-8")
    if not lines:
        return _json(text, str(path))
    *whole, _torn = text.split("\n")  # a line is whole once its end is written
    return [_json(line, f"{path}:{i}") for i, line in enumerate(whole, 1) if line.strip()]


def _json(text: str, where: str) -> dict:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}.") from None
