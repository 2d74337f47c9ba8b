"""Products by group: each row with the matrix of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.core.grouped import block_rows, grouped_matmul

SIZES = {
    "uneven": [7, 1, 0, 12, 3],
    "all of one": [0, 0, 40, 0],
    "several blocks": [30, 0, 25, 9],
    "rows of no group": [3, 0, 5],
    "no rows": [0, 0],
    "one group": [17],
}
ROWS, INPUTS, OUTPUTS = 64, 6, 5


def problem(sizes, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (ROWS, INPUTS), (len(sizes), INPUTS, OUTPUTS), (ROWS, OUTPUTS)
    x, kernels, g = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    return x, kernels, g, jnp.asarray(sizes, jnp.int32)


def oracle(x, kernels, g, sizes):
    """(products, gradient of the rows, gradient of the matrices), row by row in float64."""
    x, kernels, g = (np.asarray(a, np.float64) for a in (x, kernels, g))
    y, dx, dkernels = np.zeros_like(g), np.zeros_like(x), np.zeros_like(kernels)
    for row, group in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        y[row] = x[row] @ kernels[group]
        dx[row] = kernels[group] @ g[row]
        dkernels[group] += np.outer(x[row], g[row])
    return y, dx, dkernels


def run(x, kernels, g, sizes):
    y, pullback = jax.vjp(lambda x, kernels: grouped_matmul(x, kernels, sizes), x, kernels)
    return y, *pullback(g)


@pytest.mark.parametrize("name", SIZES)
def test_products_and_gradients_are_those_row_by_row(name):
    arrays = problem(SIZES[name])
    for ours, expected in zip(jax.jit(run)(*arrays), oracle(*arrays), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_the_form_of_accelerators_is_the_same(monkeypatch):
    """With lanes, whose products are one after the other there."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, default, **_: default(*x))
    lanes = [problem(sizes, i) for i, sizes in enumerate([[40, 2, 1], [0, 0, 3]])]
    together = jax.jit(jax.vmap(run))(*jax.tree.map(lambda *x: jnp.stack(x), *lanes))
    for i, lane in enumerate(lanes):
        for ours, expected in zip(together, oracle(*lane), strict=True):
            np.testing.assert_allclose(ours[i], expected, atol=1e-5)


def test_lanes_are_each_alone_however_many_blocks_they_need():
    lanes = [problem(sizes, i) for i, sizes in enumerate([[40, 2, 1], [0, 0, 3], [5, 6, 7]])]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *lanes)
    together = jax.jit(jax.vmap(run))(*stacked)
    for i, lane in enumerate(lanes):
        for ours, expected in zip(together, oracle(*lane), strict=True):
            np.testing.assert_allclose(ours[i], expected, atol=1e-5)


def test_a_program_for_a_cpu_multiplies_a_block_of_rows_with_one_matrix():
    x, kernels, g, _ = problem([0] * 16)
    compiled = jax.jit(run).lower(x, kernels, g, jnp.zeros(16, jnp.int32)).compile()
    block = 3 * 2 * block_rows(ROWS, 16) * INPUTS * OUTPUTS  # a loop's body is counted once
    assert compiled.cost_analysis()["flops"] < 2 * ROWS * INPUTS * OUTPUTS + 4 * block


def test_a_program_for_a_tpu_has_no_product_of_all_rows_with_all_matrices():
    """Its compiler would make one of the third of these, the gradient of the matrices."""
    x, kernels, g, _ = problem([0] * 16)
    traced = jax.jit(run).trace(x, kernels, g, jnp.zeros(16, jnp.int32))
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count('"chlo.ragged_dot"') == 2
    assert text.count("stablehlo.while") == 1


def test_gradients_of_matrices_are_sums_in_float32():
    """4,096 ones: in bfloat16 they would stop at 256."""
    x, g = jnp.ones((4096, 2), jnp.bfloat16), jnp.ones((4096, 3), jnp.bfloat16)
    kernels, sizes = jnp.zeros((2, 2, 3), jnp.bfloat16), jnp.array([4095, 1], jnp.int32)
    found = jax.jit(run)(x, kernels, g, sizes)[2]
    np.testing.assert_array_equal(found, np.array([4096, 1.0])[:, None, None] + np.zeros((2, 2, 3)))
