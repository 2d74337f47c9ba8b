"""Weights of what was sampled by one policy and is trained as another's.

Dimensions: B sequences, T response tokens. A surrogate loss is linear in the advantages, so it is
enough to multiply these by the weights.
"""

import chex
import jax
import jax.numpy as jnp

from ppo_jax.core.checks import Number, assert_numbers
from ppo_jax.core.masking import masked_mean, zero_padding
from ppo_jax.core.policy_losses import Metrics, probability_ratio

LEVELS = ("token", "sequence", "sequence_mean")
OUTSIDE = ("truncate", "drop")
CORRECTIONS = {  # what `PPOOptions.importance` names: arguments of `importance_weights`
    "token": dict(level="token", outside="truncate"),
    "sequence": dict(level="sequence", outside="truncate"),
    "sequence_mean": dict(level="sequence_mean", outside="truncate"),
    "icepop": dict(level="token", outside="drop"),
}


def importance_weights(
    logprobs: jax.Array,
    sampled_logprobs: jax.Array,
    mask: jax.Array,
    *,
    low: Number,
    high: Number,
    level: str = "token",
    outside: str = "truncate",
) -> tuple[jax.Array, Metrics]:
    """Importance weights within limits, for tokens that came from a slightly different policy:
    decoding one token at a time rounds differently.

    w = exp(d), with d of each token logprobs - sampled_logprobs (level "token"), its sum over the
    sequence ("sequence": the ratio of the probabilities of whole responses) or its mean over it
    ("sequence_mean": their geometric mean a token). d beyond ±20 counts as ±20. Then

    w in [low, high]; outside: the nearer limit ("truncate") or 0 ("drop").

    Args:
        logprobs: [B, T] float, as the update computes them.
        sampled_logprobs: [B, T] float, of the same tokens as the rollout computed them.
        mask: [B, T] bool, True counts; what the others hold elsewhere has no effect. A row is one
            response.
        low: the lowest weight, at least 0. low = high = 1 and "truncate" is no weight.
        high: the highest weight.
        level: one of `LEVELS`.
        outside: one of `OUTSIDE`.

    Returns:
        (weights [B, T] float32, a constant, finite where masked; metrics): the mean and the largest
        of |logprobs - sampled_logprobs| as policy/rollout_logprob_error and
        policy/rollout_logprob_error_max; policy/importance_weight, the mean over tokens.

    Raises:
        ValueError: level or outside is unknown.

    References: truncated weights: Espeholt et al. 2018, https://arxiv.org/abs/1802.01561. A token
    with a weight outside of the limits dropped (IcePop): Ling team 2025,
    https://arxiv.org/abs/2510.18855.

    >>> new, sampled = jnp.log(jnp.array([[0.6, 0.5]])), jnp.log(jnp.array([[0.2, 0.5]]))
    >>> mask = jnp.array([[True, True]])
    >>> [importance_weights(new, sampled, mask, low=0, high=2, outside=outside)[0].round(3).tolist()
    ...  for outside in OUTSIDE]
    [[[2.0, 1.0]], [[0.0, 1.0]]]
    """
    chex.assert_equal_shape([logprobs, sampled_logprobs, mask])
    chex.assert_rank(mask, 2)
    chex.assert_type([logprobs, sampled_logprobs, mask], [float, float, bool])
    assert_numbers(at_least=0, low=low, high=high)
    for name, choice, choices in (("level", level, LEVELS), ("outside", outside, OUTSIDE)):
        if choice not in choices:
            raise ValueError(f"unknown {name} {choice!r}; choose from {list(choices)}")

    logprobs, sampled = jax.lax.stop_gradient((logprobs, sampled_logprobs))
    new, old = zero_padding(mask, logprobs, sampled)
    difference = log_weight = new - old
    if level != "token":
        log_weight = jnp.broadcast_to(difference.sum(axis=1, keepdims=True), mask.shape)
    if level == "sequence_mean":
        count = mask.sum(axis=1, keepdims=True).astype(jnp.float32)
        log_weight = log_weight / jnp.maximum(count, 1.0)
    ratio = probability_ratio(log_weight)
    weights = jnp.clip(ratio, low, high)
    if outside == "drop":
        weights = jnp.where((ratio >= low) & (ratio <= high), ratio, 0.0)
    return weights, {
        "policy/rollout_logprob_error": masked_mean(jnp.abs(difference), mask),
        "policy/rollout_logprob_error_max": jnp.max(jnp.abs(difference), initial=0.0),
        "policy/importance_weight": masked_mean(weights, mask),
    }
