"""One reward model against three, where nothing but the scores holds the policy: no KL penalty.

    python experiments/train_sft.py --config=experiments/studies/methods.py:tiny \
        --workdir=runs/reward_models/0
    python experiments/train_reward.py --config=experiments/studies/methods.py:tiny \
        --workdir=runs/reward_models/0 --config.seed=0 \
        --config.reward.init_from=runs/reward_models/0/sft
    python experiments/train_reward.py --config=experiments/studies/methods.py:tiny \
        --workdir=runs/reward_models/1 --config.seed=1 \
        --config.reward.init_from=runs/reward_models/0/sft
    python experiments/train_reward.py --config=experiments/studies/methods.py:tiny \
        --workdir=runs/reward_models/2 --config.seed=2 \
        --config.reward.init_from=runs/reward_models/0/sft
    python experiments/sweep.py --config=experiments/studies/reward_ensemble.py:tiny \
        --workdir=runs/reward_ensemble --vectorize

A row is a rule over the scores of the three; all have the same SFT and the same two learning rates,
with three seeds of PPO each.

References: Coste et al. 2023, https://arxiv.org/abs/2310.02743 (ensembles); Rame et al. 2024,
https://arxiv.org/abs/2401.12187 (mean of the weights).
"""

from studies import methods

MODELS = tuple(f"runs/reward_models/{seed}/reward" for seed in range(3))
OTHERS = {"ppo.other_reward_models": MODELS[1:]}
ROWS = {
    "one model": {},
    "mean of three": OTHERS,
    "least of three": OTHERS | {"ppo.reward_rule": "min"},
    "mean less the deviation": OTHERS | {"ppo.reward_rule": "mean_minus_std"},
    "one of mean weights": OTHERS | {"ppo.reward_rule": "average_weights"},
}
RATES = (1e-3, 3e-3)


def get_config(variant: str = "tiny"):
    """PPO of the study of methods, twice as long and without a penalty."""
    config = methods.get_config(variant)
    del config.sft, config.reward
    config.ppo.update(init_from="runs/reward_models/0/sft", reward_model=MODELS[0], kl_coef=0.0)
    config.ppo.num_iterations *= 2
    return config


def sweep():
    return methods.searched(ROWS, RATES)
