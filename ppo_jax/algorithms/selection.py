"""Which responses of a rollout the update learns from.

Dimension key: B responses, K kept ones, T response tokens.
"""

import jax
import jax.numpy as jnp

from ppo_jax.core.rewards import whole_scores
from ppo_jax.core.shaping import best_and_worst
from ppo_jax.core.types import Experience


def extreme_responses(
    scores: jax.Array, mask: jax.Array, *, group_size: int, keep_samples: int
) -> jax.Array:
    """The best and the worst responses to each prompt, half of `keep_samples` of each.

    Args:
        scores: [B] float, one a response, or [B, T], of which the sum over a response counts.
        mask: [B, T] bool, True on response tokens.
        group_size: responses to each prompt; those of one prompt follow each other.
        keep_samples: of a prompt, an even number below the group size.

    Returns:
        [B] bool, True on keep_samples responses of each group, see `best_and_worst`.

    Reference: Zhang et al. 2024, https://arxiv.org/abs/2409.06957 (PF-PPO).
    """
    whole = whole_scores(scores, mask)
    return best_and_worst(whole, group_size=group_size, keep=keep_samples // 2)


def keep_responses(experience: Experience, kept: jax.Array, count: int) -> Experience:
    """The experience of some responses alone, in their order.

    Args:
        experience: of B responses.
        kept: [B] bool, True on K of them.
        count: K.

    Returns:
        That of K responses: an update of it costs no more than that of a rollout of K.
    """
    (rows,) = jnp.nonzero(kept, size=count)
    return jax.tree.map(lambda x: x[rows], experience)
