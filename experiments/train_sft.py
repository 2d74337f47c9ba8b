"""Run the sft stage of a config.

python experiments/train_sft.py --config=configs/sft.py --workdir=runs/sft

Every field of ppo_jax/config/ can be set with --config.SECTION.FIELD=VALUE, for instance
--config.sft.optimizer.learning_rate=1e-4; the comments there say what it means.
"""

from ppo_jax import cli

if __name__ == "__main__":
    cli.run_stages(["sft"])
