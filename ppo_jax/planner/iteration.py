"""Analytic flops of one PPO iteration, phase by phase."""

from collections.abc import Sequence
from typing import Any

from ppo_jax.config.ppo import PPOSettings
from ppo_jax.config.stages import LoRASettings
from ppo_jax.core.distributions import positions_at_once
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.partition import start_layer
from ppo_jax.planner.flops import (
    TrainedParts,
    rollout_flops,
    score_flops,
    scoring_flops,
    update_flops,
)
from ppo_jax.planner.layers import adapter_flops
from ppo_jax.planner.models import Models
from ppo_jax.planner.passes import (
    flops_of_other_scores,
    networks_in_common,
    num_other_responses,
    other_rollouts,
    passes_before_update,
    shared_samples,
    text_width,
    value_head_flops,
)
from ppo_jax.rollout.sampling import Sampling
from ppo_jax.training.ppo_setup import abstract_options


def analytic_flops(
    settings: PPOSettings,
    models: Models,
    starts: Sequence[int | None] = (None,) * 3,
    platform: str | None = None,
    shards: int = 1,
    devices: int = 1,
    again: bool = True,
) -> dict[str, float]:
    """What each phase should compute, on all devices together.

    Args:
        settings: the ppo section.
        models: the run's models.
        starts: the layers at which policy, critic and reward model start above the trunk.
        platform: of the devices, whose attention kernel it is, see `kernels.kernel_of`.
        shards: of a batch.
        devices: of the mesh.
        again: count what the backward pass computes once more, but for the models' `remat`: logits
            in chunks, the scores of long rows.
    """
    s, policy, trunk = settings, models.policy, starts[0] is not None
    sizes = dict(
        sequences=s.rollout_batch_size,
        prompt_length=s.max_prompt_length,
        response_length=s.response_length,
    )

    def chunk(rows):
        limits = dict(chunk=s.logits_chunk, devices=devices)
        return positions_at_once(rows, s.response_length, policy.vocab_size, **limits)

    kernels = dict(logits_chunk=chunk(s.rollout_batch_size) if again else 0, platform=platform)
    of_update = dict(again=again, sequences=s.update_batch_size)
    if again:
        num_parts = s.num_minibatches * s.num_micro_batches
        of_update |= dict(logits_chunk=chunk(s.update_batch_size // num_parts))
    parts = trained_networks(s, models, starts)
    flops = {
        "rollout": rollout_flops(
            policy,
            samples_per_prompt=s.samples_per_prompt,
            slots=s.max_concurrent,
            group=abstract_options(s).sampling.group(s.max_concurrent),
            trunk=trunk,
            **sizes,
        )
    }
    where = kernels, sizes, of_update, shared_samples(s, shards)
    flops |= passes_and_updates_flops(s, models, starts, parts, *where)
    for name, (count, sampling) in other_rollouts(s).items():
        flops[f"{name} rollout"] = other_rollout_flops(s, policy, count, sampling, trunk)
    if models.reads_text:
        width = text_width(s, models.reward)
        texts = s.rollout_batch_size + num_other_responses(s)
        flops["reward model"] = score_flops(models.reward, texts, width, platform)
    return flops


def passes_and_updates_flops(
    settings: PPOSettings,
    models: Models,
    starts: Sequence[int | None],
    trained: Sequence[TrainedParts],
    kernels: dict[str, Any],
    sizes: dict[str, Any],
    of_update: dict[str, Any],
    samples: tuple[int, int, int],
) -> dict[str, float]:
    """Scoring and update of `analytic_flops`, by the sizes of a rollout and of the updates."""
    s, policy, critic = settings, models.policy, models.critic
    reward = None if models.reads_text else models.reward
    trunks = [start or 0 for start in starts]
    where = dict(samples=samples[0], trunks=trunks)
    scoring = scoring_flops(policy, None, reward, **where, **kernels, **sizes)
    of_texts = sizes | dict(platform=kernels["platform"])
    scoring += flops_of_other_scores(s, models, trunks, of_texts, other_rollouts(s))
    kernels = kernels | dict(value_outputs=s.value_bins or 1, num_critics=s.num_critics)
    update = update_flops(
        policy,
        critic,
        num_epochs=s.num_epochs,
        value_updates=s.value_updates,
        trained=trained,
        samples=samples[1:],
        **kernels | sizes | of_update,
    )
    if s.shared_critic:
        outputs = s.num_epochs * s.update_batch_size * s.response_length
        update += 3 * outputs * value_head_flops(s, policy)
    if s.penalty_target_kl > 0:
        learned = abstract_options(s).learned_samples
        updated = sizes | dict(sequences=s.update_batch_size, samples=learned)
        update += scoring_flops(policy, None, None, trunks=trunks, **kernels, **updated)
    in_common = networks_in_common(s)
    of_rows = kernels | sizes | dict(samples=samples[0])
    passes = passes_before_update(s, models, trunks, trained, in_common, of_rows)
    return {
        "scoring": scoring + (not in_common) * passes,
        "update": update + bool(in_common) * passes,
    }


def trained_networks(
    settings: PPOSettings, models: Models, starts: Sequence[int | None]
) -> list[TrainedParts]:
    """Of the policy, and of the critic if there is one."""
    s, trunks = settings, [start or 0 for start in starts]
    parts = [trained_parts(models.policy, s.trainable, trunks[0], s.lora, "logits")]
    if models.critic is not None:
        parts.append(trained_parts(models.critic, s.value_trainable, trunks[1], s.lora, "scalar"))
    return parts


def other_rollout_flops(
    settings: PPOSettings, policy: ModelConfig, count: int, sampling: Sampling, trunk: bool
) -> float:
    """A rollout of so many responses besides that of the policy, see `other_rollouts`."""
    slots = min(settings.max_concurrent or count, count)
    return rollout_flops(
        policy,
        sequences=count,
        prompt_length=settings.max_prompt_length,
        response_length=settings.response_length,
        samples_per_prompt=sampling.samples_per_prompt,
        slots=slots,
        group=sampling.group(slots),
        trunk=trunk,
    )


def trained_parts(
    config: ModelConfig, trainable: str | int, trunk: int, lora: LoRASettings, head: str
) -> TrainedParts:
    """What has gradients in a network above a trunk; its head gives "logits" or a "scalar"."""
    if trainable == "lora":
        adapters, of_keys = (
            adapter_flops(config, targets, lora.rank)
            for targets in (lora.targets, sorted({"key", "value"} & set(lora.targets)))
        )
        return TrainedParts(
            adapter_flops=adapters, key_adapter_flops=of_keys, head=head == "scalar"
        )
    frozen = (start_layer(config, trainable) or 0) - trunk
    frozen_head = head == "logits" and config.tie_embeddings and trainable != "all"
    return TrainedParts(trunk=trunk, frozen_layers=frozen, head=not frozen_head)
