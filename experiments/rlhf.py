"""Run every stage of a config: SFT, reward model, PPO, evaluation, report.

python experiments/rlhf.py --config=configs/quickstart.py --workdir=runs/quickstart
"""

from ppo_jax import cli

if __name__ == "__main__":
    cli.run_stages()
