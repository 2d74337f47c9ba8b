"""Costs of compiled programs: loops count by their trips, collectives by what a chip sends."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from ppo_jax.algorithms import supervised as steps
from ppo_jax.distributed import layout as sharding
from ppo_jax.models.build import policy_network
from ppo_jax.planner.flops import training_flops
from ppo_jax.planner.hlo.cost import ProgramCost, Sent, cost_analysis, hlo_cost
from tests.support import tiny


def shape(*dims, dtype=jnp.float32, sharding=None):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)


def cost_of(function, *args, **options):
    return cost_analysis(jax.jit(function).lower(*args).compile(), **options)


def row_of_devices(size=8):
    types = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((8 // size, size), ("a", "b"), axis_types=types)


def test_a_product_counts_twice_its_multiplications_and_its_three_matrices():
    cost = cost_of(lambda x, w: x @ w, shape(32, 64), shape(64, 16))
    assert cost.flops == 2 * 32 * 64 * 16
    assert cost.bytes_accessed == 4 * (32 * 64 + 64 * 16 + 32 * 16)
    assert not cost.collectives
    assert cost.memory.arguments == 4 * (32 * 64 + 64 * 16)
    assert cost.memory.outputs == 4 * 32 * 16


def test_batched_and_transposed_products_and_convolutions():
    cost = cost_of(lambda x, w: jnp.einsum("bhsk,bhck->bhsc", x, w), *[shape(2, 3, 8, 4)] * 2)
    assert cost.flops == 2 * (2 * 3 * 8 * 8) * 4
    filters = shape(5, 5, 4, 6)

    def convolve(x, w):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=dims)

    assert cost_of(convolve, shape(2, 9, 9, 4), filters).flops == 2 * (2 * 5 * 5 * 6) * (5 * 5 * 4)


def test_elementwise_operations_have_bytes_but_no_flops():
    cost = cost_of(lambda x: jnp.tanh(x) + 1, shape(128, 128))
    assert cost.flops == 0
    assert cost.bytes_accessed == 4 * 2 * 128 * 128


def layer(x, w):
    return jnp.tanh(x @ w), None


def test_a_scanned_stack_costs_what_the_unrolled_one_does():
    """Per chip of eight, with a gather of each layer's weights. In bytes the loop adds only its
    counter and copies of its carry, a tenth or two: each trip reads its slice of the stack,
    which the unrolled program reads as well."""
    mesh = row_of_devices(4)

    def pinned(x, w):
        shardings = [jax.NamedSharding(mesh, spec) for spec in (P("a", None), P())]
        x, w = map(jax.lax.with_sharding_constraint, (x, w), shardings)
        return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), shardings[0]), None

    def unrolled(x, ws):
        for i in range(6):
            x, _ = pinned(x, ws[i])
        return x

    args = [
        shape(64, 128, sharding=jax.NamedSharding(mesh, P("a", None))),
        shape(6, 128, 128, sharding=jax.NamedSharding(mesh, P(None, "b", None))),
    ]
    scanned = cost_of(lambda x, ws: jax.lax.scan(pinned, x, ws)[0], *args)
    plain = cost_of(unrolled, *args)
    assert scanned.flops == plain.flops == 6 * 2 * 32 * 128 * 128
    assert dict(scanned.collectives) == dict(plain.collectives)
    assert scanned.collectives == {"all-gather": (6, 6 * 3 * 4 * 32 * 128)}
    assert scanned.bytes_accessed == pytest.approx(plain.bytes_accessed, rel=0.2)


def test_each_trip_reads_one_layer_of_a_stack():
    """64 layers of 64 x 64: to count the whole stack on every trip would be 64 times as much."""
    cost = cost_of(lambda x, ws: jax.lax.scan(layer, x, ws)[0], shape(8, 64), shape(64, 64, 64))
    weights = 4 * 64 * 64 * 64
    assert weights < cost.bytes_accessed < 4 * weights


def test_a_cache_is_written_where_it_changes():
    """One row of 1024 is new in each trip: the cache is neither read nor written as a whole."""

    def fill(cache, rows):
        def write(i, cache):
            return jax.lax.dynamic_update_slice_in_dim(cache, rows * i, i, axis=0)

        return jax.lax.fori_loop(0, 100, write, cache)

    lowered = jax.jit(fill, donate_argnums=0).lower(shape(1024, 64), shape(1, 64))
    assert cost_analysis(lowered.compile()).bytes_accessed < 100 * 10 * 4 * 64


def test_loops_in_loops_multiply():
    def inner(x, w):
        return jax.lax.fori_loop(0, 5, lambda i, x: x @ w, x), None

    cost = cost_of(lambda x, ws: jax.lax.scan(inner, x, ws)[0], shape(8, 16), shape(3, 16, 16))
    assert cost.flops == 3 * 5 * 2 * 8 * 16 * 16


def decode(x, w):
    """Ends after 20 trips or when nothing is left, as the decode loop does."""

    def going_on(carry):
        return (carry[0] < 20) & (carry[1] > 0).any()

    return jax.lax.while_loop(going_on, lambda c: (c[0] + 1, layer(c[1], w)[0]), (0, x))


def test_a_data_dependent_loop_takes_the_given_trip_count():
    args = shape(4, 32), shape(32, 32)
    assert cost_of(decode, *args, max_trip_counts=20).flops == 20 * 2 * 4 * 32 * 32
    with pytest.raises(ValueError, match=r"'jit\(decode\)/while' depends on data: give"):
        cost_of(decode, *args)


def test_data_dependent_loops_are_matched_by_name_scope():
    def twice(x, w):
        with jax.named_scope("first"):
            x = decode(x, w)[1]
        with jax.named_scope("outer"):
            going_on = lambda x: (x > 0).any()  # noqa: E731
            return jax.lax.while_loop(going_on, lambda x: later(x, w), x)

    def later(x, w):
        with jax.named_scope("inner"):
            return decode(x, w)[1]

    args, product = (shape(4, 32), shape(32, 32)), 2 * 4 * 32 * 32
    counts = {"first": 20, "outer": 3, "inner": 2.5}
    assert cost_of(twice, *args, max_trip_counts=counts).flops == (20 + 3 * 2.5) * product
    with pytest.raises(ValueError, match="'jit.twice./outer/while.* depends on data: give"):
        cost_of(twice, *args, max_trip_counts={"first": 20})


@pytest.mark.parametrize(("end", "step"), [(7, 1), (12, 3), (5, 1)])
def test_trip_counts_are_found_where_the_compiler_does_not_write_them(end, step):
    """TPU programs have none: they follow from the counter's start, step and end."""

    def f(x, w):
        def body(carry):
            return carry[0] + step, carry[1] @ w

        return jax.lax.while_loop(lambda c: c[0] < end, body, (1, x))[1]

    text = jax.jit(f).lower(shape(8, 16), shape(16, 16)).compile().as_text()
    bare = re.sub(r", backend_config=\{.*?\}(?=\n|$)", "", text)
    assert "known_trip_count" in text and "known_trip_count" not in bare
    expected = math.ceil((end - 1) / step) * 2 * 8 * 16 * 16
    assert hlo_cost(text).flops == expected
    assert hlo_cost(bare).flops == expected


