"""How good the critic of an iteration is, for the log.

Dimension key: B responses, T response tokens.
"""

import jax

from ppo_jax.core.critics import (
    explained_variance,
    explained_variance_by_position,
    value_bias,
    value_calibration,
)
from ppo_jax.core.masking import masked_mean


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
