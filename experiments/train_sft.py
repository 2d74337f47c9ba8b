"""Run the sft stage of a config.

python experiments/train_sft.py --config=configs/sft.py --workdir=runs/sft
"""

from ppo_jax import cli

if __name__ == "__main__":
    cli.run_stages(["sft"])
