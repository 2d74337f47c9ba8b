"""Run every stage of a config: SFT, reward model, PPO, evaluation, report.

python experiments/rlhf.py --config=configs/quickstart.py --workdir=runs/quickstart

Every field of ppo_jax/config/ can be set with --config.SECTION.FIELD=VALUE, for instance
--config.ppo.kl_coef=0.1; the comments there say what it means.
"""

from ppo_jax import cli

if __name__ == "__main__":
    cli.run_stages()
