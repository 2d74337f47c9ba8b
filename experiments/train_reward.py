"""Run the reward stage of a config.

python experiments/train_reward.py --config=configs/reward.py --workdir=runs/reward
"""

from ppo_jax import cli

if __name__ == "__main__":
    cli.run_stages(["reward"])
