"""Operations that XLA compiles badly for a CPU, in a form that it compiles well.

The docstring of each names the plain expression that it replaces.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ppo_jax.core.checks import Number


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: jax.Array, kernel: jax.Array, dtype: str | None = None) -> jax.Array:
    """x @ kernel, [..., I] x [I, O] -> [..., O]; `dtype` is that of the result.

    On a CPU the gradient of the kernel is computed in another order of axes than autodiff's.
    Reverse mode only: `jax.jvp` is refused.
    """
    return _matmul(x, kernel, dtype)


def _matmul(x, kernel, dtype):
    return jnp.matmul(x, kernel, preferred_element_type=dtype)


def _matmul_forward(x, kernel, dtype):
    return _matmul(x, kernel, dtype), (x, kernel)


def _matmul_backward(dtype, saved, g):
    x, kernel = saved

    def autodiff(x, g):
        return jax.linear_transpose(lambda kernel: _matmul(x, kernel, dtype), kernel)(g)[0]

    reordered = functools.partial(_kernel_gradient, dtype=kernel.dtype)
    kernel_gradient = jax.lax.platform_dependent(x, g, cpu=reordered, default=autodiff)
    return *jax.linear_transpose(lambda x: _matmul(x, kernel, dtype), x)(g), kernel_gradient


def _kernel_gradient(x, g, dtype):
    """x' g over all positions.

    On a CPU XLA transposes the left operand of such a product, number by number, and both operands
    if the sum is over more than one axis. So: one axis, and the narrower array on the left. The
    barrier keeps XLA from swapping the operands back.
    """
    x_NI, g_NO = (a.reshape(-1, a.shape[-1]) for a in (x, g))
    swapped = x_NI.shape[1] > g_NO.shape[1]
    left, right = (g_NO, x_NI) if swapped else (x_NI, g_NO)
    product = jnp.matmul(left.T, right, preferred_element_type=dtype)
    product = jax.lax.optimization_barrier(product)
    return product.T if swapped else product


matmul.defvjp(_matmul_forward, _matmul_backward)


def after(x: jax.Array, tree: Any) -> jax.Array:
    """x [...] bool, for what is to be computed after the arrays of a tree; the plain form is x.

    A CPU's scheduler starts whatever it can, so that of two networks that are trained it holds the
    activations of both. It follows data alone: here that of a flag which is never set.
    """

    def wait(x, *leaves):
        # Cut out in all axes at once: of a flattened leaf that is sharded all would be gathered.
        corners = (jax.lax.slice(x, (0,) * x.ndim, (1,) * x.ndim) for x in leaves)
        first = sum(corner.sum().astype(jnp.float32) for corner in corners)
        return x & ~((first != first) & (first == 0))

    leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.size]
    return jax.lax.platform_dependent(x, *leaves, cpu=wait, default=lambda x, *_: x)


def argmax(x: jax.Array) -> jax.Array:
    """`jnp.argmax(x, axis=-1)`, int32, as two reductions of one value each, which XLA vectorises.

    The first of equal values; 0 for a row with NaN.
    """
    below = x < jnp.max(x, axis=-1, keepdims=True)
    ids = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    return jnp.min(jnp.where(below, x.shape[-1], ids), axis=-1)


def nucleus(logits: jax.Array, top_p: Number) -> jax.Array:
    """[..., V] bool, the tokens of top-p sampling; the plain form sorts, then sums from the top.

    A bisection finds the largest threshold whose tokens reach top_p together, in 32 sums; `logits`
    are float32.
    """
    bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    probs = jax.nn.softmax(logits, axis=-1)
    bound = jnp.maximum(top_p, jnp.finfo(jnp.float32).tiny)

    def mass(chosen):
        return jnp.sum(jnp.where(chosen, probs, 0.0), axis=-1, keepdims=True)

    def halve(_, interval):
        low, high = interval
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, which does not overflow
        reached = mass(order >= middle) >= bound
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

    ends = jnp.iinfo(jnp.int32)
    shape = (*logits.shape[:-1], 1)
    interval = tuple(jnp.full(shape, end, jnp.int32) for end in (ends.min, ends.max))
    threshold, _ = jax.lax.fori_loop(0, 32, halve, interval)
    above, equal = order > threshold, order == threshold
    # Of the tokens at the threshold, as many as needed, the lower ids first.
    first = jnp.cumsum(equal, axis=-1) - 1
    inside = above | (equal & (mass(above) + first * probs < bound))
    return inside | (top_p >= 1)
