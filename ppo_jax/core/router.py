"""What the routers of a mixture of experts do: how evenly they choose, and the loss for it.

Dimension key: M layers with experts, E experts, k experts of a token.
"""

import chex
import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass(kw_only=True)
class RouterStatistics:
    """Sums over the real tokens of a call. Those of two calls add up, field by field."""

    tokens: jax.Array  # [M] float32, how many there are; fewer in a layer that skips some
    chosen: jax.Array  # [M, E] float32, tokens that have an expert
    probs: jax.Array  # [M, E] float32, their router's probabilities
    entropy: jax.Array  # [M] float32, of these, in nats
    compared: jax.Array  # [M] float32, choices of another pass that these are compared with, and
    changed: jax.Array  # [M] float32, those among them that the token has not made again


def router_statistics(
    logits: jax.Array, chosen: jax.Array, mask: jax.Array, before: jax.Array | None = None
) -> RouterStatistics:
    """The statistics of one layer, without the axis M.

    Args:
        logits: [..., E] float, of the router.
        chosen: [..., k] int, the experts that each token has.
        mask: [...] bool, True on real tokens; what the others hold elsewhere has no effect.
        before: [..., k] int, the experts that each token had in another pass, in any order. What is
            E or more is none, and is not compared. None compares nothing.

    Returns:
        The sums, whose gradient is that of `probs` and `entropy`.
    """
    chex.assert_equal_shape_prefix([logits, chosen, mask], mask.ndim)
    chex.assert_type([logits, chosen, mask], [float, int, bool])
    real, every = mask[..., None], tuple(range(mask.ndim))
    logits = jnp.where(real, logits.astype(jnp.float32), 0.0)
    probs = jnp.where(real, jax.nn.softmax(logits), 0.0)
    has = jax.nn.one_hot(jnp.where(real, chosen, -1), logits.shape[-1])  # of -1 all 0
    compared = changed = jnp.float32(0.0)
    if before is not None:
        again = (before[..., None].astype(chosen.dtype) == chosen[..., None, :]).any(-1)
        counts = real & (before < logits.shape[-1])
        compared, changed = (x.sum(dtype=jnp.float32) for x in (counts, counts & ~again))
    return RouterStatistics(
        tokens=mask.sum(dtype=jnp.float32),
        chosen=has.sum((*every, -2)),
        probs=probs.sum(every),
        entropy=-(probs * jax.nn.log_softmax(logits)).sum(),
        compared=compared,
        changed=changed,
    )


def load_balancing_loss(statistics: RouterStatistics) -> jax.Array:
    """How unevenly tokens choose experts: k where each expert has as many, up to E where all tokens
    are sure of the same one.

    L = E Σ_e f_e P_e, with f_e the share of tokens that have expert e and P_e the mean of its
    probability, both over the tokens of all layers together. The gradient is that of P alone.

    Args:
        statistics: of M layers.

    Returns:
        [] float32; 0 of no token.

    Reference: Fedus et al. 2021, https://arxiv.org/abs/2101.03961, eq. 4 to 6; of k experts, and
    over all layers, as transformers has it.

    >>> chosen, probs = jnp.array([[3.0, 1.0]]), jnp.array([[2.0, 2.0]])
    >>> others = dict.fromkeys(("entropy", "compared", "changed"), jnp.zeros(1))
    >>> tokens = jnp.array([4.0])
    >>> statistics = RouterStatistics(tokens=tokens, chosen=chosen, probs=probs, **others)
    >>> load_balancing_loss(statistics).item()
    1.0
    """
    s = statistics
    chex.assert_rank([s.tokens, s.chosen, s.probs], [1, 2, 2])
    total = jnp.maximum(s.tokens.sum(), 1.0)
    shares = jax.lax.stop_gradient(s.chosen).sum(0) / total
    return s.chosen.shape[-1] * (shares * s.probs.sum(0) / total).sum()


def router_metrics(statistics: RouterStatistics) -> dict[str, jax.Array]:
    """`load_balancing_loss`; the share of a layer's tokens that its busiest expert has, the
    greatest of all layers (an even load is k / E); the mean entropy; and the share of choices that
    differ from those compared with.

    Returns:
        policy/router_loss, policy/router_load_max, policy/router_entropy, policy/router_mismatch,
        without gradients.
    """
    s = jax.lax.stop_gradient(statistics)
    tokens = jnp.maximum(s.tokens, 1.0)
    return {
        "policy/router_loss": load_balancing_loss(s),
        "policy/router_load_max": (s.chosen / tokens[:, None]).max(),
        "policy/router_entropy": s.entropy.sum() / jnp.maximum(s.tokens.sum(), 1.0),
        "policy/router_mismatch": s.changed.sum() / jnp.maximum(s.compared.sum(), 1.0),
    }
