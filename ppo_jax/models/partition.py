"""Which parameters are trained: all, the top N layers, the head alone, or low-rank adapters.

Frozen lower layers become a trunk, which is computed once; the upper network starts from its hidden
states. Both are plain networks; this file splits and joins their parameters.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppo_jax.core.types import Params
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.lora import split_lora


class Parts(NamedTuple):
    """The parameters of one network in three parts; `merge_params(*parts)` joins them again.

    `trunk` has the layers below the upper network, with the embeddings; `frozen` is what the upper
    network reads and does not train.
    """

    trunk: Params
    frozen: Params
    trained: Params


def start_layer(config: ModelConfig, trainable: str | int) -> int | None:
    """The number of frozen layers below the trained ones; None when all layers or adapters in all
    of them are trained.

    Raises:
        ValueError: `trainable` is neither "all", "head", "lora", nor in 1 .. num_layers.
    """
    if trainable in ("all", "lora"):
        return None
    if trainable == "head":
        return config.num_layers
    if isinstance(trainable, int) and 1 <= trainable <= config.num_layers:
        return config.num_layers - trainable
    raise ValueError(
        f"trainable must be 'all', 'head', 'lora' or a number of top layers in "
        f"1..{config.num_layers}, got {trainable!r}"
    )


def trains_experts(config: ModelConfig, trainable: str | int) -> bool:
    """Whether a layer that is trained, or above one that is, has experts."""
    first = start_layer(config, trainable) or 0
    return any(config.has_experts(i) for i in range(first, config.num_layers))


def split_params(
    config: ModelConfig, params: Params, trainable: str | int, start: int | None
) -> Parts:
    """Split the parameters of a whole network.

    Args:
        config: the network's shape.
        params: all of the network's.
        trainable: "all", "head", "lora" (the adapters in `params`, and the head of a value or
            reward network), or the number of top layers to train.
        start: the layer that the upper network starts from; None reads tokens, without a trunk.

    Raises:
        ValueError: trained layers would be in the trunk, the head alone is trained but is the
            token table, or there are no adapters to train.
    """
    first = start_layer(config, trainable)
    if first is None and start is None:
        return split_adapters(params) if trainable == "lora" else Parts({}, {}, params)
    if first is None or first < (start or 0):
        raise ValueError(f"trainable={trainable!r} is not above layer {start}")
    tied = "head" not in params
    if trainable == "head" and tied:
        raise ValueError(
            "trainable='head' needs a head of its own; this model ties it to the token table. "
            "Choose 'all', 'lora' or a number of top layers."
        )
    layers, embed = params["layers"], params["embed"]
    trained = {name: params[name] for name in ("final_norm", "head") if name in params}
    if first < config.num_layers:
        trained["layers"] = layer_range(config, layers, first, config.num_layers)
    frozen = {}
    if trainable == "head":
        frozen["final_norm"] = trained.pop("final_norm")
    if first > (start or 0):
        frozen["layers"] = layer_range(config, layers, start or 0, first)
    if start is None:
        return Parts({}, frozen | {"embed": embed}, trained)
    trunk = {"embed": embed}
    if start > 0:
        trunk["layers"] = layer_range(config, layers, 0, start)
    if tied:
        frozen["embed"] = {"tokens": embed["tokens"]}
    return Parts(trunk, frozen, trained)


def split_adapters(params: Params) -> Parts:
    """`split_params` for "lora"."""
    frozen, trained = split_lora(params)
    if not trained:
        raise ValueError("trainable='lora' needs adapters in the parameters, see `init_lora`")
    if "bias" in params.get("head", {}):  # a scalar head; logits have no bias
        trained["head"] = frozen.pop("head")
    return Parts({}, frozen, trained)


def keep_layers(config: ModelConfig, params: Params, count: int) -> tuple[ModelConfig, Params]:
    """The network cut down to its lowest `count` layers.

    The middle layers of a language model often judge a text better than the top ones, which
    specialise in the next token: a reward model of the lower layers can be cheaper and better.

    Raises:
        ValueError: the network has fewer layers.
    """
    if count > config.num_layers:
        raise ValueError(f"num_layers must be at most {config.num_layers}, got {count}")
    layers = layer_range(config, params["layers"], 0, count)
    return dataclasses.replace(config, num_layers=count), {**params, "layers": layers}


def layer_range(config: ModelConfig, layers: Params, begin: int, end: int) -> Params:
    """The parameters of layers begin .. end - 1."""
    if config.scan_layers:
        return {"stack": jax.tree.map(lambda x: x[begin:end], layers["stack"])}
    return {str(i): layers[str(i)] for i in range(begin, end)}


def stack_layers(params: Params) -> Params:
    """Parameters of unrolled layers, stacked for a model with `scan_layers`."""
    layers = [params["layers"][str(i)] for i in range(len(params["layers"]))]
    return {**params, "layers": {"stack": jax.tree.map(lambda *x: jnp.stack(x), *layers)}}


def unstack_layers(params: Params) -> Params:
    """Parameters of scanned layers, unrolled for a model without `scan_layers`."""
    stack = params["layers"]["stack"]
    count = len(jax.tree.leaves(stack)[0])
    layers = {str(i): jax.tree.map(lambda x, i=i: x[i], stack) for i in range(count)}
    return {**params, "layers": layers}
