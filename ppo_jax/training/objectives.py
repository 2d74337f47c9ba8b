"""A user's own estimator of advantages and loss, called with shapes before anything is allocated.

Dimension key: B responses, T response tokens.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ppo_jax.algorithms.advantages import estimate_advantages
from ppo_jax.config.objectives import (
    ADVANTAGES,
    LOSSES,
    keeps_baseline,
    loss_function,
    needs_critic,
    needs_greedy,
)
from ppo_jax.config.ppo import PPOSettings
from ppo_jax.core.losses import ppo_loss
from ppo_jax.core.named import fields_of, is_of_sequences
from ppo_jax.core.types import Hyperparameters
from ppo_jax.training.ppo_setup import abstract_options, make_hyperparameters


def check_objectives(settings: PPOSettings) -> None:
    """Functions of the user's take what they are given and return what they should.

    Raises:
        ValueError: they return something else.
        FunctionFailed: they raise something.
    """
    given, numbers = arrays(settings), make_hyperparameters(settings)
    if settings.advantage not in ADVANTAGES:
        jax.eval_shape(functools.partial(advantages_of, settings), given, numbers)
    if settings.loss not in LOSSES:
        loss = functools.partial(loss_of, settings)
        jax.eval_shape(jax.grad(loss, has_aux=True), given["tokens"], given, numbers)


def arrays(settings: PPOSettings) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Shapes of an iteration's responses."""
    rows, tokens = (settings.rollout_batch_size,), settings.response_length
    return {
        "rows": jax.ShapeDtypeStruct(rows, jnp.float32),
        "tokens": jax.ShapeDtypeStruct((*rows, tokens), jnp.float32),
        "mask": jax.ShapeDtypeStruct((*rows, tokens), jnp.bool_),
        "places": jax.ShapeDtypeStruct((*rows, tokens), jnp.int32),
        "one": jax.ShapeDtypeStruct((), jnp.float32),
    }


def advantages_of(settings: PPOSettings, given: Mapping[str, Any], numbers: Hyperparameters) -> Any:
    more = {"baseline": given["one"]} if keeps_baseline(settings.advantage) else {}
    more |= {"greedy_scores": given["rows"]} if needs_greedy(settings.advantage) else {}
    return estimate_advantages(
        given["tokens"],
        given["tokens"] if needs_critic(settings.advantage) else None,
        given["mask"],
        numbers,
        abstract_options(settings),
        **more,
    )


def loss_of(
    settings: PPOSettings, logprobs: jax.Array, given: Mapping[str, Any], numbers: Hyperparameters
) -> Any:
    loss, x, mask = loss_function(settings.loss), given["tokens"], given["mask"]
    offered = {"behavior_logprobs": x, "dropped_mask": mask, "penalty_mask": mask}
    offered |= {"segment_ids": given["places"] if settings.packing else None}
    offered |= {"weights": None if settings.aggregation == "token_mean" else x}
    count = given["one"]
    return ppo_loss(
        logprobs,
        None,
        x,
        mask,
        old_logprobs=x,
        old_values=None,
        returns=None,
        advantages=x,
        policy_loss=loss,
        normalizer=count,
        num_sequences=count if is_of_sequences(loss) else None,
        **offered,
        **fields_of(numbers),
    )
