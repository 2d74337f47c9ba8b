"""Networks as plain functions of arrays, and the parameters that they share.

Dimension key: B sequences, L positions, D model, V vocabulary."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppo_jax.core.types import Params


class Network(NamedTuple):
    """A network as functions: the first four are a policy, the others save time or memory.

    `inputs` is tokens [B, L] int32, or, for a network that starts above a frozen trunk, the hidden
    states [B, L, D] that the trunk gives. `mask` [B, L] bool is True on real positions; padding may
    stand on either side and may hold anything. Outputs are logits [B, L - start, V] for a policy,
    values [B, L - start] for a value or reward network, hidden states for a trunk: those of the
    positions from `start` on, so that nobody pays for logits of a prompt.

    - `init(key) -> params`; the key is consumed.
    - `apply(params, inputs, mask, *, start=0, segments=None, at=None) -> outputs`; see below.
    - `init_cache(batch_size, length) -> cache`
    - `decode(params, inputs, mask, cache, *, start=0) -> (outputs, cache)`: the same for new
      positions that follow those in the cache.
    - `refill(cache, fresh, source) -> cache`: sequence b of the cache begins anew with what
      `fresh`, the cache of some prompts, holds of prompt source[b], or goes on where that is -1.
      Needed where `Sampling` has fewer slots than responses, or several samples of a prompt; the
      cache must then hold a sequence of its length wherever it begins (ours is a ring).
    - `token_statistics(params, inputs, mask, tokens, temperature, *, start=0, segments=None,
      at=None) -> (logprobs, entropies)`: what `distributions.token_statistics` gives for the logits
      of `apply` and tokens [B, L - start], without holding all of the logits.
    - `packs`: True where `apply` and `token_statistics` take `segments` and `at`.

    Value and reward networks need the first two only.

    `segments` [B, L] int32 says which text of its row a position belongs to, 1, 2, ... and 0 in
    padding, where several texts share a row: positions then begin anew with each text, and no text
    sees another. `at` [B, T] int32 is then the positions that have an output, in place of `start`.
    Both are given for packed rows alone (`sft.packing`, which needs no `at`, and `ppo.packing`); a
    network that is not trained on such rows need not take them.
    """

    init: Callable[[jax.Array], Params]
    apply: Callable[..., jax.Array]
    init_cache: Callable[[int, int], Any] | None = None
    decode: Callable[..., tuple[jax.Array, Any]] | None = None
    refill: Callable[[Any, Any, jax.Array], Any] | None = None
    token_statistics: Callable[..., tuple[jax.Array, jax.Array]] | None = None
    packs: bool = False


def merge_params(*trees: Params, stacked: bool = False) -> Params:
    """The union of nested dictionaries, lower layers first.

    A leaf in several trees comes from the last; layers stacked for `scan_layers` are put one
    upon the other. `stacked` says that the trees are the inside of such a stack."""
    merged: Params = {}
    for tree in trees:
        for name, value in tree.items():
            old = merged.get(name)
            if isinstance(old, dict) and isinstance(value, dict):
                merged[name] = merge_params(old, value, stacked=stacked or name == "stack")
            elif stacked and old is not None:
                merged[name] = jnp.concatenate([old, value])
            else:
                merged[name] = value
    return merged
