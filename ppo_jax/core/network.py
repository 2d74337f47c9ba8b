"""Networks as plain functions of arrays, and the parameters that they share.

Dimension key: B sequences, L positions, D model, V vocabulary."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppo_jax.core.masking import last_token_index
from ppo_jax.core.shared_prompts import SharedPrompt
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
    - `map_rows(function, cache) -> cache`: function(x) in the place of each array x of the cache
      that has a row for each sequence, its first axis. With it the last responses of a rollout
      with `max_concurrent` move into fewer rows, and cost less.
    - `num_shards(num_rows) -> int`: how many equal parts a mesh cuts so many rows into, 1 without.
    - `token_statistics(params, inputs, mask, tokens, temperature, *, first_output=0,
      segment_ids=None, output_positions=None) -> (logprobs, entropies)`: what
      `distributions.token_statistics` gives for the logits of `apply` and tokens [B, O], without
      holding all of the logits.
    - `summed_logprobs(params, inputs, mask, tokens, factors, *, segment_ids=None) -> [] float32`:
      what `distributions.summed_logprobs` gives for them and factors [B, L], likewise. A network
      with another `apply` needs its own two, or None.
    - `supports_packing`: True where `apply`, `token_statistics` and `summed_logprobs` take
      `segment_ids`, and the first two `output_positions`.
    - `supports_shared_prompts(num_prompts, samples) -> bool`: whether `apply` and
      `token_statistics` take `shared_prompt`, and it is less work for so many prompts with so many
      responses each.

    - `routed`: the same network where it has experts, else None. Its `apply`, `token_statistics`
      and `summed_logprobs` give (outputs, `RouterStatistics`). They take `chosen` [B, L, M, k] int,
      the experts of each position in each of M layers: the statistics compare with these, or, with
      `replay=True`, they are what each position has, by weights of its router; what is the number
      of experts or more is none. With `output_mask` [B, T] bool the last layer routes and counts
      these outputs alone. Its `decode` gives (outputs, cache, chosen). Training and rollout
      call it: a network with another `apply` or `decode` needs its own, or None.

    Value and reward networks need `init` and `apply` only.

    Where several texts share a row, `segment_ids` [B, L] int32 numbers the texts of a row 1, 2, ...
    and is 0 in padding: positions then start over with each text, and no text attends to another.
    `output_positions` [B, T] int32 is the positions that have an output, in place of
    `first_output`. Both are given to a network that `supports_packing` alone.

    With a `shared_prompt` inputs and mask are those of joined rows, [B / n, P + n S], where the n
    responses to a prompt follow it, see `SharedPrompt`. Outputs, and what says which, are those of
    B rows apart.
    """

    init: Callable[[jax.Array], Params]
    apply: Callable[..., jax.Array]
    init_cache: Callable[[int, int], Any] | None = None
    decode: Callable[..., tuple[jax.Array, Any]] | None = None
    refill: Callable[[Any, Any, jax.Array], Any] | None = None
    token_statistics: Callable[..., tuple[jax.Array, jax.Array]] | None = None
    summed_logprobs: Callable[..., jax.Array] | None = None
    supports_packing: bool = False
    supports_shared_prompts: Callable[[int, int], bool] | None = None
    map_rows: Callable[[Callable[[jax.Array], jax.Array], Any], Any] | None = None
    num_shards: Callable[[int], int] = lambda num_rows: 1
    routed: "Network | None" = None


def shared_prompt(
    network: Network, num_rows: int, *, prompt_length: int, samples: int
) -> SharedPrompt | None:
    """The shape of joined rows for so many responses, `samples` to each prompt; None where a prompt
    has one, or the network does not support it."""
    supports = network.supports_shared_prompts
    if samples == 1 or supports is None or not supports(num_rows // samples, samples):
        return None
    return SharedPrompt(prompt_length, samples)


def last_outputs(
    network: Network,
    params: Any,
    inputs: Any,
    mask: jax.Array,
    shared: SharedPrompt | None = None,
) -> jax.Array:
    """The outputs of a value or reward network at the last real position of each row, [B]; with
    `shared` the rows are joined on the way."""
    last = last_token_index(mask)[:, None]
    if shared is not None:
        joined = shared.join(inputs), shared.join(mask)
        where = dict(output_positions=last, shared_prompt=shared)
        return network.apply(params, *joined, **where)[:, 0]
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


def average_params(trees: Sequence[Params], weights: Sequence[float] | None = None) -> Params:
    """The weighted mean of the parameters of several networks: one network in place of them all.

    θ = Σ w_k θ_k / Σ w_k, summed in float32. It works for networks that were trained from one
    start, as reward models from one SFT model with other data or seeds: their own mean is then as
    good as the mean of their scores, at the cost of one.

    Args:
        trees: parameters of the same structure and shapes, one or more.
        weights: of each, at least 0 and not all 0; None are equal ones.

    Returns:
        The same structure, each leaf in the dtype of the first tree's.

    Raises:
        ValueError: there is no tree, they differ in structure or shapes, or the weights are others.

    Reference: Ramé et al. 2024, https://arxiv.org/abs/2401.12187 (WARM).

    >>> average_params([{"w": jnp.array([1.0])}, {"w": jnp.array([5.0])}], [3.0, 1.0])["w"].tolist()
    [2.0]
    """
    shapes = [jax.tree.map(jnp.shape, tree) for tree in trees]
    if not shapes or any(shape != shapes[0] for shape in shapes):
        got = f"{len(shapes)} that differ" if shapes else "none"
        raise ValueError(f"trees must be one or more of equal structure and shapes, got {got}")
    weights = [1.0] * len(trees) if weights is None else [float(w) for w in weights]
    if len(weights) != len(trees) or not min(weights) >= 0 or not 0 < sum(weights) < math.inf:
        raise ValueError(
            f"weights must be {len(trees)} numbers of at least 0, and not all 0, got {weights}"
        )
    shares = [w / sum(weights) for w in weights]

    def mean(*leaves: jax.Array) -> jax.Array:
        total = sum(w * jnp.asarray(x, jnp.float32) for w, x in zip(shares, leaves, strict=True))
        return jnp.asarray(total, jnp.asarray(leaves[0]).dtype)

    return jax.tree.map(mean, *trees)
