"""The Transformer behind `Network`, for all of `families.FAMILIES`.

`build` makes policy, value and reward networks of a `ModelConfig`; `lora` and `partition` say which
parameters are trained; `families` maps checkpoints. Pure: imports `core` alone.
Start with `build`, then `transformer`.
"""

from ppo_jax.models.attention import KVCache
from ppo_jax.models.axes import ShardingConstraint
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
from ppo_jax.models.transformer import Transformer

__all__ = [
    "KVCache",
    "ModelConfig",
    "RopeScaling",
    "ShardingConstraint",
    "Transformer",
    "init_lora",
    "merge_lora",
    "policy_apply",
    "policy_network",
    "policy_value_network",
    "reward_network",
    "split_params",
    "trunk_network",
    "value_network",
]
