"""The product of activations with a matrix of parameters.

Dimension key: I inputs, O outputs, N positions of all sequences.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, kernel: jax.Array, dtype: str | None = None) -> jax.Array:
    """x @ kernel, with a gradient of the kernel that is fast on a CPU as well.

    On other platforms the gradients are those of autodiff. Reverse mode only: `jax.jvp` is refused.

    Args:
        x: [..., I] float.
        kernel: [I, O] float.
        dtype: of the result; None is that of the arguments.

    Returns:
        [..., O].
    """
    return _plain(x, kernel, dtype)


def _plain(x, kernel, dtype):
    return jnp.matmul(x, kernel, preferred_element_type=dtype)


def _forward(x, kernel, dtype):
    return _plain(x, kernel, dtype), (x, kernel)


def _backward(dtype, saved, g):
    x, kernel = saved

    def by_autodiff(x, g):
        return jax.linear_transpose(lambda kernel: _plain(x, kernel, dtype), kernel)(g)[0]

    by_hand = functools.partial(_kernel_gradient, dtype=kernel.dtype)
    of_kernel = jax.lax.platform_dependent(x, g, cpu=by_hand, default=by_autodiff)
    return *jax.linear_transpose(lambda x: _plain(x, kernel, dtype), x)(g), of_kernel


def _kernel_gradient(x, g, dtype):
    """x' g over all positions.

    XLA copies what stands on the left of such a product on a CPU into another order, number by
    number, and both if the sum is over more than one axis. So: one axis, and the narrower array on
    the left. The barrier keeps XLA from turning the product around again.
    """
    x_NI, g_NO = (a.reshape(-1, a.shape[-1]) for a in (x, g))
    turned = x_NI.shape[1] > g_NO.shape[1]
    left, right = (g_NO, x_NI) if turned else (x_NI, g_NO)
    found = jax.lax.optimization_barrier(jnp.matmul(left.T, right, preferred_element_type=dtype))
    return found.T if turned else found


product.defvjp(_forward, _backward)
