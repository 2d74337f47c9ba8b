"""Over-optimisation: gold and proxy score against sqrt(KL), of several runs and best-of-n."""

from types import SimpleNamespace

from absl import flags

from ppo_jax import cli
from ppo_jax.evaluation.report.frontier_report import write_frontier


def define_flags() -> SimpleNamespace:
    """The flags of the command, by name."""
    found = SimpleNamespace(
        runs=flags.DEFINE_list(
            "runs", None, "Folders of runs with ppo.evaluate_every, or of a sweep.", required=True
        ),
        out=flags.DEFINE_string("out", None, "OUT.png and OUT.json are written.", required=True),
        by=flags.DEFINE_string("by", "ppo.kl_coef", "The setting that has a curve a value."),
        evaluation=flags.DEFINE_string(
            "evaluation", "", "A folder of evaluate.py with best-of-n, to draw beside them."
        ),
    )
    cli.show_in_help(*vars(found).values())
    return found


def main():
    """Define the flags, parse them, draw."""
    flag = define_flags()

    def draw():
        how = {"by": flag.by.value, "evaluation": flag.evaluation.value}
        print(write_frontier(flag.runs.value, flag.out.value, **how))

    cli.run(draw)
