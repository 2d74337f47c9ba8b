"""Losses of the critic: of one that gives a number, and of one that classifies.

Dimensions: B sequences, T response tokens, N bins of a critic that classifies. Losses add up over
micro-batches as those of `policy_losses` do. How good a critic is: `critics`.
"""

import math

import chex
import jax
import jax.numpy as jnp

from ppo_jax.core.checks import Number, assert_numbers, known
from ppo_jax.core.masking import masked_mean, zero_padding
from ppo_jax.core.policy_losses import Metrics


def clipped_value_loss(
    values: jax.Array,
    old_values: jax.Array,
    returns: jax.Array,
    mask: jax.Array,
    *,
    value_clip_range: Number | None = 0.2,
    normalizer: Number | None = None,
) -> tuple[jax.Array, Metrics]:
    """Squared error of the critic, which gains nothing by moving far from its old values.

    L = ½ mean max((V - R)², (clip(V, V_old - ε, V_old + ε) - R)²), in float32.

    Args:
        values: [B, T] float, of the critic that is trained.
        old_values: [B, T] float, when the responses were sampled; a constant.
        returns: [B, T] float; a constant.
        mask: [B, T] bool, True counts; what the others hold elsewhere has no effect.
        value_clip_range: ε, in units of the values; None is no clip, and old_values then do not
            matter.
        normalizer: what the sum is divided by; None is the count of the mask.

    Returns:
        (loss, metrics): value/loss; value/clip_fraction, the share of tokens whose clipped term
        is the larger.

    Reference: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, in its published code.

    >>> loss, _ = clipped_value_loss(
    ...     values=jnp.array([[2.0]]),
    ...     old_values=jnp.array([[0.0]]),
    ...     returns=jnp.array([[2.0]]),
    ...     mask=jnp.array([[True]]),
    ...     value_clip_range=1.0,
    ... )
    >>> loss.item()
    0.5
    """
    chex.assert_equal_shape([values, old_values, returns, mask])
    chex.assert_type([values, old_values, returns, mask], [float, float, float, bool])
    assert_numbers(at_least=0, value_clip_range=value_clip_range)

    old_values, returns = jax.lax.stop_gradient((old_values, returns))
    values, old, returns = zero_padding(mask, values, old_values, returns)
    unclipped = clipped = jnp.square(values - returns)
    if value_clip_range is not None:
        # Not old + clip(values - old): its rounding would count as clipping.
        near = jnp.clip(values, old - value_clip_range, old + value_clip_range)
        clipped = jnp.square(near - returns)

    is_clipped = (clipped > unclipped).astype(jnp.float32)
    loss = 0.5 * masked_mean(jnp.maximum(unclipped, clipped), mask, normalizer=normalizer)
    metrics = {
        "value/loss": loss,
        "value/clip_fraction": masked_mean(is_clipped, mask, normalizer=normalizer),
    }
    return loss, jax.lax.stop_gradient(metrics)


def classification_value_loss(
    logits: jax.Array,
    returns: jax.Array,
    mask: jax.Array,
    *,
    bins: jax.Array,
    sigma: Number,
    normalizer: Number | None = None,
) -> tuple[jax.Array, Metrics]:
    """Cross-entropy of a critic that tells in which bin the return lies (HL-Gauss).

    L = -mean Σ_n p_n log softmax(logits)_n, p = hl_gauss_targets(R), in float32. The gradient of
    the logits is softmax(logits) - p: a return far off pulls no harder than one a few bins away.

    Args:
        logits: [B, T, N] float, of the critic that is trained.
        returns: [B, T] float; a constant.
        mask: [B, T] bool, True counts; what the others hold elsewhere has no effect.
        bins: [N + 1] float, the edges of the bins, increasing.
        sigma: how far the target spreads; 0.75 of the width of a bin is usual.
        normalizer: what the sum is divided by; None is the count of the mask.

    Returns:
        (loss, metrics): value/loss; value/outside_bins, the share of tokens whose return is
        outside of the bins, where the critic cannot follow.

    Raises:
        ValueError: as `hl_gauss_targets`.

    Reference: Farebrother et al. 2024, https://arxiv.org/abs/2403.03950.

    >>> loss, _ = classification_value_loss(
    ...     logits=jnp.zeros((1, 1, 4)),
    ...     returns=jnp.array([[2.0]]),
    ...     mask=jnp.array([[True]]),
    ...     bins=jnp.arange(5.0),
    ...     sigma=0.75,
    ... )
    >>> round(loss.item(), 4)  # log 4
    1.3863
    """
    chex.assert_equal_shape([returns, mask])
    chex.assert_type([logits, returns, bins, mask], [float, float, float, bool])
    chex.assert_shape(logits, (*mask.shape, len(bins) - 1))

    (returns,) = zero_padding(mask, jax.lax.stop_gradient(returns))
    logits = jnp.where(mask[..., None], logits.astype(jnp.float32), 0.0)
    targets = hl_gauss_targets(returns, bins=bins, sigma=sigma)
    terms = -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)

    is_outside = ((returns < bins[0]) | (returns > bins[-1])).astype(jnp.float32)
    loss = masked_mean(terms, mask, normalizer=normalizer)
    metrics = {
        "value/loss": loss,
        "value/outside_bins": masked_mean(is_outside, mask, normalizer=normalizer),
    }
    return loss, jax.lax.stop_gradient(metrics)


