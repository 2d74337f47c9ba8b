"""The brake of an update: steps end where the policy has moved far enough; means of those taken."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ppo_jax.core.lanes import any_lane


def until_far(step: Callable[..., tuple[Any, dict]], stop_kl: jax.Array | float):
    """A step of `ppo_update` with its brake: the carry is (that of `step`, whether to go on)."""

    def step_if_near(carry, inputs):
        before, goes_on = carry
        _, shapes = jax.eval_shape(step, before, inputs)

        def compute():
            after, metrics = step(before, inputs)
            near = goes_on & (metrics["policy/approx_kl"] <= stop_kl)
            after = jax.tree.map(lambda new, old: jnp.where(near, new, old), after, before)
            metrics = {name: jnp.where(goes_on, x, 0.0) for name, x in metrics.items()}
            flags = {"ppo/computed": goes_on, "ppo/taken": near}
            return (after, near), metrics | {k: x.astype(jnp.float32) for k, x in flags.items()}

        def skip():
            zeros = {name: jnp.zeros(x.shape, x.dtype) for name, x in shapes.items()}
            flags = {"ppo/computed": jnp.float32(0.0), "ppo/taken": jnp.float32(0.0)}
            return (before, jnp.bool_(False)), zeros | flags

        return jax.lax.cond(any_lane(goes_on), compute, skip)

    return step_if_near


def average_updates(
    updates: dict[str, jax.Array], critic_apart: bool = False
) -> dict[str, jax.Array]:
    """The metrics of `ppo_update` over its steps: means, and maxima of those named `*_max`.

    With stop_kl they are of the minibatches that were computed, but for those of a critic that
    takes steps of its own; `ppo/updates` is the number of steps that were taken.
    """
    updates = dict(updates)
    computed, taken = (updates.pop(f"ppo/{name}", None) for name in ("computed", "taken"))

    def average(name, x):
        if name.endswith("_max"):
            return x.max()
        if computed is None or critic_apart and name.startswith("value/"):
            return x.mean()
        return (x * computed).sum() / computed.sum()

    averages = {name: average(name, x) for name, x in updates.items()}
    return averages if taken is None else averages | {"ppo/updates": taken.sum()}
