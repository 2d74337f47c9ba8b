"""Networks as plain functions of arrays, and the parameters that they share.

Dimension key: B sequences, L positions, D model, V vocabulary."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppo_jax.core.masking import last_token_index
from ppo_jax.core.types import Params


class Network(NamedTuple):
    """A network as functions: the first four are a policy, the others save time or memory.

    `inputs` is tokens [B, L] int32, or, for a network above a frozen trunk, the trunk's hidden
    states [B, L, D]. `mask` [B, L] bool is True on real positions; padding may be on either side
    and may hold anything. Outputs are logits [B, O, V] for a policy, values [B, O] for a value or
    reward network, hidden states [B, O, D] for a trunk: those of the O = L - first_output positions
    from `first_output` on, so that prompt logits are never computed.

    - `init(key) -> params`; the key is consumed.
    - `apply(params, inputs, mask, *, first_output=0, segment_ids=None, output_positions=None) ->
      outputs`; see below.
    - `init_cache(batch_size, length) -> cache`
    - `decode(params, inputs, mask, cache, *, first_output=0) -> (outputs, cache)`: the same for new
      positions that follow those in the cache.
    - `refill(cache, fresh, source) -> cache`: sequence b of the cache starts over with what
      `fresh`, the cache of some prompts, holds of prompt source[b], or continues where that is -1.
      Needed where `Sampling` has `max_concurrent` below the number of responses, or several samples
      of a prompt; the cache must then hold a sequence of its length wherever it begins (ours is a
      ring).
    - `token_statistics(params, inputs, mask, tokens, temperature, *, first_output=0,
      segment_ids=None, output_positions=None) -> (logprobs, entropies)`: what
      `distributions.token_statistics` gives for the logits of `apply` and tokens [B, O], without
      holding all of the logits.
    - `supports_packing`: True where `apply` and `token_statistics` take `segment_ids` and
      `output_positions`.

    Value and reward networks need the first two only.

    Where several texts share a row, `segment_ids` [B, L] int32 numbers the texts of a row 1, 2, ...
    and is 0 in padding: positions then start over with each text, and no text attends to another.
    `output_positions` [B, T] int32 is the positions that have an output, in place of
    `first_output`. Both are given to a network that `supports_packing` alone.
    """

    init: Callable[[jax.Array], Params]
    apply: Callable[..., jax.Array]
    init_cache: Callable[[int, int], Any] | None = None
    decode: Callable[..., tuple[jax.Array, Any]] | None = None
    refill: Callable[[Any, Any, jax.Array], Any] | None = None
    token_statistics: Callable[..., tuple[jax.Array, jax.Array]] | None = None
    supports_packing: bool = False


def last_outputs(network: Network, params: Any, inputs: Any, mask: jax.Array) -> jax.Array:
    """The outputs of a value or reward network at the last real position of each row, [B]."""
    last = last_token_index(mask)[:, None]
    if network.supports_packing:  # its last layer computes no others
        return network.apply(params, inputs, mask, output_positions=last)[:, 0]
    return jnp.take_along_axis(network.apply(params, inputs, mask), last, axis=1)[:, 0]


def merge_params(*trees: Params, stacked: bool = False) -> Params:
    """The union of nested dictionaries, lower layers first.

    A leaf in several trees comes from the last; layers stacked for `scan_layers` are concatenated.
    `stacked` says that the trees are inside such a stack."""
    merged: Params = {}
    for tree in trees:
        for name, value in tree.items():
            old = merged.get(name)
            if isinstance(old, dict) and isinstance(value, dict):
                merged[name] = merge_params(old, value, stacked=stacked or name == "stack")
            elif stacked and old is not None:
                both: list[Any] = [old, value]
                merged[name] = jnp.concatenate(both)
            else:
                merged[name] = value
    return merged