def test_of_branches_the_costliest_counts():
    def f(p, x, w):
        return jax.lax.cond(p, lambda: x @ w @ w, lambda: x @ w)

    assert cost_of(f, shape(dtype=bool), shape(8, 16), shape(16, 16)).flops == 2 * 2 * 8 * 16 * 16


COLLECTIVES = {
    # kind: (what each of n chips does with its [8, 16] of float32, bytes it then sends)
    "all-reduce": (lambda x: jax.lax.psum(x, "b"), lambda n, size: 2 * (n - 1) / n * size),
    "all-gather": (lambda x: jax.lax.all_gather(x, "b"), lambda n, size: (n - 1) * size),
    "reduce-scatter": (
        lambda x: jax.lax.psum_scatter(x, "b", tiled=True),
        lambda n, size: (n - 1) / n * size,
    ),
    "all-to-all": (
        lambda x: jax.lax.all_to_all(x, "b", 0, 1, tiled=True),
        lambda n, size: (n - 1) / n * size,
    ),
    "collective-permute": (
        lambda x: jax.lax.ppermute(x, "b", [(0, 1), (1, 0)]),
        lambda n, size: size,
    ),
}


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("kind", COLLECTIVES)
def test_collectives_count_what_a_chip_sends(kind, n):
    function, sent = COLLECTIVES[kind]
    mesh = row_of_devices(n)
    specs = dict(in_specs=P(("a", "b")), out_specs=P(("a", "b")))
    program = jax.shard_map(function, mesh=mesh, check_vma=False, **specs)
    cost = cost_of(program, shape(64, 16))
    assert dict(cost.collectives) == {kind: (1, sent(n, 4 * 8 * 16))}
    assert cost.collective_bytes == sent(n, 4 * 8 * 16)


def test_costs_add_up():
    one = ProgramCost(flops=1, collectives={"all-gather": Sent(1, 10.0)})
    two = one.plus(one, 3).plus(ProgramCost(collectives={"all-reduce": Sent(2, 5.0)}))
    assert two.flops == 4
    assert two.collectives == {"all-gather": (4, 40.0), "all-reduce": (2, 5.0)}
    assert two.collective_bytes == 45


def sft_gradient(config, mesh_sizes, sequences=8, length=17):
    """The cost of one gradient of the SFT loss on a mesh."""
    layout = sharding.Layout(sharding.make_mesh(sharding.MeshSettings(**mesh_sizes), jax.devices()))
    network = policy_network(config, constrain=layout.constrain)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    placed = layout.shardings(shapes)
    rows = jax.NamedSharding(layout.mesh, P(layout.mesh_axes("batch") or None, None))
    tokens = shape(sequences, length, dtype=jnp.int32, sharding=rows)
    mask = shape(sequences, length, dtype=bool, sharding=rows)
    batch = steps.TextBatch(inputs=tokens, tokens=tokens, mask=mask, loss_mask=mask)
    gradient = jax.grad(lambda p, b: steps.sft_loss(network, p, b)[0])
    params = jax.tree.map(lambda x, s: shape(*x.shape, sharding=s), shapes, placed)
    lowered = jax.jit(gradient, out_shardings=placed).lower(params, batch)
    return cost_analysis(lowered.compile())


def test_eight_chips_share_the_work_of_a_gradient_scanned_or_not():
    """Nothing is computed twice across the mesh; and the Transformer, too, costs the same as a
    loop. One loop's all-reduces cannot be combined with another's, so their number differs."""
    config = tiny.model_config(vocab_size=64, num_layers=4, remat="full")
    plain, scanned = (
        sft_gradient(dataclasses.replace(config, scan_layers=scan), dict(data=2, fsdp=2, model=2))
        for scan in (False, True)
    )
    whole = training_flops(config, sequences=8, positions=16, outputs=16, head="logits")
    assert 8 * plain.flops == pytest.approx(whole, rel=0.15)
    assert scanned.flops == plain.flops
    assert scanned.collective_bytes == pytest.approx(plain.collective_bytes)
    assert scanned.collectives["all-gather"] == plain.collectives["all-gather"]
    assert scanned.collectives["all-gather"].count > 4  # of every layer's parameters, along fsdp
    assert scanned.bytes_accessed == pytest.approx(plain.bytes_accessed, rel=0.2)
