"""PPO for aligning language models: pure functions in JAX.

Every name of `__all__` is a pure function or a struct of arrays; importing it loads neither Orbax
nor transformers. What touches files (`run`, `dry_run`, `load_policy`, `load_model`, `generate`,
`evaluate`, `export`, `plan`) is loaded when it is first used.
"""

import importlib

from ppo_jax.algorithms.experience import make_experience, response_scores, sample_responses
from ppo_jax.algorithms.options import PPONetworks, PPOOptions
from ppo_jax.algorithms.ppo import (
    init_ppo,
    ppo_iteration,
    update_from_rollout,
)
from ppo_jax.algorithms.supervised import reward_step, sft_loss, sft_step, text_scores
from ppo_jax.algorithms.update import experience_loss, ppo_update
from ppo_jax.core.advantages import gae, length_adaptive_lambda, whiten
from ppo_jax.core.covariance import (
    adaptive_entropy_coef,
    clip_cov_mask,
    clip_cov_policy_loss,
    clip_cov_weights,
    kl_cov_mask,
    kl_cov_policy_loss,
    token_covariances,
)
from ppo_jax.core.critic_free import (
    grpo_advantages,
    leave_one_out,
    reinforce_advantages,
    reinforce_plus_plus_advantages,
    remax_advantages,
    rloo_advantages,
    running_baseline,
)
from ppo_jax.core.critics import (
    disputed_states,
    ensemble_values,
    explained_variance,
    explained_variance_by_position,
    mask_agreed_advantages,
    value_bias,
    value_calibration,
)
from ppo_jax.core.distributions import entropy, token_logprobs
from ppo_jax.core.importance import importance_weights
from ppo_jax.core.kl import adaptive_kl_coef, adaptive_penalty_coef, kl_estimate, kl_loss
from ppo_jax.core.losses import next_token_loss, ppo_loss, preference_loss
from ppo_jax.core.masking import last_token_index, masked_mean, response_mask
from ppo_jax.core.network import Network, average_params, merge_params
from ppo_jax.core.off_policy_losses import (
    cispo_policy_loss,
    decoupled_policy_loss,
    dppo_policy_loss,
)
from ppo_jax.core.optimizer import apply_gradients, init_optimizer, schedule
from ppo_jax.core.policy_losses import (
    clipped_policy_loss,
    dual_clip_policy_loss,
    kl_penalty_policy_loss,
    vpg_policy_loss,
)
from ppo_jax.core.rewards import missing_eos_scores, token_rewards
from ppo_jax.core.sequence_losses import aggregation_weights, gspo_policy_loss
from ppo_jax.core.shaping import (
    Moments,
    best_and_worst,
    clip_scores,
    ensemble_scores,
    groups_with_variance,
    length_penalty,
    normalize_scores,
    overlong_penalty,
    par_scores,
    threshold_scores,
    update_moments,
)
from ppo_jax.core.types import (
    Experience,
    FrozenParams,
    Hyperparameters,
    Optimizer,
    PPOState,
    PreferenceBatch,
    Prompts,
    Rollout,
    TextBatch,
    TrainState,
)
from ppo_jax.core.value_losses import (
    classification_value_loss,
    clipped_value_loss,
    hl_gauss_targets,
    hl_gauss_value,
)
from ppo_jax.models.build import (
    policy_apply,
    policy_network,
    policy_value_network,
    reward_network,
    trunk_network,
    value_network,
)
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.lora import init_lora, merge_lora
from ppo_jax.models.partition import split_params
from ppo_jax.models.rope import RopeScaling
from ppo_jax.rollout.decode import response_outputs
from ppo_jax.rollout.rollout import rollout
from ppo_jax.rollout.sampling import Sampling, sample

__version__ = "0.2.0"

# Functions that touch files or devices: name -> where it is.
SHELL = {
    "dry_run": "pipeline.run:dry_run",
    "evaluate": "pipeline.run:evaluate",
    "export": "pipeline.export:export_stage",
    "generate": "inference.generate:generate",
    "hf": "io.huggingface",
    "load_model": "io.stage_folder:load_model",
    "load_policy": "io.huggingface:load_policy",
    "plan": "planner.planner:plan",
    "run": "pipeline.run:run",
}

__all__ = [
    "Experience",
    "FrozenParams",
    "Hyperparameters",
    "ModelConfig",
    "Moments",
    "Network",
    "Optimizer",
    "PPONetworks",
    "PPOOptions",
    "PPOState",
    "PreferenceBatch",
    "Prompts",
    "Rollout",
    "RopeScaling",
    "Sampling",
    "TextBatch",
    "TrainState",
    "adaptive_entropy_coef",
    "adaptive_kl_coef",
    "adaptive_penalty_coef",
    "aggregation_weights",
    "apply_gradients",
    "average_params",
    "best_and_worst",
    "cispo_policy_loss",
    "classification_value_loss",
    "clip_cov_mask",
    "clip_cov_policy_loss",
    "clip_cov_weights",
    "clip_scores",
    "clipped_policy_loss",
    "clipped_value_loss",
    "decoupled_policy_loss",
    "disputed_states",
    "dppo_policy_loss",
    "dual_clip_policy_loss",
    "ensemble_scores",
    "ensemble_values",
    "entropy",
    "experience_loss",
    "explained_variance",
    "explained_variance_by_position",
    "gae",
    "groups_with_variance",
    "grpo_advantages",
    "gspo_policy_loss",
    "hl_gauss_targets",
    "hl_gauss_value",
    "importance_weights",
    "init_lora",
    "init_optimizer",
    "init_ppo",
    "kl_cov_mask",
    "kl_cov_policy_loss",
    "kl_estimate",
    "kl_loss",
    "kl_penalty_policy_loss",
    "last_token_index",
    "leave_one_out",
    "length_adaptive_lambda",
    "length_penalty",
    "make_experience",
    "mask_agreed_advantages",
    "masked_mean",
    "merge_lora",
    "merge_params",
    "missing_eos_scores",
    "next_token_loss",
    "normalize_scores",
    "overlong_penalty",
    "par_scores",
    "policy_apply",
    "policy_network",
    "policy_value_network",
    "ppo_iteration",
    "ppo_loss",
    "ppo_update",
    "preference_loss",
    "reinforce_advantages",
    "reinforce_plus_plus_advantages",
    "remax_advantages",
    "response_mask",
    "response_outputs",
    "response_scores",
    "reward_network",
    "reward_step",
    "rloo_advantages",
    "rollout",
    "running_baseline",
    "sample",
    "sample_responses",
    "schedule",
    "sft_loss",
    "sft_step",
    "split_params",
    "text_scores",
    "threshold_scores",
    "token_covariances",
    "token_logprobs",
    "token_rewards",
    "trunk_network",
    "update_from_rollout",
    "update_moments",
    "value_bias",
    "value_calibration",
    "value_network",
    "vpg_policy_loss",
    "whiten",
]


def __getattr__(name: str):
    if name not in SHELL:
        raise AttributeError(f"module 'ppo_jax' has no attribute {name!r}")
    module, _, function = SHELL[name].partition(":")
    loaded = importlib.import_module(f"ppo_jax.{module}")
    return getattr(loaded, function) if function else loaded


def __dir__():
    return sorted([*globals(), *SHELL])
