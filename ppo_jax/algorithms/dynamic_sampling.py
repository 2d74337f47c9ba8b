"""Dynamic sampling (DAPO): groups of equal scores make room for those of the next prompts.

Dimension key: B responses, R rollouts of an iteration at most.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from ppo_jax.core.lanes import any_lane
from ppo_jax.core.rewards import whole_scores
from ppo_jax.core.shaping import groups_with_variance
from ppo_jax.core.types import Prompts, Rollout


@struct.dataclass(kw_only=True)
class Gathered:
    """B responses of one rollout or more: first those of groups whose scores vary."""

    rollout: Rollout  # B responses
    scores: jax.Array  # [B], or [B, T] of each token
    of_models: dict[str, jax.Array] | None = None  # [B] each, of them, see `combine_scores`
    num_kept: jax.Array  # [] int32, responses of groups whose scores vary; the others are of groups
    # of the first rollout whose scores do not
    num_rollouts: jax.Array  # [] int32, sampled so far
    share_sum: jax.Array  # [] float32, over the rollouts, of the share of groups whose scores vary
    score_sum: jax.Array  # [] float32, likewise of the mean score

    @property
    def is_full(self) -> jax.Array:
        """[] bool, whether there is nothing left to replace."""
        return self.num_kept >= self.scores.shape[0]


def gather_first(
    rollout: Rollout,
    scores: jax.Array,
    of_models: dict[str, jax.Array] | None = None,
    *,
    group_size: int,
) -> Gathered:
    """The first rollout of an iteration: groups whose scores vary come first.

    Args:
        rollout: B responses; those to one prompt follow each other.
        scores: [B] float, or [B, T] float, as they came.
        of_models: metrics of each response, [B] float; None for none.
        group_size: responses to each prompt, at least 2.

    Reference: Yu et al. 2025, https://arxiv.org/abs/2503.14476, section 3.2 (DAPO).
    """
    varies, mean = groups_of(rollout, scores, group_size)
    order = jnp.argsort(~varies, stable=True)
    given = (rollout, scores, of_models)
    rollout, scores, of_models = jax.tree.map(lambda x: x[order], given)
    return Gathered(
        rollout=rollout,
        scores=scores,
        of_models=of_models,
        num_kept=varies.sum(dtype=jnp.int32),
        num_rollouts=jnp.int32(1),
        share_sum=varies.astype(jnp.float32).mean(),
        score_sum=mean,
    )


def gather_more(
    gathered: Gathered,
    rollout: Rollout,
    scores: jax.Array,
    of_models: dict[str, jax.Array] | None = None,
    *,
    group_size: int,
) -> Gathered:
    """One rollout more: its groups whose scores vary replace those that do not, as many as there
    is room for. What is full stays as it is."""
    varies, mean = groups_of(rollout, scores, group_size)
    order, rows = jnp.argsort(~varies, stable=True), jnp.arange(len(varies), dtype=jnp.int32)
    place = rows - gathered.num_kept  # among the groups that vary of the new ones
    is_new = (place >= 0) & (place < varies.sum())
    source = order[jnp.maximum(place, 0)]

    def merge(old, new):
        return jnp.where(is_new.reshape(-1, *[1] * (old.ndim - 1)), new[source], old)

    old = (gathered.rollout, gathered.scores, gathered.of_models)
    merged, scores, of_models = jax.tree.map(merge, old, (rollout, scores, of_models))
    counts = ~gathered.is_full
    share = varies.astype(jnp.float32).mean()
    return Gathered(
        rollout=merged,
        scores=scores,
        of_models=of_models,
        num_kept=gathered.num_kept + is_new.sum(dtype=jnp.int32),
        num_rollouts=gathered.num_rollouts + counts,
        share_sum=gathered.share_sum + jnp.where(counts, share, 0.0),
        score_sum=gathered.score_sum + jnp.where(counts, mean, 0.0),
    )


def groups_of(rollout: Rollout, scores: jax.Array, group_size: int) -> tuple[jax.Array, jax.Array]:
    """(which responses are of groups whose scores vary [B], the mean score)."""
    scores = whole_scores(scores, rollout.response_mask)
    return groups_with_variance(scores, group_size=group_size), scores.mean(dtype=jnp.float32)


def gather(
    sample: Callable[[Prompts, jax.Array], tuple[Any, ...]],
    prompts: tuple[Prompts, ...],
    key: jax.Array,
    *,
    group_size: int,
) -> Gathered:
    """Rollouts until B responses are of groups whose scores vary, or there are no prompts left.

    As one program; lanes of a `jax.vmap` go on together until all of them are full.

    Args:
        sample: (prompts, key) -> (rollout, scores), or (rollout, scores, metrics of each response).
        prompts: R batches, of one shape.
        key: consumed; each rollout has its own, see `rollout_keys`.
        group_size: responses to each prompt, at least 2.
    """
    keys = rollout_keys(key, len(prompts))
    first = gather_first(*sample(prompts[0], keys[0]), group_size=group_size)
    batches = jax.tree.map(lambda *x: jnp.stack(x), *prompts)

    def goes_on(carry):
        gathered, number = carry
        return (number < len(prompts)) & any_lane(~gathered.is_full)

    def once_more(carry):
        gathered, number = carry
        given = jax.tree.map(lambda x: x[number], batches), keys[number]
        return gather_more(gathered, *sample(*given), group_size=group_size), number + 1

    return jax.lax.while_loop(goes_on, once_more, (first, jnp.int32(1)))[0]


def rollout_keys(key: jax.Array, count: int) -> jax.Array:
    """[count] keys of the rollouts of an iteration."""
    return jax.random.split(key, count)


def gathering_metrics(gathered: Gathered) -> dict[str, jax.Array]:
    """How many rollouts there were, what share of their groups varied and of the B responses is of
    such groups, the mean score of all responses that were sampled, and the means of `of_models`
    over those of the batch."""
    count = gathered.num_rollouts.astype(jnp.float32)
    return {
        "ppo/rollouts": count,
        "ppo/varied_group_fraction": gathered.share_sum / count,
        "ppo/kept_fraction": gathered.num_kept / gathered.scores.shape[0],
        "reward/sampled_score_mean": gathered.score_sum / count,
        **{name: x.mean() for name, x in (gathered.of_models or {}).items()},
    }
