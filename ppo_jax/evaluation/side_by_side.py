"""Policies side by side: responses, figures, judges, into a folder of their own.

Dimension key: S seeds, P prompts, N samples a prompt (1, or those that the best is chosen from).
"""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ppo_jax.data.atomic import atomic_write
from ppo_jax.data.encode import encode_demonstrations
from ppo_jax.distributed.folder_lock import hold_folder
from ppo_jax.distributed.layout import one_device
from ppo_jax.evaluation.compare import (
    How,
    characters,
    log_ratios,
    respond,
    response_figures,
    same_tokens,
)
from ppo_jax.evaluation.judges import LoadedJudge, load_judges
from ppo_jax.evaluation.report.comparison_page import table, write_page
from ppo_jax.evaluation.request import Checked, Request, check
from ppo_jax.evaluation.statistics import (
    length_controlled_win_rate,
    mean_and_stderr,
    mean_interval,
    outcomes_of,
)
from ppo_jax.inference.best_of_n import best_of_first, expected_best, kl_bound
from ppo_jax.inference.generate import find_sampling
from ppo_jax.inference.responses import Responses
from ppo_jax.inference.score import sampled_scores, text_logprobs
from ppo_jax.io.run_folder import read_object
from ppo_jax.io.stage_folder import load_model

RESULT, PAGE = "evaluation.json", "evaluation.html"
NUM_SAMPLES = 12  # prompts side by side
BATCH_SIZE = 64  # responses at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pool:
    """Responses of one model: N to each prompt, for each seed."""

    name: str  # of the first policy that is from it
    path: str
    step: int | None
    num_samples: int  # N


def evaluate_side_by_side(request: Request, workdir: str | Path) -> dict[str, Any]:
    """Compare policies; write evaluation.json and evaluation.html into a folder; print a table.

    A second call with the same request goes on where the first one was ended: the responses of
    policies that were sampled are kept. One that is complete prints what is there.

    Returns:
        what evaluation.json holds, see docs/evaluation.md.

    Raises:
        ValueError: something of the request is not usable, or the folder holds another evaluation;
            before anything is sampled.
    """
    workdir, settings = Path(workdir), json.loads(json.dumps(dataclasses.asdict(request)))
    old = read_object(workdir / RESULT)
    check_same(old, settings, workdir)
    if old and old.get("complete"):
        print(f"{table(old)}\n\ncomplete: nothing to do\npage: {workdir / PAGE}", flush=True)
        return old
    checked = check(request)
    workdir.mkdir(parents=True, exist_ok=True)
    with hold_folder(workdir):
        write_result(workdir, {"settings": settings, "complete": False})
        result = {"settings": settings, "complete": True, **figures(request, checked, workdir)}
        write_result(workdir, result)
        page = write_page(result, workdir / PAGE)
    print(f"{table(result)}\n\npage: {page}", flush=True)
    return result


def check_same(old: Mapping[str, Any] | None, settings: Mapping[str, Any], workdir: Path) -> None:
    """Raise a ValueError where a folder holds another evaluation."""
    if old is None:
        if workdir.is_file() or (workdir.is_dir() and any(workdir.iterdir())):
            raise ValueError(f"--workdir must be a new folder, but {workdir} holds something else")
        return
    was = old.get("settings", {})
    changed = [name for name in settings if was.get(name) != settings[name]]
    if changed:
        name = changed[0]
        old, new = was.get(name), settings[name]
        how = f"{name} was {old!r}, is {new!r}"
        if isinstance(old, dict) and isinstance(new, dict):
            other = [x for x in {**old, **new} if old.get(x) != new.get(x)]
            how = f"{name} differ in {', '.join(other)}"
        raise ValueError(
            f"{workdir} holds an evaluation with other settings: {how}; choose another --workdir"
        )


def write_result(workdir: Path, result: Mapping[str, Any]) -> None:
    atomic_write(workdir / RESULT, json.dumps(result, indent=2, ensure_ascii=False) + "\n")


