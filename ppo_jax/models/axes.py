"""Logical axes: what each dimension of a parameter, a cache or an activation stands for.

A table of rules (see `sharding`) says over which axes of a mesh a logical axis is cut. The names
are all that the networks know of it.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax

Axes = tuple[str | None, ...]  # a name for each dimension; None is never cut

# Kernels and tables by the name of the module that holds them. The axes behind the input's are
# those of the output, and of the bias.
KERNELS: dict[str, tuple[Axes, Axes]] = {
    "query": (("embed",), ("heads", None)),
    "key": (("embed",), ("kv_heads", None)),
    "value": (("embed",), ("kv_heads", None)),
    "output": (("heads", None), ("embed",)),
    "up": (("embed",), ("mlp",)),
    "gate": (("embed",), ("mlp",)),
    "down": (("mlp",), ("embed",)),
    "head": (("embed",), ("vocab",)),
}
TABLES: dict[str, Axes] = {"tokens": ("vocab", "embed"), "positions": (None, "embed")}
HEAD_NORMS = ("query_norm", "key_norm")  # over a head's numbers; the others over embed
LORA = ("lora_a", "lora_b")  # of an adapter, beside the kernel: inputs to rank, rank to outputs
TOP = ("embed", "layers", "final_norm", "head")  # the parts of a network

HIDDEN: Axes = ("batch", None, None)  # of hidden states [B, L, D]
CACHE: Axes = ("batch", "kv_heads", None, None)  # of cached keys and values [B, G, C, K]


@dataclasses.dataclass(frozen=True)
class ShardingConstraint:
    """What a program knows of the mesh that its arrays lie on.

    Called with an array and its logical axes it pins how the array lies. A program that knows of no
    mesh has `unconstrained`, which pins nothing.
    """

    sharding: Callable[[Axes, Sequence[int]], jax.sharding.NamedSharding] | None = None

    def __call__(self, x: jax.Array, axes: Axes) -> jax.Array:
        if self.sharding is None:
            return x
        return jax.lax.with_sharding_constraint(x, self.sharding(axes, x.shape))

    @property
    def platform(self) -> str | None:
        """Of the mesh's devices, which may be described ones: "cpu", "gpu", "tpu"."""
        return self.sharding and next(iter(self.sharding((), ()).device_set)).platform

    def piece(self, axes: Axes, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of what one device of the mesh has of an array."""
        return self.sharding(axes, shape).shard_shape(tuple(shape))

    def by_device(self, function: Callable, axes: Sequence[Axes], *arrays: jax.Array) -> jax.Array:
        """function(*arrays), by each device of the mesh for its pieces alone.

        Args:
            function: what it gives lies as its first argument does.
            axes: of each array.
            arrays: its arguments.
        """
        lies = [self.sharding(a, x.shape) for a, x in zip(axes, arrays, strict=True)]
        specs = tuple(lie.spec for lie in lies)
        mapped = jax.shard_map(
            function, mesh=lies[0].mesh, in_specs=specs, out_specs=specs[0], check_vma=False
        )
        return mapped(*arrays)


unconstrained = ShardingConstraint()


def gathered(axes: Axes) -> Axes:
    """A parameter's axes where it is used: whole along `embed`, along which it is only stored.

    The gather is of the numbers in the dtype of the computation, and XLA cannot choose to gather
    the larger activations in its place.
    """
    return tuple(None if axis == "embed" else axis for axis in axes)


def parameter_axes(path: Sequence[str]) -> Axes | None:
    """The logical axes of a leaf by its path, in a network's parameters or whatever mirrors them.

    Args:
        path: names from the root to the leaf; what stands above the network (a field of a state,
            an optimizer's moment) does not count.

    Returns:
        One entry a dimension, or None where the leaf is no parameter of a Transformer.

    >>> parameter_axes(("opt_state", "mu", "policy", "layers", "3", "attention", "key", "kernel"))
    ('embed', 'kv_heads', None)
    >>> parameter_axes(("params", "layers", "stack", "mlp_norm", "scale"))
    ('layers', 'embed')
    >>> parameter_axes(("policy_params", "layers", "0", "mlp", "down", "lora_a"))
    ('mlp', None)
    >>> parameter_axes(("opt_state", "count")) is None
    True
    """
    tops = [i for i, name in enumerate(path) if name in TOP and i + 1 < len(path)]
    if not tops:
        return None
    inside = tuple(path[tops[-1] :])
    stacked: Axes = ("layers",) if inside[:2] == ("layers", "stack") else ()
    module, name = inside[-2:]
    if module == "embed" and name in TABLES:
        return TABLES[name]
    if module in KERNELS and name in ("kernel", "bias"):
        before, after = KERNELS[module]
        return stacked + (before + after if name == "kernel" else after)
    if module in KERNELS and name in LORA:
        before, after = KERNELS[module]
        return stacked + ((*before, None) if name == "lora_a" else (None, *after))
    if module.endswith("norm") and name in ("scale", "bias"):
        return stacked + ((None,) if module in HEAD_NORMS else ("embed",))
    return None
