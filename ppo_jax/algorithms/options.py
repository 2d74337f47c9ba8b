"""What an iteration is made of: its networks, and the options that shape its program."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from ppo_jax.algorithms.ensembles import RewardEnsemble
from ppo_jax.core.advantages import gae
from ppo_jax.core.checks import assert_counts
from ppo_jax.core.importance import CORRECTIONS
from ppo_jax.core.kl import (
    ESTIMATORS,
    REWARD_ESTIMATORS,
    REWARD_RULE,
)
from ppo_jax.core.named import (
    function_name,
    reads_behavior,
    reads_greedy,
    reads_values,
)
from ppo_jax.core.network import Network
from ppo_jax.core.policy_losses import clipped_policy_loss
from ppo_jax.core.sequence_losses import AGGREGATIONS
from ppo_jax.core.types import (
    Params,
)
from ppo_jax.rollout.sampling import Sampling


class Sampler(NamedTuple):
    """The policy as the rollout runs it, where it is sharded differently there."""

    policy: Network
    trunk: Network | None
    reshard: Callable[[Params], Params]  # once an iteration: to the rollout's dtype and sharding


class PPONetworks(NamedTuple):
    """The networks of one run.

    A network "on the trunk" reads the trunk's hidden states from the rollout; any other reads
    tokens. The policy is on the trunk whenever there is one.

    A critic "on the policy" has the policy's parameters besides its own, and both losses train
    them: its `token_statistics` then give (logprobs, entropies, values).
    """

    policy: Network
    value: Network | None = None  # None: advantages come without a critic
    reward: Network | RewardEnsemble | None = None  # None: scores come from outside
    trunk: Network | None = None
    value_on_trunk: bool = False
    value_on_policy: bool = False  # the critic is a head of the policy, see `policy_value_network`
    reward_on_trunk: bool = False
    sampler: Sampler | None = None  # None: policy and trunk as they are


CHOICES = {
    "aggregation": AGGREGATIONS,
    "importance": tuple(CORRECTIONS),
    "kl_control": ("adaptive", "fixed"),
    "kl_estimator": tuple(ESTIMATORS),
    "missing_eos": ("keep", "penalty", "replace"),
    "old_logprobs": ("recompute", "rollout"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOOptions:
    """What shapes the program of an iteration; the numbers are in `Hyperparameters`.

    Raises:
        ValueError: a choice is unknown, a count not possible, the estimator of the KL one that
            leads away from the reference, or an estimator of advantages or a loss that does not go
            with another option.
    """

    sampling: Sampling
    num_epochs: int  # passes over a rollout
    num_minibatches: int  # optimizer steps a pass
    max_rollouts: int = 1  # above 1: groups of equal scores are replaced, see `dynamic_sampling`
    num_micro_batches: int = 1  # of a minibatch, in memory one after the other
    packing: bool = False  # responses share rows in the update; empty micro-batches are skipped
    advantage: Callable = gae  # called by the names of its parameters, see `estimate_advantages`
    loss: Callable = clipped_policy_loss  # of the policy, likewise, see `experience_loss`
    aggregation: str = "token_mean"  # of the tokens' losses, see `aggregation_weights`
    value_updates: int = 1  # passes of a critic with an optimizer of its own, a pass of the policy
    value_num_minibatches: int = 0  # of such a pass; 0: num_minibatches
    num_critics: int = 1  # several have stacked parameters, and their mean is the value
    kl_estimator: str = "k1"  # of the penalty in the rewards
    any_kl_estimator: bool = False  # take one that leads away from the reference, see `kl_estimate`
    kl_control: str = "fixed"  # or "adaptive"
    whiten_rewards: bool = False  # to a variance of 1 over the tokens of the batch
    whiten_advantages: bool = True  # those of a critic, to a mean of 0 and a variance of 1
    missing_eos: str = "keep"  # the score of a response without a stop token, or "replace", or
    # "penalty": see `missing_eos_scores`
    old_logprobs: str = "rollout"  # those of the sampling, or "recompute"
    importance: str = "token"  # of the recomputed ones, whose weight and what of those outside of
    # the limits, see `CORRECTIONS`
    score_eos: int | None = None  # the `eos_id` of `response_scores`
    replay_experts: bool = False  # the update's passes have the experts of the rollout (R3)
    keep_samples: int = 0  # of a prompt, that are learned from, see `extreme_responses`; 0: all
    reference_responses: int = 0  # M of the reference to each prompt, see `par_scores`; 0: none

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"unknown {name} {getattr(self, name)!r}; choose from {list(allowed)}"
                )
        counts = ("num_epochs", "num_minibatches", "num_micro_batches", "value_updates")
        counts += ("max_rollouts", "num_critics")
        assert_counts(**{name: getattr(self, name) for name in counts})
        assert_counts(at_least=0, value_num_minibatches=self.value_num_minibatches)
        assert_counts(at_least=0, reference_responses=self.reference_responses)
        if self.reference_responses and self.max_rollouts > 1:
            raise ValueError(
                "reference_responses need max_rollouts=1: they are to the prompts of one rollout"
            )
        samples, kept = self.sampling.samples_per_prompt, self.keep_samples
        if kept and not (0 < kept < samples and kept % 2 == 0):
            raise ValueError(
                f"keep_samples must be 0, or even and from 2 to below {samples}, got {kept}"
            )
        if reads_greedy(self.advantage) and self.max_rollouts > 1:
            rule = "needs max_rollouts=1: its greedy responses are to the prompts of one rollout"
            raise ValueError(f"{function_name(self.advantage)} {rule}")
        if reads_greedy(self.advantage) and self.whiten_rewards:
            rule = "needs whiten_rewards=False: greedy scores are not scaled"
            raise ValueError(f"{function_name(self.advantage)} {rule}")
        if self.num_critics > 1 and not reads_values(self.advantage):
            raise ValueError(
                f"{function_name(self.advantage)} needs no critic, got {self.num_critics} critics"
            )
        if reads_behavior(self.loss) and self.old_logprobs != "recompute":
            rule = 'needs old_logprobs="recompute": otherwise its two policies are one'
            raise ValueError(f"{function_name(self.loss)} {rule}")
        if not self.any_kl_estimator and self.kl_estimator not in REWARD_ESTIMATORS:
            raise ValueError(f"kl_estimator must be {REWARD_RULE}, got {self.kl_estimator!r}")

    @property
    def learned_samples(self) -> int:
        """Responses to a prompt that the update learns from."""
        return self.keep_samples or self.sampling.samples_per_prompt