def figures(request: Request, checked: Checked, workdir: Path) -> dict[str, Any]:
    """All that evaluation.json says besides the settings."""
    pools = find_pools(request)
    sampled, perplexities = {}, {}
    for pool in pools:
        sampled[pool], perplexities[pool] = sample(pool, request, checked, workdir)
    ratios = reference_ratios(request, checked, sampled)
    of_judges = load_judges(checked.judges, request.run, request.score_at)
    scores = proxy_scores(request, checked, sampled)
    rated = {judge.name: rate_all(judge, checked, sampled) for judge in of_judges}
    chosen = {name: choose(name, request, sampled, scores) for name in request.policies}
    found = {
        name: policy_figures(name, request, chosen, scores, ratios, perplexities)
        for name in request.policies
    }
    return {
        "policies": found,
        "judges": {
            judge.name: judge_figures(judge, request, chosen, scores, rated[judge.name])
            for judge in of_judges
        },
        "best_of_n": curves(sampled, scores, rated),
        "samples": side_by_side(checked, chosen, scores, rated),
    }


# --- responses -----------------------------------------------------------------------------------


def find_pools(request: Request) -> list[Pool]:
    """The models to sample, each once, with as many samples as any policy wants."""
    pools: dict[tuple[str, int | None], Pool] = {}
    for name, source in request.policies.items():
        key = (source.path, source.step)
        pool = pools.get(key, Pool(name=name, path=key[0], step=key[1], num_samples=1))
        most = max(pool.num_samples, source.n)
        pools[key] = dataclasses.replace(pool, num_samples=most)
    return list(pools.values())


def pool_of(name: str, request: Request, pools: Mapping[Pool, Any]) -> Pool:
    source = request.policies[name]
    return next(p for p in pools if (p.path, p.step) == (source.path, source.step))


def sample(
    pool: Pool, request: Request, checked: Checked, workdir: Path
) -> tuple[list[Responses], dict[str, float]]:
    """(responses of a model for each seed, its perplexity); from the folder where they are there.

    Sample n of prompt p is row n P + p of the rollout: the first P rows are the responses that the
    policy itself gives.
    """
    paths = [workdir / "responses" / f"{pool.name}-seed{seed}.json" for seed in request.seeds]
    spec = checked.specs[pool.name]
    load = functools.cache(lambda: on_device(load_model(pool.path, step=pool.step)))
    how = find_sampling(pool.path, spec.tokenizer, **request.sampling)
    found, perplexity = [], {}
    for seed, path in zip(request.seeds, paths, strict=True):
        if (kept := read_object(path)) is None:
            settings = How(
                sampling=lambda _: how["sampling"],
                temperature=how["temperature"],
                seed=seed,
                batch_size=BATCH_SIZE,
                max_prompt_length=request.max_prompt_length,
            )
            responses = respond(load(), checked.prompts * pool.num_samples, settings, None)
            kept = to_json(responses) | perplexity_of(load(), checked)
            path.parent.mkdir(exist_ok=True)
            atomic_write(path, json.dumps(kept, ensure_ascii=False) + "\n")
        perplexity = {x: kept[x] for x in ("perplexity", "bits_per_character") if x in kept}
        found.append(from_json(kept))
        print(f"{len(found[-1].texts)} responses of {pool.name}, seed {seed}", flush=True)
    return found, perplexity


def on_device(model):
    """The model with its parameters on the device, once for all that it is asked."""
    layout = one_device()
    return dataclasses.replace(model, params=layout.shard_params(model.params), layout=layout)


def to_json(responses: Responses) -> dict[str, Any]:
    values = vars(responses)
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in values.items()}


def from_json(values: Mapping[str, Any]) -> Responses:
    arrays = {name: np.array(values[name]) for name in ("lengths", "logprobs", "ended")}
    return Responses(texts=values["texts"], rows=values["rows"], **arrays)


def perplexity_of(policy: Any, checked: Checked) -> dict[str, float]:
    """How well a policy predicts the unseen texts: the alignment tax is how much this rises."""
    if not checked.texts:
        return {}
    length = policy.config.max_length
    texts = encode_demonstrations(checked.texts, policy.tokenizer, max_length=length)
    nats, tokens = -text_logprobs(policy, texts).sum(), texts.loss_mask.sum()
    kept = (checked.texts[i] for i in set(texts.records.tolist()))
    letters = sum(len(text) for record in kept for row in record.rows for text, _ in row)
    return {
        "perplexity": float(math.exp(min(nats / tokens, 700.0))),
        "bits_per_character": float(nats / math.log(2) / letters),
    }


# --- scores --------------------------------------------------------------------------------------


