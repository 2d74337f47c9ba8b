"""From the scores of responses to those that PPO learns from, in one order.

1. In deviations of all scores so far, where the state has their moments; then clipped. Or, in place
   of both, against the scores of responses of the reference (PAR), which gives 0 to 1.
2. The rule for responses that were cut off.
3. Less what a response loses for its length, then for coming near its limit.

The moments see the scores as they came, so that no rule below moves the scale of a model's scores;
the limit of the clip then is one in deviations; and the numbers of rules and penalties, which come
last, are in the unit of what PPO learns from, whatever the scale of the model.

Dimension key: B responses, T response tokens; G prompts, M responses of the reference to each.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ppo_jax.core.rewards import missing_eos_scores, whole_scores
from ppo_jax.core.shaping import (
    clip_scores,
    length_penalty,
    normalize_scores,
    overlong_penalty,
    par_scores,
    update_moments,
)
from ppo_jax.core.types import Hyperparameters, PPOState, Rollout


def count_scores(state: PPOState, scores: jax.Array, mask: jax.Array) -> PPOState:
    """The state with these scores in its moments, if it has some.

    Args:
        state: of PPO.
        scores: [B] float, one a response, or [B, T], of which the sum over a response counts.
        mask: [B, T] bool, True on response tokens.
    """
    if state.score_moments is None:
        return state
    moments = update_moments(state.score_moments, whole_scores(scores, mask))
    return dataclasses.replace(state, score_moments=moments)


def scores_of_references(
    references: tuple[Rollout, jax.Array] | None,
    scores: jax.Array,
    state: PPOState,
    hyperparameters: Hyperparameters,
    *,
    num_references: int,
) -> tuple[jax.Array | None, dict[str, jax.Array]]:
    """([G, M] float32, the scores of the reference's responses to each prompt; metrics); None and
    none where there are no such responses.

    Args:
        references: G M responses of the reference, those to a prompt side by side, and their
            scores [G M] float.
        scores: [B] float, of the policy's responses.
        state: of PPO, without moments of scores.
        hyperparameters: without a limit of scores.
        num_references: M; 0 without references.

    Raises:
        ValueError: there are none where they are needed, or some where they are not; the scores are
            those of tokens; scores are to be normalized or clipped.
    """
    if (num_references > 0) != (references is not None):
        got = "some" if references else "none"
        raise ValueError(f"reference_responses is {num_references}, got {got} of the reference")
    if references is None:
        return None, {}
    responses, reference_scores = references
    if scores.ndim != 1 or reference_scores.ndim != 1:
        raise ValueError("reference_responses need scores [B] of responses, got some of tokens")
    if state.score_moments is not None or hyperparameters.score_clip is not None:
        raise ValueError("reference_responses need scores that are not normalized or clipped")
    mask = responses.response_mask
    metrics = {
        "reward/reference_score_mean": reference_scores.mean(),
        "response/reference_length": mask.sum(axis=1).astype(jnp.float32).mean(),
    }
    return reference_scores.astype(jnp.float32).reshape(-1, num_references), metrics


def shape_scores(
    scores: jax.Array,
    mask: jax.Array,
    has_eos: jax.Array,
    state: PPOState,
    hyperparameters: Hyperparameters,
    *,
    missing_eos: str,
    reference_scores: jax.Array | None = None,
) -> jax.Array:
    """Scores [B] as PPO learns from them, in the order of this module.

    Args:
        scores: [B] float.
        mask: [B, T] bool, True on response tokens; T is the limit of their length.
        has_eos: [B] bool.
        state: its moments, with these scores in them, are read.
        hyperparameters: the numbers of all of it; None is off.
        missing_eos: see `PPOOptions`.
        reference_scores: [G, M] float, see `scores_of_references`; B / G responses to each prompt
            follow each other. None compares with none.

    Returns:
        [B] float32.
    """
    numbers = hyperparameters
    if state.score_moments is not None:
        scores = normalize_scores(scores, state.score_moments)
    if numbers.score_clip is not None:
        scores = clip_scores(scores, limit=numbers.score_clip)
    if reference_scores is not None:
        group_size = len(scores) // len(reference_scores)
        scores = par_scores(scores, jnp.repeat(reference_scores, group_size, axis=0))
    scores = adjust_scores(scores, has_eos, numbers, missing_eos=missing_eos)
    if numbers.length_penalty is not None:
        free = numbers.length_penalty_free
        scores = scores + length_penalty(mask, coef=numbers.length_penalty, free_tokens=free)
    if numbers.overlong_tokens is None:
        return scores
    lengths = dict(max_length=mask.shape[1], cache_length=numbers.overlong_tokens)
    return scores + overlong_penalty(mask, **lengths)


def adjust_scores(
    scores: jax.Array, has_eos: jax.Array, hyperparameters: Hyperparameters, *, missing_eos: str
) -> jax.Array:
    """`missing_eos` applied to responses without a stop token."""
    number = hyperparameters.missing_eos_score
    match missing_eos:
        case "keep":
            return scores
        case "replace":
            return missing_eos_scores(scores, has_eos, replace=number)
        case _:
            return missing_eos_scores(scores, has_eos, penalty=number)


def moment_metrics(state: PPOState) -> dict[str, jax.Array]:
    """The mean and the deviation by which scores are normalized, if they are."""
    moments = state.score_moments
    if moments is None:
        return {}
    count = jnp.maximum(moments.count.astype(jnp.float32), 1.0)
    return {
        "reward/running_score_mean": moments.mean,
        "reward/running_score_std": jnp.sqrt(moments.m2 / count),
    }
