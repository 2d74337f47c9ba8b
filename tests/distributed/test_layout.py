"""Sharding: the mesh axes of each dimension, and what is refused."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.algorithms import ppo
from ppo_jax.config.mesh import ROLLOUT_RULES, AxisRules, MeshSettings, RolloutRules
from ppo_jax.distributed.layout import Layout, init_sharded, local_rows, mesh_shape
from ppo_jax.distributed.trees import named_leaves
from ppo_jax.models.axes import parameter_axes
from ppo_jax.models.build import policy_network, value_network
from tests.support import tiny
from tests.support.meshes import WIDE, layout_of, mesh_of
from tests.support.tiny_state import assert_identical

MIB = 2**20


def large_copies(tree):
    """Leaves of more than 1 MiB a device that are replicated over a mesh."""
    leaves = named_leaves(tree).items()
    return [n for n, leaf in leaves if leaf.sharding.is_fully_replicated and leaf.nbytes > MIB]


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_nothing_large_is_copied_to_every_device(shape, scan_layers):
    layout = Layout(mesh_of(shape))
    large = dict(vocab_size=4096, embed_dim=512, num_heads=8, num_kv_heads=8, head_dim=64)
    config = tiny.model_config(**large, mlp_dim=1024, max_length=1024, scan_layers=scan_layers)
    policy = policy_network(config, constrain=layout.constrain)
    value = value_network(config, constrain=layout.constrain)

    def init(key):
        return ppo.init_ppo(policy.init(key), value.init(key), tiny.hyperparameters())

    state = init_sharded(layout, init, jax.random.key(0))
    assert not large_copies(state)
    kernels = [x for name, x in named_leaves(state).items() if name.endswith("up/kernel")]
    assert len(kernels) >= 6  # of policy and critic, with two moments each
    assert all(x.addressable_shards[0].data.nbytes < x.nbytes for x in kernels)
    cache = jax.jit(lambda: policy.init_cache(16, 512))()
    assert max(leaf.nbytes for leaf in jax.tree.leaves(cache)) > MIB
    assert not large_copies(cache)
    replicated = jax.device_put(state.policy_params, layout.replicated)
    assert large_copies(replicated)  # the walk sees what is copied


@pytest.mark.parametrize("shape", sorted(tiny.SHAPES))
@pytest.mark.parametrize("make", [policy_network, value_network])
def test_every_parameter_has_its_logical_axes(shape, make):
    network = make(tiny.model_config(**tiny.SHAPES[shape]))
    known = {*vars(AxisRules()), None} - {"batch"}
    for name, leaf in named_leaves(jax.eval_shape(network.init, jax.random.key(0))).items():
        axes = parameter_axes(name.split("/"))
        assert axes is not None and len(axes) == leaf.ndim and set(axes) <= known, name


def test_the_sizes_of_a_mesh_multiply_to_the_number_of_devices():
    assert mesh_shape(MeshSettings(), 8) == (8, 1, 1)
    assert mesh_shape(MeshSettings(data=2, fsdp=-1, model=2), 8) == (2, 2, 2)
    assert mesh_shape(MeshSettings(data=1, model=-1), 8) == (1, 1, 8)


@pytest.mark.parametrize("name", ["members", "value_params"])
def test_the_first_axis_of_stacked_networks_is_whole(name):
    """Several reward models or critics, [K, ...] a leaf: the rest is sharded as that of one."""
    layout = Layout(mesh_of((2, 2, 2)))
    one = jax.eval_shape(policy_network(tiny.model_config(**WIDE)).init, jax.random.key(0))
    several = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), one)
    alone, stacked = (named_leaves(layout.shardings({name: x})) for x in (one, several))
    assert any(x.spec for x in alone.values())
    for path, sharding in stacked.items():
        assert (None, *alone[path].spec) == (*sharding.spec,), path


def shardings(shape, rules, **changes):
    network = policy_network(tiny.model_config(**WIDE | changes))
    return Layout(mesh_of(shape), rules).shardings(jax.eval_shape(network.init, jax.random.key(0)))


REFUSED = {
    r"mesh \(data=3, fsdp=2, model=1\) needs 6 devices, have 8": lambda: mesh_shape(
        MeshSettings(data=3, fsdp=2), 8
    ),
    r"mesh \(data=-1, fsdp=3, model=1\) needs a multiple of 3 devices, have 8": lambda: mesh_shape(
        MeshSettings(fsdp=3), 8
    ),
    r"only one size may be -1, got \['data', 'model'\]": lambda: MeshSettings(model=-1),
    r"mesh.fsdp must be -1 or >= 1, got 0": lambda: MeshSettings(fsdp=0),
    r"mesh.rules.heads must be different axes out of .*, got \('modle',\)": lambda: MeshSettings(
        rules=AxisRules(heads=("modle",))
    ),
    r"mesh.rollout_rules.mlp must be different axes": lambda: MeshSettings(
        rollout_rules=RolloutRules(mlp=("model", "model"))
    ),
    r"output/kernel: the rules shard it twice over the mesh axis fsdp": lambda: shardings(
        (2, 2, 2), AxisRules(heads=("fsdp",))
    ),
    r"layers/0/attention/key/kernel: its kv_heads axis of 2 cannot be split into 8 equal shards "
    r"over mesh.model; choose mesh.model from \[1, 2\], or replicate it with": lambda: shardings(
        (1, 1, 8), AxisRules(), num_kv_heads=2
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_mesh_that_does_not_fit_is_refused_by_name(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


@pytest.mark.parametrize("vocab_size", [151_669, 6, 12])
def test_an_indivisible_vocabulary_is_refused_with_the_sizes_that_divide_it(vocab_size):
    def shard(count):
        return shardings((8 // count, 1, count), AxisRules(), vocab_size=vocab_size)

    message = rf"^embed/tokens: its vocab axis of {vocab_size:,} .* mesh.model from (\[.*?\]), or"
    works = []
    for count in (1, 2, 4, 8):
        with contextlib.suppress(ValueError):
            shard(count)
            works.append(count)
    with pytest.raises(ValueError, match=message) as refused:
        shard(8)
    assert re.search(message, str(refused.value))[1] == str(works)


def test_the_rollout_reads_kernels_in_its_dtype_and_leaves_the_rest_as_it_is():
    config = tiny.model_config(**WIDE)
    params = tiny.random_params(policy_network(config), 0)
    own = {"table": jnp.ones((3, 2)), "count": jnp.int32(3), "block": {"gain": jnp.ones(5)}}
    layout = layout_of((2, 2, 2), ROLLOUT_RULES)
    cast = jax.jit(functools.partial(layout.decoding_params, dtype="bfloat16"))
    for name, leaf in named_leaves(cast(params)).items():
        assert leaf.dtype == ("float32" if "norm" in name else "bfloat16"), name
    found = cast(own)
    assert_identical(found, own)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(found))


def test_rows_are_padded_sharded_and_read_back():
    layout = Layout(mesh_of((2, 2, 2)))
    rows = layout.pad_batch(np.array([5, 6, 7]))
    assert rows.tolist() == [5, 6, 7, 5] and len(layout.pad_batch(rows, multiple=3)) == 12
    batch = layout.shard_batch(np.arange(12.0).reshape(4, 3))
    assert {shard.data.shape for shard in batch.addressable_shards} == {(1, 3)}
    indices, values = local_rows(batch)
    assert indices.tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(values, batch)
