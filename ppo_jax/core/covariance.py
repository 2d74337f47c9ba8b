"""Control of the entropy, by its coefficient or by the few tokens that reduce it: those where
log-prob and advantage are high, or low, together. Dimensions: B sequences, T response tokens.

What is of tokens takes its means and shares over the arrays that it is given: mostly a whole
minibatch. Reference: Cui et al. 2025, https://arxiv.org/abs/2505.22617.
"""

import functools
from collections.abc import Callable, Mapping

import chex
import jax
import jax.numpy as jnp

from ppo_jax.core.checks import Number, assert_numbers
from ppo_jax.core.masking import masked_mean, zero_padding
from ppo_jax.core.named import parameters
from ppo_jax.core.policy_losses import (
    Metrics,
    checked_tokens,
    clipped_policy_loss,
    probability_ratio,
    surrogate_metrics,
    weighted,
)


def token_covariances(logprobs: jax.Array, advantages: jax.Array, mask: jax.Array) -> jax.Array:
    """What each token adds to the covariance of log-probs and advantages.

    c = (logprobs - mean logprobs) (A - mean A): a step of the policy gradient lowers the entropy by
    about their mean.

    Args:
        logprobs: [B, T] float.
        advantages: [B, T] float.
        mask: [B, T] bool, True counts; what the others hold elsewhere has no effect.

    Returns:
        [B, T] float32, a constant; 0 where masked.

    >>> logprobs, mask = jnp.array([[-1.0, -3.0]]), jnp.array([[True, True]])
    >>> token_covariances(logprobs, jnp.array([[2.0, 0.0]]), mask).tolist()
    [[1.0, 1.0]]
    """
    chex.assert_equal_shape([logprobs, advantages, mask])
    chex.assert_type([logprobs, advantages, mask], [float, float, bool])
    logprobs, advantages = zero_padding(mask, *jax.lax.stop_gradient((logprobs, advantages)))
    product = (logprobs - masked_mean(logprobs, mask)) * (
        advantages - masked_mean(advantages, mask)
    )
    return jnp.where(mask, product, 0.0)


def clip_cov_weights(
    key: jax.Array,
    logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    covariance_fraction: Number = 2e-4,
    low: Number = 1.0,
    high: Number = 5.0,
) -> jax.Array:
    """Weights of a loss that leave out some tokens of high covariance, drawn by chance (Clip-Cov).

    w = 0 for max(1, ⌊covariance_fraction N⌋) of the N tokens, among those with low < c < high, see
    `token_covariances`; 1 for the others.

    Args:
        key: of the draw.
        logprobs: [B, T] float.
        advantages: [B, T] float.
        mask: [B, T] bool, True counts; what the others hold elsewhere has no effect.
        covariance_fraction: the share of all tokens to leave out, from 0 to 1; at least one is.
        low: what the covariance must be above.
        high: what it must be below; may be inf.

    Returns:
        [B, T] float32, a constant; 0 where masked.

    Reference: Cui et al. 2025, https://arxiv.org/abs/2505.22617, section 4.2. Its code passes over
    the tokens that PPO's clip leaves without a gradient; here they may be drawn.

    >>> logprobs, mask = jnp.array([[-1.0, -9.0, -5.0]]), jnp.ones((1, 3), bool)
    >>> advantages = jnp.array([[1.0, 0.0, -1.0]])
    >>> clip_cov_weights(jax.random.key(0), logprobs, advantages, mask).tolist()
    [[0.0, 1.0, 1.0]]
    """
    assert_numbers(low=low, high=high)
    covariances = token_covariances(logprobs, advantages, mask)
    is_candidate = mask & (covariances > low) & (covariances < high)
    drawn = jnp.where(is_candidate, jax.random.uniform(key, mask.shape, jnp.float32), -jnp.inf)
    is_left_out = is_candidate & is_top(drawn, mask, covariance_fraction)
    return (mask & ~is_left_out).astype(jnp.float32)


def clip_cov_mask(
    key: jax.Array,
    logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    covariance_fraction: Number = 2e-4,
    covariance_low: Number = 1.0,
    covariance_high: Number = 5.0,
) -> jax.Array:
    """The tokens that `clip_cov_weights` leaves out, those without a gradient in
    `clip_cov_policy_loss`: [B, T] bool, False where masked. Arguments as there.

    >>> logprobs, mask = jnp.array([[-1.0, -9.0, -5.0]]), jnp.ones((1, 3), bool)
    >>> advantages = jnp.array([[1.0, 0.0, -1.0]])
    >>> clip_cov_mask(jax.random.key(0), logprobs, advantages, mask).tolist()
    [[True, False, False]]
    """
    how = dict(covariance_fraction=covariance_fraction, low=covariance_low, high=covariance_high)
    return mask & (clip_cov_weights(key, logprobs, advantages, mask, **how) == 0)


