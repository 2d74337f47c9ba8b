"""What travels between the steps: frozen pytrees of arrays.

Dimension key: B sequences, P prompt tokens, T response tokens, L = P + T, D model.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from ppo_jax.core.renamed import renamed
from ppo_jax.core.shaping import Moments

Params = dict[str, Any]

SCHEDULES = ("constant", "linear", "cosine")


@struct.dataclass(kw_only=True)
class Prompts:
    """Prompts padded on the left, so that every response begins at position P."""

    tokens: jax.Array  # [B, P] int32
    mask: jax.Array  # [B, P] bool, True on real tokens
    # [B] bool, True on prompts that are meant to provoke, see `threshold_scores`; None: none is. No
    # part of a fingerprint where it is None, or no run that began before could go on.
    is_safety: jax.Array | None = struct.field(default=None, metadata={"added_later": True})


@renamed(hidden="hidden_states")
@struct.dataclass(kw_only=True)
class Rollout:
    """Sampled responses.

    The logits that predict response token t are those of position P - 1 + t.
    """

    prompt_tokens: jax.Array  # [B, P] int32
    prompt_mask: jax.Array  # [B, P] bool
    response_tokens: jax.Array  # [B, T] int32, 0 where masked
    response_mask: jax.Array  # [B, T] bool, True up to and including the token that ends it
    logprobs: jax.Array  # [B, T] float32, at the sampling temperature, 0 where masked
    has_eos: jax.Array  # [B] bool, the response ended with a stop token or a stop string
    hidden_states: jax.Array | None = None  # [B, L, D], the trunk's output, when there is a trunk
    is_safety: jax.Array | None = None  # [B] bool, that of the prompt
    experts: jax.Array | None = None  # [B, L, M, k] uint8 or uint16, those that each position had
    # in each of the policy's M layers with experts, if there are any; the largest number of the
    # dtype where it had none: the last token of a response, and what the last layer has not run

    @property
    def tokens(self) -> jax.Array:
        """[B, L] int32, prompt and response."""
        return jnp.concatenate([self.prompt_tokens, self.response_tokens], axis=1)

    @property
    def mask(self) -> jax.Array:
        """[B, L] bool, prompt and response."""
        return jnp.concatenate([self.prompt_mask, self.response_mask], axis=1)


@renamed(segments="segment_ids", at="output_positions")
@struct.dataclass(kw_only=True)
class Experience:
    """A rollout with all that the update needs. Everything but `policy_inputs`, `value_inputs`,
    `mask` and `experts` is over the response, and zero where `response_mask` is False.

    Where responses share rows (see `rollout.packing`), there are `segment_ids` and
    `output_positions`: B is a number of rows, [B, L] is [B, L - 1], without the position that
    predicts nothing, and what is over the response is over those of a row, one after the other.
    """

    policy_inputs: jax.Array  # [B, L] int32 tokens, or [B, L, D] the trunk's hidden states
    value_inputs: jax.Array | None  # the same for the value network; None without one
    mask: jax.Array  # [B, L] bool
    response_tokens: jax.Array  # [B, T] int32
    response_mask: jax.Array  # [B, T] bool
    logprobs: jax.Array  # [B, T] float32, of the policy that the ratio starts from
    values: jax.Array | None  # [B, T] float32, before token t is emitted; None without a critic
    advantages: jax.Array  # [B, T] float32, see `PPOOptions.advantage`
    returns: jax.Array | None  # [B, T] float32; None without a critic
    ref_logprobs: jax.Array | None = None  # [B, T] float32, where the loss has a KL in it
    behavior_logprobs: jax.Array | None = None  # [B, T] float32, of the policy that sampled, where
    # the loss tells it from that of `logprobs`
    dropped_mask: jax.Array | None = None  # [B, T] bool, and
    penalty_mask: jax.Array | None = None  # [B, T] bool, the tokens of a minibatch that the loss
    # has chosen, see `TOKEN_CHOICES`
    disputed_mask: jax.Array | None = None  # [B, T] bool, the tokens without an entropy bonus, see
    # `disputed_states`; None is none
    weights: jax.Array | None = None  # [B, T] float32 of a token's term of the loss; None is 1
    critics: jax.Array | None = None  # [B, T] int32, which of several critics learns the token; its
    # own are the `values`
    segment_ids: jax.Array | None = None  # [B, L - 1] int32, as in `TextBatch`
    output_positions: jax.Array | None = None  # [B, T] int32, predict the response tokens
    experts: jax.Array | None = None  # [B, L, M, k] int, those of the rollout
    replays_experts: bool = struct.field(pytree_node=False, default=False)  # the policy has them in
    # the update as well; False: it chooses by itself, and the two are compared


@struct.dataclass(kw_only=True)
class Optimizer:
    """Adam with a gradient-norm limit and a schedule. Numbers are traced; the kind is code.

    Raises:
        ValueError: the kind of schedule is unknown.
    """

    learning_rate: jax.Array | float  # the highest of the schedule
    max_grad_norm: jax.Array | float = 1.0  # over all trained parameters together; inf is off
    b1: jax.Array | float = 0.9
    b2: jax.Array | float = 0.999
    eps: jax.Array | float = 1e-8
    weight_decay: jax.Array | float = 0.0  # decoupled, times the learning rate
    warmup_steps: jax.Array | float = 0.0
    total_steps: jax.Array | float = 1.0
    final_fraction: jax.Array | float = 0.0  # of learning_rate, at total_steps
    schedule: str = struct.field(pytree_node=False, default="constant")

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.schedule!r}; choose from {list(SCHEDULES)}")


@renamed(importance_low="tis_clip_low", importance_high="tis_clip_high")
@struct.dataclass(kw_only=True)
class Hyperparameters:
    """Every number of PPO. All leaves are traced: changing one never recompiles, and `jax.vmap`
    over them trains a sweep as one program. None is no leaf.

    `temperature` must be > 0: the logits of the update are divided by it, and at 0 the loss is
    NaN. It is traced, so nothing can refuse a 0 here.
    """

    optimizer: Optimizer
    value_optimizer: Optimizer | None = None  # of the critic alone, which then takes steps of its
    # own; None: those of `optimizer`, one norm over both, at value_learning_rate
    value_learning_rate: jax.Array | float = 1e-5  # of the critic, where there is one
    critic_warmup: jax.Array | float = 0.0  # iterations, the first, at a policy's rate of 0
    critic_warmup_tolerance: jax.Array | float | None = None  # ends them early, see `settle`
    temperature: jax.Array | float = 1.0  # > 0; divides the logits, in sampling and in training
    kl_coef: jax.Array | float = 0.05  # fixed control, and where adaptive control starts
    target_kl: jax.Array | float = 6.0  # nats per response, adaptive control
    kl_horizon: jax.Array | float = 10_000.0  # episodes, adaptive control
    gamma: jax.Array | float = 1.0
    gae_lambda: jax.Array | float = 0.95
    gae_lambda_alpha: jax.Array | float | None = None  # in place of gae_lambda that of the length,
    # see `length_adaptive_lambda`; None is off
    value_gae_lambda: jax.Array | float | None = None  # of the critic's returns; None: gae_lambda
    clip_range: jax.Array | float = 0.2  # of the probability ratio, below 1
    clip_range_high: jax.Array | float | None = None  # above 1; None is the same as clip_range
    value_clip_range: jax.Array | float = 0.2
    value_range: jax.Array | None = None  # [2], lowest and highest return of a critic that gives
    # logits of bins of returns, see `values_from`; None: it gives the value
    agreed_fraction: jax.Array | float | None = None  # see `mask_agreed_advantages`; None is off
    disputed_fraction: jax.Array | float | None = None  # see `disputed_states`; None is off
    vf_coef: jax.Array | float = 0.1
    entropy_coef: jax.Array | float = 0.0
    target_entropy: jax.Array | float | None = None  # nats a token that it adapts to; None: no
    entropy_coef_step: jax.Array | float = 0.005  # of that, see `adaptive_entropy_coef`
    baseline_decay: jax.Array | float | None = None  # see `running_baseline`; None keeps none
    ref_ema_decay: jax.Array | float | None = None  # see `next_reference`; None is off
    ref_reset_every: jax.Array | float | None = None  # iterations, likewise
    kl_loss_coef: jax.Array | float | None = None  # of a KL in the loss; None is off
    dual_clip: jax.Array | float = 3.0  # see `dual_clip_policy_loss`
    penalty_coef: jax.Array | float = 1.0  # see `kl_penalty_policy_loss`
    penalty_target_kl: jax.Array | float | None = None  # nats a token that it adapts to; None: no
    divergence_limit: jax.Array | float = 0.15  # see `dppo_policy_loss`
    covariance_fraction: jax.Array | float = 2e-4  # see `clip_cov_mask` and `kl_cov_mask`
    covariance_low: jax.Array | float = 1.0  # see `clip_cov_mask`
    covariance_high: jax.Array | float = 5.0  # likewise
    behavior_weight_limit: jax.Array | float = jnp.inf  # see `decoupled_policy_loss`
    missing_eos_score: jax.Array | float = 0.0  # replaces, or is subtracted from, the score
    score_clip: jax.Array | float | None = None  # scores are within it of 0; None is off
    length_penalty: jax.Array | float | None = None  # of a score for each token; None is off
    length_penalty_free: jax.Array | float = 0.0  # tokens that cost nothing
    overlong_tokens: jax.Array | float | None = None  # see `overlong_penalty`; None is off
    stop_kl: jax.Array | float | None = None  # nats a token, see `ppo_update`; None is off
    tis_clip_low: jax.Array | float = 1.0  # limits of the weights of recomputed log-probs; 1 and
    tis_clip_high: jax.Array | float = 1.0  # 1 is no weight, see `importance_weights`


@struct.dataclass(kw_only=True)
class TrainState:
    """State of supervised fine-tuning and of reward-model training."""

    step: jax.Array  # [] int32, optimizer steps taken
    params: Params  # the trained leaves
    opt_state: Any


@struct.dataclass(kw_only=True)
class PPOState:
    """State of PPO. Reference and reward parameters are arguments of a step, not state."""

    step: jax.Array  # [] int32, iterations done
    episodes: jax.Array  # [] int32, responses sampled
    policy_params: Params  # the trained leaves
    value_params: Params | None  # None without a critic
    opt_state: Any
    kl_coef: jax.Array  # [] float32, moved by adaptive control alone
    adaptive: dict[str, jax.Array] = struct.field(default_factory=dict)  # see `init_adaptive`
    ref_params: Params | None = None  # the reference, where it moves; None: that of `FrozenParams`
    score_moments: Moments | None = None  # of all scores so far; None: they are not normalized


@struct.dataclass(kw_only=True)
class FrozenParams:
    """Parameters that PPO reads and never writes. Never donated, never saved with the state."""

    ref_policy: Params  # where the policy's trained leaves started
    reward: Params | None = None  # None when scores come from a Python function
    trunk: Params | None = None  # the layers below the trained ones, when they are shared
    policy: Params = struct.field(default_factory=dict)  # untrained leaves above the trunk
    value: Params = struct.field(default_factory=dict)


@renamed(segments="segment_ids")
@struct.dataclass(kw_only=True)
class TextBatch:
    """A batch of training texts, right-padded; one a row, or several with `segment_ids`."""

    inputs: jax.Array  # [N, L] int32 tokens, or [N, L, D] a trunk's hidden states
    tokens: jax.Array  # [N, L] int32
    mask: jax.Array  # [N, L] bool, True on real tokens
    loss_mask: jax.Array  # [N, L] bool, True on tokens to predict; False on a text's first token
    segment_ids: jax.Array | None = None  # [N, L] int32, which text of its row: 1, 2, .. or 0


@struct.dataclass(kw_only=True)
class PreferenceBatch:
    """Texts and which of them is preferred to which.

    A row holds one text or, with `segment_ids` and `ends`, up to K: text k of row r is then text
    r K + k of the pairs.
    """

    inputs: jax.Array  # [N, L] int32 tokens, or [N, L, D] a trunk's hidden states
    mask: jax.Array  # [N, L] bool
    pairs: jax.Array  # [M, 2] int32, texts (the preferred, the other)
    valid: jax.Array  # [M] bool, False where the pair was a tie
    margins: jax.Array | None = None  # [M] float32, see `preference_loss`; None is 0
    segment_ids: jax.Array | None = None  # [N, L] int32, as `Network` has it
    ends: jax.Array | None = None  # [N, K] int32, position of each text's last token; else 0
