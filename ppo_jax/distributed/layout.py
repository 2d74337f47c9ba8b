"""Where arrays lie on many devices: one mesh, and one table from logical axes to its axes.

The only file that spells a mesh axis. A program is the same on one device and on many; a `Layout`
says how the arrays that it is given, and those inside it, are cut.
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
from ppo_jax.distributed.trees import named_leaves
from ppo_jax.models.axes import Axes, ShardingConstraint, parameter_axes


def devices_of_run() -> Sequence[jax.Device]:
    """All devices of all processes, in the order of the processes."""
    return jax.devices()


def mesh_shape(settings: MeshSettings, num_devices: int) -> tuple[int, ...]:
    """The sizes of the mesh axes.

    Raises:
        ValueError: they do not multiply to the number of devices.
    """
    sizes = (settings.data, settings.fsdp, settings.model)  # as in MESH_AXES
    given = math.prod(size for size in sizes if size != -1)
    filled = [num_devices // given if size == -1 else size for size in sizes]
    if math.prod(filled) != num_devices:
        shape = ", ".join(f"{a}={s}" for a, s in zip(MESH_AXES, sizes, strict=True))
        needs = f"a multiple of {given}" if -1 in sizes else str(given)
        raise ValueError(f"mesh ({shape}) needs {needs} devices, have {num_devices}")
    return tuple(filled)


def make_mesh(settings: MeshSettings, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a run.

    Args:
        settings: the sizes.
        devices: by default all devices of all processes.

    Raises:
        ValueError: the sizes do not fit the number of devices.
    """
    devices = devices_of_run() if devices is None else devices
    shape = mesh_shape(settings, len(devices))
    # Linen needs the Auto type; Explicit is the default of today's jax.
    types = (AxisType.Auto,) * len(MESH_AXES)
    # An axis of the torus may be cut in two: a mesh of 16 x 4 fits on 8 x 8 chips.
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=types)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the rules by which arrays are cut over it."""

    mesh: Mesh
    rules: AxisRules = RULES

    def cuts(self, axis: str | None) -> tuple[str, ...]:
        """The mesh axes, longer than 1, that a logical axis is cut over."""
        over = () if axis is None else getattr(self.rules, axis)
        return tuple(name for name in over if self.mesh.shape[name] > 1)

    def pieces(self, axis: str | None) -> int:
        """Into how many pieces a logical axis is cut."""
        return math.prod(self.mesh.shape[name] for name in self.cuts(axis))

    def sharding(self, axes: Axes, shape: Sequence[int], name: str = "an array") -> NamedSharding:
        """Where an array lies.

        Args:
            axes: its logical axes.
            shape: its shape. A dimension of 1 is whole whatever the rules say.
            name: what the errors call it.

        Raises:
            ValueError: a mesh axis would cut it twice, or does not divide the dimension it cuts.
        """
        entries: list[tuple[str, ...]] = []
        for axis, size in zip(axes, shape, strict=True):
            over = () if size == 1 else self.cuts(axis)
            if twice := sorted({x for entry in entries for x in entry} & set(over)):
                raise ValueError(f"{name}: the rules cut it twice over the mesh axis {twice[0]}")
            pieces = math.prod(self.mesh.shape[x] for x in over)
            if size % pieces:
                raise ValueError(f"{name}: {self.no_cut(axis, size, over)}")
            entries.append(over)
        return NamedSharding(self.mesh, PartitionSpec(*(entry or None for entry in entries)))

    def no_cut(self, axis: str, size: int, over: Sequence[str]) -> str:
        """What to say of a dimension that the mesh axes `over` do not divide, and what would."""
        both = math.gcd(size, self.mesh.size)  # the number of devices has to be divided as well
        works = [n for n in range(1, both + 1) if both % n == 0]
        axes = " x ".join(f"mesh.{x}" for x in over)
        return (
            f"its {axis} axis of {size:,} cannot be cut into the {self.pieces(axis)} equal "
            f"pieces of {axes}; choose {axes} from {works}, or keep it whole with "
            f"mesh.rules.{axis}=() and mesh.rollout_rules.{axis}=()"
        )

    @property
    def constrain(self) -> ShardingConstraint:
        """What a network knows of this layout."""
        return ShardingConstraint(self.sharding)

    def shardings(self, tree: Any) -> Any:
        """The sharding of every leaf of a tree of parameters, or of a state that holds some.

        Args:
            tree: of arrays or `jax.ShapeDtypeStruct`s. What is no parameter of a Transformer is
                copied to every device: counters, coefficients.

        Raises:
            ValueError: as `sharding` does, with the leaf's name.
        """

        def one(name: str, leaf: Any) -> NamedSharding:
            axes = parameter_axes(name.split("/"))
            return self.sharding(axes or (None,) * len(leaf.shape), leaf.shape, name)

        shardings = [one(name, leaf) for name, leaf in named_leaves(tree).items()]
        return jax.tree.unflatten(jax.tree.structure(tree), shardings)

    def put(self, tree: Any) -> Any:
        """Parameters, or a state that holds some, in their pieces; numpy ones are equal on all."""
        return jax.tree.map(place, tree, self.shardings(tree))

    @property
    def rows(self) -> NamedSharding:
        """The sharding of a batch: its first axis is cut."""
        return NamedSharding(self.mesh, PartitionSpec(self.cuts("batch") or None))

    @property
    def whole(self) -> NamedSharding:
        """The sharding of what every device has a copy of."""
        return NamedSharding(self.mesh, PartitionSpec())

    def shard_batch(self, batch: Any) -> Any:
        """A batch [N, ...] a leaf, in its pieces; N is a multiple of `pieces("batch")`."""
        return jax.tree.map(lambda x: place(x, self.rows), batch)

    def replicate(self, tree: Any) -> Any:
        """Arrays and numbers that every device has a copy of."""
        return jax.tree.map(lambda x: place(x, self.whole), tree)

    def key(self, seed: int, step: int) -> jax.Array:
        """The random key of a step: a resumed run has the same."""
        return self.replicate(jax.random.fold_in(jax.random.key(seed), step))

    def pad_batch(self, rows: np.ndarray, multiple: int = 1) -> np.ndarray:
        """The rows, and their first again until a number and the mesh's pieces divide them."""
        lacking = -len(rows) % math.lcm(multiple, self.pieces("batch"))
        return np.concatenate([rows, np.repeat(rows[:1], lacking)])

    def decoding_params(self, params: Any, dtype: str) -> Any:
        """Parameters as the rollout reads them, inside a program: cut by these rules, and what is
        cast at every use is cast once. Norms are computed in float32 and stay as they are; so does
        what is no parameter of a Transformer, of which nobody here knows how it is used."""

        def one(name: str, leaf: jax.Array) -> jax.Array:
            path = name.split("/")
            axes = parameter_axes(path)
            stays = axes is None or path[-2].endswith("norm")
            lie = self.sharding(axes or (None,) * leaf.ndim, leaf.shape, name)
            return jax.lax.with_sharding_constraint(leaf if stays else leaf.astype(dtype), lie)

        leaves = [one(name, leaf) for name, leaf in named_leaves(params).items()]
        return jax.tree.unflatten(jax.tree.structure(params), leaves)


