"""What moves from iteration to iteration beside the trained parameters: coefficients that hold a
measured quantity at a target, the baseline of REINFORCE, the reference.

Each is on where the number in `Hyperparameters` that it follows is not None.

Dimension key: B responses, T response tokens.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ppo_jax.core.checks import assert_numbers
from ppo_jax.core.covariance import adaptive_entropy_coef
from ppo_jax.core.critic_free import running_baseline
from ppo_jax.core.kl import adaptive_penalty_coef
from ppo_jax.core.types import FrozenParams, Hyperparameters, Params, PPOState

# Those of `init_adaptive` that stand in place of a hyperparameter, and their metrics.
COEFFICIENTS = {"penalty_coef": "policy/penalty_coef", "entropy_coef": "policy/entropy_coef"}


def init_adaptive(hyperparameters: Hyperparameters) -> dict[str, jax.Array]:
    """The numbers that move, [] float32 each, before the first iteration; those that do not move
    are left out."""
    numbers = hyperparameters
    starts = {
        "penalty_coef": (numbers.penalty_target_kl, numbers.penalty_coef),
        "entropy_coef": (numbers.target_entropy, numbers.entropy_coef),
        "baseline": (numbers.baseline_decay, jnp.nan),  # see `running_baseline`
        "variance_of_two": (numbers.critic_warmup_tolerance, jnp.nan),  # see `settle`
        "variance_of_five": (numbers.critic_warmup_tolerance, jnp.nan),
        "has_settled": (numbers.critic_warmup_tolerance, 0.0),
    }
    # Copies: the loops donate the state.
    return {k: jnp.array(x, jnp.float32) for k, (on, x) in starts.items() if on is not None}


def init_reference(policy_params: Params, hyperparameters: Hyperparameters) -> Params | None:
    """A copy of the trained leaves, where the reference moves; else None."""
    if hyperparameters.ref_ema_decay is None and hyperparameters.ref_reset_every is None:
        return None
    return jax.tree.map(jnp.copy, policy_params)


def adapted_numbers(hyperparameters: Hyperparameters, state: PPOState) -> Hyperparameters:
    """The hyperparameters of an iteration: its own coefficients in place of those of the start."""
    coefs = {name: x for name, x in state.adaptive.items() if name in COEFFICIENTS}
    return dataclasses.replace(hyperparameters, **coefs)


def moved_reference(frozen: FrozenParams, state: PPOState) -> FrozenParams:
    """The frozen parameters of an iteration: with the reference of the state, where it moves."""
    if state.ref_params is None:
        return frozen
    return dataclasses.replace(frozen, ref_policy=state.ref_params)


def next_adaptive(
    adaptive: dict[str, jax.Array],
    metrics: dict[str, jax.Array],
    step: Any,
    hyperparameters: Hyperparameters,
) -> dict[str, jax.Array]:
    """The numbers of the next iteration, see `adaptive_penalty_coef`, `adaptive_entropy_coef`,
    `running_baseline` and `settle`. Coefficients stay where the policy does, at a rate of 0.

    Args:
        adaptive: those of this iteration.
        metrics: of this iteration: policy/learning_rate, and policy/old_kl, policy/entropy,
            reward/total_mean, value/explained_variance, each where a number that follows it is
            there.
        step: [] int32, the iterations that are done.
        hyperparameters: targets, step, decay and tolerance.
    """
    numbers, following = hyperparameters, dict(adaptive)
    moved = metrics["policy/learning_rate"] > 0
    if (coef := adaptive.get("penalty_coef")) is not None:
        kl, target = metrics["policy/old_kl"], numbers.penalty_target_kl
        new = adaptive_penalty_coef(coef, kl, target_kl=target)
        following["penalty_coef"] = jnp.where(moved, new, coef)
    if (coef := adaptive.get("entropy_coef")) is not None:
        how = dict(target=numbers.target_entropy, step=numbers.entropy_coef_step)
        new = adaptive_entropy_coef(coef, metrics["policy/entropy"], **how)
        following["entropy_coef"] = jnp.where(moved, new, coef)
    if (baseline := adaptive.get("baseline")) is not None:
        totals = metrics["reward/total_mean"][None]
        following["baseline"] = running_baseline(baseline, totals, decay=numbers.baseline_decay)
    if (tolerance := numbers.critic_warmup_tolerance) is not None:
        variance = metrics["value/explained_variance"]
        following |= settle(adaptive, variance, step, tolerance=tolerance)
    return following


def settle(
    adaptive: dict[str, jax.Array], variance: jax.Array, step: Any, *, tolerance: Any
) -> dict[str, jax.Array]:
    """Whether the explained variance of a critic has settled, after `step` iterations, of which the
    last one had `variance`.

    Its running means over about two and five iterations (decays of 1/2 and 4/5) are kept; after
    five iterations at least it has settled, from then on, once they differ by less than the
    tolerance.

    >>> state = dict.fromkeys(("variance_of_two", "variance_of_five"), jnp.float32(0.5))
    >>> state |= {"has_settled": jnp.float32(0.0)}
    >>> variances = [(0.9, 5), (0.6, 5), (0.6, 4)]
    >>> found = [settle(state, jnp.float32(x), n, tolerance=0.1) for x, n in variances]
    >>> [one["has_settled"].item() for one in found]
    [0.0, 1.0, 0.0]
    """
    two, five = (
        running_baseline(adaptive[name], variance[None], decay=decay)
        for name, decay in (("variance_of_two", 0.5), ("variance_of_five", 0.8))
    )
    near = (step >= 5) & (jnp.abs(two - five) < tolerance)
    settled = jnp.maximum(adaptive["has_settled"], near.astype(jnp.float32))
    return {"variance_of_two": two, "variance_of_five": five, "has_settled": settled}


def next_reference(
    ref_params: Params | None, policy_params: Params, step: Any, hyperparameters: Hyperparameters
) -> Params | None:
    """The reference after an iteration.

    ref' = a ref + (1 - a) policy, in float32, with a = `ref_ema_decay`; the policy itself after
    each `ref_reset_every` iterations.

    Args:
        ref_params: the reference of this iteration; None does not move.
        policy_params: the trained leaves after its update, of the same tree.
        step: [] int32, the iterations that are done.
        hyperparameters: `ref_ema_decay`, `ref_reset_every`; None is off.

    Raises:
        ValueError: a decay that is known is not from 0 to 1, or a count not above 0.

    Reference: the mean is that of Xu et al. 2024, https://arxiv.org/abs/2404.10719, section 5.

    >>> one, two = {"w": jnp.array([1.0])}, {"w": jnp.array([2.0])}
    >>> from ppo_jax.core.types import Optimizer
    >>> numbers = Hyperparameters(optimizer=Optimizer(learning_rate=1.0), ref_ema_decay=0.75)
    >>> next_reference(one, two, 1, numbers)["w"].item()
    1.25
    """
    decay, every = hyperparameters.ref_ema_decay, hyperparameters.ref_reset_every
    if ref_params is None:
        return None
    if decay is not None:
        assert_numbers(at_least=0, at_most=1, ref_ema_decay=decay)
        ref_params = jax.tree.map(lambda r, p: toward(p, r, decay), ref_params, policy_params)
    if every is not None:
        assert_numbers(above=0, ref_reset_every=every)
        is_due = jnp.asarray(step, jnp.int32) % jnp.asarray(every, jnp.int32) == 0
        ref_params = jax.tree.map(lambda r, p: jnp.where(is_due, p, r), ref_params, policy_params)
    return ref_params


def toward(policy: jax.Array, ref: jax.Array, decay: Any) -> jax.Array:
    """A leaf of the mean, in its own dtype."""
    old, new = ref.astype(jnp.float32), policy.astype(jnp.float32)
    return (new + decay * (old - new)).astype(ref.dtype)
