"""The leaves of a state by name: copied to be saved, described to be loaded, compared."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def named_leaves(tree: Any) -> dict[str, Any]:
    """{"opt_state/0/mu/kernel": leaf, ...} in the order of the tree's leaves."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_named(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """The tree of function(name, leaf)."""
    return jax.tree_util.tree_map_with_path(lambda path, x: function(_name(path), x), tree)


def detach(tree: Any) -> Any:
    """A tree to save while the buffers of this one are donated or written to.

    On CPU the host's view of an array is the array itself, so it is copied. Elsewhere the array is
    returned: saving copies it to the host first, and a copy on the device would cost memory.

    Raises:
        ValueError: a leaf is not an array.
    """
    return jax.tree_util.tree_map_with_path(_detached, tree)


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape, dtype and sharding to load a leaf with; by default on the first device."""
    sharding = getattr(leaf, "sharding", None)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def differences(saved: Any, expected: Any) -> list[str]:
    """A line for every leaf whose path, shape or dtype differs between the trees."""
    saved, expected = (
        {
            name: f"{tuple(leaf.shape)} {np.dtype(leaf.dtype)}"
            for name, leaf in named_leaves(tree).items()
        }
        for tree in (saved, expected)
    )
    return [
        f"{name}: saved {saved.get(name, 'nothing')}, expected {expected.get(name, 'nothing')}"
        for name in {**expected, **saved}
        if saved.get(name) != expected.get(name)
    ]


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _detached(path: tuple[Any, ...], leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        on_cpu = next(iter(leaf.sharding.device_set)).platform == "cpu"
        return leaf.copy() if on_cpu else leaf
    if isinstance(leaf, np.ndarray | np.generic):
        return np.array(leaf)
    name = _name(path) or "the state"
    raise ValueError(f"{name} must be an array to be saved, got {type(leaf)}.")
