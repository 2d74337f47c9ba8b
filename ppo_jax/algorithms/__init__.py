"""Training steps: SFT, reward model, and the PPO iteration.

`supervised` has the steps on texts and preferences. `experience` goes from prompts to rewards, with
`ensembles` and `scores` for what is scored, `greedy` and `references` for further responses;
`advantages` and `critics` say what is learned from them, `selection` and `dynamic_sampling` from
which. `update` takes the optimizer steps, `adaptation` moves what moves from one iteration to the
next, `ppo` is one whole iteration. Pure: imports `core` and `rollout`; knows a `Network` and no
Transformer. Start with `ppo`.
"""

from ppo_jax.algorithms.experience import (
    make_experience,
    policy_logprobs,
    response_scores,
    sample_responses,
)
from ppo_jax.algorithms.options import PPONetworks, PPOOptions
from ppo_jax.algorithms.ppo import (
    init_ppo,
    ppo_iteration,
    update_from_rollout,
)
from ppo_jax.algorithms.supervised import reward_step, sft_loss, sft_step, text_scores
from ppo_jax.algorithms.update import experience_loss, ppo_update, trained_params
from ppo_jax.core.importance import importance_weights

__all__ = [
    "PPONetworks",
    "PPOOptions",
    "experience_loss",
    "importance_weights",
    "init_ppo",
    "make_experience",
    "policy_logprobs",
    "ppo_iteration",
    "ppo_update",
    "response_scores",
    "reward_step",
    "sample_responses",
    "sft_loss",
    "sft_step",
    "text_scores",
    "trained_params",
    "update_from_rollout",
]
