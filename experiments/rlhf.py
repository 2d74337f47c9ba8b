"""Run every stage of a config: SFT, reward model, PPO, evaluation, report.

python experiments/rlhf.py --config=configs/quickstart.py --workdir=runs/quickstart
"""

from absl import app, flags
from ml_collections import config_flags

from ppo_jax import pipeline

CONFIG = config_flags.DEFINE_config_file("config", help_string="FILE.py or FILE.py:VARIANT")
WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.", required=True)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    pipeline.run(CONFIG.value, WORKDIR.value)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
