"""What an iteration samples, where the host scores it: one rollout, or several."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ppo_jax.algorithms.dynamic_sampling import (
    Gathered,
    gather_first,
    gather_more,
    gathering_metrics,
    rollout_keys,
)
from ppo_jax.algorithms.options import PPOOptions
from ppo_jax.config.ppo import PPOSettings
from ppo_jax.core.types import Prompts, Rollout
from ppo_jax.data.encode import take_prompts
from ppo_jax.data.prompts import PromptBuckets
from ppo_jax.distributed.layout import Layout


def inputs_of(
    settings: PPOSettings, buckets: PromptBuckets, rows: Prompts, layout: Layout, step: int
) -> tuple[np.ndarray, Prompts | tuple[Prompts, ...], int]:
    """(the prompt of each response [B], the prompts, their width in tokens) of an iteration.

    With `max_rollouts` R above 1: (those of R rollouts [R, B], R batches of prompts, their width).
    The batches are those with the numbers R i, .., R i + R - 1, so that what an iteration takes
    depends on its number alone; those that it does not come to are passed over.
    """
    count, each = settings.max_rollouts, settings.samples_per_prompt
    drawn = [buckets.batch(step * count + i) for i in range(count)]
    prompts = tuple(layout.shard_batch(take_prompts(rows, *batch)) for batch in drawn)
    chosen = np.stack([batch.repeat(each) for batch, _ in drawn])
    width = max(width for _, width in drawn)
    return (chosen[0], prompts[0], width) if count == 1 else (chosen, prompts, width)


def make_sampled(
    options: PPOOptions,
    sample: Callable[..., Rollout],
    score: Callable[[np.ndarray, Rollout], tuple[jax.Array, dict[str, np.ndarray]]],
    layout: Layout,
) -> Callable[..., tuple[Rollout, jax.Array, dict[str, np.ndarray], dict[str, Any]]]:
    """(chosen, prompts, key, state, hyperparameters, frozen=) -> (rollout, scores, metrics of each
    response, further arguments of `update_from_rollout`), see `inputs_of`.

    With `max_rollouts` the host samples and scores until the batch is full; all processes see the
    same count, and stop together.

    Args:
        options: of the iteration.
        sample: (state, hyperparameters, prompts, key, frozen=) -> rollout.
        score: (the prompt of each response, rollout) -> (scores, metrics of each response).
        layout: of the updates.
    """

    def once(chosen, prompts, key, *inputs, frozen):
        rollout = sample(*inputs, prompts, key, frozen=frozen)
        return rollout, *score(chosen, rollout), {}

    if options.max_rollouts == 1:
        return once
    how = dict(group_size=options.sampling.samples_per_prompt)
    rows, one = layout.batch_sharding, layout.replicated
    where = Gathered(
        rollout=rows, scores=rows, num_kept=one, num_rollouts=one, share_sum=one, score_sum=one
    )
    begin, go_on = (
        jax.jit(functools.partial(function, **how), out_shardings=where)
        for function in (gather_first, gather_more)
    )

    def several(chosen, prompts, key, *inputs, frozen):
        gathered, every = None, []
        for given in zip(chosen, prompts, rollout_keys(key, len(prompts)), strict=True):
            rollout, scores, more, _ = once(*given, *inputs, frozen=frozen)
            every.append(more)
            new = (rollout, scores)
            gathered = begin(*new) if gathered is None else go_on(gathered, *new)
            if gathered.is_full:
                break
        more = {name: np.concatenate([x[name] for x in every]) for name in every[0]}
        more |= {name: np.asarray(x)[None] for name, x in gathering_metrics(gathered).items()}
        how_many = {"num_rollouts": gathered.num_rollouts}
        return gathered.rollout, gathered.scores, more, how_many

    return several
