"""How often the critic learns: passes over a rollout for each of the policy's, and its own norm.

    python experiments/sweep.py --config=experiments/studies/value_updates.py:tiny \
        --workdir=runs/value_updates --vectorize

The task is that of `methods_acting.py`. In the first row one Adam and one norm limit hold both
networks; in the second the critic has an optimizer of its own with the same numbers, and the others
give it more passes. Each row gets the same search of the policy's rate.

Reference: Cobbe et al. 2020, https://arxiv.org/abs/2009.04416 (phasic policy gradient), which
trains policy and value function at paces of their own.
"""

from studies import methods_acting
from studies.methods import searched

OWN = {"ppo.value_optimizer.max_grad_norm": 1.0}
ROWS = {
    "one norm for both": {},
    "a norm each": OWN,
    "2 passes of the critic": OWN | {"ppo.value_updates": 2},
    "4 passes of the critic": OWN | {"ppo.value_updates": 4},
}


def get_config(variant: str = "tiny"):
    return methods_acting.get_config(variant)


def sweep():
    return searched(ROWS, methods_acting.RATES)
