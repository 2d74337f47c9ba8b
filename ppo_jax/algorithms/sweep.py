"""PPO of several lanes as one program: `jax.vmap` of an iteration, or of its two halves.

A lane is a run of its own: a state, numbers and, where the lanes' seeds differ, prompts and a key.
What lanes have in common is there once: frozen parameters, prompts and keys without a lane axis,
and with a shared key the noise of the sampling and the shuffles are computed once for all of them.

Dimension key: N lanes, B responses.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ppo_jax.algorithms.experience import response_scores, sample_responses
from ppo_jax.algorithms.options import PPONetworks, PPOOptions
from ppo_jax.algorithms.ppo import ppo_iteration, update_from_rollout
from ppo_jax.core.checks import assert_divides
from ppo_jax.core.types import FrozenParams, Hyperparameters, PPOState, Prompts, Rollout


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaneAxes:
    """Which arguments have an axis of lanes, their first: 0 has one, None is shared by all."""

    inputs: int | None = None  # prompts and keys
    frozen: Any = None  # 0 or None for all frozen parameters, or a tree of them, see `stack_frozen`
    mesh_axis: str | None = None  # of the mesh, that the lanes are sharded over
    at_once: int | None = None  # lanes computed side by side, a divisor of N; None: all of them


def stack_lanes(lanes: Sequence[Any]) -> Any:
    """N trees of one structure as one, whose leaves have a first axis of lanes."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *lanes)


def take_lane(tree: Any, lane: jax.Array | int) -> Any:
    """One lane of a stacked tree."""
    return jax.tree.map(lambda x: x[lane], tree)


def split_lanes(rows: Any, num_lanes: int) -> Any:
    """Rows of all lanes, lane after lane, [N B, ...] a leaf, as [N, B, ...]."""
    return jax.tree.map(lambda x: x.reshape(num_lanes, -1, *x.shape[1:]), rows)


def stack_frozen(lanes: Sequence[FrozenParams]) -> tuple[FrozenParams, FrozenParams]:
    """Frozen parameters of N lanes: (each leaf once, where all lanes have the same numbers, else
    stacked; 0 for a leaf that is stacked, None for one that is shared).

    Raises:
        ValueError: their trees differ in structure, or the shapes of leaves do.
    """
    first = jax.tree.map(jnp.shape, lanes[0])
    for number, lane in enumerate(lanes):
        if jax.tree.map(jnp.shape, lane) != first:
            raise ValueError(f"lane {number} has frozen parameters of other shapes than lane 0")

    def same(*leaves):
        return all(x is leaves[0] or bool((x == leaves[0]).all()) for x in leaves[1:])

    shared = jax.tree.map(same, *lanes)
    frozen = jax.tree.map(lambda s, *xs: xs[0] if s else jnp.stack(xs), shared, *lanes)
    return frozen, jax.tree.map(lambda s: None if s else 0, shared)


def over_lanes(function: Callable, axes: LaneAxes, *in_axes: int | None) -> Callable:
    """`jax.vmap` of `function(*args, frozen=...)`, with the axes of its positional arguments; of
    `axes.at_once` lanes, where not all are computed at once."""

    def call(frozen, *args):
        return function(*args, frozen=frozen)

    all_axes = (axes.frozen, *in_axes)
    mapped = jax.vmap(call, all_axes, spmd_axis_name=axes.mesh_axis)
    if axes.at_once is not None:
        mapped = in_turns(call if axes.at_once == 1 else mapped, all_axes, axes.at_once)
    return lambda *args, frozen: mapped(frozen, *args)


