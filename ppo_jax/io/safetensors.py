"""Parameters stored in safetensors files: found and checked by the headers, read in slices.

A slice of a parameter is read alone: transposed matrices, query, key and value side by side,
flattened heads, layers and experts that are one tensor each become ranges of rows and columns in
the files.

Dimension key: D model, H heads, K head size.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from ppo_jax.core.network import Network
from ppo_jax.core.types import Params
from ppo_jax.models.build import policy_network, reward_network
from ppo_jax.models.config import LayerKind, ModelConfig
from ppo_jax.models.families import family_of
from ppo_jax.models.families.base import DERIVED, Family, Fusion, Tensor

DTYPES = ("F32", "F16", "BF16")  # as the headers call them
COMPARED_ROWS = 4096  # of a head and an embedding, at a time
# The head of a sequence classification, in every family.
SCORE = {"head.kernel": Tensor("score.weight", transposed=True)}

Index = tuple[slice, ...]  # of an array, a slice a dimension
Files = dict[str, Any]  # name of a tensor -> the open file that holds it


class NotFinite(ValueError):
    """A parameter with a number that is NaN or infinite."""


@dataclasses.dataclass(frozen=True)
class StoredParameter:
    """A parameter in open files."""

    path: str  # its name, without the number of a layer
    names: Sequence[str]  # of its tensors, as the files have them
    row: Tensor  # the layout of each of its tensors in the files
    tensors: Sequence[Any]  # unread, in the order of the leading axes
    shape: tuple[int, ...]
    num_stacked: int = 0  # leading axes, of layers and of experts, with a tensor for each index
    before: int = 0  # outputs of its tensor that are other parameters', see `Fusion`

    def stacked(self, num_layers: int) -> "StoredParameter":
        """With the tensors of so many layers, as one parameter."""
        shape = (num_layers, *self.shape)
        return dataclasses.replace(self, shape=shape, num_stacked=self.num_stacked + 1)

    def split(self, num_layers: int) -> list["StoredParameter"]:
        """With the tensors of so many layers, as one parameter each."""
        count = len(self.tensors) // num_layers
        own = [slice(i * count, (i + 1) * count) for i in range(num_layers)]
        return [
            dataclasses.replace(self, names=self.names[x], tensors=self.tensors[x]) for x in own
        ]

    def read(self, index: Index | None = None) -> np.ndarray:
        """A slice of the parameter, or all of it, as float32; one tensor's slice is held on top.

        The numbers inside a head (K) are never split.
        """
        index = index or (slice(None),) * len(self.shape)
        ranges = [range(size)[bounds] for size, bounds in zip(self.shape, index, strict=True)]
        array = np.empty([len(r) for r in ranges], np.float32)
        lead, inside = ranges[: self.num_stacked], ranges[self.num_stacked :]
        numbers = np.arange(len(self.tensors)).reshape(self.shape[: self.num_stacked])
        own = numbers[np.ix_(*lead)].ravel() if lead else [0]
        targets = array.reshape(len(own), *map(len, inside))  # a view
        for target, number in zip(targets, own, strict=True):
            target[...] = self.read_tensor(number, inside).reshape(target.shape)
            if not is_finite(target):
                raise NotFinite(f"{self.names[number]} holds NaN or infinity")
        return array

    def read_tensor(self, number: int, ranges: Sequence[range]) -> np.ndarray:
        """A slice of one of the tensors as a matrix [in, out] or a vector."""
        stored = self.tensors[number][self.stored_index(ranges)]
        matrix = stored.T if self.row.transposed else stored
        fusion = self.row.fusion
        if fusion is None or not fusion.by_head:
            return matrix
        head_dim, parts = self.shape[-1], len(fusion.paths)
        heads = matrix.reshape(*matrix.shape[:-1], -1, parts, head_dim)
        own = heads[..., fusion.paths.index(self.path), :]
        return own.reshape(*matrix.shape[:-1], -1)

    def stored_index(self, ranges: Sequence[range]) -> Index:
        """The rows and columns of a tensor that hold a slice of one layer's parameter; of
        parameters that are fused by head, whole heads of all of them."""
        shape = self.shape[self.num_stacked :]
        fusion, index = self.row.fusion, []
        for (first, *_), (_, *inner) in zip(
            group_dims(self.path, ranges), group_dims(self.path, shape), strict=True
        ):
            size = math.prod(inner)  # of a head, where heads are flattened
            index.append(slice(first.start * size, first.stop * size))
        times = len(fusion.paths) if fusion and fusion.by_head else 1
        start, stop = index[-1].start * times, index[-1].stop * times
        index[-1] = slice(self.before + start, self.before + stop)
        return tuple(index[::-1] if self.row.transposed else index)


def is_finite(array: np.ndarray) -> bool:
    """Whether all numbers of a float32 array are finite, without another array of its size."""
    return bool(np.isfinite(array.sum(dtype=np.float64)))  # no sum is too large for float64


def group_dims(path: str, dims: Sequence[Any]) -> list[Sequence[Any]]:
    """The dimensions of one layer's parameter, by the dimension of the matrix they merge into.

    Kernels are [D, (H, K)] before the heads and [(H, K), D] after them, biases [(H, K)].
    """
    if path.endswith("bias"):
        return [dims]
    border = len(dims) - 1 if path.endswith("output.kernel") else 1
    return [group for group in (dims[:border], dims[border:]) if group]


def matrix_shape(path: str, shape: Sequence[int]) -> tuple[int, ...]:
    """[in, out] of one layer's kernel, [size] of a bias: its heads are flattened."""
    return tuple(math.prod(dims) for dims in group_dims(path, shape))


