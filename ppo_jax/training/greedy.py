"""Greedy responses that are scored between two programs, see `training.ppo.make_iteration`."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ppo_jax.algorithms.options import PPOOptions
from ppo_jax.core.named import reads_greedy
from ppo_jax.core.types import Rollout


def make_greedy(
    options: PPOOptions,
    sample: Callable[..., Rollout],
    score: Callable[[np.ndarray, Rollout], tuple[jax.Array, dict[str, np.ndarray]]],
) -> Callable[..., tuple[Rollout, jax.Array] | None]:
    """(the prompt of each sampled response [B], arguments of the sampling) -> (the greedy response
    to each prompt, their scores); None where the estimator needs none.

    Args:
        options: of the iteration.
        sample: samples greedy responses; compiled at the first call.
        score: what scores those of the sampling, too. Their other metrics are not kept.
    """

    def greedy(chosen: np.ndarray, *inputs: Any, **frozen: Any):
        if not reads_greedy(options.advantage):
            return None
        responses = sample(*inputs, **frozen)
        scores, _ = score(chosen[:: options.sampling.samples_per_prompt], responses)
        return responses, scores

    return greedy
