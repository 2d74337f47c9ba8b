"""Settings of PPO: what the section `ppo` of a config holds; `ppo_checks` says what goes together.

Every number has its unit in a comment.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from ppo_jax.config.parsing import Limit, changeable
from ppo_jax.config.ppo_checks import check_ppo
from ppo_jax.config.stages import LoRASettings, OptimizerSettings

# Numbers of PPO, each with the value at which it is no part of the program.
LEFT_OUT = {
    "stop_kl": math.inf,
    "score_clip": math.inf,
    "overlong_tokens": 0,
    "length_penalty": 0,
    "gae_lambda_alpha": 0,
    "critic_warmup_tolerance": 0,
    "value_gae_lambda": -1,
    "kl_loss_coef": 0,
    "penalty_target_kl": 0,
    "target_entropy": 0,
    "ref_ema_decay": 1,
    "ref_reset_every": 0,
    "value_range": (),
    "agreed_fraction": 0,
    "disputed_fraction": 0,
}
CRITIC_STARTS = ("", "reward_model", "policy", "scratch")  # what names no model of its own


def names_critic(settings: "PPOSettings") -> bool:
    """Whether `critic_init_from` names the model that the critic starts from."""
    return settings.critic_init_from not in CRITIC_STARTS


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValueOptimizerSettings:
    """Adam of the critic alone: where any of these is given, or ppo.value_updates or
    ppo.value_num_minibatches. Its rate is ppo.value_learning_rate. -1 is what ppo.optimizer has."""

    max_grad_norm: Limit = -1.0  # over the critic's parameters; without any of these
    # fields there is one norm over those of policy and critic
    schedule: str = ""  # of value_learning_rate: "cosine", "linear" or "constant"; ""
    # is that of ppo.optimizer
    warmup_steps: int = -1  # iterations from a tenth of the rate to all of it
    final_fraction: float = -1.0  # of the rate, at the last iteration
    weight_decay: float = -1.0  # decoupled, per step and times the rate
    b1: float = -1.0  # decay a step of the mean gradient
    b2: float = -1.0  # decay a step of the mean squared gradient
    eps: float = -1.0  # added to the root of the mean squared gradient

    def over(self, optimizer: OptimizerSettings, learning_rate: float) -> OptimizerSettings:
        """The critic's optimizer: what is given here, else what the policy's has."""
        own = {k: x for k, x in dataclasses.asdict(self).items() if x not in (-1, "")}
        return dataclasses.replace(optimizer, learning_rate=learning_rate, **own)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOSettings:
    """Proximal policy optimization with a KL penalty against the policy it starts from."""

    FORMERLY: ClassVar[Mapping[str, str]] = {  # names until 0.1, taken with a warning in 0.2
        "advantages": "advantage",  # until 0.2
        "slots": "max_concurrent",
        "refill": "min_free_slots",
        "reward_seconds": "reward_timeout_s",
        "importance_low": "tis_clip_low",
        "importance_high": "tis_clip_high",
    }

    BEFORE: ClassVar[Mapping[str, Any]] = {  # what runs did before there was the field
        "score_at": "last",
    }

    # Data, models, and what of them is trained

    prompts: str  # rows of {"prompt"} or {"messages"}
    optimizer: OptimizerSettings  # of the policy; max_grad_norm is over policy and critic
    value_learning_rate: float = changeable(1e-5)  # of the critic, on the same schedule
    value_optimizer: ValueOptimizerSettings = ValueOptimizerSettings()  # of the critic alone
    init_from: str = "sft"  # the policy: a stage of this workdir, "base", a stage folder or a model
    reward_model: str = "reward"  # a stage of this workdir, a stage folder or a sequence
    # classification with one label; "" with a function
    other_reward_models: tuple[str, ...] = ()  # more of them, which read the policy's tokens: a
    # response then has one score, by reward_rule; a critic starts from reward_model
    reward_rule: str = "mean"  # of the scores of several: or "min", "mean_minus_std",
    # "mean_minus_var"; "average_weights": one model, whose weights are the mean of theirs; or
    # "threshold" of two, reward_model for helpfulness and one for safety, whose score counts alone
    # where it is low, or the prompt's row has "is_safety": true
    reward_rule_coef: float = changeable(1.0)  # of std or var, between the models
    reward_rule_threshold: float = changeable(-1.73)  # with reward_rule="threshold": what the score
    # of safety is low below; -1.73 is the logit of a probability of 0.15
    reward_function: str = ""  # "module:function": (prompts, responses, ...) -> one number a
    # response or one list of numbers, a number a token; see "Reward functions"
    reward_functions: tuple[str, ...] = ()  # several, in place of the one: their weighted sum
    reward_weights: tuple[float, ...] = changeable(())  # of reward_functions; () is 1 each
    reward_timeout_s: Limit = changeable(math.inf)  # that a call of a function may take, else the
    # run ends
    critic_init_from: str = ""  # "reward_model", or "policy": its body and a head of zeros; "" is
    # the reward model, or the policy where scores come from text: of a function, or of a reward
    # model with a tokenizer of its own. "scratch" is the policy's shape with random weights. Or a
    # model of any size with the policy's tokenizer: a stage of this workdir, "base", a stage folder
    # (of PPO its critic) or a model
    shared_critic: bool = False  # the critic is a second head on the policy's own body (or several,
    # num_critics), and its loss, times vf_coef, trains the body as well: no second model in memory
    trainable: str | int = "all"  # "all", a number of top layers such as "4", "head" or "lora"
    value_trainable: str | int = "all"  # the same for the layers of the critic
    lora: LoRASettings = LoRASettings()  # of the adapters of policy and critic

    # An iteration: a rollout and the updates on it

    num_iterations: int = changeable(100)  # each is a rollout and the updates on it
    seed: int = -1  # of adapters, order of prompts and sampling, so that runs with the same SFT and
    # reward model differ; -1 is the run's seed
    rollout_batch_size: int = 64  # responses an iteration
    num_epochs: int = 4  # passes over a rollout
    num_minibatches: int = 1  # optimizer steps a pass
    num_micro_batches: int = changeable(1)  # parts of a minibatch, in memory one after another
    packing: bool = changeable(False)  # responses share rows in the updates: the same gradient.
    # Empty micro-batches are skipped, so that many small ones save the most
    logits_chunk: int = 0  # response positions whose logits are held at a time; where these are not
    # all the backward pass computes them again. 0 is all, on one device up to 256 MB, else 64 MB
    samples_per_prompt: int = 1  # responses of an iteration to each of its prompts
    keep_samples: int = 0  # responses to each prompt that are learned from: half of them those of
    # the highest scores, half those of the lowest; 0 is all
    max_rollouts: int = 1  # above 1: prompts whose responses all have one score are replaced by
    # others, from at most so many batches of prompts an iteration
    max_concurrent: int = 0  # responses decoded at a time; 0 is all. Fewer save work where lengths
    # differ much, and a KV cache of so many rows: when a response ends, the next prompt enters
    min_free_slots: int = 0  # free rows that prompts wait for, to enter together; 0 is a quarter

    # Prompts, responses and how they are sampled

    max_prompt_length: int = 64  # tokens; longer prompts are left out and counted
    prompt_buckets: int = 1  # widths in tokens that prompts are padded to: the longest one's, its
    # half, its quarter, ...; more than 1 puts prompts of like length into a batch
    response_length: int = 64  # tokens at most
    stop_tokens: tuple[str, ...] = ()  # what ends a response besides EOS and the tokens that the
    # model's files declare: tokens as they are spelled in the vocabulary, and any other text, such
    # as "\n\nHuman:", with the token that completes it
    temperature: float = changeable(1.0)  # divides the logits, in sampling and in training
    top_k: int = 0  # the likeliest tokens; 0 is off
    top_p: float = 1.0  # 1 is off
    min_p: float = 0.0  # 0 is off
    score_at: str = "eos"  # where the reward model reads a response that has stopped at another
    # token than EOS, with which its training texts end: at an EOS put behind it, or "last", at its
    # last token
    reference_responses: int = 0  # responses of the reference to each prompt: the score is then how
    # probably a response is preferred to one of them, the mean sigmoid of the difference of scores
    # (PAR), from 0 to 1; 0 is off
    missing_eos: str = "keep"  # the score of a response that was cut off: or "penalty", "replace"
    missing_eos_score: float = changeable(1.0)  # what is subtracted from it, or put in its place
    score_normalization: bool = False  # scores less the mean of all scores of the run so far, in
    # their standard deviations; score_clip, missing_eos and the penalties come after it
    score_clip: Limit = changeable(math.inf)  # scores are cut to at most this far from 0, before
    # missing_eos; inf is off
    length_penalty: float = changeable(0.0)  # what a response loses for each of its tokens; 0 is
    # off
    length_penalty_free: int = changeable(0)  # tokens of a response that cost nothing
    overlong_tokens: int = changeable(0)  # the last tokens of response_length, over which a
    # response loses up to 1, the more it reaches into them; 0 is off

    # Log-probabilities that the ratio starts from

    old_logprobs: str = changeable("rollout")  # what ratio and KL start from: the log-probs of the
    # sampling, or "recompute", one pass more, as the update computes them: in bfloat16 they differ
    replay_experts: bool = changeable(False)  # updates, and recomputed log-probs, have the experts
    # that the rollout chose, by weights of the router as it is now (R3); False: they choose again
    tis_clip_low: float = changeable(1.0)  # with "recompute": the least weight of a token, which is
    # the ratio of the two probabilities, times its advantage
    tis_clip_high: float = changeable(1.0)  # the greatest; 1 and 1 is off, 0 and 2 is usual
    importance: str = changeable("token")  # the weights within these limits: "token"; or that of
    # the whole response for each of its tokens, "sequence", the product of the tokens' ratios, or
    # "sequence_mean", their geometric mean; or "icepop", by token, and 0 outside of the limits

    # Rewards, advantages and losses

    advantage: str = "gae"  # by the critic's values; or without a critic: "rloo", "grpo",
    # "dr_grpo", "reinforce_plus_plus_baseline" against the other samples of a prompt,
    # "reinforce_plus_plus" over all tokens, "reinforce" against a running mean, "remax" against a
    # greedy response, one more for each prompt; or "module:function", see "How to add an advantage"
    loss: str = "clip"  # of the policy; or "dual_clip", "gspo", "cispo", "dppo", "kl_penalty",
    # "policy_gradient"; "clip_cov", "kl_cov", which keep up the entropy; with
    # old_logprobs="recompute" also "decoupled"; or "module:function", see "How to add a loss"
    aggregation: str = "token_mean"  # of the tokens' losses: their mean; or "sequence_mean", the
    # mean of the means of responses; or "constant", their sum by responses x response_length
    kl_coef: float = changeable(0.05)  # reward per nat
    kl_estimator: str = "k1"  # of the penalty; or, with any_kl_estimator, "k2", "k3"
    any_kl_estimator: bool = changeable(False)  # take k2 and k3, which as a reward push the policy
    # away from the reference
    ref_ema_decay: float = 1.0  # what stays of the reference after an iteration; the rest of it is
    # the policy's. 1 keeps the one that the run began with
    ref_reset_every: int = 0  # iterations after which the policy becomes the reference; 0 is never
    kl_control: str = "fixed"  # or "adaptive"
    target_kl: float = changeable(6.0)  # nats per response, adaptive only
    kl_horizon: float = changeable(10_000.0)  # episodes, adaptive only; at least 0.2 of
    # rollout_batch_size
    gamma: float = changeable(1.0)  # discount a token
    gae_lambda: float = changeable(0.95)  # 0 is one-step differences, 1 the whole return
    gae_lambda_alpha: float = changeable(0.0)  # above 0: of a response of l tokens gae_lambda is
    # max(0, 1 - 1 / (alpha l)); 0.05 is usual for long ones
    value_gae_lambda: float = changeable(-1.0)  # of the returns that the critic learns; -1 is that
    # of the advantages
    baseline_decay: float = changeable(0.9)  # with advantage="reinforce": what stays after an
    # iteration of the running mean of the whole reward of a response, with its KL penalty
    clip_range: Limit = changeable(0.2)  # of the probability ratio, around 1; 1 is no lower limit,
    # inf no clip
    clip_range_high: float = changeable(0.0)  # of the ratio above 1, at least clip_range
    # or, where that is 1, any; 0 is the same as clip_range
    whiten_rewards: bool = False  # scale the rewards of an iteration's tokens to a variance of 1
    whiten_advantages: bool = True  # scale those of "gae" to a mean of 0 and a variance of 1
    value_clip_range: Limit = changeable(0.2)  # of the critic's change, in units of reward; inf is
    # off
    value_bins: int = 0  # number of bins of value_range that the critic gives logits of: their mean
    # is the value, and cross-entropy (HL-Gauss) the loss; 0 is a critic that gives the value
    value_range: tuple[float, ...] = ()  # with value_bins: the lowest and the highest return
    num_critics: int = 1  # number of critics, of which the mean is the value; each has a random
    # head of its own, and learns the responses to every num_critics-th prompt
    agreed_fraction: float = changeable(0.0)  # of the tokens, those on whose value several critics
    # agree most: they teach the policy nothing; 0 is off, 0.2 is usual
    disputed_fraction: float = changeable(0.0)  # of the tokens, those on whose value several
    # critics disagree most: they have no entropy bonus; 0 is off
    vf_coef: float = changeable(0.1)  # weight of the value loss; Adam divides it out but for
    # max_grad_norm
    entropy_coef: float = changeable(0.0)  # weight of the entropy, per nat
    target_entropy: float = 0.0  # nats a token: entropy_coef rises by entropy_coef_step after an
    # iteration with less entropy and falls by it, to 0 at least, after one with more; 0 is off
    entropy_coef_step: float = changeable(0.005)  # of that, per nat
    dual_clip: float = changeable(3.0)  # with loss="dual_clip": most that a ratio counts where the
    # advantage is below 0
    penalty_coef: float = changeable(1.0)  # with loss="kl_penalty": of the KL from the old policy;
    # with "kl_cov": of the size of the log-ratio, per nat, for the tokens that pay it
    penalty_target_kl: float = 0.0  # nats a token: penalty_coef doubles after an iteration that has
    # moved the policy by more than 1.5 of it, halves after one by less than 1 / 1.5; 0 is off
    divergence_limit: float = changeable(0.15)  # with loss="dppo": of the change of a probability
    covariance_fraction: float = changeable(2e-4)  # with loss="clip_cov": share of a minibatch's
    # tokens without a gradient; with "kl_cov": the share that pays the penalty; at least one does
    covariance_low: float = changeable(1.0)  # with loss="clip_cov": of these tokens, what their
    # covariance of log-prob and advantage is above
    covariance_high: Limit = changeable(5.0)  # and below; inf is no limit
    behavior_weight_limit: Limit = changeable(math.inf)  # with loss="decoupled": the greatest
    # weight of a token, its old probability by that of the sampling; inf is none
    kl_loss_coef: float = changeable(0.0)  # of a KL from the reference in the loss, per nat: k3,
    # weighted by the ratio; 0 is off
    critic_warmup: int = changeable(0)  # iterations, the first, in which the policy stays as it is
    critic_warmup_tolerance: float = 0.0  # the warm-up ends early where value/explained_variance
    # has settled: its means over about five and two iterations differ by less; 0 is off
    value_updates: int = 1  # passes of the critic over a rollout, for each of the policy's
    value_num_minibatches: int = 0  # optimizer steps of such a pass; 0 is num_minibatches
    stop_kl: Limit = changeable(math.inf)  # nats a token: the updates of an iteration end at the
    # minibatch whose policy/approx_kl is above it; inf is off, 0.02 is usual
    max_ref_kl: Limit = changeable(math.inf)  # nats a response: above it, kl/ref ends the run

    # Output

    sample_every: int = changeable(10)  # iterations between samples of the same prompts
    num_samples: int = changeable(8)  # prompts in samples.jsonl
    evaluate_every: int = changeable(0)  # iterations between evaluations by the judges of
    # `evaluate`, logged as eval/...; 0 is off
    evaluate_prompts: int = changeable(32)  # prompts of each: the last ones of evaluate.prompts
    save_every: int = changeable(20)  # iterations between checkpoints
    keep: str | int = changeable(2)  # number of newest checkpoints, or "best:METRIC": as sft.keep

    def __post_init__(self):
        check_ppo(self)

    @property
    def update_batch_size(self) -> int:
        """Responses of an iteration that are learned from."""
        kept = self.keep_samples or self.samples_per_prompt
        return self.rollout_batch_size // self.samples_per_prompt * kept

    @property
    def reference_moves(self) -> bool:
        """Whether the reference is another one in later iterations."""
        return self.ref_ema_decay < 1 or self.ref_reset_every > 0

    @property
    def critic_has_optimizer(self) -> bool:
        """Whether the critic takes optimizer steps of its own."""
        given = self.value_optimizer != ValueOptimizerSettings()
        return given or self.value_updates > 1 or self.value_num_minibatches > 0
