"""Sharding: one mesh, and one table from logical to mesh axes.

The only file that spells a mesh axis. A program is the same on one device and on many; a `Layout`
says how its inputs, and the arrays inside it, are sharded.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ppo_jax.config.mesh import MESH_AXES, RULES, AxisRules, MeshSettings
from ppo_jax.distributed.processes import require_all_processes
from ppo_jax.distributed.trees import map_named
from ppo_jax.models.axes import OPTIONAL, Axes, ShardingConstraint, parameter_axes


def devices_of_run() -> Sequence[jax.Device]:
    """All devices of all processes, in the order of the processes."""
    return jax.devices()


def mesh_shape(settings: MeshSettings, num_devices: int) -> tuple[int, ...]:
    """The sizes of the mesh axes.

    Raises:
        ValueError: they do not multiply to the number of devices.
    """
    sizes = (settings.data, settings.fsdp, settings.model)  # as in MESH_AXES
    known = math.prod(size for size in sizes if size != -1)
    shape = tuple(num_devices // known if size == -1 else size for size in sizes)
    if math.prod(shape) != num_devices:
        given = ", ".join(f"{a}={s}" for a, s in zip(MESH_AXES, sizes, strict=True))
        needs = f"a multiple of {known}" if -1 in sizes else str(known)
        raise ValueError(f"mesh ({given}) needs {needs} devices, have {num_devices}")
    return shape


def make_mesh(settings: MeshSettings, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a run, by default over all devices of all processes.

    Raises:
        ValueError: the sizes do not fit the number of devices.
    """
    devices = devices_of_run() if devices is None else devices
    shape = mesh_shape(settings, len(devices))
    # Linen needs Auto axes; the default of jax is Explicit.
    types = (AxisType.Auto,) * len(MESH_AXES)
    # An axis of the torus may be split: a mesh of 16 x 4 fits on 8 x 8 chips.
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=types)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, and the rules by which arrays are sharded over it."""

    mesh: Mesh
    rules: AxisRules = RULES

    def mesh_axes(self, axis: str | None) -> tuple[str, ...]:
        """The mesh axes, longer than 1, that a logical axis is sharded over."""
        names = () if axis is None else getattr(self.rules, axis)
        return tuple(name for name in names if self.mesh.shape[name] > 1)

    def num_shards(self, axis: str | None) -> int:
        """The number of shards of a logical axis."""
        return math.prod(self.mesh.shape[name] for name in self.mesh_axes(axis))

    def sharding(self, axes: Axes, shape: Sequence[int], name: str = "an array") -> NamedSharding:
        """The sharding of an array; a dimension of 1 is replicated whatever the rules say.

        Args:
            axes: its logical axes.
            shape: its shape.
            name: what errors call it.

        Raises:
            ValueError: two dimensions share a mesh axis, or the mesh axes do not divide one.
        """
        spec: list[tuple[str, ...]] = []
        for axis, size in zip(axes, shape, strict=True):
            fits = axis not in OPTIONAL or size % self.num_shards(axis) == 0
            names = self.mesh_axes(axis) if size > 1 and fits else ()
            taken = {x for entry in spec for x in entry}
            if axis == "embed" and "expert" in axes:  # has the mesh axes that experts leave
                names = tuple(name for name in names if name not in taken)
            if twice := sorted(taken & set(names)):
                raise ValueError(f"{name}: the rules shard it twice over the mesh axis {twice[0]}")
            if size % math.prod(self.mesh.shape[name] for name in names):
                raise ValueError(f"{name}: {self._indivisible(axis, size)}")
            spec.append(names)
        return NamedSharding(self.mesh, PartitionSpec(*(entry or None for entry in spec)))

    def _indivisible(self, axis: str, size: int) -> str:
        """The message about a dimension that its mesh axes do not divide, with sizes that would."""
        both = math.gcd(size, self.mesh.size)  # it must divide the number of devices as well
        works = [n for n in range(1, both + 1) if both % n == 0]
        names = " x ".join(f"mesh.{x}" for x in self.mesh_axes(axis))
        return (
            f"its {axis} axis of {size:,} cannot be split into {self.num_shards(axis)} equal "
            f"shards over {names}; choose {names} from {works}, or replicate it with "
            f"mesh.rules.{axis}=() and mesh.rollout_rules.{axis}=()"
        )

    @property
    def constrain(self) -> ShardingConstraint:
        """The sharding constraint of networks on this layout."""
        return ShardingConstraint(self.sharding)

    def shardings(self, tree: Any) -> Any:
        """The sharding of every leaf of parameters, or of a state that holds some.

        What is no parameter of a Transformer is replicated: counters, coefficients. Of stacked
        networks the first axis is that of the networks, which is not sharded. The tree is of arrays
        or `jax.ShapeDtypeStruct`s.

        Raises:
            ValueError: as `sharding` does, with the leaf's name.
        """

        def sharding(name: str, leaf: Any) -> NamedSharding:
            axes = parameter_axes(name.split("/")) or ()
            before = (None,) * (len(leaf.shape) - len(axes))
            return self.sharding((*before, *axes), leaf.shape, name)

        return map_named(sharding, tree)

    def shard_params(self, tree: Any) -> Any:
        """Parameters, or a state that holds some, sharded; numpy arrays are equal on all
        processes."""
        return jax.tree.map(device_put, tree, self.shardings(tree))

    @property
    def batch_sharding(self) -> NamedSharding:
        """The sharding of a batch: over its first axis."""
        return NamedSharding(self.mesh, PartitionSpec(self.mesh_axes("batch") or None))

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of arrays that every device has a copy of."""
        return NamedSharding(self.mesh, PartitionSpec())

    def shard_batch(self, batch: Any) -> Any:
        """A batch, [N, ...] a leaf, sharded; N is a multiple of `num_shards("batch")`."""
        return jax.tree.map(lambda x: device_put(x, self.batch_sharding), batch)

    def replicate(self, tree: Any) -> Any:
        """Arrays and numbers, copied to every device."""
        return jax.tree.map(lambda x: device_put(x, self.replicated), tree)

    def key(self, seed: int, step: int) -> jax.Array:
        """The random key of a step: a resumed run has the same."""
        return self.replicate(jax.random.fold_in(jax.random.key(seed), step))

    def pad_batch(self, rows: np.ndarray, multiple: int = 1) -> np.ndarray:
        """The rows, padded with their first to a multiple of `multiple` and of the shards."""
        padding = -len(rows) % math.lcm(multiple, self.num_shards("batch"))
        return np.concatenate([rows, np.repeat(rows[:1], padding)])

    def decoding_params(self, params: Any, dtype: str) -> Any:
        """Parameters as the rollout reads them, inside a program: sharded by these rules, and cast
        once instead of at every use. Norms, which are computed in float32, keep their dtype; so
        does what is no parameter of a Transformer, whose use is unknown here."""

        def decoding(name: str, leaf: jax.Array) -> jax.Array:
            path = name.split("/")
            axes = parameter_axes(path)
            keeps = axes is None or path[-2].endswith("norm")
            sharding = self.sharding(axes or (None,) * leaf.ndim, leaf.shape, name)
            return jax.lax.with_sharding_constraint(leaf if keeps else leaf.astype(dtype), sharding)

        return map_named(decoding, params)