def stored_shape(
    path: str, row: Tensor, shapes: Mapping[str, Sequence[int]]
) -> tuple[tuple[int, ...], int]:
    """(the shape, in the files, of the tensor of one layer's parameter; how many of its outputs
    come before the parameter's own). `shapes` are those of all parameters of a layer."""
    *inputs, size = matrix_shape(path, shapes[path])
    outputs, before = size, 0
    if row.fusion is not None:
        paths = row.fusion.paths
        sizes = [matrix_shape(other, shapes[other])[-1] for other in paths]
        outputs = sum(sizes)
        before = 0 if row.fusion.by_head else sum(sizes[: paths.index(path)])
    expected = (*inputs, outputs)
    return expected[::-1] if row.transposed else expected, before


def join_fused(fusion: Fusion, matrices: Sequence[np.ndarray], head_dim: int) -> np.ndarray:
    """The matrices [..., O] of fused parameters, in order -> that of their tensor [..., all O]."""
    if not fusion.by_head:
        return np.concatenate(matrices, axis=-1)
    lead = matrices[0].shape[:-1]
    heads = [x.reshape(*lead, -1, 1, head_dim) for x in matrices]
    return np.concatenate(heads, axis=-2).reshape(*lead, -1)


def find_parameters(
    config: ModelConfig, family: str, files: Files, score_bias: float | None = None
) -> Params:
    """The parameter tree of a model with a `StoredParameter` for every leaf.

    Args:
        config: says whether layers are stacked.
        family: one of `models.families.FAMILIES`.
        files: that hold the tensors.
        score_bias: of a reward model's head, which the files lack; None is a policy.

    Raises:
        ValueError: before any parameter is read: a tensor is missing, is too many, or has a shape
            or a dtype that is not expected; or a tied head differs from the embedding.
    """
    names, ties = family_of(family), config.tie_embeddings
    if score_bias is not None:
        names, ties = dataclasses.replace(names, tensors={**names.tensors, **SCORE}), False
    tensors = canonical_names(files, names)
    held = held_parameters(config, policy_network if score_bias is None else reward_network)
    held.pop("head.bias", None)
    rows = {path: names.tensors[path] for path in held}
    full_names = {path: held[path].names(row) for path, row in rows.items()}
    head = names.tensors["head.kernel"].name
    check_names(sum(full_names.values(), []), tensors, {head} if ties else set())
    slices = {name: file.get_slice(key) for name, (file, key) in tensors.items()}
    own_names = {name: key for name, (_, key) in tensors.items()}  # as the files have them
    of_tensor = {path: held[path].shape[row.per_expert :] for path, row in rows.items()}
    tree: Params = {}
    for path, (shape, layers) in held.items():
        row, full = rows[path], full_names[path]
        expected, before = stored_shape(path, row, of_tensor)
        there, parts = [own_names[x] for x in full], [slices[x] for x in full]
        for name, tensor in zip(there, parts, strict=True):
            check_tensor(name, tensor, expected)
        leaf = StoredParameter(path, there, row, parts, shape, int(row.per_expert), before)
        if not layers:
            set_leaf(tree, path, leaf)
        elif config.scan_layers:
            set_leaf(tree, path.replace("layers.", "layers.stack.", 1), leaf.stacked(len(layers)))
        else:
            for i, own in zip(layers, leaf.split(len(layers)), strict=True):
                set_leaf(tree, path.replace("layers.", f"layers.{i}.", 1), own)
    if ties and head in slices:
        check_tied(head, rows["embed.tokens"].name, slices)
    if score_bias is not None:
        bias = [np.array([score_bias], np.float32)]
        row = Tensor("score_bias")
        leaf = StoredParameter("head.bias", [row.name], row, bias, (1,))
        set_leaf(tree, "head.bias", leaf)
    return tree


