"""The mathematics of RLHF as functions of arrays.

Log-probs, KL estimates, rewards, advantages, losses, the optimizer, and `Network`, a policy or
critic as plain functions. Pure: imports jax, flax, optax, chex and nothing of this library.
Start with `losses` and `advantages`.
"""

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
from ppo_jax.core.distributions import (
    chunked_token_statistics,
    entropy,
    token_logprobs,
    token_statistics,
)
from ppo_jax.core.importance import importance_weights
from ppo_jax.core.kl import (
    ESTIMATORS,
    LOSS_ESTIMATORS,
    adaptive_kl_coef,
    adaptive_penalty_coef,
    kl_estimate,
    kl_loss,
)
from ppo_jax.core.losses import next_token_loss, ppo_loss, preference_loss
from ppo_jax.core.masking import last_token_index, masked_mean, response_mask, zero_padding
from ppo_jax.core.network import Network, average_params, merge_params
from ppo_jax.core.off_policy_losses import (
    cispo_policy_loss,
    decoupled_policy_loss,
    dppo_policy_loss,
)
from ppo_jax.core.optimizer import SCHEDULES, apply_gradients, init_optimizer, schedule
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

__all__ = [
    "ESTIMATORS",
    "Experience",
    "FrozenParams",
    "Hyperparameters",
    "LOSS_ESTIMATORS",
    "Moments",
    "Network",
    "Optimizer",
    "PPOState",
    "PreferenceBatch",
    "Prompts",
    "Rollout",
    "SCHEDULES",
    "TextBatch",
    "TrainState",
    "adaptive_entropy_coef",
    "adaptive_kl_coef",
    "adaptive_penalty_coef",
    "aggregation_weights",
    "apply_gradients",
    "average_params",
    "best_and_worst",
    "chunked_token_statistics",
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
    "explained_variance",
    "explained_variance_by_position",
    "gae",
    "groups_with_variance",
    "grpo_advantages",
    "gspo_policy_loss",
    "hl_gauss_targets",
    "hl_gauss_value",
    "importance_weights",
    "init_optimizer",
    "kl_cov_mask",
    "kl_cov_policy_loss",
    "kl_estimate",
    "kl_loss",
    "kl_penalty_policy_loss",
    "last_token_index",
    "leave_one_out",
    "length_adaptive_lambda",
    "length_penalty",
    "mask_agreed_advantages",
    "masked_mean",
    "merge_params",
    "missing_eos_scores",
    "next_token_loss",
    "normalize_scores",
    "overlong_penalty",
    "par_scores",
    "ppo_loss",
    "preference_loss",
    "reinforce_advantages",
    "reinforce_plus_plus_advantages",
    "remax_advantages",
    "response_mask",
    "rloo_advantages",
    "running_baseline",
    "schedule",
    "threshold_scores",
    "token_covariances",
    "token_logprobs",
    "token_rewards",
    "token_statistics",
    "update_moments",
    "value_bias",
    "value_calibration",
    "vpg_policy_loss",
    "whiten",
    "zero_padding",
]
