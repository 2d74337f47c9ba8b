"""A critic that gives values or logits of bins of returns: its values, its loss, how good it is.

Dimension key: B responses, T response tokens, N bins, K critics.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ppo_jax.core.critics import (
    explained_variance,
    explained_variance_by_position,
    value_bias,
    value_calibration,
)
from ppo_jax.core.masking import masked_mean
from ppo_jax.core.network import Network, merge_params
from ppo_jax.core.types import Hyperparameters, Params
from ppo_jax.core.value_losses import (
    classification_value_loss,
    clipped_value_loss,
    hl_gauss_value,
)
from ppo_jax.rollout.decode import response_outputs, response_statistics

SIGMA = 0.75  # of the target of a return, in widths of a bin; 6 bins then have some mass


def values_from(outputs: jax.Array, hyperparameters: Hyperparameters) -> jax.Array:
    """The values of a critic from what its network gives, in float32.

    Args:
        outputs: [B, T] float, the values themselves; with `value_range` [B, T, N] float, logits of
            N bins of equal width from the lowest return to the highest.
        hyperparameters: `value_range` is read.

    Returns:
        [B, T] float32.

    Raises:
        ValueError: the outputs are none of a critic with, or without, a `value_range`.

    >>> numbers = Hyperparameters(optimizer=None, value_range=jnp.array([-1.0, 3.0]))
    >>> values_from(jnp.zeros((1, 1, 4)), numbers).tolist()  # equal logits: the middle
    [[1.0]]
    """
    check_outputs(outputs, hyperparameters)
    if hyperparameters.value_range is None:
        return outputs
    return hl_gauss_value(outputs, bins=bin_edges(outputs, hyperparameters))


def critic_loss(
    outputs: jax.Array,
    old_values: jax.Array,
    returns: jax.Array,
    mask: jax.Array,
    hyperparameters: Hyperparameters,
    *,
    normalizer: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`clipped_value_loss` of a critic's values, or `classification_value_loss` of its logits.

    Args:
        outputs: [B, T] or [B, T, N] float, see `values_from`.
        old_values: [B, T] float; a constant, which a critic with logits does not read.
        returns: [B, T] float; a constant.
        mask: [B, T] bool, True counts; what the others hold elsewhere has no effect.
        hyperparameters: `value_range`, and without it `value_clip_range`.
        normalizer: what the sum is divided by; None is the count of the mask.

    Returns:
        (loss, metrics), those of the function.

    Raises:
        ValueError: as `values_from`.
    """
    check_outputs(outputs, hyperparameters)
    if hyperparameters.value_range is None:
        clip = dict(value_clip_range=hyperparameters.value_clip_range)
        return clipped_value_loss(outputs, old_values, returns, mask, normalizer=normalizer, **clip)
    bins = bin_edges(outputs, hyperparameters)
    spread = SIGMA * (bins[1] - bins[0])
    return classification_value_loss(
        outputs, returns, mask, bins=bins, sigma=spread, normalizer=normalizer
    )


def outputs_of(
    network: Network,
    frozen: Params,
    trained: Params,
    *inputs: jax.Array,
    several: bool,
    **where: Any,
) -> jax.Array:
    """`response_outputs` of a critic; of `several`, whose trained leaves are stacked [K, ...] and
    which have the frozen ones in common, [K, B, T]."""

    def outputs(own: Params) -> jax.Array:
        return response_outputs(network, merge_params(frozen, own), *inputs, **where)

    return jax.vmap(outputs)(trained) if several else outputs(trained)


def statistics_of(
    network: Network,
    policy: Params,
    trained: Params,
    *inputs: jax.Array,
    several: bool,
    **where: Any,
) -> tuple[Any, ...]:
    """`response_statistics` of a critic on the policy, whose parameters these are: (logprobs,
    entropies, what `outputs_of` gives), all of one pass; with experts (these, the statistics)."""

    def statistics(own: Params) -> tuple[Any, ...]:
        return response_statistics(network, merge_params(policy, own), *inputs, **where)

    if not several:
        return statistics(trained)
    axes: tuple[Any, ...] = (None, None, 0)
    if "experts" in where:
        axes = (axes, None)
    return jax.vmap(statistics, out_axes=axes)(trained)


def take_critic(values: jax.Array, critics: jax.Array) -> jax.Array:
    """[B, T]: of the values [K, B, T] of several critics that of each token's own, [B, T] int32."""
    return jnp.take_along_axis(values, critics[None], axis=0)[0]


def share_prompts(mask: jax.Array, *, group_size: int, num_critics: int) -> jax.Array:
    """Which critic learns which token, [B, T] int32, 0 where masked: each has the responses to the
    prompts of its own, critic k to prompt k, k + K, k + 2 K, ...

    >>> share_prompts(jnp.ones((4, 1), bool), group_size=2, num_critics=2).ravel().tolist()
    [0, 0, 1, 1]
    """
    prompt = jnp.arange(mask.shape[0], dtype=jnp.int32) // group_size
    return jnp.where(mask, (prompt % num_critics)[:, None], 0)


def check_outputs(outputs: jax.Array, hyperparameters: Hyperparameters) -> None:
    """A critic with a `value_range` gives logits of bins, and one without it gives values."""
    rank, rule = 2, "[B, T] without value_range"
    if hyperparameters.value_range is not None:
        rank, rule = 3, "[B, T, N] with value_range"
    if outputs.ndim != rank:
        raise ValueError(f"networks.value must give {rule}, got {list(outputs.shape)}")


def bin_edges(logits: jax.Array, hyperparameters: Hyperparameters) -> jax.Array:
    """[N + 1] float32: bins of equal width from end to end of `value_range`."""
    low, high = hyperparameters.value_range
    return jnp.linspace(low, high, logits.shape[-1] + 1, dtype=jnp.float32)


def critic_metrics(values: jax.Array, returns: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Scalars on the values of a batch before it is trained on.

    Args:
        values: [B, T] float.
        returns: [B, T] float.
        mask: [B, T] bool, True counts; what the others hold elsewhere has no effect.

    Returns:
        {name: scalar}: value/explained_variance, also of each quarter of the responses; the means
        of values and returns, also in each fifth of the tokens from the lowest values to the
        highest, NaN in a fifth without tokens; value/bias, the difference of the two.

    >>> values, mask = jnp.array([[1.0, 3.0]]), jnp.array([[True, True]])
    >>> float(critic_metrics(values, values + 2, mask)["value/bias"])
    -2.0
    """
    quarters = explained_variance_by_position(values, returns, mask, num_bins=4)
    fifths = zip(*value_calibration(values, returns, mask, num_bins=5), strict=True)
    metrics = {
        "value/explained_variance": explained_variance(values, returns, mask),
        "value/bias": value_bias(values, returns, mask),
        "value/mean": masked_mean(values, mask),
        "value/return": masked_mean(returns, mask),
    }
    metrics |= {f"value/explained_variance_quarter{i}": x for i, x in enumerate(quarters, 1)}
    for i, (value, own) in enumerate(fifths, 1):
        metrics |= {f"value/mean_fifth{i}": value, f"value/return_fifth{i}": own}
    return metrics
