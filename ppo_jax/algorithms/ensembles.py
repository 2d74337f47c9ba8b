"""Several reward models, whose scores become one by a rule.

Dimension key: K models, B responses, L positions.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppo_jax.core.network import Network, last_outputs, shared_prompt
from ppo_jax.core.shaping import THRESHOLD, counts_safety, ensemble_scores, threshold_scores
from ppo_jax.core.types import Params


class RewardEnsemble(NamedTuple):
    """Reward models that read the same tokens.

    Their parameters are {"members": each leaf [K, ...]} of one network, which scores by all of them
    in one pass, or {"0": ..., "1": ...} of several networks, which score one after another.
    """

    networks: tuple[Network, ...]
    rule: str  # see `ensemble_scores`; or "threshold", of two: helpfulness, then safety
    coef: float = 1.0  # k of `ensemble_scores`
    threshold: float | None = None  # see `threshold_scores`

    @property
    def is_stacked(self) -> bool:
        """Whether one network has the parameters of all."""
        return len(self.networks) == 1


def ensemble_params(members: Sequence[Params], *, stacked: bool) -> Params:
    """The parameters of a `RewardEnsemble` of K models.

    Args:
        members: of each model; of one structure and equal shapes where they are to be stacked.
        stacked: one leaf [K, ...] for all.
    """
    if stacked:
        return {"members": jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)}
    return {str(number): params for number, params in enumerate(members)}


def member_scores(
    ensemble: RewardEnsemble,
    params: Params,
    inputs: Any,
    mask: jax.Array,
    groups: dict[str, int] | None = None,
) -> jax.Array:
    """The score of each model for each response, [K, B] float32, read at the last token.

    Args:
        ensemble: of K models.
        params: of `ensemble_params`.
        inputs: [B, L] int32 tokens.
        mask: [B, L] bool.
        groups: the numbers of `shared_prompt`; None shares none.
    """

    def score(network: Network, own: Params) -> jax.Array:
        shared = groups and shared_prompt(network, len(mask), **groups)
        return last_outputs(network, own, inputs, mask, shared)

    if ensemble.is_stacked:
        (network,) = ensemble.networks
        scores = jax.vmap(lambda own: score(network, own))(params["members"])
    else:
        every = (
            score(network, params[str(number)]) for number, network in enumerate(ensemble.networks)
        )
        scores = jnp.stack([x.astype(jnp.float32) for x in every])
    return scores.astype(jnp.float32)


def combine_scores(
    ensemble: RewardEnsemble, scores: jax.Array, is_safety: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One score of several models.

    Args:
        ensemble: its rule is read.
        scores: [K, B] float.
        is_safety: [B] bool, see `threshold_scores`; no other rule reads it.

    Returns:
        (scores [B] float32; metrics of each response, [B]: "reward/score_0", "reward/score_1", ...
        by each model, and "reward/disagreement", how far they are apart, or
        "reward/safety_fraction", 1 where the score is that of safety).

    Raises:
        ValueError: the rule is one of two models, and there are others.
    """
    metrics = {f"reward/score_{number}": row for number, row in enumerate(scores)}
    if ensemble.rule == THRESHOLD:
        if len(scores) != 2:
            raise ValueError(f"the rule {THRESHOLD!r} is one of 2 reward models, got {len(scores)}")
        helpfulness, safety = scores
        how = dict(threshold=ensemble.threshold, is_safety=is_safety)
        metrics["reward/safety_fraction"] = counts_safety(safety, **how).astype(jnp.float32)
        return threshold_scores(safety, helpfulness, **how), metrics
    mean = ensemble_scores(scores, how="mean")
    metrics["reward/disagreement"] = mean - ensemble_scores(scores, how="mean_minus_std")
    return ensemble_scores(scores, how=ensemble.rule, k=ensemble.coef), metrics
