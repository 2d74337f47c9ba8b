"""PPO for aligning language models: pure functions in JAX.

This module gives what computes: every name here is a pure function or a struct of arrays, and
importing it loads neither Orbax nor transformers. What touches files (`hf`, `checkpoints`,
`pipeline` ...) is a submodule and is loaded when it is first used.
"""

import importlib

from ppo_jax.advantages import gae, whiten
from ppo_jax.distributions import entropy, sample, token_logprobs
from ppo_jax.experience import (
    PPONetworks,
    Recipe,
    make_experience,
    response_scores,
    sample_responses,
)
from ppo_jax.kl import adaptive_kl_coef, kl_estimate
from ppo_jax.lora import init_lora, merge_lora
from ppo_jax.losses import (
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    next_token_loss,
    ppo_loss,
    preference_loss,
)
from ppo_jax.masking import last_token_index, masked_mean, response_mask
from ppo_jax.networks import (
    ModelConfig,
    Network,
    RopeScaling,
    policy_apply,
    policy_network,
    reward_network,
    trunk_network,
    value_network,
)
from ppo_jax.optimizer import apply_gradients, init_optimizer, schedule
from ppo_jax.partition import merge_params, split_params
from ppo_jax.ppo import experience_loss, init_ppo, learn, ppo_iteration, ppo_update
from ppo_jax.rewards import missing_eos_scores, token_rewards
from ppo_jax.rollout import response_outputs, rollout
from ppo_jax.sampling import Sampling
from ppo_jax.steps import (
    PreferenceBatch,
    TextBatch,
    reward_step,
    sft_loss,
    sft_step,
    text_scores,
)
from ppo_jax.structs import (
    Experience,
    Frozen,
    Hyperparameters,
    Optimizer,
    PPOState,
    Prompts,
    Rollout,
    TrainState,
)

__version__ = "0.1.0"

SHELL = ("checkpoints", "config", "data", "generation", "hf", "pipeline", "sources", "vocabulary")

__all__ = [
    "Experience",
    "Frozen",
    "Hyperparameters",
    "ModelConfig",
    "Network",
    "Optimizer",
    "PPONetworks",
    "PPOState",
    "PreferenceBatch",
    "Prompts",
    "Recipe",
    "Rollout",
    "RopeScaling",
    "Sampling",
    "TextBatch",
    "TrainState",
    "adaptive_kl_coef",
    "apply_gradients",
    "clipped_policy_loss",
    "clipped_value_loss",
    "entropy",
    "experience_loss",
    "explained_variance",
    "gae",
    "init_lora",
    "init_optimizer",
    "init_ppo",
    "kl_estimate",
    "last_token_index",
    "learn",
    "make_experience",
    "masked_mean",
    "merge_lora",
    "merge_params",
    "missing_eos_scores",
    "next_token_loss",
    "policy_apply",
    "policy_network",
    "ppo_iteration",
    "ppo_loss",
    "ppo_update",
    "preference_loss",
    "response_mask",
    "response_outputs",
    "response_scores",
    "reward_network",
    "reward_step",
    "rollout",
    "sample",
    "sample_responses",
    "schedule",
    "sft_loss",
    "sft_step",
    "split_params",
    "text_scores",
    "token_logprobs",
    "token_rewards",
    "trunk_network",
    "value_network",
    "whiten",
]


def __getattr__(name: str):
    if name in SHELL:
        return importlib.import_module(f"ppo_jax.{name}")
    raise AttributeError(f"module 'ppo_jax' has no attribute {name!r}")
