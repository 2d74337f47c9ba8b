"""The charts of the report: which metrics each shows, its unit and how to read it."""

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ppo_jax.config.objectives import LOSSES, loss_parameters
from ppo_jax.training.stages import find_stage


def display_name(name: str) -> str:
    """A stage, or the policy that it trains, for a reader."""
    stage = find_stage(name)
    return stage.label if stage else name


def compared(results: Mapping[str, Any]) -> tuple[str, str]:
    """(candidate, reference) of an evaluation: the last of its policies and the one before it.

    >>> compared({"text/distinct2_base": 0.9, "text/distinct2_best_of_4": 0.8})
    ('best_of_4', 'base')
    """
    prefix = "text/distinct2_"
    names = [key.removeprefix(prefix) for key in results if key.startswith(prefix)]
    names = [name for name in names if name != "ratio"]
    return (names[-1], names[-2]) if len(names) > 1 else ("ppo", "sft")


class Chart(NamedTuple):
    """One figure: its metrics (name -> label), the unit of its axis, and how to read it."""

    title: str
    unit: str
    note: str
    metrics: dict[str, str]
    band: str = ""  # a metric that is the half-width of a band around the first
    exact: bool = False  # set by a rule, not measured: drawn as it is, never smoothed
    needs: str = ""  # a metric without which there is no chart, whatever else is logged
    other: str = ""  # a metric that is drawn where it is another one than the first
    moves: bool = False  # no chart where all is one number from first to last


class Group(NamedTuple):
    """Charts under one heading."""

    heading: str
    charts: tuple[Chart, ...]


