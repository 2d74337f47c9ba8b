"""Whether the models of a run have what their stages ask of them, by their shapes alone."""

import dataclasses

from ppo_jax.config import Config
from ppo_jax.lora import check_targets
from ppo_jax.networks import ModelConfig
from ppo_jax.plan import Shape
from ppo_jax.stage_settings import LoRASettings, PPOSettings


def check_policy(stage: str, config: Config, start: Shape):
    """A stage that trains a policy has one, and has what is to be trained."""
    trainable = getattr(config, stage).trainable
    if start.kind != "policy":
        raise ValueError(
            f"ppo.init_from must be a policy, got {config.ppo.init_from!r}, which scores texts"
        )
    if trainable == "head" and start.config.tie_embeddings:
        raise ValueError(
            f"{stage}.trainable must be 'all', 'lora' or a number of top layers for a model that "
            "ties its head to the token table, got 'head'"
        )
    check_part(f"{stage}.trainable", trainable, getattr(config, stage).lora, start.config)


def check_reward(config: Config, start: Shape):
    """A reward model has the layers that are kept, and of them what is to be trained."""
    settings, depth = config.reward, start.config.num_layers
    check_depth("reward.num_layers", settings.num_layers, depth)
    lower = dataclasses.replace(start.config, num_layers=settings.num_layers or depth)
    check_part("reward.trainable", settings.trainable, settings.lora, lower)


def check_ppo(settings: PPOSettings, policy: Shape, score: Shape | None):
    """Lengths fit the policy; the reward model scores, and reads what the policy writes."""
    context = min([policy.config.max_length] + ([score.config.max_length] if score else []))
    total = settings.max_prompt_length + settings.response_length
    if total > context:
        raise ValueError(
            f"ppo.max_prompt_length + ppo.response_length must be at most {context} (the models' "
            f"context), got {settings.max_prompt_length} + {settings.response_length}"
        )
    if score is not None and score.kind != "reward":
        raise ValueError(
            f"ppo.reward_model must be a reward model, got the policy {settings.reward_model!r}"
        )
    if score is not None and policy.tokenizer.get_vocab() != score.tokenizer.get_vocab():
        raise ValueError(
            "ppo.reward_model must have the policy's tokenizer, got one with "
            f"{len(score.tokenizer)} tokens where the policy has {len(policy.tokenizer)}, or other "
            "ids. Use a reward_function, which gets text."
        )
    critic = policy if score is None or settings.critic_init_from == "policy" else score
    check_part("ppo.value_trainable", settings.value_trainable, settings.lora, critic.config)


def check_part(field: str, trainable: str | int, lora: LoRASettings, config: ModelConfig):
    """What is to be trained is in the model: so many layers, or the places of the adapters."""
    check_depth(field, trainable, config.num_layers)
    if trainable == "lora":
        stage, width = field.split(".")[0], config.embed_dim
        check_targets(config, lora.targets, f"{stage}.lora.targets")
        if lora.rank > width:
            raise ValueError(
                f"{stage}.lora.rank must be at most {width}, the model's width, got {lora.rank}"
            )


def check_depth(field: str, count: str | int, depth: int):
    if isinstance(count, int) and count > depth:
        raise ValueError(f"{field} must be at most {depth}, the model's layers, got {count}")
