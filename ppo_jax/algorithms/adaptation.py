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
    hyperparameters: Hyperparameters,
) -> dict[str, jax.Array]:
    """The numbers of the next iteration, see `adaptive_penalty_coef`, `adaptive_entropy_coef` and
    `running_baseline`.

    Args:
        adaptive: those of this iteration.
        metrics: of this iteration: policy/old_kl, policy/entropy, reward/total_mean, each where the
            number that follows it is there.
        hyperparameters: targets, step and decay.
    """
    numbers = hyperparameters
    moves = {
        "penalty_coef": lambda x: adaptive_penalty_coef(
            x, metrics["policy/old_kl"], target_kl=numbers.penalty_target_kl
        ),
        "entropy_coef": lambda x: adaptive_entropy_coef(
            x,
            metrics["policy/entropy"],
            target=numbers.target_entropy,
            step=numbers.entropy_coef_step,
        ),
        "baseline": lambda x: running_baseline(
            x, metrics["reward/total_mean"][None], decay=numbers.baseline_decay
        ),
    }
    following = {name: move(adaptive[name]) for name, move in moves.items() if name in adaptive}
    if numbers.critic_warmup_tolerance is not None:
        variance, tolerance = metrics["value/explained_variance"], numbers.critic_warmup_tolerance
        following |= settle(adaptive, variance, tolerance=tolerance)
    return following


def settle(
    adaptive: dict[str, jax.Array], variance: jax.Array, *, tolerance: Any
) -> dict[str, jax.Array]:
    """Whether the explained variance of a critic has settled, after an iteration with `variance`.

    Its running means over about two and five iterations (decays of 1/2 and 4/5) are kept; it has
    settled, from then on, once they differ by less than the tolerance.

    >>> state = dict.fromkeys(("variance_of_two", "variance_of_five"), jnp.float32(0.5))
    >>> state |= {"has_settled": jnp.float32(0.0)}
    >>> settle(state, jnp.float32(0.9), tolerance=0.1)["has_settled"].item()
    0.0
    >>> settle(state, jnp.float32(0.6), tolerance=0.1)["has_settled"].item()
    1.0
    """
    old = adaptive["variance_of_two"], adaptive["variance_of_five"]
    two, five = (
        running_baseline(mean, variance[None], decay=decay)
        for mean, decay in zip(old, (0.5, 0.8), strict=True)
    )
    # Not at the first: both are its own value then.
    near = ~jnp.isnan(old[0]) & (jnp.abs(two - five) < tolerance)
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
