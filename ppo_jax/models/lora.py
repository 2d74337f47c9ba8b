"""Low-rank adapters (LoRA): the weights are frozen, small matrices beside them are trained.

With adapters a projection x W computes x W + alpha / r (x A) B. Without these leaves the network is
the initial model, so one copy of the weights serves both.

Reference: Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1.

Dimension key: I inputs and O outputs of a kernel, one axis or two each; r rank.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ppo_jax.core.types import Params
from ppo_jax.models.axes import KERNELS, LORA
from ppo_jax.models.config import ModelConfig

# The module that holds each projection; the order sets the random keys.
PARTS = dict.fromkeys(("query", "key", "value", "output"), "attention")
PARTS |= dict.fromkeys(("up", "gate", "down"), "mlp")
TARGETS = tuple(PARTS)


def targets_of(config: ModelConfig) -> list[str]:
    """The projections that may have adapters: all, but for experts."""
    known = [name for name in TARGETS if name != "gate" or config.gated]
    return known if config.experts is None else [x for x in known if PARTS[x] == "attention"]


def check_targets(config: ModelConfig, targets: Sequence[str], field: str = "targets"):
    """Refuse targets that are no projections of the model.

    Raises:
        ValueError: it names `field`, the first such target, and the projections.
    """
    known = targets_of(config)
    for target in targets:
        if target not in known:
            raise ValueError(f"{field} must be among {known} for this model, got {target!r}")


def init_lora(
    key: jax.Array, config: ModelConfig, params: Params, *, targets: Sequence[str], rank: int
) -> Params:
    """New adapters beside the kernels of the targets in every layer.

    A is uniform in ±1 / sqrt(I), as in peft, and B is 0: the model's outputs do not change.

    Args:
        key: consumed. The numbers do not depend on the other targets or on `scan_layers`.
        config: the network's shape.
        params: all of the network's; only their shapes are read.
        targets: names from `TARGETS`.
        rank: r.

    Returns:
        `lora_a` [I, r] and `lora_b` [r, O], float32, at the paths of the kernels, with a leading
        layer axis where layers are stacked; `core.merge_params` joins them with `params`.

    Raises:
        ValueError: the model lacks a target.
    """
    check_targets(config, targets)
    layers = params["layers"]
    first = layers["stack" if config.scan_layers else "0"]

    def of_layer(number: int | jax.Array) -> Params:
        layer_key, adapters = jax.random.fold_in(key, number), {}
        for name in targets:
            shape = first[PARTS[name]][name]["kernel"].shape[config.scan_layers :]
            num_in = len(KERNELS[name][0])
            bound = 1 / math.sqrt(math.prod(shape[:num_in]))
            own_key = jax.random.fold_in(layer_key, TARGETS.index(name))
            a = jax.random.uniform(own_key, (*shape[:num_in], rank), minval=-bound, maxval=bound)
            b = jnp.zeros((rank, *shape[num_in:]))
            adapters.setdefault(PARTS[name], {})[name] = {"lora_a": a, "lora_b": b}
        return adapters

    if config.scan_layers:
        return {"layers": {"stack": jax.vmap(of_layer)(jnp.arange(config.num_layers))}}
    return {"layers": {name: of_layer(int(name)) for name in layers}}


def split_lora(params: Params) -> tuple[Params, Params]:
    """(parameters without the adapters, the adapters alone)."""
    base: Params = {}
    adapters: Params = {}
    for name, value in params.items():
        if isinstance(value, dict):
            base[name], inner = split_lora(value)
            adapters |= {name: inner} if inner else {}
        else:
            (adapters if name in LORA else base)[name] = value
    return base, adapters


def merge_lora(config: ModelConfig, params: Params) -> Params:
    """The same model without adapters: kernels W + alpha / r A B, float32.

    Leaves without an adapter are returned as they are.
    """

    def merged(tree: Params, stacked: bool) -> Params:
        if "lora_a" not in tree:
            return {
                name: merged(x, stacked or name == "stack") if isinstance(x, dict) else x
                for name, x in tree.items()
            }
        base, pair = split_lora(tree)
        a, b = (jnp.asarray(pair[name], jnp.float32) for name in LORA)
        # At the highest precision, whatever that of other products.
        product = functools.partial(jnp.tensordot, axes=1, precision="highest")
        change = (jax.vmap(product) if stacked else product)(a, b)
        kernel = base["kernel"].astype(jnp.float32)
        return {**base, "kernel": kernel + lora_scale(config.lora_alpha, a.shape[-1]) * change}

    return merged(params, False)


def lora_scale(alpha: float, rank: int) -> float:
    """alpha / r.

    Raises:
        ValueError: alpha is 0: the adapters would do nothing and learn nothing.
    """
    if not alpha:
        raise ValueError("the parameters have adapters, but the model's lora_alpha is 0")
    return alpha / rank
