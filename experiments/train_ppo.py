"""Run the ppo stage of a config.

python experiments/train_ppo.py --config=configs/ppo.py --workdir=runs/ppo
"""

from ppo_jax import cli

if __name__ == "__main__":
    cli.run_stages(["ppo"])
