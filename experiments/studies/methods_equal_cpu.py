"""PPO against the estimators without a critic on film reviews, at equal CPU seconds.

    python experiments/sweep.py --config=experiments/studies/methods_equal_cpu.py:tiny \
        --workdir=runs/methods_equal_cpu --vectorize

The task and the rates are those of `methods.py`, where all have 25 iterations. Without a critic an
iteration takes 0.63 of the CPU seconds there (0.12 against 0.19, the user time of 86 iterations
less that of 6, by 80, both with one core's programs compiled before), and a run has 40.
"""

from studies import methods

WITH_CRITIC = ("PPO: GAE, clip", "PPO, 4 samples a prompt")
WITHOUT = ("RLOO", "GRPO", "Dr. GRPO", "REINFORCE++", "REINFORCE++, baseline")
ROWS = {name: methods.METHODS[name] for name in WITH_CRITIC}
ROWS |= {name: methods.METHODS[name] | {"ppo.num_iterations": 40} for name in WITHOUT}


def get_config(variant: str = "tiny"):
    return methods.get_config(variant)


def sweep():
    return methods.searched(ROWS, methods.RATES)
