"""Experts over mesh axes of the rows: the outputs of one device, whatever the router chooses."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.config.mesh import RULES
from ppo_jax.distributed.layout import over_lanes
from ppo_jax.models import moe
from ppo_jax.models.axes import EXPERTS, HIDDEN
from ppo_jax.models.config import Experts
from ppo_jax.models.expert_exchange import SLACK
from ppo_jax.models.moe import mixture
from tests.support.meshes import layout_of

ROWS, LENGTH, EMBED, WIDTH, NUM = 8, 7, 6, 5, 8
EXPERTS_OF = Experts(num_experts=NUM, num_chosen=3, dim=WIDTH, normalized=True)
OF_ARRAYS = HIDDEN, ("batch", None), HIDDEN, *[("expert", None, None)] * 3


def layout_with(shape, *axes):
    return layout_of(shape, dataclasses.replace(RULES, expert=axes))


def problem(favourites=()):
    """(x, real, router logits, gate, up, down); all tokens choose the favourites."""
    rng = np.random.default_rng(0)
    up = NUM, EMBED, WIDTH
    shapes = [(ROWS, LENGTH, EMBED), (ROWS, LENGTH, NUM), up, up, (NUM, WIDTH, EMBED)]
    x, logits, *kernels = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    logits[..., list(favourites)] += 9.0
    return jax.tree.map(jnp.asarray, (x, rng.random((ROWS, LENGTH)) < 0.7, logits, *kernels))


def on_mesh(layout):
    """`mixture` on a mesh, as `MoE` calls it."""
    constrain = layout.constrain
    axes, rows = constrain.mesh_axes("expert", NUM), constrain.mesh_axes("batch", ROWS)
    compute = functools.partial(
        mixture, EXPERTS_OF, jax.nn.silu, axes, row_axes=tuple(x for x in axes if x in rows)
    )
    return lambda *arrays: constrain.shard_map(compute, OF_ARRAYS, *arrays)


def outputs_and_gradients(compute):
    """Of tokens, router and kernels."""

    def both(x, real, *arrays):
        outputs = lambda x, *arrays: jax.tree.leaves(compute(x, real, *arrays))[0]  # noqa: E731
        y, backward = jax.vjp(outputs, x, *arrays)
        return y, backward(jnp.sin(jnp.arange(y.size, dtype=y.dtype).reshape(y.shape)))

    return jax.jit(both)


@functools.cache
def of_one_device():
    return outputs_and_gradients(functools.partial(mixture, EXPERTS_OF, jax.nn.silu, ()))


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((8, 1, 1), ("data",)),
        ((2, 2, 2), ("fsdp",)),
        ((2, 2, 2), ("data", "fsdp")),
        ((2, 2, 2), ("model", "data")),
    ],
    ids=str,
)
def test_a_mesh_has_the_outputs_and_gradients_of_one_device(shape, axes):
    """Also where all tokens choose experts of one device: of three times its share of pairs, or
    more, none is dropped."""
    compute = outputs_and_gradients(on_mesh(layout_with(shape, *axes)))
    for favourites in ((), (3,), (6, 7), (0, 4, 7)):
        arrays = problem(favourites)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, atol=2e-5),
            compute(*arrays),
            of_one_device()(*arrays),
        )


def test_lanes_over_the_data_exchange_rows_of_their_own():
    """With as many chunks as the lane that needs most."""
    layout = layout_with((2, 2, 2), "data", "fsdp")
    lanes = over_lanes((layout, layout), 2)
    assert lanes.layouts[0].rules.expert == lanes.layouts[0].rules.batch == ("fsdp",)
    compute = outputs_and_gradients(on_mesh(lanes.layouts[0]))
    arrays = [problem(), problem((0, 1, 2))]
    found = jax.jit(jax.vmap(compute, spmd_axis_name=lanes.mesh_axis))(
        *jax.tree.map(lambda *x: jnp.stack(x), *arrays)
    )
    for lane, alone in enumerate(arrays):
        jax.tree.map(
            lambda x, y, i=lane: np.testing.assert_allclose(x[i], y, atol=2e-5),
            found,
            of_one_device()(*alone),
        )


def test_tokens_of_no_text_have_no_experts():
    x, _, *arrays = problem()
    compute = outputs_and_gradients(on_mesh(layout_with((2, 2, 2), "fsdp")))
    for leaf in jax.tree.leaves(compute(x, jnp.zeros((ROWS, LENGTH), bool), *arrays)):
        assert not np.asarray(leaf).any()


def test_rows_are_gathered_and_sums_scattered():
    """No kernel moves, and no array has a row for each pair of a token and an expert."""
    layout = layout_with((8, 1, 1), "data")
    shapes = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.sharding(axes, x.shape))
        for x, axes in zip(problem(), OF_ARRAYS, strict=True)
    ]
    text = outputs_and_gradients(on_mesh(layout)).lower(*shapes).compile().as_text()
    moved = re.findall(r"= (\w+)\[([\d,]*)\]\S* (all-[\w-]+|reduce-scatter|collective-\w+)\(", text)
    rows, k = ROWS * LENGTH, EXPERTS_OF.num_chosen
    gathered = {("f32", EMBED), ("f32", k), ("s32", k)}  # of a row: itself, weights, experts
    assert set(moved) == {
        *((dtype, f"{rows},{size}", "all-gather") for dtype, size in gathered),
        *(("f32", f"{LENGTH},{size}", "reduce-scatter") for size in (EMBED, k)),
    }
    assert f"[{rows},{EMBED}]" in text and f"[{rows * k},{EMBED}]" not in text


def test_a_chunk_has_the_share_of_the_experts_of_its_device(monkeypatch):
    """A quarter of the pairs, though each second device with experts has the same rows."""
    chunks, outputs = set(), moe.outputs

    def counted(activation, x_PD, *args):
        chunks.add(len(x_PD))
        return outputs(activation, x_PD, *args)

    monkeypatch.setattr(moe, "outputs", counted)
    mesh = on_mesh(layout_with((2, 2, 2), "fsdp", "model"))
    jax.eval_shape(outputs_and_gradients(mesh), *problem())
    share = ROWS // 2 * LENGTH * EXPERTS_OF.num_chosen / 4
    assert chunks == {int(SLACK * share) + 1} == {27}


def test_experts_that_nobody_trains_have_no_gradient():
    """The loop over chunks carries none, either."""
    layout = layout_with((8, 1, 1), "data")
    outputs = on_mesh(layout)

    def compiled(*trained):
        def loss(x, *arrays):
            return (jax.tree.leaves(outputs(x, *arrays))[0] ** 2).sum()

        return jax.jit(jax.grad(loss, trained)).lower(*problem()).compile().as_text()

    # The down kernel of one expert, a sum over chunks.
    of_kernel = rf"f32\[1,{WIDTH},{EMBED}\]\S* add\("
    assert re.search(of_kernel, compiled(0, 5)) and not re.search(of_kernel, compiled(0))


def test_stored_experts_leave_their_mesh_axes_to_none_else():
    """Numbers of a matrix are over the axes of `embed` that the experts do not have."""

    def of(layout, shape):
        return tuple(layout.sharding(EXPERTS["up"], shape).spec)

    assert of(layout_with((2, 2, 2), "fsdp"), (8, 6, 5)) == ("fsdp", None, None)
    assert of(layout_with((2, 2, 2), "data"), (8, 6, 5)) == ("data", "fsdp", None)
    assert of(layout_with((2, 2, 2), "data", "fsdp"), (6, 8, 5)) == (None, "fsdp", None)
