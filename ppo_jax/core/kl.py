"""KL divergence between the policy and its reference. Dimensions: B sequences, T tokens."""

import chex
import jax
import jax.numpy as jnp

from ppo_jax.core.checks import Number, assert_numbers
from ppo_jax.core.masking import masked_mean, zero_padding
from ppo_jax.core.renamed import renamed

LOG_RATIO_LIMIT = 20.0  # nats: exp of more says nothing, and above 88 it is infinite in float32


def probability_ratio(log_ratio: jax.Array) -> jax.Array:
    """exp(log_ratio) with a log-ratio within ±20: finite, and without a gradient beyond.

    Args:
        log_ratio: float of any shape, in nats.

    Returns:
        float of the same shape, within exp(±20).

    >>> probability_ratio(jnp.array([0.0, 1000.0])).round().tolist()
    [1.0, 485165184.0]
    """
    return jnp.exp(jnp.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def _k3(d):
    """Through expm1: near d = 0 the terms of the plain form cancel, and it may come out below 0."""
    d = jnp.maximum(d, -LOG_RATIO_LIMIT)
    return jnp.expm1(-d) + d


# The estimators, as functions of d = logprobs - ref_logprobs.
ESTIMATORS = {
    "k1": lambda d: d,
    "k2": lambda d: 0.5 * jnp.square(d),
    "k3": _k3,
}
REWARD_ESTIMATORS = ("k1",)  # those that, as a penalty in the rewards, lead back to the reference
REWARD_RULE = (
    f"one of {list(REWARD_ESTIMATORS)}, or any_kl_estimator True: in the rewards the others push "
    "the policy away from the reference"
)
LOSS_ESTIMATORS = ("k2", "k3")  # those whose gradient, in a loss, is that of the KL of a token


@renamed(kind="estimator")
def kl_estimate(
    logprobs: jax.Array, ref_logprobs: jax.Array, *, estimator: str = "k1"
) -> jax.Array:
    """Per-token estimates of KL(policy || reference), for tokens sampled from the policy.

    With d = logprobs - ref_logprobs:  k1 = d,  k2 = d² / 2,  k3 = exp(-d) - 1 + d.

    As values, k1 and k3 are unbiased; k2 and k3 are never negative. In k3, d below -20 counts as
    -20.

    In a reward it is the gradient that matters, and there k1 alone is right: the gradient of the
    KL is E[k1 ∇log π]. Since E[∇log π] = 0, and k2 and k3 grow like d² / 2, theirs is zero to first
    order at the reference, and farther out need not lead back to it.

    Args:
        logprobs: float of any shape, mostly [B, T], of the sampled tokens under the policy.
        ref_logprobs: float, the same shape, of the same tokens under the reference.
        estimator: a key of `ESTIMATORS`.

    Returns:
        float32 of that shape, in nats. Elementwise: what padding holds stays in padding.

    Raises:
        ValueError: the estimator is unknown.

    Reference: Schulman 2020, http://joschu.net/blog/kl-approx.html.

    >>> kl_estimate(jnp.array([[-1.0]]), jnp.array([[-3.0]]), estimator="k2").item()
    2.0
    """
    chex.assert_equal_shape([logprobs, ref_logprobs])
    chex.assert_type([logprobs, ref_logprobs], float)

    if estimator not in ESTIMATORS:
        known = sorted(ESTIMATORS)
        raise ValueError(f"estimator must be one of {known}, got {estimator!r}")
    logprobs, ref_logprobs = (jnp.asarray(x, jnp.float32) for x in (logprobs, ref_logprobs))
    return ESTIMATORS[estimator](logprobs - ref_logprobs)


def kl_loss(
    logprobs: jax.Array,
    ref_logprobs: jax.Array,
    mask: jax.Array,
    *,
    estimator: str,
    old_logprobs: jax.Array | None = None,
    weights: jax.Array | None = None,
    normalizer: Number | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """KL(policy || reference) of the sampled tokens as a loss, with the gradient of the KL.

    L = mean l,  l = sg(w) d² / 2 (k2)  or  l = w (exp(-d) - 1 + d) (k3),  d = logprobs -
    ref_logprobs,  w = exp(logprobs - old_logprobs), sg without a gradient. The gradient of both is
    E_old[w d ∇log π] = ∇KL: in k3 it needs that of w, without which it is the gradient of
    KL(reference || policy). It is written out, for in a sum the terms exp(-d) do not cancel where
    they are large. As values, k3 is unbiased.

    k1 is none of them: its gradient is E[∇log π] = 0. And no loss of tokens has the effect of one
    on the KL of the states after it, as k1 in the rewards has it, see `token_rewards`.

    A log-ratio beyond ±20 counts as ±20 in w, and d below -20 as -20 in the value of k3.

    Args:
        logprobs: [B, T] float, of the tokens under the policy that is trained.
        ref_logprobs: [B, T] float, of the same tokens under the reference; a constant.
        mask: [B, T] bool, True counts; what the others hold elsewhere has no effect.
        estimator: one of `LOSS_ESTIMATORS`.
        old_logprobs: [B, T] float, of the same tokens when they were sampled; a constant. None: by
            this policy, w = exp(logprobs - sg(logprobs)).
        weights: [B, T] float, what each token's term is multiplied by, see `aggregation_weights`; a
            constant. None is 1.
        normalizer: what the sum is divided by; None is the count of the mask.

    Returns:
        (loss, metrics): kl/loss.

    Raises:
        ValueError: the estimator is none of those of a loss.

    Reference: Tang and Munos 2025, https://arxiv.org/abs/2506.09477; k3 with the weight:
    DeepSeek-AI 2025, https://arxiv.org/abs/2512.02556, section 3.1.

    >>> d, mask = jnp.array([[2.0]]), jnp.array([[True]])
    >>> jax.value_and_grad(lambda x: kl_loss(x, 0 * d, mask, estimator="k2")[0])(d)
    (Array(2., dtype=float32), Array([[2.]], dtype=float32))
    """
    if estimator not in LOSS_ESTIMATORS:
        why = ": its gradient in a loss is 0 on average" if estimator == "k1" else ""
        raise ValueError(
            f"estimator must be one of {list(LOSS_ESTIMATORS)}, got {estimator!r}{why}"
        )
    old_logprobs = logprobs if old_logprobs is None else old_logprobs
    weights = jnp.ones(mask.shape) if weights is None else weights
    arrays = [logprobs, ref_logprobs, old_logprobs, weights]
    chex.assert_equal_shape([*arrays, mask])
    chex.assert_type([*arrays, mask], [float] * 4 + [bool])

    logprobs, reference, old, weights = zero_padding(mask, *arrays)
    now = jax.lax.stop_gradient(logprobs)
    d = now - reference
    weights = jax.lax.stop_gradient(weights * probability_ratio(now - old))
    values = kl_estimate(now, reference, estimator=estimator)
    terms = jax.lax.stop_gradient(values) + jax.lax.stop_gradient(d) * (logprobs - now)
    loss = masked_mean(weights * terms, mask, normalizer=normalizer)
    return loss, {"kl/loss": jax.lax.stop_gradient(loss)}


def adaptive_penalty_coef(coef: Number, kl: Number, *, target_kl: Number) -> jax.Array:
    """Next coefficient of the penalty on the KL divergence from the old policy.

    coef' = 2 coef where kl > 1.5 target_kl,  coef / 2 where kl < target_kl / 1.5,  else coef.

    Args:
        coef: coefficient of this iteration, that of `kl_penalty_policy_loss`.
        kl: KL(old || new) after this iteration, in nats per token: its metric policy/old_kl.
        target_kl: KL to hold, in nats per token; above 0.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: target_kl is known and not above 0.

    Reference: Schulman et al. 2017, https://arxiv.org/abs/1707.06347, section 4.

    >>> [adaptive_penalty_coef(1.0, kl, target_kl=0.01).item() for kl in (0.02, 0.01, 0.005)]
    [2.0, 1.0, 0.5]
    """
    chex.assert_rank([coef, kl], 0)
    assert_numbers(above=0, target_kl=target_kl)
    coef, kl, target_kl = (jnp.asarray(x, jnp.float32) for x in (coef, kl, target_kl))
    factor = jnp.where(kl > 1.5 * target_kl, 2.0, jnp.where(kl < target_kl / 1.5, 0.5, 1.0))
    return coef * factor


def adaptive_kl_coef(
    kl_coef: Number,
    kl: Number,
    *,
    target_kl: Number,
    horizon: Number,
    batch_size: Number,
) -> jax.Array:
    """Next coefficient of the KL penalty, which rises while the KL is above its target.

    kl_coef' = kl_coef max(0.1, 1 + clip(kl / target_kl - 1, -0.2, 0.2) batch_size / horizon).

    The limit of 0.1 keeps the coefficient above 0; it is reached where the horizon is less than
    0.22 batches.

    Args:
        kl_coef: coefficient of this iteration.
        kl: mean KL of this iteration, in nats per response.
        target_kl: KL to hold, in nats per response; above 0.
        horizon: episodes over which the coefficient adapts; above 0.
        batch_size: episodes of this iteration; above 0.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: a number that is known is not above 0.

    Reference: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, section 2.2.

    >>> round(adaptive_kl_coef(0.1, 12.0, target_kl=6.0, horizon=100, batch_size=10).item(), 6)
    0.102
    """
    chex.assert_rank([kl_coef, kl], 0)
    assert_numbers(above=0, target_kl=target_kl, horizon=horizon, batch_size=batch_size)
    kl = jnp.asarray(kl, jnp.float32)
    target_kl, horizon = jnp.asarray(target_kl, jnp.float32), jnp.asarray(horizon, jnp.float32)
    error = jnp.clip(kl / target_kl - 1.0, -0.2, 0.2)
    step = error * jnp.asarray(batch_size, jnp.float32) / horizon
    return jnp.asarray(kl_coef, jnp.float32) * jnp.maximum(1.0 + step, 0.1)
