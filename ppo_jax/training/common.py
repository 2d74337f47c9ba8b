"""What SFT and reward training share: the split of the data, the number of steps, the start."""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from ppo_jax.config.parsing import LARGEST_INT
from ppo_jax.config.stages import LoRASettings, OptimizerSettings, SFTSettings
from ppo_jax.core.network import merge_params
from ppo_jax.core.optimizer import init_optimizer
from ppo_jax.core.types import Optimizer, Params, TrainState
from ppo_jax.data.hidden_states import make_inputs
from ppo_jax.data.records import TextSettings
from ppo_jax.data.shared_states import FOLDER, SharedStates, layers_name
from ppo_jax.distributed.layout import Layout, device_put, init_sharded
from ppo_jax.io.stage_folder import Model
from ppo_jax.models.build import trunk_network
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.lora import init_lora


def count_steps(settings: TextSettings, num_rows: int) -> int:
    """Optimizer steps of num_epochs passes over `num_rows` rows, of a text or of several.

    Raises:
        ValueError: they are more than a counter on the devices can hold.
    """
    steps = max(1, math.ceil(settings.num_epochs * num_rows / settings.batch_size))
    if steps > LARGEST_INT:
        section = "sft" if isinstance(settings, SFTSettings) else "reward"
        raise ValueError(
            f"{section}.num_epochs must give at most {LARGEST_INT:,} steps, "
            f"got {settings.num_epochs:g} passes over {num_rows} rows"
        )
    return steps


def make_optimizer(settings: OptimizerSettings, total_steps: int) -> Optimizer:
    """The numbers of an optimizer, as float32; on the devices, changing one does not recompile."""
    values = dataclasses.asdict(settings) | {"total_steps": total_steps}
    kind = values.pop("schedule")
    return Optimizer(**{k: np.float32(v) for k, v in values.items()}, schedule=kind)


def with_adapters(
    model: Model,
    trainable: str | int,
    lora: LoRASettings,
    seed: int,
    layout: Layout,
    make: Callable[[Layout, Callable[[], Params]], Params] = init_sharded,
) -> Model:
    """The model with new adapters, if it is they that are trained.

    Args:
        model: what the training starts from; it keeps its arrays.
        trainable: what is trained of it.
        lora: rank, weight and places of the adapters.
        seed: of their numbers.
        layout: where they are put.
        make: what makes them; `layout.abstract` gives their shapes alone.
    """
    if trainable != "lora":
        return model

    def init() -> Params:
        how = dict(targets=lora.targets, rank=lora.rank)
        return init_lora(jax.random.key(seed), model.config, model.params, **how)

    params = merge_params(model.params, make(layout, init))
    config = dataclasses.replace(model.config, lora_alpha=lora.alpha)
    return dataclasses.replace(model, config=config, params=params)


def init_train_state(params: Params, optimizer: Optimizer) -> TrainState:
    params = jax.tree.map(jnp.copy, params)  # the state is donated
    opt_state = init_optimizer(optimizer, params)
    return TrainState(step=jnp.int32(0), params=params, opt_state=opt_state)


def freeze(params: Any, layout: Layout, dtype: str) -> Any:
    """Parameters that are not trained: on the mesh, in the dtype that is enough for them.

    Args:
        params: of one network or, in any tree, of several. An array that is in it more than
            once is so in the result, and takes its memory once.
        layout: where they are put.
        dtype: what they are cast to.
    """
    frozen: dict[tuple[int, Any], jax.Array] = {}

    def one(leaf: Any, lie: NamedSharding) -> jax.Array:
        key = (id(leaf), lie)  # the tree keeps every leaf alive: no id is used twice
        if key not in frozen:
            frozen[key] = device_put(leaf, lie).astype(dtype)
        return frozen[key]

    return jax.tree.map(one, params, layout.shardings(params))


def compile_step(
    step: Callable,
    state: Any,
    layout: Layout,
    *,
    compiler_options: dict[str, Any] | None = None,
    **parts: Any,
) -> Callable:
    """A compiled step: its first argument, the state, is donated, and all others must be on the
    devices. A transfer that nobody asked for is an error.

    Args:
        step: (state, ...) -> (state, metrics).
        state: what the first step is given; every step returns one with its shardings.
        layout: every device has a copy of the metrics.
        compiler_options: of XLA; None is none.
        **parts: networks and choices, which shape the program.
    """
    shardings = (jax.tree.map(lambda leaf: leaf.sharding, state), layout.replicated)
    compiled = jax.jit(
        functools.partial(step, **parts),
        donate_argnums=0,
        out_shardings=shardings,
        compiler_options=compiler_options,
    )

    def call(*args: Any, **kwargs: Any):
        with jax.transfer_guard("disallow"):
            return compiled(*args, **kwargs)

    return call


def inputs_reader(
    config: ModelConfig,
    start: int | None,
    trunk_params: Params,
    layout: Layout,
    cache_gb: float,
    known: SharedStates | None = None,
    later: SharedStates | None = None,
):
    """(texts, used=None) -> `Inputs`: tokens, or the states below layer `start`; see `make_inputs`
    for what is known of them, and what is kept for a later stage."""
    exits = () if later is None else sorted({start, later.layer})
    how = dict(exits=exits, constrain=layout.constrain)
    trunk = None if start is None else trunk_network(config, end_layer=start, **how)
    return functools.partial(
        make_inputs,
        trunk=trunk,
        trunk_params=trunk_params,
        layout=layout,
        num_exits=len(exits) or 1,
        cache_gb=cache_gb,
        context=config.max_length,
        known=known,
        later=later,
    )


def shared_states(
    config: ModelConfig, layer: int | None, trunk_params: Params, workdir: Path
) -> SharedStates | None:
    """Where the states of texts after a layer of a trunk are; None where none are shared: of no
    frozen layer, of scanned ones, among several processes."""
    if not layer or config.scan_layers or jax.process_count() > 1:
        return None
    return SharedStates(workdir / FOLDER, layers_name(config, trunk_params, layer), layer)