# The first chart of a stage is also that of its model card. A chart of which a run logged no metric
# is left out.
CHARTS: dict[str, tuple[Group, ...]] = {
    "sft": (
        Group(
            "",
            (
                Chart(
                    "Loss",
                    "nats per token",
                    "Cross-entropy of the next token, on texts trained on and on unseen texts.",
                    {"sft/loss": "training", "sft/validation_loss": "validation"},
                ),
                Chart(
                    "Validation perplexity",
                    "perplexity",
                    "exp(validation loss): as unsure as a choice among this many tokens.",
                    {"sft/validation_perplexity": "validation"},
                ),
                Chart(
                    "Loss of the routers",
                    "experts per token",
                    "Before sft.router_coef. It is the number of experts of a token where tokens "
                    "are spread evenly, or where the router is unsure.",
                    {"sft/router_loss": "training"},
                ),
            ),
        ),
    ),
    "reward": (
        Group(
            "",
            (
                Chart(
                    "Accuracy",
                    "share of pairs",
                    "How often the preferred text of a pair has the higher score.",
                    {
                        "reward_model/accuracy": "training",
                        "reward_model/validation_accuracy": "validation",
                    },
                ),
                Chart(
                    "Loss",
                    "nats per pair",
                    "-log sigmoid(chosen - rejected); a coin toss gives 0.69.",
                    {"reward_model/loss": "training"},
                ),
            ),
        ),
    ),
    "ppo": (
        Group(
            "What is optimised",
            (
                Chart(
                    "Score",
                    "score",
                    "Mean of the sampled responses; the band is one standard deviation over them. "
                    "Where scores are shaped, PPO learns from the adjusted one.",
                    {
                        "reward/score_mean": "as it came",
                        "reward/adjusted_score_mean": "adjusted",
                    },
                    "reward/score_std",
                    other="reward/adjusted_score_mean",
                ),
                Chart(
                    "Score beside the reference's",
                    "score",
                    "Mean scores as they came, of the policy's responses and of those of the "
                    "reference to the same prompts, which they are compared with.",
                    {"reward/reference_score_mean": "reference", "reward/score_mean": "policy"},
                    needs="reward/reference_score_mean",
                ),
                Chart(
                    "Score beside the greedy response's",
                    "score",
                    "Mean scores as they came, of the sampled responses and of the likeliest ones "
                    "to the same prompts, which they are measured against.",
                    {"reward/greedy_score_mean": "greedy", "reward/score_mean": "sampled"},
                    needs="reward/greedy_score_mean",
                ),
                Chart(
                    "Reward and baseline",
                    "reward per response",
                    "Mean reward of a response with its KL penalty, and the running mean of it "
                    "over the iterations before, which is taken off.",
                    {"reward/baseline": "baseline", "reward/total_mean": "reward"},
                ),
                Chart(
                    "KL from the reference policy",
                    "nats per response",
                    "Summed log-ratio of policy and reference over a response, on average.",
                    {"kl/ref": "KL"},
                ),
                Chart(
                    "KL penalty",
                    "reward per response",
                    "What the KL takes from the score.",
                    {"reward/kl_penalty": "penalty"},
                    moves=True,
                ),
                Chart(
                    "KL coefficient",
                    "score per nat",
                    "Rises while the KL is above its target, falls while it is below.",
                    {"kl/coef": "coefficient"},
                    exact=True,
                    moves=True,
                ),
                Chart(
                    "Disagreement of the reward models",
                    "score",
                    "Standard deviation between the scores of several reward models: where it "
                    "rises, the policy goes where one of them may be wrong.",
                    {"reward/disagreement": "deviation"},
                ),
                Chart(
                    "Groups with different scores",
                    "share",
                    "Dynamic sampling: the prompts that there is something to learn from, of those "
                    "sampled and of the batch. Below 1 of the batch the rollouts did not suffice.",
                    {
                        "ppo/varied_group_fraction": "of the sampled",
                        "ppo/kept_fraction": "of the batch",
                    },
                ),
            ),
        ),
        Group(
            "On unseen prompts",
            (
                Chart(
                    "Proxy and gold score",
                    "score",
                    "The same unseen prompts each time: the score that is trained for, and the "
                    "headline judge's. Where they part, the proxy is optimised too far.",
                    {"eval/proxy_score": "proxy", "eval/gold_score": "gold"},
                    exact=True,
                ),
                Chart(
                    "Win rate against the start",
                    "share of prompts",
                    "How often the headline judge prefers the response to that of the policy "
                    "before PPO.",
                    {"eval/gold_win_rate": "gold"},
                    exact=True,
                ),
                Chart(
                    "KL on unseen prompts",
                    "nats per response",
                    "Summed log-ratio of policy and reference over a response, on average.",
                    {"eval/kl": "KL"},
                    exact=True,
                ),
                Chart(
                    "Length on unseen prompts",
                    "tokens",
                    "On average, the end token included.",
                    {"eval/length": "length"},
                    exact=True,
                ),
            ),
        ),
        Group(
            "Policy update",
            (
                Chart(
                    "Entropy",
                    "nats per token",
                    "Falls as the policy becomes sure; near 0 it has collapsed.",
                    {"policy/entropy": "entropy"},
                ),
                Chart(
                    "Weight of the entropy",
                    "loss per nat",
                    "A step up after an iteration with less entropy than the target, a step down "
                    "after one with more.",
                    {"policy/entropy_coef": "weight"},
                    exact=True,
                ),
                Chart(
                    "Clip fraction",
                    "share",
                    "Tokens, with GSPO responses, at the limit of the loss. At 0 for long the "
                    "updates are timid.",
                    {"policy/clip_fraction": "fraction"},
                ),
                Chart(
                    "Approximate KL of the update",
                    "nats per token",
                    "Between the policy that sampled and the policy that is updated.",
                    {"policy/approx_kl": "KL"},
                ),
                Chart(
                    "KL of an iteration",
                    "nats per token",
                    "Between the policy before and after it: what the penalty holds at its target.",
                    {"policy/old_kl": "KL"},
                ),
                Chart(
                    "Coefficient of that KL",
                    "loss per nat",
                    "Of the penalty in the loss: doubles after an iteration that went too far, "
                    "halves after one that hardly moved.",
                    {"policy/penalty_coef": "coefficient"},
                    exact=True,
                ),
                Chart(
                    "Largest ratio",
                    "new / old probability",
                    "Of a token, with GSPO of a response: what an update raised the most.",
                    {"policy/ratio_max": "ratio"},
                ),
                Chart(
                    "Policy loss",
                    "loss",
                    "The run's loss of the policy, before entropy and the KL from the reference "
                    "are added. Its level means little, a jump means trouble.",
                    {"policy/loss": "loss"},
                ),
                Chart(
                    "Learning rate",
                    "learning rate",
                    "Of the policy.",
                    {"policy/learning_rate": "rate"},
                    exact=True,
                ),
            ),
        ),
        Group(
            "Critic",
            (
                Chart(
                    "Value loss",
                    "loss",
                    "Of the critic's values against the returns: half the squared error, or "
                    "with bins the cross-entropy in nats.",
                    {"value/loss": "loss"},
                ),
                Chart(
                    "Explained variance",
                    "share",
                    "1 - mean squared error / variance of the returns: 1 is a perfect critic, "
                    "0 one no better than a constant.",
                    {"value/explained_variance": "share"},
                ),
                Chart(
                    "Bias",
                    "reward",
                    "Mean value minus mean return: above 0 the critic hopes for too much.",
                    {"value/bias": "bias"},
                ),
                Chart(
                    "Value clip fraction",
                    "share of tokens",
                    "Tokens whose value moved by more than the clip range.",
                    {"value/clip_fraction": "fraction"},
                ),
                Chart(
                    "Disagreement of the critics",
                    "reward",
                    "Standard deviation of the values of several critics, mean over the tokens.",
                    {"value/disagreement": "deviation"},
                ),
                Chart(
                    "Returns outside of the bins",
                    "share of tokens",
                    "Of a critic with bins: what it cannot follow. Above 0.01 or so the range is "
                    "too narrow.",
                    {"value/outside_bins": "share"},
                ),
            ),
        ),
        Group(
            "Experts",
            (
                Chart(
                    "Busiest expert",
                    "share of tokens",
                    "Tokens of a layer that have its busiest expert, where that is most. Near 1 "
                    "the layer is a dense one: train it with sft.router_coef.",
                    {"policy/router_load_max": "share"},
                ),
                Chart(
                    "Choices that differ from the rollout's",
                    "share of choices",
                    "Experts that the update does not choose again; ppo.replay_experts keeps them.",
                    {"policy/router_mismatch": "share"},
                ),
            ),
        ),
        Group(
            "Responses and speed",
            (
                Chart(
                    "Response length",
                    "tokens",
                    "On average, the end token included.",
                    {"response/length": "length"},
                ),
                Chart(
                    "Ended by themselves",
                    "share of responses",
                    "Responses with an end token before the length limit.",
                    {"response/eos_fraction": "share"},
                ),
                Chart(
                    "Time of an iteration",
                    "seconds",
                    "Rollout, scoring and all optimizer steps.",
                    {"time/step_s": "time"},
                ),
                Chart(
                    "Speed",
                    "tokens per second",
                    "Response tokens sampled and trained on.",
                    {"time/tokens_per_s": "speed"},
                ),
            ),
        ),
    ),
}


