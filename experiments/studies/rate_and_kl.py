"""Learning rate and KL coefficient together: sixteen runs of PPO as one program.

    python experiments/sweep.py --config=experiments/studies/rate_and_kl.py:tiny \
        --workdir=runs/rate_and_kl --vectorize

Sixteen pairs of two numbers, all from one SFT and one reward model, trained side by side. Without
--vectorize they are the same sixteen runs one by one.
"""

from studies import quickstart

RATES = (1e-4, 3e-4, 1e-3, 3e-3)
KL_COEFS = (0.0, 0.02, 0.05, 0.2)


def get_config(variant: str = "tiny"):
    return quickstart(variant)


def sweep():
    for rate in RATES:
        for kl_coef in KL_COEFS:
            yield {"ppo.optimizer.learning_rate": rate, "ppo.kl_coef": kl_coef}