def fetch(tree: Any) -> Any:
    """Arrays as numpy, whole, on every process: for what is small. A leaf that lies on several
    processes is fetched by all of them together, any other by this one alone."""

    def whole(leaf: Any) -> Any:
        if getattr(leaf, "is_fully_addressable", True):  # so are numpy and numbers
            return leaf
        require_all_processes("an array of several processes must be fetched")
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.device_get(jax.tree.map(whole, tree))


def own_rows(x: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """(numbers [n] of this process's rows, those rows [n, ...]).

    Each row is one process's alone, the one that holds its first copy, so that what is done with
    rows is done once; a process may have none.
    """
    found = {s.index[0].start or 0: s.data for s in x.addressable_shards if s.replica_id == 0}
    blocks = [(begin, np.asarray(found[begin])) for begin in sorted(found)]
    numbers = [np.arange(begin, begin + len(block)) for begin, block in blocks]
    nothing = np.zeros((0, *x.shape[1:]), x.dtype)
    rows = np.concatenate([np.zeros(0, int), *numbers])
    return rows, np.concatenate([nothing, *(block for _, block in blocks)])


def gather_rows(rows: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """The values [count] of all rows on every process, from those that each has for its own."""
    whole = np.full(count, np.nan, np.float32)
    whole[rows] = values
    if jax.process_count() == 1:
        return whole
    return np.nanmax(multihost_utils.process_allgather(whole), axis=0)


def place(x: Any, sharding: NamedSharding) -> jax.Array:
    """One array in its pieces: a process makes those of its own devices alone."""
    if isinstance(x, jax.Array) and (x.is_fully_addressable <= sharding.is_fully_addressable):
        return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(place(jax.random.key_data(x), sharding))
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
    """The shapes, dtypes and shardings of what `init_sharded` would make."""
    shapes = jax.eval_shape(init, *args)
    return jax.tree.map(lambda x, lie: x.update(sharding=lie), shapes, layout.shardings(shapes))


def init_sharded(layout: Layout, init: Callable[..., Any], *args: Any) -> Any:
    """What `init(*args)` gives, made in its pieces: no device ever holds a whole array."""
    lies = layout.shardings(jax.eval_shape(init, *args))
    return jax.jit(init, out_shardings=lies)(*args)