def drawn(rows: Sequence[dict], chart: Chart, *, idle: Container[str] = ()) -> dict[str, str]:
    """The metrics of a chart that have something to show in the rows of one stage; {} is no chart.

    Args:
        rows: of metrics.jsonl.
        idle: metrics that say nothing under the settings of the run, see `idle_metrics`.
    """
    logged = {name: series(rows, name)[1] for name in chart.metrics if name not in idle}
    logged = {name: values for name, values in logged.items() if values}
    first = logged.get(next(iter(chart.metrics)))
    if first is not None and chart.other in logged and _same(first, logged[chart.other]):
        del logged[chart.other]
    still = all(_same(values, values[:1] * len(values)) for values in logged.values())
    if (chart.needs and chart.needs not in logged) or (chart.moves and still):
        return {}
    return {name: chart.metrics[name] for name in logged}


def _same(values: Sequence[float], others: Sequence[float]) -> bool:
    """Whether two series are one but for rounding; NaN is as NaN."""
    if len(values) != len(others):
        return False
    return bool(np.allclose(values, others, rtol=1e-5, atol=1e-7, equal_nan=True))


def idle_metrics(settings: Mapping[str, Any]) -> set[str]:
    """The metrics of PPO that stay at 0 under its settings, as there is nothing that could move
    them: a share of what is clipped, where nothing clips. Of a setting that is unknown, or a loss
    of the user's, none.

    >>> sorted(idle_metrics({"loss": "kl_penalty", "value_bins": 51}))
    ['policy/clip_fraction', 'value/clip_fraction']
    >>> idle_metrics({"loss": "clip", "clip_range": 0.2}), idle_metrics({})
    (set(), set())
    """
    idle, loss = set(), str(settings.get("loss"))
    if loss in LOSSES:
        limits = {"clip_range", "divergence_limit"} & loss_parameters(loss)
        no_clip = {"clip_range"} if str(settings.get("clip_range")) == "inf" else set()
        idle |= set() if limits - no_clip else {"policy/clip_fraction"}
    if settings.get("value_bins") or str(settings.get("value_clip_range")) == "inf":
        idle.add("value/clip_fraction")
    return idle


def series(rows: Iterable[dict], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of a metric in the rows of one stage; null and inf become NaN.

    >>> series([{"step": 1, "a": 2.0}, {"step": 2}, {"step": 3, "a": None}], "a")
    ([1, 3], [2.0, nan])
    """
    points = {row["step"]: row[name] for row in rows if name in row}
    known = (value is not None and math.isfinite(value) for value in points.values())
    values = [float(v) if ok else math.nan for v, ok in zip(points.values(), known, strict=True)]
    return list(points), values
