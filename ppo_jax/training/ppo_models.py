"""The models that a PPO run begins from, found and loaded."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from ppo_jax.config.ppo import names_critic
from ppo_jax.config.run import Config
from ppo_jax.distributed.layout import Layout
from ppo_jax.io.critics import load_critic
from ppo_jax.io.stage_folder import Model, load_source, other_field, source_steps
from ppo_jax.training.ppo_setup import begin_models


def find_models(
    config: Config,
    workdir: Path,
    base: str,
    layout: Layout,
    load_source: Callable[..., Model] = load_source,
    load_critic: Callable[..., Model] = load_critic,
):
    """(policy, reward model with its others or None, critic) as the run begins, with adapters where
    it is they that are trained. A run that goes on begins from the same steps of other stages."""
    settings, pins = config.ppo, source_steps(workdir / "ppo")

    def load(field: str, load: Callable[..., Model] = load_source, name: str = "") -> Model:
        how = dict(settings=config.model, layout=layout, step=pins.get(field))
        return load(name or getattr(settings, field), workdir=workdir, base=base, **how)

    policy, reward = load("init_from"), load("reward_model") if settings.reward_model else None
    if names := settings.other_reward_models:
        others = (load(other_field(i), load_source, name) for i, name in enumerate(names))
        reward = dataclasses.replace(reward, others=tuple(others))
    named = load("critic_init_from", load_critic) if names_critic(settings) else None
    return begin_models(settings, policy, reward, config.ppo_seed, layout, named=named)