def canonical_names(files: Files, family: Family) -> dict[str, tuple[Any, str]]:
    """Full name of each tensor -> (open file, its name there), without derived constants."""
    tensors: dict[str, tuple[Any, str]] = {}
    prefix, head = family.prefix, family.tensors["head.kernel"].name
    for key, file in files.items():
        name = key if key.startswith(prefix) or key == head else prefix + key
        if DERIVED.fullmatch(name.removeprefix(prefix)):
            continue
        if name in tensors:
            raise ValueError(f"the weight files hold {name} twice: {key}, {tensors[name][1]}")
        tensors[name] = (file, key)
    return tensors


class Held(NamedTuple):
    """A parameter of a network."""

    shape: tuple[int, ...]  # in one layer
    layers: tuple[int, ...]  # that have it; () outside of layers

    def names(self, row: Tensor) -> list[str]:
        """Those of all its tensors, layer after layer and in a layer expert after expert."""
        experts = range(self.shape[0] if row.per_expert else 1)
        return [row.name.format(i, j) for i in self.layers or (0,) for j in experts]


def held_parameters(
    config: ModelConfig, network: Callable[[ModelConfig], Network]
) -> dict[str, Held]:
    """Path, without its layer -> each parameter of a network."""
    held: dict[str, Held] = {}
    for dense in {kind.dense for kind in config.kinds}:
        layers = {i for i in range(config.num_layers) if config.kind_of(i).dense == dense}
        # One layer to trace, however many there are.
        same = (LayerKind(dense=dense),) * config.num_layers
        stacked = dataclasses.replace(config, scan_layers=True, layer_kinds=same)
        tree = jax.eval_shape(network(stacked).init, jax.random.key(0))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = ".".join(entry.key for entry in path)
            own = name.replace("layers.stack.", "layers.")
            if own == name:
                held[own] = Held(leaf.shape, ())
                continue
            others = held[own].layers if own in held else ()
            held[own] = Held(leaf.shape[1:], tuple(sorted(layers.union(others))))
    return held


def check_names(names: Iterable[str], tensors: dict[str, Any], copies: set[str]) -> None:
    """Refuse files that lack a tensor or have one too many; `copies` of others may be there."""
    needed = set(names)
    allowed = needed | copies
    if missing := sorted(needed - tensors.keys()):
        raise ValueError(f"the weight files lack {len(missing)} tensors: {first_names(missing)}")
    if unused := sorted(tensors[name][1] for name in tensors.keys() - allowed):
        raise ValueError(
            f"the weight files hold {len(unused)} tensors that the model of config.json does not "
            f"have: {first_names(unused)}"
        )


def first_names(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def check_tensor(name: str, tensor: Any, expected: tuple[int, ...]) -> None:
    if tensor.get_dtype() not in DTYPES:
        raise ValueError(f"{name} is stored as {tensor.get_dtype()}; choose from {list(DTYPES)}")
    shape = tuple(tensor.get_shape())
    if name in {row.name for row in SCORE.values()} and shape != expected:
        raise ValueError(f"{name} has shape {shape}, but one score a text is {expected}")
    if shape != expected:
        raise ValueError(f"{name} has shape {shape}, but config.json asks for {expected}")


def check_tied(head: str, embedding: str, slices: dict[str, Any]) -> None:
    """Refuse a head that is not the embedding, of which it should be a copy."""
    matrix, table = slices[head], slices[embedding]
    is_copy = matrix.get_shape() == table.get_shape() and all(
        np.array_equal(matrix[rows], table[rows]) for rows in row_blocks(table.get_shape()[0])
    )
    if not is_copy:
        raise ValueError(
            "config.json ties the head to the embedding, but "
            f"{head} differs from {embedding}; should tie_word_embeddings be false?"
        )


def row_blocks(count: int) -> Iterator[slice]:
    for start in range(0, count, COMPARED_ROWS):
        yield slice(start, min(start + COMPARED_ROWS, count))


def read_parameters(stored: Params, shardings: Callable[[Params], Any] | None) -> Params:
    """The parameters of `find_parameters`, on the host or sharded, as in `hf.load_policy`."""
    if shardings is None:
        return jax.tree.map(StoredParameter.read, stored)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.float32), stored)
    return jax.tree.map(read_sharded, stored, shardings(shapes))


def read_sharded(leaf: StoredParameter, sharding: NamedSharding) -> jax.Array:
    """A sharded parameter; each shard is read once, however many devices hold it.

    One shard is on its devices before the next is read: `jax.make_array_from_callback` would hold
    those of all devices of this process on the host at once.
    """
    devices: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        bounds = tuple(x.indices(n)[:2] for x, n in zip(index, leaf.shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    shards: list[jax.Array] = []
    for bounds, holders in devices.items():
        shard = leaf.read(tuple(slice(*x) for x in bounds))
        shards += jax.block_until_ready([jax.device_put(shard, device) for device in holders])
        del shard  # before the next is read
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


def set_leaf(tree: Params, path: str, value: Any) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[name] = value