def over_lanes(layouts: tuple[Layout, Layout], num_lanes: int) -> "LaneLayout":
    """How the lanes of a sweep are laid out, whose runs have these layouts.

    They are sharded over the mesh axis `data`, each with the rows of its own batches together,
    where it divides their number; else every lane is sharded as a run alone.
    """
    size = layouts[0].mesh.shape["data"]
    if size == 1 or num_lanes % size:
        return LaneLayout(layouts, layouts[0].batch_sharding, None)

    def of_lane(rules: AxisRules) -> AxisRules:
        left = ((axis, getattr(rules, axis)) for axis in ("batch", "expert"))
        return dataclasses.replace(
            rules, **{axis: tuple(x for x in names if x != "data") for axis, names in left}
        )

    inner = [of_lane(x.rules) for x in layouts]
    mesh = layouts[0].mesh
    both = Layout(mesh, inner[0]), Layout(mesh, inner[1])
    flat = NamedSharding(mesh, PartitionSpec(("data", *both[0].mesh_axes("batch"))))
    return LaneLayout(both, flat, "data")


@dataclasses.dataclass(frozen=True)
class LaneLayout:
    """The layouts of lanes that are one program."""

    layouts: tuple[Layout, Layout]  # of a lane, in training and in the rollout
    batch_sharding: NamedSharding  # of the rows of all lanes, lane after lane
    mesh_axis: str | None  # that the lanes are sharded over

    def stacked(self, shardings: Any) -> Any:
        """The shardings of leaves with a first axis of lanes, from those of a lane."""
        return jax.tree.map(
            lambda x: NamedSharding(x.mesh, PartitionSpec(self.mesh_axis, *x.spec)), shardings
        )

    def shard_batch(self, batch: Any) -> Any:
        """The rows of all lanes, sharded, as `Layout.shard_batch`."""
        return jax.tree.map(lambda x: device_put(x, self.batch_sharding), batch)

    def put_stacked(self, tree: Any, sharding: NamedSharding) -> Any:
        """Leaves [N, ...] on the mesh; `sharding` is that of a lane's."""
        where = self.stacked(sharding)
        return jax.tree.map(lambda x: device_put(x, where), tree)


