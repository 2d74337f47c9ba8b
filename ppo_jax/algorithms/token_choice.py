"""The tokens of a minibatch that a loss treats apart, chosen before it is split."""

import dataclasses
import functools
from collections.abc import Callable

import jax

from ppo_jax.core.covariance import token_choices
from ppo_jax.core.named import call_named, fields_of
from ppo_jax.core.types import Experience, Hyperparameters


def choose_tokens(
    minibatch: Experience, key: jax.Array, *, loss: Callable, hyperparameters: Hyperparameters
) -> Experience:
    """The minibatch with the choices that the loss has parameters for, see `TOKEN_CHOICES`.

    They are made by the old log-probs, which are there before the first forward pass: so a choice
    is that of the whole minibatch, whatever its micro-batches and their packing are. The published
    code takes those of the policy that is trained: the same at the first step on a rollout.
    """
    e = minibatch
    tokens = dict(logprobs=e.logprobs, advantages=e.advantages, mask=e.response_mask)
    offered = fields_of(hyperparameters) | tokens | dict(key=key)
    chosen = {name: call_named(choose, offered) for name, choose in token_choices(loss).items()}
    return dataclasses.replace(minibatch, **chosen)


def make_choice(
    loss: Callable, hyperparameters: Hyperparameters
) -> Callable[[Experience, jax.Array], Experience] | None:
    """(minibatch, key) -> minibatch; None where the loss has no choice to be made."""
    if not token_choices(loss):
        return None
    return functools.partial(choose_tokens, loss=loss, hyperparameters=hyperparameters)


def split_keys(keys: jax.Array, num_steps: int) -> tuple[jax.Array, jax.Array]:
    """Keys [E] of epochs as (keys [E] of their shuffles, keys [E num_steps] of their choices)."""
    pairs = jax.vmap(jax.random.split)(keys)
    of_steps = jax.vmap(lambda key: jax.random.split(key, num_steps))(pairs[:, 1])
    return pairs[:, 0], of_steps.reshape(-1)