def clip_cov_policy_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    dropped_mask: jax.Array,
    clip_range: Number,
    clip_range_high: Number | None = None,
    weights: jax.Array | None = None,
    normalizer: Number | None = None,
) -> tuple[jax.Array, Metrics]:
    """PPO's loss without the terms of some tokens (Clip-Cov); these still count in the mean.

    L = mean l,  l = 0 for the tokens of `dropped_mask`, else the term of `clipped_policy_loss`.

    Args:
        logprobs: [B, T] float, of the tokens under the policy that is trained.
        old_logprobs: [B, T] float, of the same tokens when they were sampled; a constant.
        advantages: [B, T] float; a constant.
        mask: [B, T] bool, True counts; what the others hold elsewhere has no effect.
        dropped_mask: [B, T] bool, the tokens without a gradient, see `clip_cov_mask`: chosen of the
            whole minibatch.
        clip_range: how far the ratio may fall below 1; may be inf.
        clip_range_high: how far it may rise above 1; None is the same as clip_range.
        weights: [B, T] float, see `clipped_policy_loss`; a constant.
        normalizer: what the sum is divided by; None is the count of the mask.

    Returns:
        (loss, metrics): those of `clipped_policy_loss`, and policy/dropped_fraction, the share of
        the tokens of `dropped_mask`.

    Reference: Cui et al. 2025, https://arxiv.org/abs/2505.22617, section 4.2.

    >>> new, old = jnp.log(jnp.array([[0.6, 0.5]])), jnp.log(jnp.array([[0.5, 0.5]]))
    >>> loss, metrics = clip_cov_policy_loss(
    ...     new, old, jnp.ones((1, 2)), jnp.ones((1, 2), bool),
    ...     dropped_mask=jnp.array([[True, False]]), clip_range=0.2,
    ... )
    >>> loss.item(), metrics["policy/dropped_fraction"].item()
    (-0.5, 0.5)
    """
    chex.assert_equal_shape([dropped_mask, mask])
    chex.assert_type(dropped_mask, bool)
    kept = (~dropped_mask).astype(jnp.float32)
    loss, metrics = clipped_policy_loss(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        clip_range=clip_range,
        clip_range_high=clip_range_high,
        weights=weighted(kept, weights),
        normalizer=normalizer,
    )
    dropped = masked_mean(dropped_mask.astype(jnp.float32), mask, normalizer=normalizer)
    return loss, metrics | {"policy/dropped_fraction": dropped}


def kl_cov_mask(
    logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    covariance_fraction: Number = 2e-4,
) -> jax.Array:
    """The tokens that pay the penalty of `kl_cov_policy_loss`.

    True at the max(1, ⌊covariance_fraction N⌋) of the N tokens with the highest covariance, see
    `token_covariances`.

    Args:
        logprobs: [B, T] float.
        advantages: [B, T] float.
        mask: [B, T] bool, True counts; what the others hold elsewhere has no effect.
        covariance_fraction: the share of tokens, from 0 to 1; at least one is chosen.

    Returns:
        [B, T] bool; False where masked.

    Reference: Cui et al. 2025, https://arxiv.org/abs/2505.22617, section 4.3.

    >>> logprobs, mask = jnp.array([[-1.0, -9.0, -5.0]]), jnp.ones((1, 3), bool)
    >>> advantages = jnp.array([[1.0, 0.0, -1.0]])
    >>> kl_cov_mask(logprobs, advantages, mask, covariance_fraction=0.34).tolist()
    [[True, False, False]]
    """
    covariances = jnp.where(mask, token_covariances(logprobs, advantages, mask), -jnp.inf)
    return mask & is_top(covariances, mask, covariance_fraction)