def fetch(tree: Any) -> Any:
    """Full arrays as numpy on every process: for small ones. A leaf that spans several processes
    is gathered by all of them together, any other is read by this process alone."""

    def gather(leaf: Any) -> Any:
        if getattr(leaf, "is_fully_addressable", True):  # so are numpy and numbers
            return leaf
        require_all_processes("an array of several processes must be fetched")
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.device_get(jax.tree.map(gather, tree))


def local_rows(x: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """(the indices [n] of this process's rows, those rows [n, ...]).

    A row belongs to one process, which holds its first replica, so that it is processed once; a
    process may have none.
    """
    shards = {s.index[0].start or 0: s.data for s in x.addressable_shards if s.replica_id == 0}
    blocks = [(begin, np.asarray(shards[begin])) for begin in sorted(shards)]
    indices = [np.arange(begin, begin + len(block)) for begin, block in blocks]
    empty = np.zeros((0, *x.shape[1:]), x.dtype)
    rows = np.concatenate([np.zeros(0, int), *indices])
    return rows, np.concatenate([empty, *(block for _, block in blocks)])


def gather_rows(rows: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """The values [count, ...] of all rows on every process, from each process's `local_rows`."""
    gathered = np.full((count, *np.shape(values)[1:]), np.nan, np.float32)
    gathered[rows] = values
    if jax.process_count() == 1:
        return gathered
    return np.nanmax(multihost_utils.process_allgather(gathered), axis=0)


def device_put(x: Any, sharding: NamedSharding) -> jax.Array:
    """`jax.device_put` for several processes: each makes the shards of its own devices."""
    if isinstance(x, jax.Array) and (x.is_fully_addressable <= sharding.is_fully_addressable):
        return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(device_put(jax.random.key_data(x), sharding))
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def one_device() -> Layout:
    """Everything on this process's first device."""
    return Layout(make_mesh(MeshSettings(), jax.local_devices()[:1]))


def make_layouts(settings: MeshSettings) -> tuple[Layout, Layout]:
    """(the layout of training, the layout of the rollout) on the mesh of a run."""
    mesh = make_mesh(settings)
    return Layout(mesh, settings.rules), Layout(mesh, settings.rollout_rules)


def abstract(layout: Layout, init: Callable[..., Any], *args: Any) -> Any:
    """The shapes, dtypes and shardings of the result of `init_sharded`."""
    shapes = jax.eval_shape(init, *args)
    return jax.tree.map(lambda x, s: x.update(sharding=s), shapes, layout.shardings(shapes))


def init_sharded(layout: Layout, init: Callable[..., Any], *args: Any) -> Any:
    """`init(*args)`, made sharded: no device ever holds a full array."""
    shardings = layout.shardings(jax.eval_shape(init, *args))
    return jax.jit(init, out_shardings=shardings)(*args)
