"""Which of PPO's choices matter here: one changed at a time, with a learning rate of its own.

    python experiments/sweep.py --config=experiments/studies/ppo_choices.py:tiny \
        --workdir=runs/ppo_choices --vectorize

The first row is the quickstart; every other row changes one thing of it. Each row gets the same
three learning rates, three seeds of PPO each, and is judged at its best one. All start from one SFT
and one reward model.

References: Schulman et al. 2017, https://arxiv.org/abs/1707.06347; Andrychowicz et al. 2021,
https://arxiv.org/abs/2006.05990; Huang et al. 2024, https://arxiv.org/abs/2403.17031.
"""

import math

from studies import quickstart

CHOICES = {
    "the quickstart": {},
    "4 epochs": {"ppo.num_epochs": 4},
    "no value clipping": {"ppo.value_clip_range": math.inf},
    "advantages not whitened": {"ppo.whiten_advantages": False},
    "rewards whitened": {"ppo.whiten_rewards": True},
    "critic from the policy": {"ppo.critic_init_from": "policy"},
    "critic from scratch": {"ppo.critic_init_from": "scratch"},
}
RATES = (2e-4, 5e-4, 1e-3)


def get_config(variant: str = "tiny"):
    config = quickstart(variant)
    config.ppo.value_trainable = "all"  # a critic from scratch has no frozen layers
    return config


def sweep():
    names = dict.fromkeys(name for change in CHOICES.values() for name in change)
    for change in CHOICES.values():
        for rate in RATES:
            for seed in range(3):
                point = change | {"ppo.optimizer.learning_rate": rate, "ppo.seed": seed}
                yield {name: point[name] for name in (*names, *point) if name in point}