def reference_ratios(request: Request, checked: Checked, sampled: Mapping) -> dict[Pool, Any]:
    """log p - log p_reference of the first sample of each pool, [P, S]; 0 of the reference itself,
    None where its tokens are others."""
    own = pool_of(request.reference, request, sampled)
    spec, count = checked.specs[request.reference], len(checked.prompts)
    load = functools.cache(lambda: on_device(load_model(own.path, step=own.step)))
    ratios: dict[Pool, Any] = {}
    for pool, seeds in sampled.items():
        if pool == own:
            ratios[pool] = np.zeros((count, len(seeds)))
        elif not same_tokens(checked.specs[pool.name], spec):
            ratios[pool] = None
        else:
            firsts = [responses.take(range(count)) for responses in seeds]
            columns = [log_ratios(load(), x, request.temperature) for x in firsts]
            ratios[pool] = np.stack(columns, axis=1)
    return ratios


def proxy_scores(request: Request, checked: Checked, sampled: Mapping) -> dict[Pool, np.ndarray]:
    """The reward model's scores of all samples, pool -> [S, P, N]; {} without one."""
    if not request.reward:
        return {}
    reward = on_device(load_model(request.reward))

    def rate(policy, prompts, responses):
        scores = sampled_scores(reward, policy, prompts, responses, request.score_at)
        return np.array([scores[i] for i in range(len(prompts))])

    judge = LoadedJudge(name="score", rate=rate)
    return rate_all(judge, checked, sampled)


def rate_all(judge: LoadedJudge, checked: Checked, sampled: Mapping) -> dict[Pool, np.ndarray]:
    """What a judge says of all samples, pool -> [S, P, N]."""
    rated = {}
    for pool, seeds in sampled.items():
        prompts = checked.prompts * pool.num_samples
        rows = [judge.rate(checked.specs[pool.name], prompts, x) for x in seeds]
        shape = (len(seeds), pool.num_samples, len(checked.prompts))
        rated[pool] = np.stack(rows).reshape(shape).swapaxes(1, 2)
    return rated


class Chosen:
    """The response of a policy to each prompt and seed, out of its pool."""

    def __init__(self, pool: Pool, seeds: Sequence[Responses], samples: np.ndarray):
        """`samples` [S, P]: which sample of the pool it is."""
        count = samples.shape[1]
        rows = samples * count + np.arange(count)
        self.pool, self.samples = pool, samples
        self.responses = [r.take(row) for r, row in zip(seeds, rows, strict=True)]

    def of(self, rated: Mapping[Pool, np.ndarray]) -> np.ndarray:
        """[P, S] of [S, P, N]: the values of the chosen responses."""
        values = np.take_along_axis(rated[self.pool], self.samples[:, :, None], axis=2)
        return values[:, :, 0].T


def choose(name: str, request: Request, sampled: Mapping, scores: Mapping) -> Chosen:
    """A policy's own responses, or the best of its first n."""
    pool, n = pool_of(name, request, sampled), request.policies[name].n
    count = len(sampled[pool][0].texts) // pool.num_samples
    if n == 1:
        samples = np.zeros((len(request.seeds), count), int)
    else:
        samples = np.stack([best_of_first(seed, n) for seed in scores[pool]])
    return Chosen(pool, sampled[pool], samples)


# --- figures -------------------------------------------------------------------------------------


def with_stderr(name: str, values: np.ndarray) -> dict[str, float | None]:
    """The mean of [P, S] values under a name, with its standard error over prompts."""
    mean, stderr = mean_and_stderr(values)
    return {name: mean, f"{name}_stderr": stderr}


def policy_figures(
    name: str,
    request: Request,
    chosen: Mapping[str, Chosen],
    scores: Mapping,
    ratios: Mapping,
    perplexities: Mapping,
) -> dict[str, Any]:
    """What is measured of a policy without a judge."""
    mine, n = chosen[name], request.policies[name].n
    found: dict[str, Any] = response_figures(mine.responses)
    if scores:
        found |= with_stderr("score", mine.of(scores))
    if n > 1:  # its own probabilities are unknown: no entropy, and a bound of the KL alone
        del found["entropy"]
        own = scores[mine.pool]
        found["score_expected"], found["score_expected_stderr"] = expected_over(own, own, n)
        if mine.pool == chosen[request.reference].pool:
            found |= {"kl": kl_bound(n), "kl_is": "upper bound"}
    elif ratios[mine.pool] is not None:
        found |= with_stderr("kl", ratios[mine.pool])
    if n == 1:
        found |= perplexities[mine.pool]
    return found


