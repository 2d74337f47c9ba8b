"""The stages of a run, in the order in which they run."""

from ppo_jax.evaluation.evaluate import evaluate, read_evaluation
from ppo_jax.training.stage import Stage
from ppo_jax.training.stages import TRAINING_STAGES

EVALUATE = Stage(
    name="evaluate",
    title="Evaluation",
    label="evaluation",
    data_fields=("prompts", "ratings"),
    read=read_evaluation,
    train=evaluate,
)
STAGES = (*TRAINING_STAGES, EVALUATE)


def chosen(names) -> list[Stage]:
    """The stages of these names, in their order."""
    return [stage for stage in STAGES if stage.name in names]
