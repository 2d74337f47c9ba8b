"""PPO against GRPO and the other relatives, on a reward that is a fact: does a review mention the
acting? A small model from scratch, so that a point takes seconds.

    python experiments/sweep.py --config=experiments/studies/methods_acting.py:tiny \
        --workdir=runs/methods_acting --vectorize

The rows are those of `methods.py`, at equal episodes.
"""

from studies import config_of, methods

RATES = (1e-3, 3e-3, 1e-2)


def sweep():
    return methods.searched(methods.METHODS, RATES)


def get_config(variant: str = "tiny"):
    """configs/verifiable.py; the tiny variant is a smaller model and a shorter run."""
    config = config_of("verifiable", "acting")
    if variant == "tiny":
        config.model.scratch.update(embed_dim=64, mlp_dim=192)
        config.sft.update(num_epochs=4.0, max_length=48)
        config.ppo.update(num_iterations=30, rollout_batch_size=64, num_epochs=1, num_minibatches=4)
        config.ppo.update(max_prompt_length=24, response_length=20, sample_every=30, num_samples=4)
        config.ppo.save_every = 30
    return config