def judge_figures(
    judge: LoadedJudge,
    request: Request,
    chosen: Mapping[str, Chosen],
    scores: Mapping,
    rated: Mapping,
) -> dict[str, Any]:
    """A judge's mean of each policy, and how often it prefers it to the reference."""
    of_reference = chosen[request.reference]
    theirs, lengths = of_reference.of(rated), text_lengths(of_reference)
    policies = {}
    for name, mine in chosen.items():
        row = with_stderr("mean", mine.of(rated))
        if (n := request.policies[name].n) > 1:
            mean, stderr = expected_over(scores[mine.pool], rated[mine.pool], n)
            row |= {"mean_expected": mean, "mean_expected_stderr": stderr}
        if name != request.reference:
            row |= wins(mine.of(rated), theirs, text_lengths(mine) - lengths)
        policies[name] = row
    accuracy = judge.accuracy()
    return {
        **({"note": judge.note} if judge.note else {}),
        **({} if accuracy is None else {"pair_accuracy_margin1": accuracy}),
        "policies": policies,
    }


def text_lengths(chosen: Chosen) -> np.ndarray:
    """Characters of the responses, [P, S]."""
    return np.stack([characters(x.texts) for x in chosen.responses], axis=1)


def wins(mine: np.ndarray, theirs: np.ndarray, longer: np.ndarray) -> dict[str, Any]:
    """Win rates of scores [P, S] over others, each with its 95% interval over prompts."""
    outcomes = np.stack([outcomes_of(a, b) for a, b in zip(mine.T, theirs.T, strict=True)], axis=1)
    means = outcomes.mean(axis=1)
    rate, interval = length_controlled_win_rate(outcomes, longer, seed=0)
    return {
        "win_rate": float(means.mean()),
        "win_rate_interval": list(mean_interval(means, seed=0)),
        "length_controlled_win_rate": rate,
        "length_controlled_win_rate_interval": list(interval),
        "win_rate_by_seed": outcomes.mean(axis=0).tolist(),
    }


def expected_over(scores: np.ndarray, values: np.ndarray, n: int) -> tuple[float, float | None]:
    """(mean, standard error over prompts) of the best of n by scores [S, P, N], worth by values."""
    seeds = [expected_best(x, y, n) for x, y in zip(scores, values, strict=True)]
    return mean_and_stderr(np.stack(seeds, axis=1))


def curves(sampled: Mapping, scores: Mapping, rated: Mapping) -> dict[str, dict[str, Any]]:
    """Best of n of each pool that has several samples, for n = 1, 2, 4 ... N, by all N samples."""
    found = {}
    for pool in (pool for pool in sampled if pool.num_samples > 1):
        ns = sorted({2**i for i in range(pool.num_samples.bit_length())} | {pool.num_samples})
        ns = [n for n in ns if n <= pool.num_samples]

        def curve(values, pool=pool, ns=ns):
            rows = [expected_over(scores[pool], values, n) for n in ns]
            return {"mean": [x for x, _ in rows], "stderr": [x for _, x in rows]}

        found[pool.name] = {
            "n": ns,
            "kl_bound": [kl_bound(n) for n in ns],
            "score": curve(scores[pool]),
            "judges": {name: curve(values[pool]) for name, values in rated.items()},
        }
    return found


def side_by_side(
    checked: Checked, chosen: Mapping[str, Chosen], scores: Mapping, rated: Mapping
) -> list[dict[str, Any]]:
    """The first prompts with the response of every policy, of the first seed, and its scores."""
    by_proxy = {name: x.of(scores)[:, 0] for name, x in chosen.items()} if scores else {}
    by_judge = {
        judge: {name: x.of(values)[:, 0] for name, x in chosen.items()}
        for judge, values in rated.items()
    }
    return [
        {
            "prompt": checked.prompts[i],
            "responses": {name: x.responses[0].texts[i] for name, x in chosen.items()},
            "scores": {name: float(values[i]) for name, values in by_proxy.items()},
            "judges": {
                judge: {name: float(values[i]) for name, values in of.items()}
                for judge, of in by_judge.items()
            },
        }
        for i in range(min(NUM_SAMPLES, len(checked.prompts)))
    ]
