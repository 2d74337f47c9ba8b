"""Run every stage of a config, or one."""

from ppo_jax import cli


def main(name: str = "rlhf"):
    """The command `name`: "rlhf" for all stages, else the stage."""
    cli.run_stages() if name == "rlhf" else cli.run_stages([name])
