"""The stages that train a model, in the order in which they run."""

from ppo_jax.training.ppo import PPO
from ppo_jax.training.reward import REWARD
from ppo_jax.training.sft import SFT
from ppo_jax.training.stage import Stage

TRAINING_STAGES: tuple[Stage, ...] = (SFT, REWARD, PPO)


def find_stage(name: str) -> Stage | None:
    """The stage of this name; None where it is none of these."""
    return next((stage for stage in TRAINING_STAGES if stage.name == name), None)
