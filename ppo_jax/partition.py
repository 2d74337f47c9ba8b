"""Which parameters are trained: all, the top N layers, or the head alone.

With frozen lower layers a network falls into a trunk, which is computed once, and an upper
network, which starts from the trunk's hidden states. Both are plain networks; this file splits
and joins their parameters.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppo_jax.networks import ModelConfig, Params


class Parts(NamedTuple):
    """The parameters of one network, by what becomes of them.

    `trunk` is empty when everything is trained. `frozen` is what the upper network needs besides
    its trained leaves (a tied token table; the final norm when the head alone is trained).
    """

    trunk: Params
    frozen: Params
    trained: Params


def start_layer(config: ModelConfig, trainable: str | int) -> int | None:
    """The number of frozen layers below the trained part; None when all is trained.

    Raises:
        ValueError: `trainable` is neither "all", "head", nor in 1 .. num_layers.
    """
    if trainable == "all":
        return None
    if trainable == "head":
        return config.num_layers
    if isinstance(trainable, int) and 1 <= trainable <= config.num_layers:
        return config.num_layers - trainable
    raise ValueError(
        f"trainable must be 'all', 'head' or a number of top layers in 1..{config.num_layers}, "
        f"got {trainable!r}"
    )


def split_params(config: ModelConfig, params: Params, trainable: str | int) -> Parts:
    """Split the parameters of a whole network.

    Raises:
        ValueError: the head alone is to be trained, but it is the frozen token table.
    """
    start = start_layer(config, trainable)
    if start is None:
        return Parts({}, {}, params)
    is_policy_head = "head" not in params
    if trainable == "head" and is_policy_head:
        raise ValueError(
            "trainable='head' needs a head of its own; this model ties it to the token table. "
            "Choose 'all' or a number of top layers."
        )
    lower, upper = split_layers(config, params["layers"], start)
    trunk = {"embed": params["embed"], "layers": lower}
    frozen = {"embed": {"tokens": params["embed"]["tokens"]}} if is_policy_head else {}
    trained = {name: params[name] for name in ("final_norm", "head") if name in params}
    if trainable == "head":
        frozen["final_norm"] = trained.pop("final_norm")
    else:
        trained["layers"] = upper
    return Parts(trunk, frozen, trained)


def split_layers(config: ModelConfig, layers: Params, start: int) -> tuple[Params, Params]:
    """Layers below `start`, layers from `start` on."""
    if config.scan_layers:
        return (
            {"stack": jax.tree.map(lambda x: x[:start], layers["stack"])} if start else {},
            {"stack": jax.tree.map(lambda x: x[start:], layers["stack"])},
        )
    return (
        {i: layer for i, layer in layers.items() if int(i) < start},
        {i: layer for i, layer in layers.items() if int(i) >= start},
    )


def merge_params(*trees: Params) -> Params:
    """The union of nested dictionaries, lower layers first.

    A leaf in several trees comes from the last; layers stacked for `scan_layers` are put one
    upon the other. `merge_params(*split_params(...))` is the whole network again.
    """
    merged: Params = {}
    for tree in trees:
        for name, value in tree.items():
            old = merged.get(name)
            if not (isinstance(old, dict) and isinstance(value, dict)):
                merged[name] = value
            elif name == "stack":
                merged[name] = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), old, value)
            else:
                merged[name] = merge_params(old, value)
    return merged


def stack_layers(params: Params) -> Params:
    """Parameters of unrolled layers, for a model with `scan_layers`."""
    layers = [params["layers"][str(i)] for i in range(len(params["layers"]))]
    return {**params, "layers": {"stack": jax.tree.map(lambda *x: jnp.stack(x), *layers)}}


def unstack_layers(params: Params) -> Params:
    """Parameters of scanned layers, for a model without `scan_layers`."""
    stack = params["layers"]["stack"]
    count = len(jax.tree.leaves(stack)[0])
    layers = {str(i): jax.tree.map(lambda x, i=i: x[i], stack) for i in range(count)}
    return {**params, "layers": layers}
