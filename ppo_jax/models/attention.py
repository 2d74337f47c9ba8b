"""Attention masks, positions, the KV cache and dot-product attention.

Dimension key: B sequences, L positions, S new positions, C cache slots, H heads, G key/value heads,
R = H / G queries per key, N = R S, K head size; F prompts of P positions that are admitted to a
cache.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from ppo_jax.core.shared_prompts import SharedPrompt
from ppo_jax.models.long_rows import (
    FLOOR,
    LONG,
    CausalRows,
    GivenPairs,
    attend_in_blocks,
    by_group,
    by_position,
    scaled_scores,
    slope_of_cap,
)

CACHE_BLOCK = 128  # slots
MAX_CACHE_BLOCKS = 4  # each is one more branch to compile


class KVCache(struct.PyTreeNode):
    """Keys and values of the positions seen so far: a ring of C slots for each sequence.

    `layers` is one (keys, values) pair of [B, G, C, K] a layer, or one pair with a leading layer
    axis when layers are scanned. A CPU reads this order of axes in place; with C before G it copies
    the whole cache for every token. `mask` is False on slots that are empty or hold padding.

    A layer with a window of W < C has a ring of W slots, unless layers are scanned: position p is
    in slot p mod W. Its mask is that of the last W positions.
    """

    layers: Any
    mask: jax.Array  # [B, C] bool
    index: jax.Array  # [] int32, positions seen; the next is written to slot `index` mod C


class AttentionFn(struct.PyTreeNode):
    """One implementation of attention, with its mask in the form that it takes."""

    mask: Any
    # (q, k, v, mask, [cap]) -> output
    fn: Callable[..., jax.Array] = struct.field(pytree_node=False)
    score_cap: float = struct.field(pytree_node=False, default=0.0)  # see `scaled_scores`

    def __call__(self, q_BSHK, k_BGCK, v_BGCK) -> jax.Array:
        """[B, S, H, K]."""
        cap = (self.score_cap,) if self.score_cap else ()  # fused kernels have none
        return self.fn(q_BSHK, k_BGCK, v_BGCK, self.mask, *cap)

    @property
    def takes_some_queries(self) -> bool:
        """Whether the keys may be those of more positions than the queries."""
        return self.fn in (attend, attend_cached, attend_in_blocks)

    def of(self, queries: "Outputs") -> "AttentionFn":
        """The attention of some queries alone; of all where it takes no fewer."""
        if queries.are_all:
            return self
        if self.fn is attend:
            return self.replace(mask=queries.take(self.mask))
        if self.fn is attend_in_blocks:
            return self.replace(mask=self.mask.of(queries.first, queries.positions))
        allowed_BSC, filled = self.mask
        return self.replace(mask=(queries.take(allowed_BSC), filled))


class Outputs(struct.PyTreeNode):
    """The positions of a call whose outputs are read: those from `first` on, or `positions`; of
    joined rows those of rows apart."""

    positions: jax.Array | None = None  # [B, T] int
    mask: jax.Array | None = None  # [B, T] bool, those of them that are used; None is all
    first: int = struct.field(pytree_node=False, default=0)
    shared: SharedPrompt | None = struct.field(pytree_node=False, default=None)

    @property
    def are_all(self) -> bool:
        return self.positions is None and self.first == 0 and self.shared is None

    def are_real(self, mask_BL: jax.Array) -> jax.Array:
        """[B, T] bool, the outputs that are used and not of padding."""
        mask_BT = self.take(mask_BL)
        return mask_BT if self.mask is None else mask_BT & self.mask

    def take(self, x: jax.Array) -> jax.Array:
        """[B, L, ...] -> [B, T, ...]."""
        if self.shared is not None and self.positions is not None:
            return self.shared.take(x, self.positions)
        if self.shared is not None:
            return self.shared.split(x, self.first)
        if self.positions is None:
            return x[:, self.first :]
        index = self.positions.reshape(*self.positions.shape, *(1,) * (x.ndim - 2))
        return jnp.take_along_axis(x, index, axis=1)


def text_positions(mask_BL, segments_BL, shared: SharedPrompt | None = None) -> jax.Array:
    """[B, L] int32: the number of real positions of its text before each; arbitrary in padding.

    A new text begins wherever `segments` changes; None means one text per row. In joined rows each
    response goes on where the prompt ends.
    """
    if shared is not None:
        return shared.join(text_positions(shared.split(mask_BL), None))
    seen_BL = jnp.cumsum(mask_BL, axis=1, dtype=jnp.int32)
    if segments_BL is None:
        return jnp.maximum(seen_BL - 1, 0)
    index_BL = jnp.where(mask_BL, jnp.arange(mask_BL.shape[1], dtype=jnp.int32)[None], -1)
    last_BL = jnp.pad(
        jax.lax.cummax(index_BL, axis=1)[:, :-1], ((0, 0), (1, 0)), constant_values=-1
    )
    last_segment_BL = jnp.take_along_axis(segments_BL, jnp.maximum(last_BL, 0), axis=1)
    begins_BL = mask_BL & ((last_BL < 0) | (segments_BL != last_segment_BL))
    before_BL = jax.lax.cummax(jnp.where(begins_BL, seen_BL - 1, 0), axis=1)
    return jnp.maximum(seen_BL - 1 - before_BL, 0)


def causal_mask(mask_BL, segments_BL, window: int = 0) -> jax.Array:
    """[B, L, L] bool: each position attends to itself and to earlier real positions, with
    `segments` only to those of its own segment, with a `window` only to so many places."""
    length = mask_BL.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    if window:
        causal &= ~jnp.tril(causal, -window)
    allowed_BLL = causal[None] & mask_BL[:, None]
    if segments_BL is not None:
        allowed_BLL &= segments_BL[:, :, None] == segments_BL[:, None]
    return allowed_BLL


def plain_attention(
    mask: jax.Array, segments: jax.Array | None, window: int = 0, score_cap: float = 0.0
) -> AttentionFn:
    """Causal attention of rows by products that any platform has; arguments as `causal_mask`."""
    window = window if window < mask.shape[1] else 0
    if mask.shape[1] < LONG:
        return AttentionFn(causal_mask(mask, segments, window), attend, score_cap)
    return AttentionFn(CausalRows(mask, segments, window=window), attend_in_blocks, score_cap)


def cache_mask(mask_BS, cache: KVCache):
    """([B, S, C] bool, the slots that each new position attends to; [S, C] int32, how many places
    before it they are; the cache with its mask)."""
    length, capacity = mask_BS.shape[1], cache.mask.shape[1]
    begin = cache.index % capacity
    mask_BC = jax.lax.dynamic_update_slice_in_dim(cache.mask, mask_BS, begin, axis=1)
    # New positions fill the slots from `begin` on; all other slots are older.
    order_C = (jnp.arange(capacity, dtype=jnp.int32) - begin) % capacity
    new_S = jnp.arange(length, dtype=jnp.int32)
    causal_SC = (order_C[None] <= new_S[:, None]) | (order_C[None] >= length)
    age_SC = (new_S[:, None] - order_C[None]) % capacity
    return causal_SC[None] & mask_BC[:, None], age_SC, cache.replace(mask=mask_BC)


def ring_mask(cache: KVCache, index: jax.Array, num_slots: int) -> jax.Array:
    """[B, W] bool, which of the last W of `index` positions are real, in their order."""
    capacity = cache.mask.shape[1]
    return take_slots(cache.mask, index - num_slots, num_slots, capacity, axis=1)


def take_slots(x: jax.Array, start: jax.Array, count: int, capacity: int, axis: int) -> jax.Array:
    """So many slots of a ring from one on, in their order."""
    slots = (start + jnp.arange(count, dtype=jnp.int32)) % capacity
    return x.at[(slice(None),) * axis + (slots,)].get(mode="promise_in_bounds")


class NextSlots(struct.PyTreeNode):
    """Writes keys and values of new positions into a cache, `slot` and those that follow."""

    slot: jax.Array  # [] int32

    def __call__(self, cache, new_BGSK, layer):
        return update_cache(cache, new_BGSK, self.slot, layer)


class LastSlots(struct.PyTreeNode):
    """Keeps the last of what is in a layer's own ring and of new positions, which may be more than
    it has slots."""

    index: jax.Array  # [] int32, positions seen before

    def __call__(self, cache, new_BGSK, layer):
        """(cache, (keys, values) of the positions in it and the new ones, [B, G, W + S, K])."""
        num_slots, num_new = cache[0].shape[2], new_BGSK[0].shape[2]

        def both(old, new):
            old = take_slots(old, self.index, num_slots, num_slots, axis=2)
            return jnp.concatenate([old, new.astype(old.dtype)], axis=2)

        def kept(all_BGCK):
            last = all_BGCK[:, :, num_new:]
            return take_slots(last, -(self.index + num_new), num_slots, num_slots, axis=2)

        all_of = tuple(both(old, new) for old, new in zip(cache, new_BGSK, strict=True))
        return tuple(kept(x) for x in all_of), all_of


def update_cache(cache, new_BGSK, slot, layer):
    """Write (keys, values) of S new positions from `slot` on; they do not wrap around the ring.

    `cache` is (keys, values) of one layer, [B, G, C, K], or of all N, [N, B, G, C, K]; then `layer`
    is its index, else None. Returns (the cache, (keys, values) of the layer [B, G, C, K]).
    """
    start = (0, 0, slot, 0) if layer is None else (layer, 0, 0, slot, 0)
    start = tuple(jnp.int32(x) for x in start)  # of one dtype, also where numbers are 64 bits wide

    def write(old, new):
        new = new.astype(old.dtype).reshape((1,) * (old.ndim - 4) + new.shape)
        return jax.lax.dynamic_update_slice(old, new, start)

    cache = tuple(write(old, new) for old, new in zip(cache, new_BGSK, strict=True))
    if layer is None:
        return cache, cache
    return cache, tuple(jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in cache)


def refill_cache(cache: KVCache, fresh: KVCache, source_B: jax.Array) -> KVCache:
    """Restart sequences of a cache with freshly prefilled prompts.

    Args:
        cache: of B sequences.
        fresh: of F prompts of P positions, in a cache for as many, P <= C.
        source_B: [B] int32, the prompt that each sequence restarts with; -1 leaves it as it is.

    Returns:
        The cache. The prompts take the P slots before the next one; all of them count as filled.
    """
    length, capacity = fresh.mask.shape[1], cache.mask.shape[1]
    index = jnp.maximum(cache.index, length)
    restarts_B, source_B = source_B >= 0, jnp.maximum(source_B, 0)

    def slots_of(capacity, of_prompt):
        """([C], whether a slot is of the prompt; [C], which of its so many slots is read.)"""
        slot_C = jnp.arange(capacity, dtype=jnp.int32)
        position_C = (slot_C - index) % capacity - (capacity - length)
        is_prompt_C, position_C = position_C >= 0, jnp.maximum(position_C, 0)
        return is_prompt_C, position_C if of_prompt == length else position_C % of_prompt

    def refill(old_BGCK, new_FGPK):
        is_prompt_C, slot_C = slots_of(old_BGCK.shape[2], new_FGPK.shape[2])
        new_BGCK = new_FGPK[source_B][:, :, slot_C]
        where_BC = restarts_B[:, None] & is_prompt_C[None]
        return jnp.where(where_BC[:, None, :, None], new_BGCK.astype(old_BGCK.dtype), old_BGCK)

    stacked = jax.tree.leaves(cache.layers)[0].ndim == 5
    layers = jax.tree.map(jax.vmap(refill) if stacked else refill, cache.layers, fresh.layers)
    is_prompt_C, slot_C = slots_of(capacity, length)
    mask_BC = fresh.mask[source_B][:, slot_C] & is_prompt_C[None]
    mask_BC = jnp.where(restarts_B[:, None], mask_BC, cache.mask)
    return cache.replace(layers=layers, mask=mask_BC, index=index)


def map_cache_rows(function: Callable[[jax.Array], jax.Array], cache: KVCache) -> KVCache:
    """A cache of other sequences: function(x) of each array [B, ...]."""
    stacked = jax.tree.leaves(cache.layers)[0].ndim == 5
    layers = jax.tree.map(jax.vmap(function) if stacked else function, cache.layers)
    return cache.replace(layers=layers, mask=function(cache.mask))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(q_BSHK, k_BGCK, v_BGCK, allowed_BSC, score_cap=0.0) -> jax.Array:
    """Softmax attention in float32, [B, S, H, K], grouped queries without repeating keys.

    With p = softmax(q k' / √K) and o = p v, the gradient of the scores is p (do v' - Σ_K do o): the
    sum that a softmax needs is one over K numbers of the output, not over C. Scores may be
    capped, see `scaled_scores`. Reverse mode only: `jax.jvp` is refused.
    """
    return _attend_forward(q_BSHK, k_BGCK, v_BGCK, allowed_BSC, score_cap)[0]


def _attend_forward(q_BSHK, k_BGCK, v_BGCK, allowed_BSC, score_cap):
    B, S, H, _ = q_BSHK.shape
    G, C = k_BGCK.shape[1:3]
    q_BGNK = by_group(q_BSHK, G)
    scores_BGRSC = scaled_scores(q_BGNK, k_BGCK, score_cap).reshape(B, G, H // G, S, C)
    scores_BGRSC = jnp.where(allowed_BSC[:, None, None], scores_BGRSC, FLOOR)
    probs_BGNC = jax.nn.softmax(scores_BGRSC, axis=-1).astype(v_BGCK.dtype).reshape(B, G, -1, C)
    output_BGNK = jnp.einsum("BGNC,BGCK->BGNK", probs_BGNC, v_BGCK)
    saved = q_BGNK, k_BGCK, v_BGCK, allowed_BSC, probs_BGNC, output_BGNK
    return by_position(output_BGNK, S), saved


def _attend_backward(score_cap, saved, g_BSHK):
    q_BGNK, k_BGCK, v_BGCK, allowed_BSC, probs_BGNC, output_BGNK = saved
    B, G, N, C = probs_BGNC.shape
    S, K = g_BSHK.shape[1], g_BSHK.shape[3]
    g_BGNK = by_group(g_BSHK, k_BGCK.shape[1])
    mean_BGN = jnp.sum(g_BGNK.astype(jnp.float32) * output_BGNK.astype(jnp.float32), axis=-1)
    of_probs = jnp.einsum("BGNK,BGCK->BGNC", g_BGNK, v_BGCK, preferred_element_type=jnp.float32)
    of_scores = probs_BGNC.astype(jnp.float32) * (of_probs - mean_BGN[..., None]) / math.sqrt(K)
    if score_cap:
        of_scores *= slope_of_cap(scaled_scores(q_BGNK, k_BGCK, score_cap), score_cap)
    # A query without any key gives an average, whatever its scores are.
    of_scores = jnp.where(allowed_BSC[:, None, None], of_scores.reshape(B, G, N // S, S, C), 0.0)
    of_scores = of_scores.astype(q_BGNK.dtype).reshape(B, G, N, C)
    of_q = jnp.einsum("BGNC,BGCK->BGNK", of_scores, k_BGCK)
    of_k = jnp.einsum("BGNC,BGNK->BGCK", of_scores, q_BGNK)
    of_v = jnp.einsum("BGNC,BGNK->BGCK", probs_BGNC, g_BGNK)
    return by_position(of_q, S), of_k, of_v, None


attend.defvjp(_attend_forward, _attend_backward)


def attend_cached(q_BSHK, k_BGCK, v_BGCK, mask, score_cap=0.0) -> jax.Array:
    """`attend` over a cache; `mask` is (allowed [B, S, C], the number of filled slots, the first).

    Accelerators read only blocks with filled slots: decoding is bound by memory bandwidth, and
    there a slice is fused into the product. A CPU copies a slice first and is faster reading all.
    """
    args = q_BSHK, k_BGCK, v_BGCK, *mask
    return jax.lax.platform_dependent(
        *args,
        cpu=lambda *args: attend_any(*args[:-1], score_cap),
        default=functools.partial(attend_blocks, score_cap=score_cap),
    )


def attend_any(q_BSHK, k_BGCK, v_BGCK, allowed_BSC, score_cap=0.0) -> jax.Array:
    """`attend`, many queries block by block."""
    if q_BSHK.shape[1] < LONG:
        return attend(q_BSHK, k_BGCK, v_BGCK, allowed_BSC, score_cap)
    return attend_in_blocks(q_BSHK, k_BGCK, v_BGCK, GivenPairs(allowed_BSC), score_cap)


def attend_blocks(q_BSHK, k_BGCK, v_BGCK, allowed_BSC, filled, *, score_cap=0.0) -> jax.Array:
    """`attend` over the fewest whole blocks of slots that hold the first `filled`."""
    capacity = k_BGCK.shape[2]
    block = CACHE_BLOCK * -(-capacity // (CACHE_BLOCK * MAX_CACHE_BLOCKS))

    def upto(end):
        def attend_some(q, k, v, allowed):
            keys = k[:, :, :end], v[:, :, :end]
            return attend_any(q, *keys, allowed[:, :, :end], score_cap)

        return attend_some

    branches = [upto(min(end, capacity)) for end in range(block, capacity + block, block)]
    return jax.lax.switch((filled - 1) // block, branches, q_BSHK, k_BGCK, v_BGCK, allowed_BSC)
