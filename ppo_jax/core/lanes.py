"""What the lanes of a `jax.vmap` decide together, so that a loop's counter is one number.

A lane is one run of a sweep. A loop whose condition differs from lane to lane would carry a copy of
its counter for each of them: every write into a cache would become a selection of the whole cache.
"""

import jax
from jax.custom_batching import custom_vmap


@custom_vmap
def any_lane(x: jax.Array) -> jax.Array:
    """x without `jax.vmap`; under it whether x is True in any lane, one value for all of them.

    >>> jax.vmap(any_lane, out_axes=None)(jnp.array([False, True])).item()
    True
    """
    return x


@any_lane.def_vmap
def _any_lane(axis_size, in_batched, x):
    return any_lane(x.any(axis=0)), False  # again: of the lanes of an outer vmap


@custom_vmap
def max_lane(x: jax.Array) -> jax.Array:
    """x without `jax.vmap`; under it the largest x of all lanes, one value for all of them.

    >>> jax.vmap(max_lane, out_axes=None)(jnp.array([3, 5, 4])).item()
    5
    """
    return x


@max_lane.def_vmap
def _max_lane(axis_size, in_batched, x):
    return max_lane(x.max(axis=0)), False
