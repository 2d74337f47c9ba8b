"""Specs of the models that the stages of a run start from, before any parameters are read."""

import dataclasses
import difflib
import functools
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from ppo_jax.config.ppo import CRITIC_STARTS, PPOSettings, names_critic
from ppo_jax.config.run import STAGE_NAMES, Config, ModelSettings, ScratchSettings
from ppo_jax.data.encode import leading_tokens
from ppo_jax.io import huggingface as hf
from ppo_jax.io import tokenizers as vocabulary
from ppo_jax.io.base_model import llama_config
from ppo_jax.io.checkpoints import Checkpoints
from ppo_jax.io.critics import critic_config, has_critic
from ppo_jax.io.hub import NotThere, model_folder
from ppo_jax.io.integrity import reading_file
from ppo_jax.io.stage_folder import (
    check_tokenizer,
    describe_stage,
    has_begun,
    other_field,
    resolve,
    split_step,
    stage_config,
)
from ppo_jax.models.build import policy_network, reward_network
from ppo_jax.models.config import ModelConfig, computation


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model without its parameters."""

    kind: str  # "policy" or "reward"
    config: ModelConfig
    tokenizer: Any
    padding_id: int | None = None  # of a reward model, see `huggingface.padding_id`
    value_range: tuple[float, ...] = ()  # of a critic with bins
    value_bins: int = 0
    title: str = ""  # what a table calls it, where "policy model" or "reward model" says too little


def parameters(spec: ModelSpec):
    """The parameter tree of a model, as shapes alone."""
    return parameters_of(spec.kind, spec.config)


@functools.lru_cache(maxsize=8)  # tracing a deep network takes seconds
def parameters_of(kind: str, config: ModelConfig):
    network = policy_network if kind == "policy" else reward_network
    return jax.eval_shape(network(config).init, jax.random.key(0))


def read_shape(path: str | os.PathLike, settings: ModelSettings) -> ModelSpec:
    """The spec of a stage's model, or of anything that `hf.load_policy` or
    `hf.load_reward_model` reads.

    Args:
        path: the folder, file or name.
        settings: how to compute with it.

    Raises:
        ValueError: there is no model at `path`, its weights are missing, or it is not supported.
    """
    how = computation(settings)
    if description := describe_stage(Path(path)):
        return ModelSpec(
            kind=description["kind"],
            config=dataclasses.replace(stage_config(description), **how),
            tokenizer=vocabulary.with_chat(
                vocabulary.load_tokenizer(Path(path) / "tokenizer"), settings
            ),
        )
    folder = model_folder(path)
    config, raw = hf.read_model_config(folder, how)
    check_weights(folder, config)
    tokenizer = vocabulary.load_tokenizer(folder)
    check_tokenizer(tokenizer, config, path)
    tokenizer = vocabulary.with_chat(tokenizer, settings)
    kind, padding_id = hf.model_kind(raw), hf.padding_id(raw)
    return ModelSpec(kind=kind, config=config, tokenizer=tokenizer, padding_id=padding_id)


def read_critic_shape(path: str, settings: ModelSettings, *, step: int | None = None) -> ModelSpec:
    """`read_shape` of what `critic_init_from` names: of a PPO stage it is that of the critic, whose
    title has the step, where one is named.

    Raises:
        ValueError: as `read_shape`, or the stage has no critic.
    """
    spec, stage = read_shape(path, settings), describe_stage(Path(path))
    if not has_critic(stage):
        return spec
    config = dataclasses.replace(critic_config(Path(path)), **computation(settings))
    bins = {"value_bins": stage["settings"].get("value_bins", 0)}
    bins["value_range"] = tuple(stage["settings"].get("value_range", ()))
    title = "critic" if step is None else f"critic, at step {step},"
    return dataclasses.replace(spec, kind="reward", config=config, title=title, **bins)


def check_weights(folder: Path, config: ModelConfig):
    """The weight files are whole and hold the tensors of the config, by their headers alone.

    Raises:
        ValueError: one is damaged, or a tensor is missing, is too many or has another shape.
    """
    raw = hf.read_config_json(folder)
    with hf.open_weights(folder) as files, reading_file(folder):
        hf.find_weights(config, raw, files)


def reread_reason(policy: Any, reward: Any) -> str:
    """Why a reward model reads the text of a response, tokenised again; "" where it reads the
    policy's tokens.

    It may have more tokens than the policy, as exports that have a padding token do. Both are
    models or specs of them.
    """
    mine, own = policy.tokenizer, reward.tokenizer
    if mine is own:
        return ""
    if not mine.get_vocab().items() <= own.get_vocab().items():
        return "it has a tokenizer of its own"
    if leading_tokens(mine) != leading_tokens(own):
        return "its texts begin with other tokens than the policy's"
    if mine.eos_token_id != own.eos_token_id:
        return "its texts end with another token than the policy's"
    if reward.padding_id == own.eos_token_id:
        return "its padding is EOS, so that its score is read before it"
    return ""


def scratch_shape(settings: ScratchSettings) -> ModelSpec:
    """What is known of a model from scratch before it is made: all but its tokenizer."""
    raw = llama_config(settings, settings.vocab_size, eos_token_id=0)
    return ModelSpec(kind="policy", config=hf.read_config(raw), tokenizer=None)


def needs_base(config: Config, stages: Sequence[str]) -> bool:
    """Whether any of the stages that will run reads the base model."""
    trained = [stage for stage in ("sft", "reward", "ppo") if stage in stages]
    starts = [getattr(config, stage).init_from for stage in trained]
    starts += [config.ppo.critic_init_from] if "ppo" in stages else []
    if "evaluate" in stages:
        origin, _ = split_step(config.ppo.init_from)
        starts.append(before_sft(config) if origin == "sft" else origin)
    return "base" in starts


def before_sft(config: Config) -> str:
    """The name of the model that SFT starts from."""
    return "base" if config.sft is None else config.sft.init_from


def initial_models(
    config: Config, workdir: Path, base: str, stages: Sequence[str]
) -> dict[str, ModelSpec]:
    """The models that the stages start from; one that the run will train has its spec already.

    Args:
        config: of the run.
        workdir: the run's folder.
        base: path of the base model, "" where none is needed.
        stages: those that will run, in their order.

    Returns:
        Specs under "sft", "reward" and "ppo" (for the evaluation too), under "score" that of PPO's
        reward model, under "critic" that of the model that `ppo.critic_init_from` names, and see
        `other_specs`.
    """
    starts: dict[str, ModelSpec] = {}
    trained: dict[str, ModelSpec] = {}

    def spec(field: str, name: str, read: Callable[..., ModelSpec] = read_shape) -> ModelSpec:
        path = resolve(name, workdir, base)
        stage, _ = split_step(name)
        if stage in STAGE_NAMES and not has_begun(Path(path)):  # a stage of this run
            return trained[stage]
        try:
            return read(path, config.model)
        except NotThere as error:
            words = CRITIC_STARTS if field == "ppo.critic_init_from" else ()
            near = difflib.get_close_matches(name, words, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"{'model.path' if name == 'base' else field}: {error}{hint}"
            ) from error

    if "sft" in stages:
        starts["sft"] = trained["sft"] = spec("sft.init_from", config.sft.init_from)
    if "reward" in stages:
        starts["reward"] = start = spec("reward.init_from", config.reward.init_from)
        depth = config.reward.num_layers or start.config.num_layers
        lower = dataclasses.replace(start.config, num_layers=depth)
        trained["reward"] = dataclasses.replace(start, kind="reward", config=lower, padding_id=None)
    if "ppo" in stages or "evaluate" in stages:
        starts["ppo"] = spec("ppo.init_from", config.ppo.init_from)
    if "ppo" in stages and config.ppo.reward_model:
        starts["score"] = spec("ppo.reward_model", config.ppo.reward_model)
        check_distinct(config.ppo, workdir, base)
        for number, name in enumerate(config.ppo.other_reward_models):
            starts[other_field(number)] = spec("ppo.other_reward_models", name)
    if "ppo" in stages and names_critic(config.ppo):
        name = config.ppo.critic_init_from
        read = functools.partial(read_critic_shape, step=split_step(name)[1])
        starts["critic"] = spec("ppo.critic_init_from", name, read)
    return starts


def check_distinct(settings: PPOSettings, workdir: Path, base: str):
    """Reward models of several names are as many models."""
    seen: dict[tuple[str, int | None], str] = {}
    for name in (settings.reward_model, *settings.other_reward_models):
        folder, (_, step) = Path(resolve(name, workdir, base)), split_step(name)
        if step is None and describe_stage(folder) is not None:
            step = Checkpoints(folder / "checkpoints").readable_step()
        model = os.path.realpath(folder), step
        if (same := seen.setdefault(model, name)) != name:
            rule = f"models that differ, got {name!r}, which is {same!r}"
            raise ValueError(f"ppo.other_reward_models must be {rule}")


def other_specs(starts: Mapping[str, ModelSpec]) -> list[ModelSpec]:
    """The specs of `ppo.other_reward_models`, in their order."""
    numbers = itertools.takewhile(starts.__contains__, map(other_field, itertools.count()))
    return [starts[name] for name in numbers]