def hl_gauss_targets(returns: jax.Array, *, bins: jax.Array, sigma: Number) -> jax.Array:
    """The share of a normal distribution around each return that lies in each bin.

    p_n = (Φ((b_{n+1} - R) / σ) - Φ((b_n - R) / σ)) / (Φ((b_N - R) / σ) - Φ((b_0 - R) / σ)) with R
    clipped to the outer edges, so that half of the mass at least lies inside unless σ is wide; in
    float32. With a small σ all of it is in the bin of R, with a large one it goes by their widths;
    beyond 1e-6 and 1e6 times the range of the bins σ counts as that.

    Args:
        returns: float of any shape; a constant.
        bins: [N + 1] float, the edges of the bins, increasing.
        sigma: standard deviation of the target, above 0.

    Returns:
        [..., N] float32, each sums to 1.

    Raises:
        ValueError: sigma is not above 0, or the edges are not finite and increasing.

    Reference: Farebrother et al. 2024, https://arxiv.org/abs/2403.03950.

    >>> hl_gauss_targets(jnp.array([1.0]), bins=jnp.arange(4.0), sigma=1e-3).tolist()
    [[0.5, 0.5, 0.0]]
    """
    chex.assert_type([returns, bins], float)
    assert_bins(bins)
    assert_numbers(above=0, sigma=sigma)

    returns = jax.lax.stop_gradient(returns).astype(jnp.float32)
    bins = jnp.asarray(bins, jnp.float32)
    width = bins[-1] - bins[0]
    sigma = jnp.clip(jnp.asarray(sigma, jnp.float32), 1e-6 * width, 1e6 * width)
    edges = jnp.broadcast_to(bins, (*returns.shape, len(bins)))
    distance = edges - jnp.clip(returns, bins[0], bins[-1])[..., None]
    below = jax.scipy.special.erf(distance / (math.sqrt(2) * sigma))
    return jnp.diff(below) / (below[..., -1:] - below[..., :1])


def hl_gauss_value(logits: jax.Array, *, bins: jax.Array) -> jax.Array:
    """The value that a critic which classifies expects, in float32.

    V = Σ_n softmax(logits)_n (b_n + b_{n+1}) / 2, between the centres of the outer bins. Choose
    bins wider than the returns by some σ: near an outer edge the part of the target that is cut
    off draws the value inwards.

    Args:
        logits: [..., N] float.
        bins: [N + 1] float, the edges of the bins, increasing.

    Raises:
        ValueError: the edges are not finite and increasing.

    >>> hl_gauss_value(jnp.zeros(2), bins=jnp.array([0.0, 1.0, 4.0])).item()
    1.5
    """
    chex.assert_type([logits, bins], float)
    chex.assert_axis_dimension(logits, -1, len(bins) - 1)
    assert_bins(bins)
    bins = jnp.asarray(bins, jnp.float32)
    probs = jax.nn.softmax(logits.astype(jnp.float32))
    centres = jnp.broadcast_to((bins[:-1] + bins[1:]) / 2, probs.shape)
    return jnp.sum(probs * centres, axis=-1)  # not @, which a TPU does in bfloat16


def assert_bins(bins: jax.Array) -> None:
    """Edges of bins are a row of at least two, and finite and increasing where they are known.

    Raises:
        ValueError: they are not.

    >>> assert_bins(jnp.array([0.0, 0.0]))
    Traceback (most recent call last):
    ...
    ValueError: bins must be at least two finite and increasing edges, got [0. 0.]
    """
    chex.assert_rank(bins, 1)
    edges = known(bins)
    rising = (
        edges is None or ((edges[1:] > edges[:-1]) & (abs(edges[1:] - edges[0]) < math.inf)).all()
    )
    if len(bins) < 2 or not rising:
        raise ValueError(f"bins must be at least two finite and increasing edges, got {edges}")
