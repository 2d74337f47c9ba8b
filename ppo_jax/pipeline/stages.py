"""The stages of a run, in the order in which they run."""

from ppo_jax.evaluation.evaluate import evaluate, read_evaluation
from ppo_jax.training.ppo import PPO
from ppo_jax.training.reward import REWARD
from ppo_jax.training.sft import SFT
from ppo_jax.training.stage import Stage

EVALUATE = Stage(
    name="evaluate", data_fields=("prompts", "ratings"), read=read_evaluation, train=evaluate
)
STAGES = (SFT, REWARD, PPO, EVALUATE)


def chosen(names) -> list[Stage]:
    """The stages of these names, in their order."""
    return [stage for stage in STAGES if stage.name in names]
