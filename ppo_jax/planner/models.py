"""The models of a plan, read or imagined from a config: shapes, without their weights."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from ppo_jax.config.objectives import needs_critic
from ppo_jax.config.ppo import names_critic
from ppo_jax.config.run import STAGE_NAMES, Config, ModelSettings
from ppo_jax.io import huggingface as hf
from ppo_jax.io.base_model import llama_config
from ppo_jax.io.critics import critic_config, has_critic
from ppo_jax.io.model_spec import ModelSpec, reread_reason
from ppo_jax.io.stage_folder import describe_stage, split_step, stage_config
from ppo_jax.io.tokenizers import load_tokenizer
from ppo_jax.models.config import ModelConfig, computation
from ppo_jax.models.families import read_config
from ppo_jax.models.families.presets import SHAPES, published_config
from ppo_jax.models.partition import start_layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Models:
    """The configs of all models of a run."""

    policy: ModelConfig  # and of the reference
    critic: ModelConfig | None  # None: advantages need none, or it is a head of the policy
    reward: ModelConfig | None  # None: scores come from a function
    reads_text: bool = False  # the reward model, in a program of its own
    others: tuple[ModelConfig, ...] = ()  # more reward models


def read_models(config: Config) -> Models:
    """The configs of all models of a run, from the table of public models or from a config.json.

    No weights are read and nothing is fetched from a hub. A stage that is not there yet has the
    config of the base model.

    Raises:
        ValueError: there is no ppo section, or `model.path` is neither a public model of the table
            nor there.
    """
    if config.ppo is None:
        raise ValueError("plan needs a config with a ppo section, got none")
    s, base = config.ppo, read_base_config(config.model)
    policy = read_model_config(s.init_from, config.model) or base
    reward = scorer_config(s.reward_model, config, base) if s.reward_model else None
    critic, by_text = None, reward is not None and reads_text(config, policy, reward)
    if names_critic(s):
        critic = scorer_config(s.critic_init_from, config, base)
    elif needs_critic(s.advantage) and not s.shared_critic:
        of_policy = reward is None or by_text or s.critic_init_from in ("policy", "scratch")
        critic = policy if of_policy else reward
    others = tuple(scorer_config(name, config, base) for name in s.other_reward_models)
    return Models(policy=policy, critic=critic, reward=reward, reads_text=by_text, others=others)


def scorer_config(name: str, config: Config, base: ModelConfig) -> ModelConfig:
    """The config of what `reward_model` or `critic_init_from` names; a reward model of this run has
    the lowest layers of the base model, as many as the config keeps."""
    folder = Path(split_step(name)[0])
    if has_critic(describe_stage(folder)):
        return dataclasses.replace(critic_config(folder), **computation(config.model))
    found = read_model_config(name, config.model) or base
    if str(folder) == "reward" and config.reward and config.reward.num_layers:
        return dataclasses.replace(found, num_layers=config.reward.num_layers)
    return found


def reads_text(config: Config, policy: ModelConfig, reward: ModelConfig) -> bool:
    """Whether the reward model cannot read the policy's tokens; by their numbers of tokens alone,
    where one of the two tokenizers is not here."""
    s, of_run = config.ppo, ("base", *STAGE_NAMES)
    origin = split_step(s.init_from)[0]
    if split_step(s.reward_model)[0] in of_run:
        return False
    path = config.model.path if origin in of_run else s.init_from
    known = path and not (origin in of_run and config.model.vocabulary_data)  # yet to be made
    writer, reader = local_spec(path, policy) if known else None, local_spec(s.reward_model, reward)
    if writer is None or reader is None:
        return reward.vocab_size < policy.vocab_size
    return bool(reread_reason(writer, reader))


def local_spec(name: str, config: ModelConfig) -> ModelSpec | None:
    """A model with its tokenizer, of a stage or a Hugging Face folder; None of any other."""
    folder = Path(name)
    if description := describe_stage(folder):
        tokenizer = load_tokenizer(folder / "tokenizer")
        return ModelSpec(kind=description["kind"], config=config, tokenizer=tokenizer)
    if not (folder / "tokenizer.json").is_file():
        return None
    raw = hf.read_config_json(folder)
    return ModelSpec(
        kind=hf.model_kind(raw),
        config=config,
        tokenizer=load_tokenizer(folder),
        padding_id=hf.padding_id(raw),
    )


def common_layers(config: Config, models: Models, other: str) -> int:
    """How many of the lowest layers the policy and another model share as PPO begins: those that
    the stages of the config do not train; 0 for a model from elsewhere."""
    configs = {"sft": models.policy}
    configs |= {"reward": models.reward} if models.reward else {}
    policy, scorer = (
        ancestors(config, split_step(name)[0], configs) for name in (config.ppo.init_from, other)
    )
    return max((min(policy[name], scorer[name]) for name in policy.keys() & scorer), default=0)


def ancestors(config: Config, name: str, configs: Mapping[str, ModelConfig]) -> dict[str, int]:
    """{model: how many of its lowest layers `name` shares} for itself and all it starts from."""
    depth = max(c.num_layers for c in configs.values())
    shared = {name: depth}
    while settings := name in configs and getattr(config, name):
        depth = min(depth, start_layer(configs[name], settings.trainable) or 0)
        name, _ = split_step(settings.init_from)
        shared[name] = depth
    return shared


def read_model_config(name: str, settings: ModelSettings) -> ModelConfig | None:
    """The config of a stage by its folder, or of a model; None where there is nothing yet."""
    name, _ = split_step(name)
    if name in ("base", *STAGE_NAMES):  # of the run itself, see `stage_folder.resolve`
        return None
    how = computation(settings)
    if description := describe_stage(Path(name)):
        return dataclasses.replace(stage_config(description), **how)
    if name in SHAPES:
        return published_config(name, **how)
    exists = os.path.exists(name) or name.startswith("package:")
    return hf.load_config(name, **how) if exists else None


def read_base_config(settings: ModelSettings) -> ModelConfig:
    """The config of `model`, with its whole vocabulary."""
    if scratch := settings.scratch:
        raw = llama_config(scratch, scratch.vocab_size, 0)
        return read_config(raw, **computation(settings))
    if config := read_model_config(settings.path, settings):
        return config
    raise ValueError(
        f"model.path must be a folder with a config.json, a .gguf file, 'package:NAME' or one of "
        f"{sorted(SHAPES)} to plan, got {settings.path!r}"
    )
