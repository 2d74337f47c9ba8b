"""PPO against GRPO and the other relatives, on film reviews: each with the same search of its rate.

    python experiments/sweep.py --config=experiments/studies/methods.py:tiny \
        --workdir=runs/methods --vectorize

A row is an estimator of advantages with a loss of the policy. All have equal episodes, one SFT, one
reward model and one KL penalty in the reward; each gets the same three learning rates with three
seeds of PPO, and is judged at its best one. `methods_acting.py` has the same rows on a reward that
is a fact.

References: Schulman et al. 2017, https://arxiv.org/abs/1707.06347; Shao et al. 2024 (GRPO),
https://arxiv.org/abs/2402.03300; those of the other rows are in docs/methods.md.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from studies import quickstart

RATE = "ppo.optimizer.learning_rate"
GROUP = {"ppo.samples_per_prompt": 4}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "PPO: GAE, clip": {},
    "PPO, 4 samples a prompt": GROUP,
    "RLOO": GROUP | {"ppo.advantage": "rloo"},
    "GRPO": GROUP | {"ppo.advantage": "grpo"},
    "Dr. GRPO": GROUP | {"ppo.advantage": "dr_grpo"},
    "REINFORCE++": GROUP | {"ppo.advantage": "reinforce_plus_plus"},
    "REINFORCE++, baseline": GROUP | {"ppo.advantage": "reinforce_plus_plus_baseline"},
    "REINFORCE": {"ppo.advantage": "reinforce"},
    "ReMax": {"ppo.advantage": "remax"},
    "GRPO, GSPO": GROUP
    | {"ppo.advantage": "grpo", "ppo.loss": "gspo", "ppo.clip_range": 0.02},  # of a mean of tokens
    "GAE, dual clip": {"ppo.loss": "dual_clip"},
    "GAE, CISPO": {"ppo.loss": "cispo"},
    "GAE, DPPO": {"ppo.loss": "dppo"},
    "GAE, KL penalty, no clip": {"ppo.loss": "kl_penalty"},
    "GAE, policy gradient": {"ppo.loss": "policy_gradient"},
    "GAE, decoupled": {"ppo.loss": "decoupled", "ppo.old_logprobs": "recompute"},
    "GAE, Clip-Cov": {"ppo.loss": "clip_cov"},
    "GAE, KL-Cov": {"ppo.loss": "kl_cov"},
}
RATES = (3e-4, 1e-3, 3e-3)
SEEDS = 3


def get_config(variant: str = "tiny"):
    """The quickstart; the tiny variant cut to a size at which a point takes seconds."""
    config = quickstart(variant)
    if variant == "tiny":
        config.model.scratch.update(num_layers=2, embed_dim=64, mlp_dim=192)
        config.sft.num_epochs, config.reward.num_epochs = 3.0, 2.0
        config.ppo.update(sample_every=25, num_samples=4, save_every=25)
        config.evaluate.num_prompts = 128
    return config


def sweep() -> Iterator[dict[str, Any]]:
    return searched(METHODS, RATES)


def searched(
    rows: Mapping[str, Mapping[str, Any]], rates: Iterable[float]
) -> Iterator[dict[str, Any]]:
    """Every row at every rate, with every seed."""
    for change in rows.values():
        for rate in rates:
            for seed in range(SEEDS):
                yield dict(change) | {RATE: rate, "ppo.seed": seed}
