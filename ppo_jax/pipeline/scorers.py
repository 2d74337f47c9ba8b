"""What is asked of reward models before a run begins."""

from collections.abc import Sequence

from ppo_jax.config.objectives import AVERAGE
from ppo_jax.config.ppo import PPOSettings
from ppo_jax.inference.generate import make_sampling
from ppo_jax.io.model_spec import ModelSpec, reread_reason
from ppo_jax.training.ppo_setup import make_options


def check_others(
    settings: PPOSettings, policy: ModelSpec, score: ModelSpec | None, others: Sequence[ModelSpec]
):
    """Several reward models score, read what the policy writes, and have one shape where their
    weights are averaged."""
    named = zip(settings.other_reward_models, others, strict=True)
    for name, spec in [(settings.reward_model, score), *named] if others else ():
        if spec.kind != "reward":
            rule = f"reward models, got the policy {name!r}"
            raise ValueError(f"ppo.other_reward_models must be {rule}")
        if reason := reread_reason(policy, spec):
            raise ValueError(
                "ppo.other_reward_models must be () where a reward model reads text, got "
                f"{list(settings.other_reward_models)}: of {name!r}, {reason}"
            )
        total = settings.max_prompt_length + settings.response_length + reads_eos(settings, policy)
        if total > spec.config.max_length:
            raise ValueError(
                f"ppo.max_prompt_length + ppo.response_length must be at most "
                f"{spec.config.max_length} (the context of {name!r}, an EOS with it), got {total}"
            )
        if settings.reward_rule == AVERAGE and spec.config != score.config:
            raise ValueError(
                f"ppo.reward_rule must be another than {AVERAGE!r}: {name!r} has another shape "
                f"than {settings.reward_model!r}"
            )


def check_text_reward(settings: PPOSettings, score: ModelSpec, reason: str):
    """A reward model that reads text has room for a response, and no critic starts from it."""
    if settings.critic_init_from == "reward_model":
        raise ValueError(
            "ppo.critic_init_from must be 'policy' or '', got 'reward_model': the critic reads the "
            f"policy's tokens, and the reward model text, as {reason}"
        )
    if settings.score_at != "eos":
        raise ValueError(
            f"ppo.score_at must be 'eos', got {settings.score_at!r}: the reward model reads text "
            f"without the policy's stop token, as {reason}"
        )
    if settings.response_length >= score.config.max_length:
        raise ValueError(
            f"ppo.response_length must be below {score.config.max_length} (the reward model's "
            f"context), got {settings.response_length}"
        )


def reads_eos(settings: PPOSettings, policy: ModelSpec) -> bool:
    """Whether the reward model reads some responses at an EOS put behind them."""
    sampling = make_sampling(vars(settings), policy.tokenizer)
    return make_options(settings, sampling, policy.tokenizer.eos_token_id).score_eos is not None
