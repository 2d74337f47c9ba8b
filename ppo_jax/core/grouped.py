"""Products of rows with the matrix of their group: what the experts of a mixture compute.

Dimension key: P rows, E groups, I inputs, O outputs, b rows of a block.
"""

import functools

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap

from ppo_jax.core.lanes import max_lane

LEAST, MOST = 8, 256  # rows of a block
# The name scope of a product, blocks_12 where all rows fill so many: what its loop depends on is
# data, so that this is all that a compiled program tells of its trips.
BLOCKS = "blocks"


@jax.custom_vjp
def grouped_matmul(x_PI: jax.Array, kernels_EIO: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Rows of group e times matrix e, [P, O]; the rows are sorted by group.

    On accelerators this is `jax.lax.ragged_dot`. XLA computes that for a CPU as all rows times all
    matrices, and its gradient of the matrices on TPUs, too; here these are one product a block of
    rows, and only as many blocks as are needed. Reverse mode only: `jax.jvp` is refused.

    Args:
        x_PI: rows, those of the first group first.
        kernels_EIO: a matrix a group.
        sizes_E: int32, rows of each group; a group may have none, or all. What follows the last is
            of no group: its result is 0, and it costs nothing.
    """
    return _product(x_PI, kernels_EIO, sizes_E, False)


def _forward(x_PI, kernels_EIO, sizes_E):
    return _product(x_PI, kernels_EIO, sizes_E, False), (x_PI, kernels_EIO, sizes_E)


def _backward(saved, g_PO):
    x_PI, kernels_EIO, sizes_E = saved
    in_blocks = dict.fromkeys(("cpu", "tpu"), _kernel_gradients)
    of_kernels = jax.lax.platform_dependent(
        x_PI, g_PO, sizes_E, **in_blocks, default=_ragged_kernel_gradients
    )
    return _product(g_PO, kernels_EIO, sizes_E, True), of_kernels, None


grouped_matmul.defvjp(_forward, _backward)


def _product(x, kernels, sizes, transposed):
    """`grouped_matmul`, or with every matrix transposed."""

    def ragged(x, kernels, sizes):
        return _ragged(x, kernels.swapaxes(1, 2) if transposed else kernels, sizes)

    in_blocks = functools.partial(_product_in_blocks, transposed=transposed)
    return jax.lax.platform_dependent(x, kernels, sizes, cpu=in_blocks, default=ragged)


# Lane after lane: jax batches `ragged_dot` over some axes only.
@sequential_vmap
def _ragged(x_PI, kernels_EIO, sizes_E):
    with _scope(len(x_PI), len(sizes_E)):
        y_PO = jax.lax.ragged_dot(x_PI, kernels_EIO, sizes_E)
    return _zero_rest(y_PO, sizes_E)  # of rows behind the last group jax promises nothing


def _zero_rest(y_PO, sizes_E):
    return jnp.where((jnp.arange(len(y_PO)) < sizes_E.sum())[:, None], y_PO, 0)


@sequential_vmap
def _ragged_kernel_gradients(x_PI, g_PO, sizes_E):
    shape = len(sizes_E), x_PI.shape[1], g_PO.shape[1]
    kernels = jax.ShapeDtypeStruct(shape, x_PI.dtype)
    return jax.linear_transpose(lambda w: jax.lax.ragged_dot(x_PI, w, sizes_E), kernels)(g_PO)[0]


def _product_in_blocks(x_PI, kernels, sizes_E, transposed):
    block = block_rows(len(x_PI), len(sizes_E))
    padded = jnp.pad(x_PI, ((0, block), (0, 0)))
    axis = 1 if transposed else 0

    def step(group, start, _, y):
        rows = jax.lax.dynamic_slice_in_dim(padded, start, block)
        matrix = jax.lax.dynamic_index_in_dim(kernels, group, keepdims=False)
        product = jax.lax.dot_general(rows, matrix, (((1,), (axis,)), ((), ())))
        # Rows after the block's own are of later blocks, which write them again.
        return jax.lax.dynamic_update_slice_in_dim(y, product, start, 0)

    y = jnp.zeros((len(padded), kernels.shape[1 if transposed else 2]), x_PI.dtype)
    with _scope(len(x_PI), len(sizes_E)):
        y = _for_blocks(step, y, sizes_E, block)[: len(x_PI)]
    return _zero_rest(y, sizes_E)


def _kernel_gradients(x_PI, g_PO, sizes_E):
    """[E, I, O], x' g over the rows of each group."""
    block = block_rows(len(x_PI), len(sizes_E))
    x, g = (jnp.pad(a, ((0, block), (0, 0))) for a in (x_PI, g_PO))

    def step(group, start, count, sums):
        own = (jnp.arange(block) < count)[:, None]
        rows = jnp.where(own, jax.lax.dynamic_slice_in_dim(x, start, block), 0)
        g_rows = jax.lax.dynamic_slice_in_dim(g, start, block)
        change = jnp.matmul(rows.T, g_rows, preferred_element_type=sums.dtype)
        before = jax.lax.dynamic_index_in_dim(sums, group, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(sums, before + change, group, 0)

    exact = jnp.promote_types(x.dtype, jnp.float32)  # a sum of many blocks
    sums = jnp.zeros((len(sizes_E), x.shape[1], g.shape[1]), exact)
    with _scope(len(x_PI), len(sizes_E)):
        return _for_blocks(step, sums, sizes_E, block).astype(x.dtype)


def _scope(num_rows, num_groups):
    return jax.named_scope(f"{BLOCKS}_{-(-num_rows // block_rows(num_rows, num_groups))}")


def block_rows(num_rows: int, num_groups: int) -> int:
    """Rows of a block: about those of a group, a power of two.

    >>> block_rows(4096, 8), block_rows(16, 64), block_rows(1000, 60)
    (256, 8, 16)
    """
    mean = num_rows // num_groups
    return min(MOST, max(LEAST, 1 << max(0, mean.bit_length() - 1)))


def _for_blocks(step, carry, sizes_E, block):
    """step(group, first row, rows of the group from there on, carry) for every block of the rows of
    every group, in order."""
    blocks_E = -(-sizes_E // block)
    until_E, rows_until_E = jnp.cumsum(blocks_E), jnp.cumsum(sizes_E)
    last = len(sizes_E) - 1

    def body(i, carry):
        # A lane of a sweep that needs fewer blocks repeats its last one, with no row of its own.
        number = jnp.minimum(i, jnp.maximum(until_E[last] - 1, 0))
        group = jnp.minimum(
            jnp.searchsorted(until_E, number, side="right", method="compare_all"), last
        )
        inside = (number - (until_E[group] - blocks_E[group])) * block
        start = rows_until_E[group] - sizes_E[group] + inside
        count = jnp.where(i == number, sizes_E[group] - inside, 0)
        return step(group, start, count, carry)

    return jax.lax.fori_loop(0, max_lane(until_E[last]), body, carry)
