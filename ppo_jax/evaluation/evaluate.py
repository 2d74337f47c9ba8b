"""Comparison of policies on unseen prompts, by the judges of a panel."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ppo_jax.config.parsing import failure, load_function
from ppo_jax.config.run import Config
from ppo_jax.config.stages import EvaluateSettings
from ppo_jax.core.distributions import token_logprobs
from ppo_jax.core.types import Rollout
from ppo_jax.data.comparisons import CONTEXT, encode_rated
from ppo_jax.data.prompts import PromptData, prompt_data
from ppo_jax.data.readers import naming_data, short_repr
from ppo_jax.data.records import RatedText, load_ratings
from ppo_jax.distributed.layout import Layout, fetch, make_layouts
from ppo_jax.distributed.processes import on_primary, stop_if_asked
from ppo_jax.evaluation.statistics import Judge, distinct_n, judge_table
from ppo_jax.inference.generate import generate, make_sampling
from ppo_jax.inference.score import sampled_scores, score_rows
from ppo_jax.io.model_spec import ModelSpec
from ppo_jax.io.run_folder import read_results, read_rows, write_results
from ppo_jax.io.stage_folder import (
    Model,
    describe_stage,
    load_source,
    resolve,
    source_steps,
    split_step,
)
from ppo_jax.models.build import policy_network
from ppo_jax.rollout.decode import response_outputs
from ppo_jax.training.stage import Stage

NUM_SAMPLES = 12  # prompts side by side in the report


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgePanel:
    """Judges of whole texts (prompt and response), and what a reader must know of them."""

    judges: Mapping[str, Judge]
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rated: tuple[Sequence[str], np.ndarray] | None = None  # texts and mean ratings, unseen by all
    reference: Mapping[str, float] = dataclasses.field(default_factory=dict)  # marks for accuracy
    headline: str = ""  # the judge whose win rate is the result of the run; "" is "gold", or the
    # first judge where none has this name

    def __post_init__(self):
        if not self.judges:
            raise ValueError("judges must be one or more, got none")
        if self.headline and self.headline not in self.judges:
            raise ValueError(
                f"headline must be one of the panel's judges {list(self.judges)}, got "
                f"{self.headline!r}"
            )

    @property
    def headline_judge(self) -> str:
        """The judge that `headline` names, also of a panel that `dataclasses.replace` gave more."""
        return self.headline or ("gold" if "gold" in self.judges else next(iter(self.judges)))


# The prompts, and the rated texts that measure the reward model.
EvaluationData = tuple[PromptData, list[RatedText] | None]


def read_evaluation(config: Config, start: ModelSpec) -> EvaluationData:
    ratings = config.evaluate.ratings
    return evaluation_prompts(config, start.tokenizer), load_ratings(ratings) if ratings else None


def evaluate(config: Config, workdir: Path, base: str, data: EvaluationData):
    """Compare the policies of a run and add the verdict to results.json."""
    settings, (layout, of_rollout) = config.evaluate, make_layouts(config.mesh)
    pins = source_steps(workdir / "ppo")
    policies = {
        name: load_source(path, workdir, base, config.model, layout, pin)
        for name, (path, pin) in compared(config, workdir, base, pins.get("init_from")).items()
    }
    prompts, ratings = data[0].texts[: settings.num_prompts], data[1]
    responses, rollouts, results = compare(policies, prompts, config, of_rollout)
    texts = {
        name: [p + r for p, r in zip(prompts, rows, strict=True)]
        for name, rows in responses.items()
    }
    # What is measured is on disk before a judge or the reward model can fail.
    add_results(workdir, results)
    add_results(workdir, judge_all(settings, workdir, texts))
    name = config.ppo.reward_model or ("reward" if config.reward is not None else "")
    pin = pins.get("reward_model") if config.ppo.reward_model else None
    reward = load_source(name, workdir, base, config.model, layout, pin) if name else None
    scores = first_scores(reward, policies, prompts, responses, rollouts, config.ppo.score_at)
    add_results(workdir, {"samples": side_by_side(prompts, responses, scores)})
    add_results(workdir, reward_accuracies(reward, ratings, config, workdir))


def compare(
    policies: Mapping[str, Model], prompts: list[str], config: Config, layout: Layout
) -> tuple[dict[str, list[str]], dict[str, list[Rollout]], dict[str, float]]:
    """Responses of some policies to the same prompts, with their variety and the last one's KL.

    Args:
        policies: two or more by name; the last is the candidate, the one before it its reference.
        prompts: N texts.
        config: of the run; `ppo` has the lengths, `evaluate` temperature and batch size.
        layout: of the rollout.

    Returns:
        name -> N responses, name -> the rollouts of their batches, and `text/distinct2_<name>` of
        each, `policy/kl_per_response` of the candidate from its reference, and
        `text/distinct2_ratio` of the two.
    """
    responses, rollouts, results = {}, {}, {}
    for name, policy in policies.items():
        responses[name], rollouts[name] = respond(policy, prompts, config, layout)
        results[f"text/distinct2_{name}"] = distinct_n(responses[name], 2)
        print(f"evaluate: {len(prompts)} responses of {name}", flush=True)
    *_, reference, candidate = policies
    results["policy/kl_per_response"] = kl_per_response(
        policies[reference], rollouts[candidate], len(prompts), config.evaluate.temperature
    )
    variety, before = (results[f"text/distinct2_{name}"] for name in (candidate, reference))
    results["text/distinct2_ratio"] = variety / max(before, 1e-9)
    return responses, rollouts, results


def add_results(workdir: Path, results: Mapping[str, Any]):
    write_results(workdir, read_results(workdir) | results)


def compared(
    config: Config, workdir: Path, base: str, pin: int | None
) -> dict[str, tuple[str, int | None]]:
    """(path, step) of the policies to compare: "base" and "sft" as far as PPO began there, "ppo".

    The order is that of training: the last began from the one before it. A stage folder from
    elsewhere that PPO began from is "sft", any other model is "base".
    """
    origin, _ = split_step(config.ppo.init_from)
    path = resolve(origin, workdir, base)
    sources = {"base": (base, None)} if origin in ("base", "sft") else {}
    if origin != "base":
        sources["base" if describe_stage(Path(path)) is None else "sft"] = (path, pin)
    return sources | {"ppo": (str(workdir / "ppo"), None)}


def evaluation_prompts(config: Config, tokenizer: Any) -> PromptData:
    """The prompts of the evaluation, num_prompts or more.

    Raises:
        ValueError: there are fewer.
    """
    settings = config.evaluate
    data = prompt_data(
        settings.prompts,
        tokenizer,
        max_length=config.ppo.max_prompt_length,
        field="evaluate.prompts",
        columns=False,  # Judges are given texts alone: a copy would count as another prompt.
    )
    if len(data.texts) < settings.num_prompts:
        raise ValueError(
            f"evaluate.num_prompts must be at most the {len(data.texts)} prompts of "
            f"{settings.prompts}, got {settings.num_prompts}"
        )
    return data


def respond(
    policy: Model, prompts: list[str], config: Config, layout: Layout
) -> tuple[list[str], list[Rollout]]:
    """Responses as long as those of the training, from the same key for every policy."""
    ppo, settings = config.ppo, config.evaluate
    return generate(
        policy,
        prompts,
        sampling=make_sampling(vars(ppo), policy.tokenizer),
        temperature=settings.temperature,
        seed=config.seed + 1,
        batch_size=settings.batch_size,
        max_prompt_length=ppo.max_prompt_length,
        layout=layout,
        before_batch=lambda: stop_if_asked("the same command starts the evaluation over"),
    )


def kl_per_response(
    reference: Model, rollouts: list[Rollout], count: int, temperature: float
) -> float:
    """KL(policy || reference) in nats per response, by the log-ratio of the policy's own samples.

    The sum over a response of logprobs - ref_logprobs, averaged over the first `count` responses.
    """
    network = policy_network(reference.config, constrain=reference.layout.constrain)

    @jax.jit
    def log_ratio(params, rollout):
        length = rollout.response_mask.shape[1]
        logits = response_outputs(
            network, params, rollout.tokens, rollout.mask, response_length=length
        )
        ref = token_logprobs(logits, rollout.response_tokens, temperature=temperature)
        return jax.numpy.where(rollout.response_mask, rollout.logprobs - ref, 0.0).sum(axis=1)

    ratios = np.concatenate(fetch([log_ratio(reference.params, r) for r in rollouts]))
    return float(ratios[:count].mean())


def judge_all(settings: EvaluateSettings, workdir: Path, texts: dict[str, list[str]]) -> dict:
    """The judges' table and the verdict of the panel's headline judge, under gold/.

    Every process makes the panel, which may load models: that is done together. The judges, which
    may be slow, paid or random, are asked by process 0 alone; they compute on its own devices.
    """
    if not settings.judges:
        return {}
    make_panel = load_function(settings.judges, "evaluate.judges")
    try:
        panel = make_panel(workdir)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit, too: the run is not done
        raise failure(f"evaluate.judges {settings.judges}", error) from error
    if not isinstance(panel, JudgePanel):
        raise ValueError(
            f"evaluate.judges {settings.judges} must return a JudgePanel, got {short_repr(panel)}"
        )
    *_, reference, candidate = texts
    table = on_primary(
        judge_table,
        panel.judges,
        texts,
        candidate=candidate,
        notes=panel.notes,
        rated=panel.rated,
    )
    results = {"judges": table, "reference": dict(panel.reference)}
    for row in table:
        if row["judge"] == panel.headline_judge:
            key = f"win_rate_{candidate}_vs_{reference}"
            results |= {f"gold/{name}": row[name] for name in (key, f"{key}_interval")}
            results["headline_judge"] = panel.headline_judge
    return results


def first_scores(
    reward: Model | None,
    policies: Mapping[str, Model],
    prompts: list[str],
    responses: dict[str, list[str]],
    rollouts: dict[str, list[Rollout]],
    score_at: str,
) -> dict[str, dict[int, float]]:
    """name -> {index: score} of the first responses of each policy, read as in PPO; none without a
    reward model, or where a response does not fit into its context."""
    if reward is None:
        return {}
    scores = {}
    for name, policy in policies.items():
        texts = (x[:NUM_SAMPLES] for x in (prompts, responses[name]))
        scores[name] = sampled_scores(reward, policy, *texts, rollouts[name], score_at)
    return scores


def side_by_side(
    prompts: list[str], responses: dict[str, list[str]], scores: dict[str, dict[int, float]]
) -> list[dict]:
    """The first prompts with every policy's response and its score, where it has one."""
    return [
        {
            "prompt": prompts[i],
            **{name: rows[i] for name, rows in responses.items()},
            "scores": {name: row[i] for name, row in scores.items() if i in row},
        }
        for i in range(min(NUM_SAMPLES, len(prompts)))
    ]


def reward_accuracies(
    reward: Model | None, ratings: list[RatedText] | None, config: Config, workdir: Path
) -> dict[str, float]:
    """The reward model's accuracy on unseen pairs, under results' names.

    On pairs of `evaluate.ratings`, or else those of the last validation.
    """
    if reward is None:
        return {}
    if ratings is not None:
        with naming_data("evaluate.ratings", config.evaluate.ratings, CONTEXT):
            data = encode_rated(ratings, reward.tokenizer, reward.config.max_length)
        accuracies = data.accuracy(score_rows(reward, data.texts), config.seed)
    else:
        accuracies = last_validation(workdir / "metrics.jsonl")
    return {name.replace("/validation_", "/"): value for name, value in accuracies.items()}


def last_validation(path: Path) -> dict[str, float]:
    """The last validation of the reward model in metrics.jsonl."""
    metrics = {}
    for row in read_rows(path)[0]:
        if row["stage"] == "reward":
            metrics |= {k: v for k, v in row.items() if "/validation_" in k}
    return metrics


EVALUATE = Stage(
    name="evaluate",
    title="Evaluation",
    label="evaluation",
    data_fields=("prompts", "ratings"),
    read=read_evaluation,
    train=evaluate,
)
