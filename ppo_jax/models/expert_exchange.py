"""Rows of several devices meet the experts of each, and what the experts add goes back.

Every device gathers the rows of all and computes its own experts on those that chose them; the sums
are scattered to the devices of the rows. No expert has a capacity: all rows may be of one. A row of
D numbers moves to all d devices and its sums from all, 2 (d - 1) D; sent to k experts and back it
would be 2 k D (d - 1) / d, more where k is more than d.

Dimension key: N rows of a device, M = d N rows of all, k experts of a row, P = M k pairs of a row
and an expert, C pairs of a chunk, E experts of a device, D model.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppo_jax.core.lanes import max_lane

SLACK = 1.25  # pairs of a chunk by those of a device whose experts have their equal share

Kernels = tuple[jax.Array, ...]
Compute = Callable[[jax.Array, jax.Array, Kernels], jax.Array]


class Chunk(NamedTuple):
    """Pairs that are computed together; of those behind the last one the weight is 0."""

    pairs_C: jax.Array  # their places among all pairs
    rows_C: jax.Array
    sizes_E: jax.Array  # int32, how many of them each expert has
    real_C: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def exchange(
    compute: Compute,
    mesh_axes: tuple[str, ...],
    num_experts: int,
    x_ND: jax.Array,
    weights_Nk: jax.Array,
    chosen_Nk: jax.Array,
    first: jax.Array,
    kernels: Kernels,
) -> jax.Array:
    """What the experts of all devices add for the rows of this one, [N, D] float32: the sum over a
    row's k experts of weight x output.

    Inside of `jax.shard_map`. The pairs of a device's experts are computed in chunks, as many as
    there are: no array is as long as all pairs. The backward pass gathers the rows again and
    computes the chunks again. Reverse mode only: `jax.jvp` is refused.

    Args:
        compute: (rows [C, D], sizes [E], kernels) -> outputs [C, D] of rows sorted by expert.
        mesh_axes: over which the devices are, whose rows differ.
        num_experts: of all devices.
        x_ND: rows of this device.
        weights_Nk: float32, of the experts of each row.
        chosen_Nk: int32, experts of each row, by their numbers among all; one that there is not is
            computed by nobody.
        first: int32, the number of this device's first expert.
        kernels: of the experts of this device, [E, ...] each.
    """
    arrays = x_ND, weights_Nk, chosen_Nk, first, kernels
    return _forward(compute, mesh_axes, num_experts, *arrays)[0]


def _forward(compute, mesh_axes, num_experts, x_ND, weights_Nk, chosen_Nk, first, kernels):
    rows = _gather(mesh_axes, x_ND, weights_Nk, chosen_Nk)

    def add(chunk, y_MD):
        return y_MD.at[chunk.rows_C].add(_outputs(compute, chunk, *rows[:2], kernels))

    zeros = jnp.zeros(rows[0].shape, jnp.float32)
    y_MD = _for_chunks(add, zeros, rows[2] - first, len(kernels[0]), num_experts)
    return _scatter(mesh_axes, y_MD), (x_ND, weights_Nk, chosen_Nk, first, kernels)


def _backward(compute, mesh_axes, num_experts, saved, g_ND):
    x_ND, weights_Nk, chosen_Nk, first, kernels = saved
    # The sum was cast to the rows' dtype, and so was what comes back.
    rows = _gather(mesh_axes, x_ND, weights_Nk, chosen_Nk, g_ND.astype(x_ND.dtype))
    x_MD, weights_Mk, chosen_Mk, g_MD = rows

    def add(chunk, gradients):
        of_x, of_weights, of_kernels = gradients
        x_CD, weights_C = x_MD[chunk.rows_C], weights_Mk.reshape(-1)[chunk.pairs_C]
        outputs = functools.partial(_weighted, compute, chunk)
        _, backward = jax.vjp(outputs, x_CD, weights_C, kernels)
        g_CD, g_weights_C, g_kernels = backward(g_MD[chunk.rows_C].astype(jnp.float32))
        return (
            of_x.at[chunk.rows_C].add(g_CD.astype(jnp.float32)),
            of_weights.at[chunk.pairs_C].add(g_weights_C),
            jax.tree.map(lambda total, g: total + g.astype(jnp.float32), of_kernels, g_kernels),
        )

    like = x_MD, weights_Mk.reshape(-1), kernels
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), like)
    own_Mk, num_own = chosen_Mk - first, len(kernels[0])
    of_x, of_weights, of_kernels = _for_chunks(add, zeros, own_Mk, num_own, num_experts)
    of_kernels = jax.tree.map(lambda g, w: g.astype(w.dtype), of_kernels, kernels)
    of_x = _scatter(mesh_axes, of_x).astype(x_ND.dtype)
    of_weights = _scatter(mesh_axes, of_weights.reshape(weights_Mk.shape))
    return of_x, of_weights.astype(weights_Nk.dtype), None, None, of_kernels


exchange.defvjp(_forward, _backward)


def _outputs(compute, chunk, x_MD, weights_Mk, kernels):
    x_CD, weights_C = x_MD[chunk.rows_C], weights_Mk.reshape(-1)[chunk.pairs_C]
    return _weighted(compute, chunk, x_CD, weights_C, kernels)


def _weighted(compute, chunk, x_CD, weights_C, kernels):
    weights_C = jnp.where(chunk.real_C, weights_C, 0)
    return weights_C[:, None] * compute(x_CD, chunk.sizes_E, kernels)


def _gather(mesh_axes, *arrays):
    return [jax.lax.all_gather(x, mesh_axes, tiled=True) for x in arrays]


def _scatter(mesh_axes, sums):
    return jax.lax.psum_scatter(sums, mesh_axes, tiled=True)


def _for_chunks(step, carry, own_Mk, num_own, num_experts):
    """step(chunk, carry) for each chunk of the pairs whose expert is one of the first `num_own` of
    `num_experts`, sorted by expert."""
    group_P = jnp.where((own_Mk >= 0) & (own_Mk < num_own), own_Mk, num_own).reshape(-1)
    size = min(len(group_P), int(SLACK * len(group_P) * num_own / num_experts) + 1)
    order_P = jnp.pad(jnp.argsort(group_P), (0, size))
    ends_E = (group_P[:, None] <= jnp.arange(num_own)[None]).sum(0, dtype=jnp.int32)
    total = ends_E[num_own - 1]

    def body(i, carry):
        begin = i * size
        pairs_C = jax.lax.dynamic_slice_in_dim(order_P, begin, size)
        until_E = jnp.clip(ends_E - begin, 0, size)
        sizes_E = jnp.diff(until_E, prepend=jnp.zeros(1, jnp.int32))
        real_C = begin + jnp.arange(size, dtype=jnp.int32) < total
        return step(Chunk(pairs_C, pairs_C // own_Mk.shape[1], sizes_E, real_C), carry)

    # A lane of a sweep with fewer chunks goes on with ones in which no pair is real.
    return jax.lax.fori_loop(0, max_lane(-(-total // size)), body, carry)
