"""Adam as pure functions whose every number may be traced."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ppo_jax.core.checks import Number, assert_numbers
from ppo_jax.core.lanes import any_lane
from ppo_jax.core.types import SCHEDULES, Optimizer

__all__ = ["SCHEDULES", "apply_gradients", "global_norm", "init_optimizer", "schedule"]

WARMUP_FROM = 0.1  # of the learning rate: InstructGPT warms up from one tenth


def schedule(settings: Optimizer, step: jax.Array) -> jax.Array:
    """The factor of the learning rate at a step, float32.

    Warm-up rises linearly from 0.1 to 1 over `warmup_steps`; then the factor is constant, or falls
    to `final_fraction` at `total_steps`: linearly, or along half a cosine.

    Args:
        settings: the optimizer's numbers and its kind of schedule.
        step: [] int, steps already taken.

    Raises:
        ValueError: a number that is known is below 0.

    >>> linear = Optimizer(learning_rate=1.0, schedule="linear", total_steps=4)
    >>> [float(schedule(linear, step)) for step in range(5)]
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    assert_numbers(step=step)
    check_numbers(settings)
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
        case _:
            half = 0.5 * (1 + jnp.cos(jnp.pi * done))
            fall = settings.final_fraction + (1 - settings.final_fraction) * half
    return jnp.where(step < warmup, rise, fall)


def check_numbers(settings: Optimizer) -> None:
    """Each of the optimizer's numbers is one number and, where it is known, at least 0."""
    names = {field.name for field in dataclasses.fields(settings)} - {"schedule"}
    assert_numbers(at_least=0, **{name: getattr(settings, name) for name in names})


def global_norm(tree: Any) -> jax.Array:
    """√Σ x² over all leaves, also where a square is beyond the largest float32.

    There the sum is that of (x / m)², with m the largest |x|, and the norm is m times its root.

    >>> round(global_norm({"w": jnp.array([3e20, 4e20])}).item() / 1e20, 5)
    5.0
    """
    norm = optax.tree.norm(tree)

    def scaled():
        largest = jnp.stack([jnp.max(jnp.abs(x), initial=0.0) for x in jax.tree.leaves(tree)]).max()
        return largest * optax.tree.norm(jax.tree.map(lambda x: x / largest, tree))

    overflows = jnp.isinf(norm)
    return jax.lax.cond(
        any_lane(overflows), lambda: jnp.where(overflows, scaled(), norm), lambda: norm
    )


def clip_by_norm(norm: jax.Array, limit: Number) -> optax.GradientTransformation:
    """Updates of this norm, scaled down to the limit where they are above it."""

    def clip(updates, _=None):
        divisor = jnp.where(norm == 0, 1.0, norm)  # a limit of 0 and updates of 0 stay 0
        return jax.tree.map(
            lambda u: jnp.where(norm < limit, u, u / divisor.astype(u.dtype) * limit), updates
        )

    return optax.stateless(clip)


def transformation(settings: Optimizer, norm: Number = 0.0) -> optax.GradientTransformation:
    """Clip gradients of this norm, then Adam's direction; the learning rate is not in it."""
    return optax.chain(
        clip_by_norm(jnp.asarray(norm), settings.max_grad_norm),
        optax.scale_by_adam(settings.b1, settings.b2, settings.eps),
        optax.add_decayed_weights(settings.weight_decay),
    )


def init_optimizer(settings: Optimizer, params: Any) -> Any:
    """Optimizer state of a parameter tree: zeros, in the shapes of the parameters."""
    check_numbers(settings)
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

    Raises:
        ValueError: a number that is known is below 0.
    """
    check_numbers(settings)
    for rate in jax.tree.leaves(learning_rates):
        assert_numbers(at_least=0, learning_rates=rate)
    norm = global_norm(gradients)
    updates, opt_state = transformation(settings, norm).update(gradients, opt_state, params)
    updates = jax.tree.map(
        lambda rate, tree: jax.tree.map(lambda u: -rate * u, tree), learning_rates, updates
    )
    return optax.apply_updates(params, updates), opt_state, norm
