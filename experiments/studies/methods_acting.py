"""PPO against GRPO and the other relatives, on a reward that is a fact: does a review mention the
acting? A small model from scratch, so that a point takes seconds.

    python experiments/sweep.py --config=experiments/studies/methods_acting.py:tiny \
        --workdir=runs/methods_acting --vectorize

The rows are those of `methods.py`, at equal episodes. A second reward function of weight 0 notes
the CPU time, so that they can be compared at equal CPU seconds as well: lanes take turns on a CPU,
and the time of an iteration is that of a lane times the lanes.
"""

import time

from studies import config_of, methods

RATES = (1e-3, 3e-3, 1e-2)


def get_config(variant: str = "tiny"):
    """configs/verifiable.py; the tiny variant is a smaller model and a shorter run."""
    config = config_of("verifiable", "acting")
    config.ppo.reward_function = ""
    config.ppo.reward_functions = ("film_reviews:mentions_acting", "studies.methods_acting:cpu_s")
    config.ppo.reward_weights = (1.0, 0.0)
    if variant == "tiny":
        config.model.scratch.update(embed_dim=64, mlp_dim=192)
        config.sft.update(num_epochs=4.0, max_length=48)
        config.ppo.update(num_iterations=30, rollout_batch_size=64, num_epochs=1, num_minibatches=4)
        config.ppo.update(max_prompt_length=24, response_length=20, sample_every=30, num_samples=4)
        config.ppo.save_every = 30
    return config


def sweep():
    return methods.searched(methods.METHODS, RATES)


def cpu_s(prompts: list[str], responses: list[str]) -> list[float]:
    """The CPU seconds that this process has used until now, of every response."""
    del prompts
    return [time.process_time()] * len(responses)
