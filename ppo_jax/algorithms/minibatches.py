"""Rows of a minibatch: packed, or with the responses to a prompt side by side.

Dimension key: B responses.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from ppo_jax.algorithms.options import PPOOptions
from ppo_jax.algorithms.supervised import accumulate, accumulate_while
from ppo_jax.core.lanes import max_lane
from ppo_jax.core.network import Network
from ppo_jax.core.types import Experience, Params
from ppo_jax.rollout.packing import pack_rows, packed_experience


def grouped_samples(
    networks: Sequence[Network], options: PPOOptions, batch_size: int, num_minibatches: int
) -> int:
    """How many responses in a row have one prompt in every micro-batch of an update, which then
    computes it once; 1 where the shuffle parts them, they are packed, or a network shares none.

    One minibatch is the whole batch: it needs no shuffle, and its parts can be whole groups.
    """
    num_groups = whole_groups(options, batch_size, num_minibatches)
    if not num_groups:
        return 1
    samples, shares = options.learned_samples, [x.supports_shared_prompts for x in networks]
    return samples if all(f is not None and f(num_groups, samples) for f in shares) else 1


def whole_groups(options: PPOOptions, batch_size: int, num_minibatches: int) -> int:
    """The groups of responses to one prompt in a micro-batch; 0 where it parts or packs them."""
    num_groups, rest = divmod(batch_size, options.num_micro_batches * options.learned_samples)
    return 0 if num_minibatches > 1 or options.packing or rest else num_groups


def whole_batch(
    experience: Experience,
    rows: jax.Array,
    key: jax.Array | None,
    choose: Callable[[Experience, jax.Array], Experience] | None,
) -> Experience:
    """The minibatch that is all of an experience, in its order; the choice of tokens is made in
    that of `rows`, as of any minibatch."""
    if choose is None:
        return experience
    chosen = choose(jax.tree.map(lambda x: x[rows], experience), key)
    order = jnp.argsort(rows)
    return jax.tree.map(lambda x: x[order], chosen)


def accumulate_groups(
    gradient: Callable[..., tuple[Params, dict]],
    params: Params,
    minibatch: Experience,
    num_micro_batches: int,
    *,
    samples: int,
) -> tuple[Params, dict[str, jax.Array]]:
    """`accumulate` with the responses to a prompt, `samples` after another, in one micro-batch."""

    def of_groups(params, groups):
        return gradient(params, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), groups))

    groups = jax.tree.map(lambda x: x.reshape(-1, samples, *x.shape[1:]), minibatch)
    return accumulate(of_groups, params, groups, num_micro_batches)


def accumulate_packed(
    gradient: Callable[..., tuple[Params, dict]],
    params: Params,
    minibatch: Experience,
    num_micro_batches: int,
) -> tuple[Params, dict[str, jax.Array]]:
    """`accumulate` with the responses packed into as few rows as possible.

    Micro-batches have as many rows as without packing; those without a packed row are skipped.
    """
    rows, num_rows = pack_rows(minibatch.mask, minibatch.response_mask)
    size = rows.mask.shape[0] // num_micro_batches
    count = (num_rows + size - 1) // size
    trips = max_lane(count)  # those beyond its own add 0 to a lane

    def micro_batch(i):
        some = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i * size, size), rows)
        return packed_experience(minibatch, some)

    gradients, metrics = accumulate_while(gradient, params, micro_batch, trips)
    real, total = (rows.segment_ids > 0).sum(), count * size * rows.segment_ids.shape[1]
    return gradients, metrics | {"ppo/packing_efficiency": real / total}
