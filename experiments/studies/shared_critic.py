"""One body for policy and critic against two: what the value loss does to the policy.

    python experiments/sweep.py --config=experiments/studies/shared_critic.py:tiny \
        --workdir=runs/shared_critic --vectorize

The task is that of `methods_acting.py`. With one body `vf_coef` weighs the value loss against the
policy's on it, where Adam would divide it out of the steps of a critic of its own. Each row gets
the same search of the policy's rate.

Reference: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593 (one body, vf_coef 0.1).
"""

from studies import methods_acting
from studies.methods import searched

ROWS = {
    "a critic of its own": {},
    "one body, vf_coef 0.01": {"ppo.shared_critic": True, "ppo.vf_coef": 0.01},
    "one body, vf_coef 0.1": {"ppo.shared_critic": True},
    "one body, vf_coef 1": {"ppo.shared_critic": True, "ppo.vf_coef": 1.0},
}


def get_config(variant: str = "tiny"):
    return methods_acting.get_config(variant)


def sweep():
    return searched(ROWS, methods_acting.RATES)
