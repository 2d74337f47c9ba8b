"""The evaluation of a run: its policies on unseen prompts, by the judges of a panel."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppo_jax.config.run import Config
from ppo_jax.data.comparisons import CONTEXT, encode_rated
from ppo_jax.data.prompts import PromptData, prompt_data
from ppo_jax.data.readers import naming_data
from ppo_jax.data.records import RatedText, load_ratings
from ppo_jax.distributed.layout import Layout, make_layouts
from ppo_jax.evaluation.compare import How, log_ratios, respond, whole_texts
from ppo_jax.evaluation.judges import JudgePanel, ask_panel, make_panel
from ppo_jax.evaluation.statistics import distinct_n, mean_and_stderr
from ppo_jax.inference.generate import make_sampling
from ppo_jax.inference.responses import Responses, join
from ppo_jax.inference.score import sampled_scores, score_rows
from ppo_jax.io.model_spec import ModelSpec, before_sft, reread_reason
from ppo_jax.io.run_folder import read_results, read_rows, write_results
from ppo_jax.io.stage_folder import (
    Model,
    best_step,
    describe_stage,
    load_source,
    resolve,
    source_steps,
    split_step,
)
from ppo_jax.training.stage import Stage

__all__ = ["EVALUATE", "JudgePanel", "compare", "evaluate"]  # the panel is named here by users

NUM_SAMPLES = 12  # prompts side by side in the report


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
    if (step := judged_step(workdir)) is not None:
        print(f"evaluate: ppo is its checkpoint of step {step}, {config.ppo.keep}", flush=True)
    prompts, ratings = data[0].texts[: settings.num_prompts], data[1]
    responses, results = compare(policies, prompts, sampled_as(config), of_rollout)
    # What is measured is on disk before a judge or the reward model can fail.
    add_results(workdir, results)
    if settings.judges:
        texts = {name: whole_texts(prompts, x) for name, x in responses.items()}
        add_results(workdir, ask_panel(make_panel(settings.judges, workdir), texts))
    name = config.ppo.reward_model or ("reward" if config.reward is not None else "")
    pin = pins.get("reward_model") if config.ppo.reward_model else None
    reward = load_source(name, workdir, base, config.model, layout, pin) if name else None
    scores = first_scores(reward, policies, prompts, responses, config.ppo.score_at)
    add_results(workdir, {"samples": side_by_side(prompts, responses, scores)})
    add_results(workdir, reward_accuracies(reward, ratings, config, workdir))


def compare(
    policies: Mapping[str, Model], prompts: list[str], how: How, layout: Layout
) -> tuple[dict[str, Responses], dict[str, float]]:
    """Responses of some policies to the same prompts, with their variety and the last one's KL.

    Args:
        policies: two or more by name; the last is the candidate, the one before it its reference.
        prompts: N texts.
        how: to sample them.
        layout: of the rollout.

    Returns:
        name -> N responses, and `text/distinct2_<name>` of each, `policy/kl_per_response` of the
        candidate from its reference with its standard error, and `text/distinct2_ratio` of the two.
    """
    responses, results = {}, {}
    for name, policy in policies.items():
        responses[name] = respond(policy, prompts, how, layout)
        results[f"text/distinct2_{name}"] = distinct_n(responses[name].texts, 2)
        print(f"evaluate: {len(prompts)} responses of {name}", flush=True)
    *_, reference, candidate = policies
    ratios = log_ratios(policies[reference], responses[candidate], how.temperature)
    kl, stderr = mean_and_stderr(ratios)
    results["policy/kl_per_response"] = kl
    if stderr is not None:
        results["policy/kl_per_response_stderr"] = stderr
    distinct, before = (results[f"text/distinct2_{name}"] for name in (candidate, reference))
    results["text/distinct2_ratio"] = distinct / max(before, 1e-9)
    return responses, results


def sampled_as(config: Config) -> How:
    """Responses as long as those of the training, from the same key for every policy."""
    ppo, settings = config.ppo, config.evaluate
    return How(
        sampling=functools.partial(make_sampling, vars(ppo)),
        temperature=settings.temperature,
        seed=config.seed + 1,
        batch_size=settings.batch_size,
        max_prompt_length=ppo.max_prompt_length,
    )


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
    path, first = resolve(origin, workdir, base), {"base": "base", "sft": before_sft(config)}
    sources = {}
    if origin in first:
        name, step = split_step(first[origin])
        step = source_steps(workdir / "sft").get("init_from") if origin == "sft" else step
        sources["base"] = (resolve(name, workdir, base), step)
    if origin != "base":
        sources["base" if describe_stage(Path(path)) is None else "sft"] = (path, pin)
    return sources | {"ppo": (str(workdir / "ppo"), judged_step(workdir))}


def judged_step(workdir: Path) -> int | None:
    """The step of PPO that the verdict is of: its best, where its `keep` is by a metric of the
    evaluation while it trained; None is the newest."""
    keep = describe_stage(workdir / "ppo")["settings"].get("keep")
    return best_step(workdir / "ppo") if str(keep).startswith("best:eval/") else None


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


def first_scores(
    reward: Model | None,
    policies: Mapping[str, Model],
    prompts: list[str],
    responses: Mapping[str, Responses],
    score_at: str,
) -> dict[str, dict[int, float]]:
    """name -> {index: score} of the first responses of each policy, read as in PPO; none without a
    reward model, or where a response does not fit into its context."""
    if reward is None:
        return {}
    count = min(NUM_SAMPLES, len(prompts))
    alike: dict[str | None, list[str]] = {}  # policies whose responses are read in the same way
    for name, policy in policies.items():
        alike.setdefault(reread_reason(policy, reward), []).append(name)
    found: dict[str, dict[int, float]] = {}
    for names in alike.values():  # together: few rows cost as much as many
        first = join([responses[name].take(range(count)) for name in names])
        every = prompts[:count] * len(names)
        scores = sampled_scores(reward, policies[names[0]], every, first, score_at)
        for place, name in enumerate(names):
            rows = range(place * count, (place + 1) * count)
            found[name] = {i: scores[row] for i, row in enumerate(rows) if row in scores}
    return found


def side_by_side(
    prompts: list[str], responses: Mapping[str, Responses], scores: dict[str, dict[int, float]]
) -> list[dict]:
    """The first prompts with every policy's response and its score, where it has one."""
    return [
        {
            "prompt": prompts[i],
            **{name: x.texts[i] for name, x in responses.items()},
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