def in_turns(function: Callable, in_axes: tuple, at_once: int) -> Callable:
    """A function of `at_once` lanes, of one without an axis of lanes, as a function of N lanes.

    A turn has a lane of each device, where the lanes are sharded over so many devices.

    Raises:
        ValueError: when it is called, at_once does not divide N.
    """

    def mapped(*args):
        is_stacked: list[bool] = []

        def note(axis, part):
            is_stacked.extend([axis is not None] * len(jax.tree.leaves(part)))

        jax.tree.map(note, in_axes, args, is_leaf=lambda axis: axis is None)
        leaves, structure = jax.tree.flatten(args)

        def turn(stacked):
            stacked = iter(stacked)
            pairs = zip(leaves, is_stacked, strict=True)
            own = [next(stacked) if stacks else x for x, stacks in pairs]
            return function(*jax.tree.unflatten(structure, own))

        def split(x):  # [N, ...] -> [turns, at_once, ...]
            return x.reshape(at_once, -1, *x.shape[1:]).swapaxes(0, 1)

        def merge(x):
            return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

        own = [x for x, stacks in zip(leaves, is_stacked, strict=True) if stacks]
        assert_divides(len(own[0]), "lanes", at_once=at_once)
        if at_once == 1:
            return jax.lax.map(turn, own)
        return jax.tree.map(merge, jax.lax.map(turn, jax.tree.map(split, own)))

    return mapped


def sweep_iteration(
    states: PPOState,
    hyperparameters: Hyperparameters,
    prompts: Prompts,
    key: jax.Array,
    *,
    frozen: FrozenParams,
    networks: PPONetworks,
    options: PPOOptions,
    axes: LaneAxes,
) -> tuple[PPOState, dict[str, jax.Array]]:
    """`ppo_iteration` of N lanes.

    Args:
        states: stacked, see `stack_lanes`.
        hyperparameters: stacked.
        prompts: [N, B, P] of each lane, or [B, P] of all.
        key: [N], or [] of all; consumed.
        frozen: see `stack_frozen`.
        networks: of all lanes.
        options: of all lanes.
        axes: which of these are stacked.

    Returns:
        (states, metrics [N]). Each lane is what `ppo_iteration` gives for it alone.
    """
    iterate = functools.partial(ppo_iteration, networks=networks, options=options)
    mapped = over_lanes(iterate, axes, 0, 0, axes.inputs, axes.inputs)
    return mapped(states, hyperparameters, prompts, key, frozen=frozen)


def sweep_responses(
    states: PPOState,
    hyperparameters: Hyperparameters,
    prompts: Prompts,
    key: jax.Array,
    *,
    frozen: FrozenParams,
    networks: PPONetworks,
    options: PPOOptions,
    axes: LaneAxes,
    sample: Callable[..., Rollout] = sample_responses,
) -> Rollout:
    """`sample_responses` of N lanes: a rollout of N B responses, lane after lane.

    So one call of a reward function scores them all. Arguments as for `sweep_iteration`; `sample`
    may be `greedy_responses` or `reference_responses`.
    """
    sample = functools.partial(sample, networks=networks, options=options)
    mapped = over_lanes(sample, axes, 0, 0, axes.inputs, axes.inputs)
    rollouts = mapped(states, hyperparameters, prompts, key, frozen=frozen)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rollouts)


def sweep_scores(
    rollout: Rollout,
    *,
    frozen: FrozenParams,
    networks: PPONetworks,
    axes: LaneAxes,
    num_lanes: int,
    eos_id: int | None = None,
) -> jax.Array:
    """`response_scores` of what `sweep_responses` gave, [N B] float32."""
    score = functools.partial(response_scores, networks=networks, eos_id=eos_id)
    scores = over_lanes(score, axes, 0)(split_lanes(rollout, num_lanes), frozen=frozen)
    return scores.reshape(-1)


def sweep_update(
    states: PPOState,
    hyperparameters: Hyperparameters,
    rollout: Rollout,
    scores: jax.Array,
    key: jax.Array,
    greedy: tuple[Rollout, jax.Array] | None = None,
    references: tuple[Rollout, jax.Array] | None = None,
    *,
    frozen: FrozenParams,
    networks: PPONetworks,
    options: PPOOptions,
    axes: LaneAxes,
) -> tuple[PPOState, dict[str, jax.Array]]:
    """`update_from_rollout` of N lanes, from what `sweep_responses` gave and its scores [N B] or
    [N B, T]; `greedy` is the same of greedy responses, `references` of those of the reference;
    other arguments as for `sweep_iteration`."""
    given = (rollout, scores, greedy, references)
    rollouts, scores, *others = split_lanes(given, len(states.step))
    update = functools.partial(update_from_rollout, networks=networks, options=options)
    mapped = over_lanes(update, axes, 0, 0, 0, 0, axes.inputs, 0, 0)
    return mapped(states, hyperparameters, rollouts, scores, key, *others, frozen=frozen)
