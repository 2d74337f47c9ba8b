"""What is asked of an evaluation side by side, checked before anything is sampled."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ppo_jax.config.parsing import LARGEST_SEED
from ppo_jax.config.run import STAGE_NAMES, Config, ModelSettings, from_config_dict
from ppo_jax.data.encode import token_rows
from ppo_jax.data.prompts import prompt_data
from ppo_jax.data.records import load_texts
from ppo_jax.evaluation.evaluate import compared
from ppo_jax.evaluation.judges import NamedJudge, check_judge, parse_judges
from ppo_jax.inference.generate import SAMPLING, find_sampling, run_settings
from ppo_jax.io.base_model import base_path
from ppo_jax.io.checkpoints import Checkpoints
from ppo_jax.io.model_spec import ModelSpec, read_shape, reread_reason
from ppo_jax.io.run_folder import fill_in_workdir, read_config
from ppo_jax.io.stage_folder import (
    check_step,
    describe_stage,
    missing_steps,
    resolve,
    source_steps,
    split_step,
)

NAME = re.compile(r"[\w.-]+")
BEST_OF_N = re.compile(r"bon\((?P<path>.+),\s*n\s*=\s*(?P<n>\d+)\s*\)")
RESERVED = ("prompt", "scores")  # of a sample, beside the policies


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicySource:
    """A policy of a comparison: a model, or the best of n of its responses."""

    path: str  # of a stage's folder, or anything that `load_model` reads
    step: int | None = None  # of a stage's checkpoint
    n: int = 1  # responses of which the reward model's best is taken


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that decides the figures; evaluation.json keeps it as "settings"."""

    policies: Mapping[str, PolicySource]
    reference: str  # the policy that the others are compared with
    prompts: str  # a file
    num_prompts: int
    judges: str = ""
    reward: str = ""  # a reward model: the proxy score, and the best of n
    texts: str = ""  # a file of unseen texts, for perplexity
    seeds: tuple[int, ...] = (0,)
    run: str = ""  # what a panel of judges is given
    max_prompt_length: int = 512
    temperature: float = 1.0
    response_length: int = 64
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    score_at: str = "eos"

    @property
    def sampling(self) -> dict[str, Any]:
        """The settings of the sampling, by their names in the ppo section."""
        return {name: getattr(self, name) for name in SAMPLING}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checked:
    """What the checks have read."""

    specs: Mapping[str, ModelSpec]  # of each policy
    prompts: list[str]
    judges: list[NamedJudge]
    reward: ModelSpec | None
    texts: list[Any]  # demonstrations, for perplexity


def parse_named(text: str, flag: str, *, unnamed: bool = False) -> dict[str, str]:
    """{name: value} of "NAME=VALUE; NAME=VALUE".

    With `unnamed`, an entry without "NAME=" stands under its own text.

    Raises:
        ValueError: there is no entry, or one is malformed or repeated.

    >>> parse_named("sft=runs/a/sft; best=bon(runs/a/sft, n=4)", "policies")
    {'sft': 'runs/a/sft', 'best': 'bon(runs/a/sft, n=4)'}
    """
    found: dict[str, str] = {}
    for entry in filter(None, (part.strip() for part in text.split(";"))):
        name, equals, value = (part.strip() for part in entry.partition("="))
        if not equals and unnamed:
            name = value = entry
        elif not equals or not value or not NAME.fullmatch(name):
            raise ValueError(f"--{flag} must be NAME=VALUE; NAME=VALUE ..., got {entry!r}")
        if name in found:
            raise ValueError(f"--{flag} has {name!r} twice: each needs a name of its own")
        found[name] = value
    if not found:
        raise ValueError(f"--{flag} is empty: give NAME=VALUE; NAME=VALUE ...")
    return found


