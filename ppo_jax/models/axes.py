"""Logical axes: what each dimension of a parameter, a cache or an activation stands for.

A table of rules (see `layout`) maps logical axes to mesh axes; networks know logical axes only.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax

Axes = tuple[str | None, ...]  # one name per dimension; None is never sharded

# Kernels and tables by the name of their module: (axes of the input, axes of output and bias).
KERNELS: dict[str, tuple[Axes, Axes]] = {
    "query": (("embed",), ("heads", None)),
    "key": (("embed",), ("kv_heads", None)),
    "value": (("embed",), ("kv_heads", None)),
    "output": (("heads", None), ("embed",)),
    "up": (("embed",), ("mlp",)),
    "gate": (("embed",), ("mlp",)),
    "down": (("mlp",), ("embed",)),
    "head": (("embed",), ("vocab",)),
    "value_head": (("embed",), (None,)),  # of a critic that is a head of the policy
}
# Kernels of experts by their names, below `experts`.
EXPERTS: dict[str, Axes] = {
    "router": ("embed", None),
    "up": ("expert", "embed", None),
    "gate": ("expert", "embed", None),
    "down": ("expert", None, "embed"),
}
OPTIONAL = ("expert",)  # whole on every device where the mesh does not divide them
TABLES: dict[str, Axes] = {"tokens": ("vocab", "embed"), "positions": (None, "embed")}
HEAD_NORMS = ("query_norm", "key_norm")  # over the head size; other norms over embed
LORA = ("lora_a", "lora_b")  # adapters beside a kernel: [inputs, rank], [rank, outputs]
TOP = ("embed", "layers", "final_norm", "head", "value_head")  # the parts of a network

HIDDEN: Axes = ("batch", None, None)  # hidden states [B, L, D]
CACHE: Axes = ("batch", "kv_heads", None, None)  # cached keys and values [B, G, C, K]


@dataclasses.dataclass(frozen=True)
class ShardingConstraint:
    """Pins the sharding of an array inside a program, by its logical axes.

    Without a mesh it is `unconstrained`, which pins nothing.
    """

    sharding: Callable[[Axes, Sequence[int]], jax.sharding.NamedSharding] | None = None

    def __call__(self, x: jax.Array, axes: Axes) -> jax.Array:
        if self.sharding is None:
            return x
        return jax.lax.with_sharding_constraint(x, self.sharding(axes, x.shape))

    @property
    def platform(self) -> str | None:
        """The platform of the mesh, real or only described: "cpu", "gpu", "tpu"."""
        return self.sharding and next(iter(self.sharding((), ()).device_set)).platform

    def mesh_axes(self, axis: str, size: int) -> tuple[str, ...]:
        """The mesh axes over which a logical axis of this size is sharded."""
        names = self.sharding((axis,), (size,)).spec[0] if self.sharding else None
        return (names,) if isinstance(names, str) else tuple(names or ())

    @property
    def num_devices(self) -> int:
        """Of the mesh; 1 without."""
        return len(self.sharding((), ()).device_set) if self.sharding else 1

    def shard_shape(self, axes: Axes, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of one device's shard of an array."""
        return self.sharding(axes, shape).shard_shape(tuple(shape))

    def shard_map(self, function: Callable, axes: Sequence[Axes], *arrays: jax.Array) -> jax.Array:
        """function(*arrays) on each device's shards; its result is sharded as the first array."""
        shardings = [self.sharding(a, x.shape) for a, x in zip(axes, arrays, strict=True)]
        mesh, specs = shardings[0].mesh, tuple(sharding.spec for sharding in shardings)
        mapped = jax.shard_map(
            function, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False
        )
        return mapped(*arrays)


unconstrained = ShardingConstraint()


def gathered(axes: Axes) -> Axes:
    """A parameter's axes where it is used: gathered along `embed`, which shards its storage only.

    The parameters are gathered in the computation dtype, and XLA cannot choose to gather the larger
    activations instead.
    """
    return tuple(None if axis == "embed" else axis for axis in axes)


def parameter_axes(path: Sequence[str]) -> Axes | None:
    """The logical axes of a leaf by its path, in a network's parameters or whatever mirrors them.

    Names above the network (a field of a state, an optimizer's moment) do not count. None is the
    answer for a leaf that is no parameter of a Transformer.

    >>> parameter_axes(("opt_state", "mu", "policy", "layers", "3", "attention", "key", "kernel"))
    ('embed', 'kv_heads', None)
    >>> parameter_axes(("params", "layers", "stack", "mlp_norm", "scale"))
    ('layers', 'embed')
    >>> parameter_axes(("policy_params", "layers", "0", "mlp", "down", "lora_a"))
    ('mlp', None)
    >>> parameter_axes(("params", "layers", "0", "experts", "down", "kernel"))
    ('expert', None, 'embed')
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
    if "experts" in inside and module in EXPERTS and name == "kernel":
        return stacked + EXPERTS[module]
    if module in KERNELS and name in ("kernel", "bias", *LORA):
        before, after = KERNELS[module]
        adapters: dict[str, Axes] = {"lora_a": (*before, None), "lora_b": (None, *after)}
        return stacked + {"kernel": before + after, "bias": after, **adapters}[name]
    if module.endswith("norm") and name in ("scale", "bias"):
        return stacked + ((None,) if module in HEAD_NORMS else ("embed",))
    return None
