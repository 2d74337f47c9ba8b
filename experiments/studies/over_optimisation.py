"""How far a score can be trusted: PPO with ever less of a KL penalty.

    python experiments/sweep.py --config=experiments/studies/over_optimisation.py:tiny \
        --workdir=runs/over_optimisation

Four coefficients of the penalty, three seeds of PPO each, from one SFT and one reward model. The
reward model (the proxy) is what PPO maximises; the gold judge, fitted on other texts, was not
trained against. Expect the proxy to rise with every nat, and the gold score to rise and then to
fall where nothing holds the policy back. About a minute of CPU time a point; ten for SmolLM2-135M,
which is the variant `default`.

Reference: Gao et al. 2022, https://arxiv.org/abs/2210.10760.
"""

from studies import quickstart

KL_COEFS = (0.0, 0.02, 0.05, 0.2)


def get_config(variant: str = "default"):
    config = quickstart(variant)
    config.ppo.num_iterations *= 2  # over-optimisation takes its time
    config.ppo.evaluate_every = 5  # iterations: the gold score while it rises and falls
    config.ppo.evaluate_prompts = 64
    return config


def sweep():
    for kl_coef in KL_COEFS:
        for seed in range(3):
            yield {"ppo.kl_coef": kl_coef, "ppo.seed": seed}