def kl_cov_policy_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    penalty_coef: Number,
    covariance_fraction: Number = 2e-4,
    penalty_mask: jax.Array | None = None,
    weights: jax.Array | None = None,
    normalizer: Number | None = None,
) -> tuple[jax.Array, Metrics]:
    """The surrogate with a penalty on the tokens of highest covariance (KL-Cov).

    L = mean (-A r + penalty_coef |log r|), the second term for the tokens of `kl_cov_mask` alone.

    Args:
        logprobs: [B, T] float, of the tokens under the policy that is trained.
        old_logprobs: [B, T] float, of the same tokens when they were sampled; a constant.
        advantages: [B, T] float; a constant.
        mask: [B, T] bool, True counts; what the others hold elsewhere has no effect.
        penalty_coef: weight of the penalty, in loss per nat.
        covariance_fraction: the share of these tokens that pay it, see `kl_cov_mask`.
        penalty_mask: [B, T] bool, the tokens that pay it instead: of a micro-batch, those that were
            chosen of the whole minibatch.
        weights: [B, T] float, see `clipped_policy_loss`; a constant.
        normalizer: what the sum is divided by; None is the count of the mask.

    Returns:
        (loss, metrics): those of `clipped_policy_loss`, and policy/penalised_fraction, the share of
        tokens that pay the penalty.

    Reference: Cui et al. 2025, https://arxiv.org/abs/2505.22617, section 4.3.

    >>> new, old = jnp.array([[-1.0, -3.0]]), jnp.array([[-1.5, -3.0]])
    >>> loss, _ = kl_cov_policy_loss(
    ...     new, old, jnp.array([[0.0, 0.0]]), jnp.array([[True, True]]),
    ...     penalty_coef=1.0, covariance_fraction=0.5,
    ... )
    >>> loss.item()
    0.25
    """
    assert_numbers(at_least=0, penalty_coef=penalty_coef)
    logprobs, log_ratio, advantages, weights = checked_tokens(
        logprobs, old_logprobs, advantages, mask, weights
    )
    if penalty_mask is None:
        fraction = covariance_fraction
        penalty_mask = kl_cov_mask(logprobs, advantages, mask, covariance_fraction=fraction)
    chex.assert_equal_shape([penalty_mask, mask])
    chex.assert_type(penalty_mask, bool)
    is_penalised = mask & penalty_mask
    ratio = probability_ratio(log_ratio)
    penalty = jnp.where(is_penalised, penalty_coef * jnp.abs(log_ratio), 0.0)
    mean = functools.partial(masked_mean, mask=mask, normalizer=normalizer)
    loss = mean(weighted(-advantages * ratio + penalty, weights))
    metrics = surrogate_metrics(loss, jnp.zeros_like(mask), log_ratio, ratio, mask, mean)
    share = jax.lax.stop_gradient(mean(is_penalised.astype(jnp.float32)))
    return loss, metrics | {"policy/penalised_fraction": share}


# The inputs of a loss that are tokens of a whole minibatch, each with the function that chooses
# them; it is called by the names of its parameters, before the minibatch is split.
TOKEN_CHOICES: Mapping[str, Callable] = {
    "dropped_mask": clip_cov_mask,
    "penalty_mask": kl_cov_mask,
}


def token_choices(loss: Callable) -> dict[str, Callable]:
    """Those of `TOKEN_CHOICES` that a loss has a parameter for.

    >>> list(token_choices(lambda logprobs, penalty_mask: logprobs))
    ['penalty_mask']
    """
    return {name: TOKEN_CHOICES[name] for name in TOKEN_CHOICES if name in parameters(loss)}


def is_top(scores: jax.Array, mask: jax.Array, fraction: Number) -> jax.Array:
    """True at the max(1, ⌊fraction N⌋) highest scores, N the count of the mask.

    >>> is_top(jnp.array([[3.0, 1.0, 2.0, 0.0]]), jnp.ones((1, 4), bool), 0.5).tolist()
    [[True, False, True, False]]
    """
    assert_numbers(at_least=0, at_most=1, covariance_fraction=fraction)
    count = jnp.floor(fraction * jnp.sum(mask).astype(jnp.float32)).astype(jnp.int32)
    ranks = jnp.argsort(jnp.argsort(-scores.ravel())).reshape(scores.shape)
    return ranks < jnp.maximum(count, 1)


def adaptive_entropy_coef(
    coef: Number, entropy: Number, *, target: Number, step: Number
) -> jax.Array:
    """Next coefficient of the entropy bonus, which rises while the entropy is below its target.

    coef' = max(0, coef + step) where entropy < target,  max(0, coef - step) where it is above.

    Args:
        coef: coefficient of this iteration, that of `ppo_loss`.
        entropy: of the policy in this iteration, in nats per token: its metric policy/entropy.
        target: entropy to hold, in nats per token.
        step: by how much the coefficient moves in an iteration, at least 0.

    Returns:
        A float32 scalar, at least 0.

    Raises:
        ValueError: step is known and below 0.

    Reference: He et al. 2025, https://arxiv.org/abs/2505.22312 (Skywork-OR1, adaptive entropy
    control), which in addition gives no bonus while the entropy is above its target.

    >>> [adaptive_entropy_coef(0.5, h, target=0.2, step=0.25).item() for h in (0.1, 0.3)]
    [0.75, 0.25]
    """
    chex.assert_rank([coef, entropy], 0)
    assert_numbers(target=target)
    assert_numbers(at_least=0, step=step)
    coef, entropy, target, step = (
        jnp.asarray(x, jnp.float32) for x in (coef, entropy, target, step)
    )
    return jnp.maximum(0.0, coef + step * jnp.sign(target - entropy))