def parse_policies(text: str) -> dict[str, PolicySource]:
    """The policies of --policies.

    Raises:
        ValueError: an entry is malformed.
    """
    policies = {}
    for name, value in parse_named(text, "policies").items():
        if name in RESERVED:
            raise ValueError(f"--policies: a policy cannot be called {name!r}; choose another name")
        n = 1
        if value.startswith("bon("):
            if not (match := BEST_OF_N.fullmatch(value)):
                raise ValueError(f"--policies: {name} must be bon(POLICY, n=16), got {value!r}")
            value, n = match["path"].strip(), int(match["n"])
            if n < 2:
                raise ValueError(f"--policies: n of {name} must be at least 2, got {n}")
        path, step = split_step(value)
        policies[name] = PolicySource(path=path, step=step, n=n)
    return policies


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds from "0:3", which are 0, 1 and 2, or "0,5".

    Raises:
        ValueError: it is neither, or a seed is repeated.

    >>> parse_seeds("0:3"), parse_seeds("7"), parse_seeds("1,5")
    ((0, 1, 2), (7,), (1, 5))
    """
    match = re.fullmatch(r"(\d+):(\d+)", text.strip())
    if match and int(match[2]) - int(match[1]) <= 1000:
        seeds = tuple(range(int(match[1]), int(match[2])))
    elif re.fullmatch(r"\d+(\s*,\s*\d+)*", text.strip()):
        seeds = tuple(int(x) for x in text.split(","))
    else:
        seeds = ()
    if not seeds or len(set(seeds)) < len(seeds) or max(seeds) > LARGEST_SEED:
        raise ValueError(
            f"--seeds must be A:B (B is not in it) or A,B,C, all different, got {text!r}"
        )
    return seeds


def of_run(run: str) -> tuple[dict[str, Any], dict[str, PolicySource]]:
    """(what a run's folder says of an evaluation, its policies in the order of their training).

    Raises:
        ValueError: there is no such run, or it has no PPO stage.
    """
    folder = Path(run)
    values = read_config(folder) if folder.is_dir() else None
    if values is None:
        raise ValueError(f"--run must be a run's folder, with its config.json, got {run!r}")
    config = fill_in_workdir(from_config_dict(values), folder)
    if config.ppo is None or describe_stage(folder / "ppo") is None:
        raise ValueError(f"--run {run} has no PPO stage: name the policies with --policies")
    base, pins = base_path(config.model, folder / "base"), source_steps(folder / "ppo")
    policies = {
        name: PolicySource(path=split_step(path)[0], step=pin)
        for name, (path, pin) in compared(config, folder, base, pins.get("init_from")).items()
    }
    return run_defaults(config, folder, base), policies


def run_defaults(config: Config, folder: Path, base: str) -> dict[str, Any]:
    """Fields of a `Request` as a run's own evaluation has them."""
    ppo, settings = config.ppo, config.evaluate
    name = ppo.reward_model or ("reward" if config.reward is not None else "")
    found = {x: getattr(ppo, x) for x in (*SAMPLING, "max_prompt_length", "score_at")}
    found |= {"reward": resolve(name, folder, base) if name else "", "seeds": (config.seed + 1,)}
    if settings is not None:
        found |= {x: getattr(settings, x) for x in ("prompts", "judges", "temperature")}
        found["num_prompts"] = settings.num_prompts
    if config.sft is not None:
        found["texts"] = config.sft.validation_data
    return found


def make_request(asked: Mapping[str, Any]) -> Request:
    """A request from flags, of which None is not given: then the run's, or a plain default.

    Raises:
        ValueError: what is needed is not given.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    found, policies = of_run(given["run"]) if given.get("run") else ({}, {})
    if "policies" in given:
        policies = parse_policies(given["policies"])
    if not policies:
        raise ValueError('give --policies="NAME=PATH; NAME=PATH", or --run')
    if "run" not in given:  # the settings of the first policy that is from a run
        own = next(filter(None, map(settings_of, policies.values())), {})
        found = {x: own[x] for x in (*SAMPLING, "max_prompt_length", "score_at") if x in own}
    found |= {name: value for name, value in given.items() if name != "policies"}
    if isinstance(found.get("seeds"), str):
        found["seeds"] = parse_seeds(found["seeds"])
    if not found.get("prompts"):
        raise ValueError("give --prompts, a file of unseen prompts, or --run")
    plain = [name for name, source in policies.items() if source.n == 1]
    names = list(policies)
    reference = names[-2] if "policies" not in given and len(names) > 1 else names[0]
    reference = found.pop("reference", reference if reference in plain else (plain or names)[0])
    if reference not in plain:
        raise ValueError(
            f"--reference must be one of the policies {plain}, not the best of n, got {reference!r}"
        )
    found.setdefault("num_prompts", 256)
    policies = {name: with_step(name, source) for name, source in policies.items()}
    return Request(policies=policies, reference=reference, **found)


def settings_of(source: PolicySource) -> dict[str, Any]:
    """The ppo section of the run that a policy is from; {} where it is from none."""
    return run_settings(source.path) if Path(source.path).is_dir() else {}


def with_step(name: str, source: PolicySource) -> PolicySource:
    """The same policy with the step of its checkpoint, so that a later start means the same one.

    Raises:
        ValueError: the stage is not complete, or lacks the step.
    """
    folder = Path(source.path)
    if any((folder / stage / "stage.json").is_file() for stage in STAGE_NAMES):
        raise ValueError(f"--policies: {name}={folder} is a run: name a stage, {folder}/ppo")
    if describe_stage(folder) is None:
        return source
    if source.step is not None:
        check_step(folder, source.step)
        return source
    if missing := missing_steps(folder):
        raise ValueError(
            f"--policies: {name}={folder} is not complete: {missing}. Name a step of it, "
            f"{folder}@STEP, or run it to its end first"
        )
    return dataclasses.replace(source, step=Checkpoints(folder / "checkpoints").readable_step())


def check(request: Request) -> Checked:
    """Read what the policies, the judges and the data are; nothing is sampled, no weights are read.

    Raises:
        ValueError: something is not usable; says which flag, and what to do.
    """
    if request.num_prompts < 1:
        raise ValueError(f"--num_prompts must be at least 1, got {request.num_prompts}")
    specs = {}
    for name, source in request.policies.items():
        with of_flag(f"--policies: {name}"):
            specs[name] = spec = read_shape(source.path, ModelSettings(path=source.path))
            find_sampling(source.path, spec.tokenizer, **request.sampling)
        if spec.kind != "policy":
            raise ValueError(f"--policies: {name}={source.path} is a reward model, not a policy")
    reward = check_reward(request, specs)
    prompts = check_prompts(request, specs)
    longest = request.max_prompt_length + request.response_length
    for name, spec in specs.items():
        if spec.config.positions == "learned" and longest > spec.config.max_length:
            raise ValueError(
                f"--max_prompt_length and --response_length must be at most "
                f"{spec.config.max_length} tokens together, the context of {name}, got {longest}"
            )
    judges = []
    if request.judges:
        judges = parse_judges(parse_named(request.judges, "judges", unnamed=True))
    for judge in judges:
        check_judge(judge, request.run)
    texts: list[Any] = []
    if request.texts:
        with of_flag("--texts"):
            texts = load_texts(request.texts, None)
    return Checked(specs=specs, prompts=prompts, judges=judges, reward=reward, texts=texts)


@contextlib.contextmanager
def of_flag(flag: str) -> Iterator[None]:
    """An error of what is inside names the flag that it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from error


def check_reward(request: Request, specs: Mapping[str, ModelSpec]) -> ModelSpec | None:
    """The spec of --reward.

    Raises:
        ValueError: it is needed and not given, or is no reward model of the policies' lengths.
    """
    best = [name for name, source in request.policies.items() if source.n > 1]
    if not request.reward:
        if best:
            raise ValueError(
                f"--reward must be given: {best[0]} is the best of n by a reward model"
            )
        return None
    path, step = split_step(request.reward)
    with of_flag("--reward"):
        spec = read_shape(path, ModelSettings(path=path))
        if step is not None:
            check_step(Path(path), step)
    if spec.kind != "reward":
        raise ValueError(f"--reward must be a reward model, {request.reward} is a policy")
    longest = request.max_prompt_length + request.response_length + 1
    read = [name for name, policy in specs.items() if not reread_reason(policy, spec)]
    if read and longest > spec.config.max_length:
        raise ValueError(
            f"--reward reads at most {spec.config.max_length} tokens, and a prompt with the "
            f"response of {read[0]} may have {longest}: lower --max_prompt_length or "
            "--response_length"
        )
    return spec


def check_prompts(request: Request, specs: Mapping[str, ModelSpec]) -> list[str]:
    """The prompts that all policies can be given, the first `num_prompts` of them.

    Messages are rendered by the chat template of the reference.

    Raises:
        ValueError: there are fewer.
    """
    tokenizer = specs[request.reference].tokenizer
    limits = dict(max_length=request.max_prompt_length, field="--prompts", columns=False)
    with of_flag("--prompts"):
        texts = prompt_data(request.prompts, tokenizer, **limits).texts
    for spec in {id(x.tokenizer): x for x in specs.values()}.values():
        rows = token_rows([((t, False),) for t in texts], spec.tokenizer, append_eos=False)
        lengths = np.array([len(row.ids) for row in rows])
        fits = (lengths > 0) & (lengths <= request.max_prompt_length)
        texts = [text for text, fit in zip(texts, fits, strict=True) if fit]
    if len(texts) < request.num_prompts:
        raise ValueError(
            f"--num_prompts must be at most the {len(texts)} prompts of {request.prompts} that "
            f"have at most {request.max_prompt_length} tokens, got {request.num_prompts}"
        )
    return texts[: request.num_prompts]
