"""Networks with experts that give what their routers do next to their outputs.

Dimension key: B sequences, S positions, M layers with experts, k experts of a token, T positions
that have an output.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from ppo_jax.core.network import Network
from ppo_jax.core.router import RouterStatistics
from ppo_jax.models.attention import Outputs
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.moe import CHOSEN, COMPARED, REPLAYED, STATISTICS, VARIABLE
from ppo_jax.models.transformer import Transformer


def routed_network(
    network: Network, module: Transformer, arguments: Callable[..., tuple]
) -> Network | None:
    """See `Network.routed`; None where no layer has experts.

    Args:
        network: that of the module.
        module: called.
        arguments: what it is called with, from those of `apply`.
    """
    config, numbers = module.config, expert_layers(module)
    if not numbers:
        return None

    def apply(params, inputs, mask, *, chosen=None, replay=False, **where):
        args = arguments(inputs, mask, **where)
        variables, outputs = {"params": params}, args[4]
        if chosen is not None:
            shape = *mask.shape, len(numbers), config.experts.num_chosen
            chex.assert_shape(chosen, shape)
            chex.assert_type(chosen, int)
            collection = REPLAYED if replay else COMPARED
            variables[collection] = of_layers(module, numbers, chosen, outputs)
        elif replay:
            raise ValueError("replay needs the experts that were chosen, got chosen=None")
        (result, _), collected = module.apply(variables, *args, mutable=[STATISTICS])
        return result, by_layer(collected[STATISTICS], axis=0)

    def decode(params, inputs, mask, cache, *, first_output=0):
        args = arguments(inputs, mask, first_output=first_output)
        variables, args = {"params": params}, (*args[:3], cache, args[4])
        (result, cache), collected = module.apply(variables, *args, mutable=[CHOSEN])
        return result, cache, all_chosen(collected[CHOSEN], config, mask.shape[1])

    unused = dict(routed=None, token_statistics=None, summed_logprobs=None)
    return network._replace(apply=apply, decode=decode, **unused)


def expert_layers(module: Transformer) -> list[int]:
    """The numbers of those of a module's layers that have experts."""
    layers = range(module.start or 0, module.end)
    return [i for i in layers if module.config.has_experts(i)]


def of_layers(
    module: Transformer, numbers: list[int], chosen: jax.Array, outputs: Outputs
) -> dict[str, Any]:
    """Chosen experts [B, S, M, k] as variables of the layers, each at the positions that it
    computes: the last one, unless it is scanned, at those that have an output alone."""
    chosen = module.constrain(chosen, ("batch", None, None, None))
    if module.config.scan_layers:
        return {"layers": {"stack": {"experts": {VARIABLE: jnp.moveaxis(chosen, 2, 0)}}}}
    layers = {}
    for place, number in enumerate(numbers):
        own = chosen[:, :, place]
        own = outputs.take(own) if number + 1 == module.end else own
        layers[str(number)] = {"experts": {VARIABLE: own}}
    return {"layers": layers}


def by_layer(collected: dict[str, Any], axis: int) -> RouterStatistics | jax.Array:
    """What the layers have recorded, stacked on a new axis."""
    layers = collected["layers"]
    if "stack" in layers:
        stacked = layers["stack"]["experts"][VARIABLE]
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, axis), stacked)
    ordered = (layers[name]["experts"][VARIABLE] for name in sorted(layers, key=int))
    return jax.tree.map(lambda *x: jnp.stack(x, axis), *ordered)


def all_chosen(collected: dict[str, Any], config: ModelConfig, length: int) -> jax.Array:
    """The experts [B, S, M, k] that the layers have recorded, in the smallest dtype; its largest
    number where the last layer has computed no position."""
    dtype = jnp.uint8 if config.experts.num_experts < 256 else jnp.uint16

    def whole(x):
        skipped = (*[(0, 0)] * (x.ndim - 2), (length - x.shape[-2], 0), (0, 0))
        return jnp.pad(x.astype(dtype), skipped, constant_values=jnp.iinfo(dtype).max)

    return by_layer(jax.tree.map(whole, collected), axis=2)
