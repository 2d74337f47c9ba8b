"""Policies side by side on unseen prompts: stages, steps of them, models, best-of-n."""

from types import SimpleNamespace

from absl import flags, logging

from ppo_jax import cli
from ppo_jax.commands.generate import define_sampling_flags
from ppo_jax.evaluation.request import make_request
from ppo_jax.evaluation.side_by_side import evaluate_side_by_side


def define_flags() -> SimpleNamespace:
    """The flags of the command but for those of the sampling, by name."""
    text, whole = flags.DEFINE_string, flags.DEFINE_integer
    found = SimpleNamespace(
        run=text("run", None, "A run's folder: gives policies, prompts, judges, reward, lengths."),
        policies=text(
            "policies",
            None,
            "NAME=POLICY; NAME=POLICY ...: a stage's folder, STAGE@40, a model, bon(POLICY, n=4).",
        ),
        reference=text("reference", None, "The policy to compare with; the first by default."),
        prompts=text("prompts", None, "A file of unseen prompts."),
        num_prompts=whole("num_prompts", None, "The first of them; 256 by default.", lower_bound=1),
        judges=text(
            "judges",
            None,
            "NAME=module:function or NAME=MODEL; or module:function that makes a JudgePanel.",
        ),
        reward=text("reward", None, "Reward model: the score, and what best-of-n chooses by."),
        texts=text("texts", None, "A file of unseen texts, for the perplexity."),
        seeds=text("seeds", None, "Of the sampling: 0, 0:3 or 0,5."),
        max_prompt_length=whole("max_prompt_length", None, "Tokens.", lower_bound=1),
        workdir=text("workdir", None, "The folder for what is found, new.", required=True),
    )
    cli.show_in_help(*vars(found).values())
    return found


def main():
    """Define the flags, parse them, evaluate."""
    flag, sampling = define_flags(), define_sampling_flags()

    def evaluate():
        logging.set_verbosity(logging.WARNING)
        asked = {name: holder.value for name, holder in (vars(flag) | sampling).items()}
        workdir = asked.pop("workdir")
        evaluate_side_by_side(make_request(asked), workdir)

    cli.run(evaluate)
