"""Responses of the reference that are scored between two programs, see `training.greedy`."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ppo_jax.algorithms.options import PPOOptions
from ppo_jax.core.types import Rollout


def make_references(
    options: PPOOptions,
    sample: Callable[..., Rollout],
    score: Callable[[np.ndarray, Rollout], tuple[jax.Array, dict[str, np.ndarray]]],
) -> Callable[..., tuple[Rollout, jax.Array] | None]:
    """(the prompt of each sampled response [B], arguments of the sampling) -> (the responses of the
    reference to each prompt, their scores); None where the options have no `reference_responses`.

    Args:
        options: of the iteration.
        sample: samples responses of the reference; compiled at the first call.
        score: what scores those of the policy, too. Their other metrics are not kept.

    Raises:
        ValueError: when it is called, the scores are those of tokens.
    """
    count = options.reference_responses

    def references(chosen: np.ndarray, *inputs: Any, **frozen: Any):
        if not count:
            return None
        responses = sample(*inputs, **frozen)
        each = chosen[:: options.sampling.samples_per_prompt].repeat(count)
        scores, _ = score(each, responses)
        if scores.ndim != 1:
            raise ValueError(
                f"ppo.reference_responses must be 0 where a function scores tokens, got {count}: "
                "only whole responses are compared with those of the reference"
            )
        return responses, scores

    return references
