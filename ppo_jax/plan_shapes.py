"""The shapes of all models of a PPO run, without any weights."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from ppo_jax import hf
from ppo_jax.base_model import llama_config
from ppo_jax.config import STAGES, Config, ModelSettings
from ppo_jax.families import read_config
from ppo_jax.models import describe_stage, stage_config
from ppo_jax.networks import ModelConfig
from ppo_jax.partition import start_layer
from ppo_jax.published import SHAPES, published_config
from ppo_jax.shapes import computation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Models:
    """The shapes of all models of a run."""

    policy: ModelConfig  # and of the reference
    critic: ModelConfig
    reward: ModelConfig | None  # None: scores come from a function


def read_models(config: Config) -> Models:
    """The shapes of all models of a run, from the table of public models or from a config.json.

    No weights are read and nothing is fetched from a hub. A stage that is not there yet has the
    shape of the base model.

    Raises:
        ValueError: there is no ppo section, or `model.path` is neither a public model of the table
            nor there.
    """
    if config.ppo is None:
        raise ValueError("plan needs a config with a ppo section, got none")
    s = config.ppo
    base = base_shape(config.model)
    policy = shape_at(s.init_from, config.model) or base
    reward = None
    if s.reward_model:
        reward = shape_at(s.reward_model, config.model) or base
        if s.reward_model == "reward" and config.reward and config.reward.num_layers:
            reward = dataclasses.replace(reward, num_layers=config.reward.num_layers)
    from_policy = reward is None or s.critic_init_from == "policy"
    return Models(policy=policy, critic=policy if from_policy else reward, reward=reward)


def common_layers(config: Config, models: Models) -> int:
    """How many of the lowest layers policy and reward model have in common as PPO begins, by what
    the stages of the config leave as it is; 0 for a reward model from elsewhere, or none."""
    if models.reward is None:
        return 0
    depths = {"sft": models.policy, "reward": models.reward}
    policy, reward = (
        ancestors(config, name, depths) for name in (config.ppo.init_from, config.ppo.reward_model)
    )
    return max((min(policy[name], reward[name]) for name in policy.keys() & reward), default=0)


def ancestors(config: Config, name: str, shapes: Mapping[str, ModelConfig]) -> dict[str, int]:
    """{what a model was made from, itself first: how many of its lowest layers it still has}."""
    kept = max(shape.num_layers for shape in shapes.values())
    found = {name: kept}
    while settings := name in shapes and getattr(config, name):
        kept = min(kept, start_layer(shapes[name], settings.trainable) or 0)
        name = "base" if name == "sft" else settings.init_from
        found[name] = kept
    return found


def shape_at(name: str, settings: ModelSettings) -> ModelConfig | None:
    """The shape of a stage by its folder, or of a model; None where there is nothing yet."""
    if name in ("base", *STAGES):  # of the run itself, see `models.resolve`
        return None
    how = computation(settings)
    if description := describe_stage(Path(name)):
        return dataclasses.replace(stage_config(description), **how)
    if name in SHAPES:
        return published_config(name, **how)
    there = os.path.exists(name) or name.startswith("package:")
    return hf.load_config(name, **how) if there else None


def base_shape(settings: ModelSettings) -> ModelConfig:
    """The shape of `model`; a vocabulary is taken whole."""
    if scratch := settings.scratch:
        raw = llama_config(scratch, scratch.vocab_size, 0)
        return read_config(raw, **computation(settings))
    if found := shape_at(settings.path, settings):
        return found
    raise ValueError(
        f"model.path must be a folder with a config.json, a .gguf file, 'package:NAME' or one of "
        f"{sorted(SHAPES)} to plan, got {settings.path!r}"
    )
