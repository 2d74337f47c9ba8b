"""Adam as pure functions whose every number may be traced."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ppo_jax.core.types import Optimizer

SCHEDULES = ("constant", "linear", "cosine")
WARMUP_FROM = 0.1  # of the learning rate: InstructGPT warms up from one tenth


def schedule(settings: Optimizer, step: jax.Array) -> jax.Array:
    """The factor of the learning rate at a step, float32.

    Warm-up rises linearly from 0.1 to 1 over `warmup_steps`; then the factor is constant, or falls
    to `final_fraction` at `total_steps`: linearly, or along half a cosine.

    Args:
        settings: the optimizer's numbers and its kind of schedule.
        step: [] int, steps already taken.

    Raises:
        ValueError: the kind is unknown.

    >>> linear = Optimizer(learning_rate=1.0, schedule="linear", total_steps=4)
    >>> [float(schedule(linear, step)) for step in range(5)]
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    step = jnp.asarray(step, jnp.float32)
    warmup = jnp.asarray(settings.warmup_steps, jnp.float32)
    rise = WARMUP_FROM + (1 - WARMUP_FROM) * step / jnp.maximum(warmup, 1.0)
    remaining = jnp.maximum(settings.total_steps - warmup, 1.0)
    done = jnp.clip((step - warmup) / remaining, 0.0, 1.0)
    match settings.schedule:
        case "constant":
            fall = jnp.ones_like(done)
        case "linear":
            fall = 1 - (1 - settings.final_fraction) * done
        case "cosine":
            half = 0.5 * (1 + jnp.cos(jnp.pi * done))
            fall = settings.final_fraction + (1 - settings.final_fraction) * half
        case unknown:
            raise ValueError(f"unknown schedule {unknown!r}; choose from {list(SCHEDULES)}")
    return jnp.where(step < warmup, rise, fall)


def transformation(settings: Optimizer) -> optax.GradientTransformation:
    """Clip by the global norm, then Adam's direction; the learning rate is not in it."""
    return optax.chain(
        optax.clip_by_global_norm(settings.max_grad_norm),
        optax.scale_by_adam(settings.b1, settings.b2, settings.eps),
        optax.add_decayed_weights(settings.weight_decay),
    )


def init_optimizer(settings: Optimizer, params: Any) -> Any:
    """Optimizer state of a parameter tree: zeros, in the shapes of the parameters."""
    return transformation(settings).init(params)


def apply_gradients(
    settings: Optimizer, gradients: Any, opt_state: Any, params: Any, learning_rates: Any
) -> tuple[Any, Any, jax.Array]:
    """One optimizer step.

    Args:
        settings: the optimizer's numbers.
        gradients: a tree like `params`.
        opt_state: from `init_optimizer`.
        params: the parameters.
        learning_rates: a prefix tree of `params`: one rate for all, or one for each part.

    Returns:
        (params, opt_state, the norm of the gradients before the limit).
    """
    norm = optax.tree.norm(gradients)
    updates, opt_state = transformation(settings).update(gradients, opt_state, params)
    updates = jax.tree.map(
        lambda rate, tree: jax.tree.map(lambda u: -rate * u, tree), learning_rates, updates
    )
    return optax.apply_updates(params, updates), opt_state, norm
