"""The functions that `ppo.advantage` and `ppo.loss` name: the library's, or one of the user's."""

import functools
from collections.abc import Callable, Mapping

from ppo_jax.config.parsing import failure, load_function
from ppo_jax.core.advantages import gae
from ppo_jax.core.covariance import clip_cov_policy_loss, kl_cov_policy_loss, token_choices
from ppo_jax.core.critic_free import (
    grpo_advantages,
    reinforce_advantages,
    reinforce_plus_plus_advantages,
    remax_advantages,
    rloo_advantages,
)
from ppo_jax.core.named import (
    ADVANTAGE_INPUTS,
    LOSS_INPUTS,
    fields_named,
    parameters,
    reads_greedy,
    reads_values,
    unknown_parameters,
)
from ppo_jax.core.off_policy_losses import (
    cispo_policy_loss,
    decoupled_policy_loss,
    dppo_policy_loss,
)
from ppo_jax.core.policy_losses import (
    clipped_policy_loss,
    dual_clip_policy_loss,
    kl_penalty_policy_loss,
    vpg_policy_loss,
)
from ppo_jax.core.sequence_losses import gspo_policy_loss
from ppo_jax.core.types import Hyperparameters

ADVANTAGES: Mapping[str, Callable] = {
    "gae": gae,
    "rloo": rloo_advantages,
    "grpo": grpo_advantages,
    "dr_grpo": functools.partial(grpo_advantages, scale_by_std=False),
    "reinforce_plus_plus": functools.partial(reinforce_plus_plus_advantages, group_size=None),
    "reinforce_plus_plus_baseline": reinforce_plus_plus_advantages,
    "reinforce": reinforce_advantages,
    "remax": remax_advantages,
    "leave_one_out": rloo_advantages,
}
FORMER = ("leave_one_out",)  # names until 0.2, still taken
LOSSES: Mapping[str, Callable] = {
    "clip": clipped_policy_loss,
    "dual_clip": dual_clip_policy_loss,
    "gspo": gspo_policy_loss,
    "cispo": cispo_policy_loss,
    "dppo": dppo_policy_loss,
    "decoupled": decoupled_policy_loss,
    "clip_cov": clip_cov_policy_loss,
    "kl_cov": kl_cov_policy_loss,
    "kl_penalty": kl_penalty_policy_loss,
    "policy_gradient": vpg_policy_loss,
}
NUMBERS = fields_named(Hyperparameters)
AVERAGE = "average_weights"  # the `ppo.reward_rule` of one model in place of several


def advantage_function(name: str) -> Callable:
    """The estimator of advantages that `ppo.advantage` names.

    Raises:
        ValueError: there is none, or it asks for what no estimator is given.
    """
    return resolve(name, ADVANTAGES, "ppo.advantage", (*ADVANTAGE_INPUTS, *NUMBERS))


def loss_function(name: str) -> Callable:
    """The loss of the policy that `ppo.loss` names; raises as `advantage_function` does."""
    return resolve(name, LOSSES, "ppo.loss", (*LOSS_INPUTS, *NUMBERS))


def loss_parameters(name: str) -> set[str]:
    """What the loss that `ppo.loss` names reads, itself or in the choice of tokens made for it.

    >>> "covariance_low" in loss_parameters("clip_cov"), "clip_range" in loss_parameters("kl_cov")
    (True, False)
    """
    loss = loss_function(name)
    return set(parameters(loss)).union(*map(parameters, token_choices(loss).values()))


def resolve(name: str, known: Mapping[str, Callable], field: str, offered: tuple) -> Callable:
    if name in known:
        return known[name]
    if ":" not in name:
        names = [x for x in known if x not in FORMER]
        raise ValueError(f"{field} must be one of {names} or 'module:function', got {name!r}")
    function = load_function(name, field)
    if unknown := unknown_parameters(function, offered):
        inputs = ", ".join(x for x in offered if x not in NUMBERS)
        raise ValueError(
            f"{field} {name} asks for {', '.join(unknown)}; there is {inputs}, and the numbers "
            f"{', '.join(sorted(NUMBERS))}"
        )
    return told(function, f"{field} {name}")


TOLD: dict[str, Callable] = {}  # a program is compiled for a function, so there is one of each


def told(function: Callable, name: str) -> Callable:
    """A function of the user's whose errors are told by its name."""
    if name in TOLD and TOLD[name].__wrapped__ is function:
        return TOLD[name]

    @functools.wraps(function)
    def call(**given):
        try:
            return function(**given)
        except Exception as error:
            raise failure(name, error) from error

    TOLD[name] = call
    return call


def needs_critic(advantage: str) -> bool:
    """Whether the estimator that a setting names reads the values of a critic.

    >>> needs_critic("gae"), needs_critic("rloo")
    (True, False)
    """
    return reads_values(advantage_function(advantage))


def keeps_baseline(advantage: str) -> bool:
    """Whether it takes off a running mean of responses' rewards, which is then in the state.

    >>> keeps_baseline("reinforce"), keeps_baseline("rloo")
    (True, False)
    """
    return "baseline" in parameters(advantage_function(advantage))


def needs_greedy(advantage: str) -> bool:
    """Whether it compares a response to a greedy one to the same prompt.

    >>> needs_greedy("remax"), needs_greedy("rloo")
    (True, False)
    """
    return reads_greedy(advantage_function(advantage))


def needs_groups(advantage: str) -> bool:
    """Whether it compares the responses to a prompt.

    >>> needs_groups("gae"), needs_groups("rloo"), needs_groups("reinforce_plus_plus")
    (False, True, False)
    """
    return "group_size" in parameters(advantage_function(advantage))
