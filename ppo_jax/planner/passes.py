"""Rollouts and passes before an update: which there are, and the analytic flops of passes."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from ppo_jax.algorithms.greedy import greedy_options
from ppo_jax.algorithms.minibatches import whole_groups
from ppo_jax.algorithms.passes import passes_in_common
from ppo_jax.algorithms.references import reference_options
from ppo_jax.config.objectives import AVERAGE, needs_critic, needs_greedy
from ppo_jax.config.ppo import PPOSettings
from ppo_jax.inference.generate import prompt_width
from ppo_jax.models.config import ModelConfig
from ppo_jax.planner.flops import TrainedParts, scoring_flops
from ppo_jax.planner.layers import head_flops
from ppo_jax.planner.models import Models
from ppo_jax.rollout.sampling import Sampling
from ppo_jax.training.ppo_setup import abstract_options


def networks_in_common(settings: PPOSettings) -> tuple[str, ...]:
    """See `passes_in_common`: the passes that the update makes in place of scoring."""
    has_critic, own_optimizer = needs_critic(settings.advantage), settings.critic_has_optimizer
    options = abstract_options(settings)
    return passes_in_common(options, has_critic=has_critic, own_optimizer=own_optimizer)


def passes_before_update(
    settings: PPOSettings,
    models: Models,
    trunks: Sequence[int],
    trained: Sequence[TrainedParts],
    in_common: Sequence[str],
    sizes: dict[str, Any],
) -> float:
    """The passes of the networks that are trained which an experience needs, and which are none of
    the update's own: of the critic, of the policy where log-probs are recomputed. A critic on the
    policy is a pass of its body, or a head on the policy's."""
    s, policy, critic = settings, models.policy, models.critic
    recomputes = s.old_logprobs == "recompute" and "policy" not in in_common
    has_values = needs_critic(s.advantage) and "value" not in in_common
    prompts = s.max_prompt_length / sizes["samples"]
    positions = s.rollout_batch_size * (prompts + s.response_length - 1)
    of_policy = positions * policy.num_layers * trained[0].adapter_flops
    count = functools.partial(scoring_flops, policy, reward=None, **sizes)
    flops = 0.0
    if recomputes:
        flops += count(None, trunks=trunks) + of_policy
    if has_values and critic is not None:
        adapters = s.num_critics * critic.num_layers * trained[1].adapter_flops
        flops += count(critic, policy_passes=0, trunks=trunks) + positions * adapters
    if has_values and s.shared_critic and recomputes:
        flops += s.rollout_batch_size * s.response_length * value_head_flops(s, policy)
    elif has_values and s.shared_critic:
        heads = dict(value_outputs=s.num_critics * (s.value_bins or 1), num_critics=1)
        body = functools.partial(count, policy, trunks=(0, trunks[0], 0))
        flops += body(policy_passes=0, **heads) + of_policy
    return flops


def value_head_flops(settings: PPOSettings, policy: ModelConfig) -> int:
    """The heads of critics on the policy, for one position."""
    return head_flops(policy, settings.num_critics * (settings.value_bins or 1))


def flops_of_other_scores(
    settings: PPOSettings,
    models: Models,
    trunks: Sequence[int],
    sizes: dict[str, Any],
    others: Mapping[str, tuple[int, Sampling]],
) -> float:
    """What further reward models read of the rollout, and all of them of the other rollouts."""
    s, reward = settings, None if models.reads_text else models.reward
    read = {"rollout": (s.rollout_batch_size, s.samples_per_prompt)}
    for name, (count, sampling) in others.items():
        read[name] = count, sampling.samples_per_prompt
    of_texts = functools.partial(scoring_flops, models.policy, None, policy_passes=0)
    more, flops = () if s.reward_rule == AVERAGE else models.others, 0.0
    for name, (count, samples) in read.items():
        how = sizes | dict(sequences=count, samples=samples)
        if name != "rollout" and reward is not None:
            flops += of_texts(reward, trunks=trunks, **how)
        flops += sum(of_texts(config, **how) for config in more)
    return flops


def shared_samples(settings: PPOSettings, shards: int) -> tuple[int, int, int]:
    """How many responses share their prompt's part of the work in (scoring, the policy's update,
    the critic's), see `grouped_samples`."""
    s, options = settings, abstract_options(settings)
    own = s.value_num_minibatches if s.critic_has_optimizer else 0
    counts = s.num_minibatches, own or s.num_minibatches
    groups = [whole_groups(options, s.update_batch_size, count) for count in counts]
    of_updates = (options.learned_samples if x and x % shards == 0 else 1 for x in groups)
    return s.samples_per_prompt, *of_updates


def other_rollouts(settings: PPOSettings) -> dict[str, tuple[int, Sampling]]:
    """{rollout of an iteration besides that of the policy: (its responses, how it samples)}."""
    options, found = abstract_options(settings), {}
    num_prompts = settings.rollout_batch_size // settings.samples_per_prompt
    if needs_greedy(settings.advantage):
        found["greedy"] = num_prompts, greedy_options(options).sampling
    if count := settings.reference_responses:
        found["reference"] = num_prompts * count, reference_options(options).sampling
    return found


def num_other_responses(settings: PPOSettings) -> int:
    """Responses of these rollouts together."""
    return sum(count for count, _ in other_rollouts(settings).values())


def text_width(settings: PPOSettings, reward: ModelConfig) -> int:
    """Tokens that texts are padded to for a reward model that reads them, if it has as many for
    one as the policy."""
    longest = settings.max_prompt_length + settings.response_length
    return min(prompt_width(longest), reward.max_length)
