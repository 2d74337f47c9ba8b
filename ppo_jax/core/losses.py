"""Losses of SFT, of the reward model, and the whole one of a PPO update: (loss, metrics) each.

Dimensions: B sequences, T response tokens. They add up over micro-batches as those of
`policy_losses` do.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from ppo_jax.core.checks import Number, assert_numbers
from ppo_jax.core.masking import masked_mean, zero_padding
from ppo_jax.core.named import call_named, function_name, is_of_sequences
from ppo_jax.core.policy_losses import Metrics, clipped_policy_loss
from ppo_jax.core.value_losses import clipped_value_loss


def ppo_loss(
    logprobs: jax.Array,
    values: jax.Array | None,
    entropies: jax.Array,
    mask: jax.Array,
    *,
    old_logprobs: jax.Array,
    old_values: jax.Array | None,
    advantages: jax.Array,
    returns: jax.Array | None,
    policy_loss: Callable = clipped_policy_loss,
    clip_range: Number = 0.2,
    clip_range_high: Number | None = None,
    value_clip_range: Number | None = 0.2,
    vf_coef: Number = 0.1,
    entropy_coef: Number = 0.0,
    disputed_mask: jax.Array | None = None,
    weights: jax.Array | None = None,
    normalizer: Number | None = None,
    num_sequences: Number | None = None,
    **of_policy_loss: Any,
) -> tuple[jax.Array, Metrics]:
    """The whole loss of a PPO update: policy, critic and entropy bonus.

    L = L_policy + vf_coef L_value - entropy_coef mean H, where L_value is 0 without a critic.

    Args:
        logprobs: [B, T] float, of the tokens under the policy that is trained.
        values: [B, T] float, of the critic that is trained; None without one.
        entropies: [B, T] float, of the policy that is trained, in nats.
        mask: [B, T] bool, True counts; what the others hold elsewhere has no effect.
        old_logprobs: [B, T] float, when the tokens were sampled.
        old_values: [B, T] float, when the tokens were sampled; None without a critic.
        advantages: [B, T] float.
        returns: [B, T] float; None without a critic.
        policy_loss: the loss of the policy, called by the names of its parameters.
        clip_range: see `clipped_policy_loss`.
        clip_range_high: see `clipped_policy_loss`.
        value_clip_range: see `clipped_value_loss`.
        vf_coef: weight of the value loss.
        entropy_coef: weight of the entropy bonus, in loss per nat.
        disputed_mask: [B, T] bool, True on the tokens without an entropy bonus, see
            `disputed_states`; they count in the mean as 0. None is none.
        weights: [B, T] float, of the terms of policy and entropy; None is 1, see
            `aggregation_weights`.
        normalizer: what the sums are divided by; None is the count of the mask.
        num_sequences: the same for a policy loss of whole sequences, one with a parameter
            `segment_ids`.
        **of_policy_loss: further arguments of `policy_loss`; those that it has no parameter for
            have no effect.

    Returns:
        (loss, metrics): ppo/loss, policy/entropy, and the metrics of both losses.

    Raises:
        ValueError: there are values, but not what their loss needs.

    Reference: Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 9.

    >>> one, mask = jnp.ones((1, 1)), jnp.array([[True]])
    >>> loss, metrics = ppo_loss(
    ...     one, one, one, mask, old_logprobs=one, old_values=one, advantages=one, returns=3 * one
    ... )
    >>> round(loss.item(), 6)  # -1 + 0.1 x 2, the clipped and the plain error being equal
    -0.8
    """
    chex.assert_equal_shape([logprobs, entropies, mask])
    chex.assert_type(entropies, float)
    assert_numbers(vf_coef=vf_coef, entropy_coef=entropy_coef)

    offered = dict(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=mask,
        clip_range=clip_range,
        clip_range_high=clip_range_high,
        weights=weights,
        normalizer=num_sequences if is_of_sequences(policy_loss) else normalizer,
    )
    found = call_named(policy_loss, offered | of_policy_loss)
    loss_of_policy, policy_metrics = check_loss(policy_loss, found)
    if "policy/approx_kl" not in policy_metrics:  # the brake of an update reads it
        moved = jnp.square(jnp.subtract(*zero_padding(mask, logprobs, old_logprobs)))
        policy_metrics |= {
            "policy/approx_kl": 0.5 * masked_mean(moved, mask, normalizer=normalizer)
        }
    mean_entropy = masked_mean(entropies, mask, normalizer=normalizer)
    bonus, terms = mean_entropy, entropies
    if disputed_mask is not None:
        chex.assert_equal_shape([mask, disputed_mask])
        chex.assert_type(disputed_mask, bool)
        (terms,) = zero_padding(mask & ~disputed_mask, entropies)
    if weights is not None:
        terms = jnp.multiply(*zero_padding(mask, terms, jax.lax.stop_gradient(weights)))
    if terms is not entropies:
        bonus = masked_mean(terms, mask, normalizer=normalizer)
    value_loss, value_metrics = 0.0, {}
    if values is not None:
        if old_values is None or returns is None:
            raise ValueError("values need old_values and returns, got None")
        clip = {"value_clip_range": value_clip_range, "normalizer": normalizer}
        value_loss, value_metrics = clipped_value_loss(values, old_values, returns, mask, **clip)
    loss = loss_of_policy + vf_coef * value_loss - entropy_coef * bonus
    metrics = {"ppo/loss": loss, "policy/entropy": mean_entropy}
    return loss, jax.lax.stop_gradient(metrics | policy_metrics | value_metrics)


def next_token_loss(
    logprobs: jax.Array, mask: jax.Array, *, normalizer: Number | None = None
) -> tuple[jax.Array, Metrics]:
    """Cross-entropy of the next token, in nats per token.

    L = -mean logprobs, in float32. Its exponential over a whole data set is the perplexity.

    Args:
        logprobs: [B, T] float, of the true tokens.
        mask: [B, T] bool, True on the tokens to learn (the completion and its stop token);
            what logprobs hold elsewhere has no effect.
        normalizer: what the sum is divided by; None is the count of the mask.

    Returns:
        (loss, metrics): sft/loss.

    >>> loss, _ = next_token_loss(jnp.array([[-1.0, -3.0]]), jnp.array([[True, True]]))
    >>> loss.item()
    2.0
    """
    loss = -masked_mean(logprobs, mask, normalizer=normalizer)
    return loss, {"sft/loss": jax.lax.stop_gradient(loss)}


def preference_loss(
    chosen_scores: jax.Array,
    rejected_scores: jax.Array,
    *,
    margin: Number = 0.0,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """Loss of a reward model on pairs of responses, of which one was preferred.

    L = -mean log σ(chosen - rejected - margin), in float32.

    Args:
        chosen_scores: [B] float, of the preferred responses.
        rejected_scores: [B] float, of the others.
        margin: by how much the chosen score should be larger, a number or [B].
        mask: [B] bool, False on pairs that nobody judged, ties for instance; None counts all.

    Returns:
        (loss, metrics): reward_model/loss; reward_model/accuracy, the share of pairs in the right
        order (a tie counts half); reward_model/margin, the mean of chosen - rejected.

    Reference: Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, eq. 1; the margin is that of
    Touvron et al. 2023, https://arxiv.org/abs/2307.09288, eq. 2.

    >>> loss, metrics = preference_loss(jnp.array([1.0, 2.0]), jnp.array([1.0, 0.0]))
    >>> metrics["reward_model/accuracy"].item(), metrics["reward_model/margin"].item()
    (0.75, 1.0)
    """
    chex.assert_rank([chosen_scores, rejected_scores, margin], [1, 1, {0, 1}])
    chex.assert_equal_shape([chosen_scores, rejected_scores])
    chex.assert_type([chosen_scores, rejected_scores], float)
    mask = jnp.ones(chosen_scores.shape, bool) if mask is None else mask
    chex.assert_equal_shape([chosen_scores, mask])
    chex.assert_type(mask, bool)
    if jnp.ndim(margin):
        chex.assert_equal_shape([chosen_scores, margin])

    chosen, rejected = zero_padding(mask, chosen_scores, rejected_scores)
    difference = chosen - rejected
    margin = jnp.broadcast_to(jnp.asarray(margin, jnp.float32), difference.shape)
    loss = -masked_mean(jax.nn.log_sigmoid(difference - margin), mask)
    metrics = {
        "reward_model/loss": loss,
        "reward_model/accuracy": masked_mean(0.5 * (jnp.sign(difference) + 1.0), mask),
        "reward_model/margin": masked_mean(difference, mask),
    }
    return loss, jax.lax.stop_gradient(metrics)


def check_loss(function: Callable, found: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What a loss has given is a number and its metrics.

    Raises:
        ValueError: it is something else.
    """
    name = function_name(function)
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], dict)):
        got = f"{len(found)} values" if isinstance(found, tuple) else f"one {type(found).__name__}"
        raise ValueError(f"{name} must return (loss, {{metric: number}}), got {got}")
    loss, metrics = found
    if jnp.shape(loss) != () or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        got = f"{list(jnp.shape(loss))} in {jnp.result_type(loss)}"
        raise ValueError(f"{name} must return one float as its loss, got {got}")
    for metric, x in metrics.items():
        is_number = isinstance(x, int | float) or (hasattr(x, "dtype") and jnp.shape(x) == ())
        if not is_number:
            got = list(jnp.shape(x)) if hasattr(x, "dtype") else f"a {type(x).__name__}"
            raise ValueError(f"{name} must return one number as the metric {metric!r}, got {got}")
    return loss, dict(metrics)
