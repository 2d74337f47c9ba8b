"""Attention as functions of arrays: who sees whom, where a token stands, what it takes from others.

Dimension key: B sequences, L positions, S new positions, C cache slots, H heads, G key/value heads,
R = H / G queries per key, K head size; F prompts of P positions that enter a cache.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from ppo_jax.models.config import ModelConfig

BLOCK, MOST_BLOCKS = 128, 4  # slots; of a cache. Each block more is a branch more to compile


class KVCache(struct.PyTreeNode):
    """Keys and values of the positions seen so far: a ring of C slots for each sequence.

    `layers` is one (keys, values) pair of [B, G, C, K] a layer, or one pair with a leading layer
    axis when layers are scanned. A CPU reads this order of axes as it lies; with C before G it
    copies the whole cache for every token. `mask` is False on slots that hold nothing, or padding.
    """

    layers: Any
    mask: jax.Array  # [B, C] bool
    index: jax.Array  # [] int32, positions seen: the next one takes slot `index` mod C


class Sight(struct.PyTreeNode):
    """Who sees whom, in the form that is wanted by what computes attention."""

    arrays: Any
    mix: Callable[..., jax.Array] = struct.field(pytree_node=False)  # (q, k, v, arrays) -> mixed


def text_positions(mask_BL, segments_BL) -> jax.Array:
    """[B, L] int32: how many real positions of its text stand before each; any number in padding.

    A text is what lies between two changes of `segments`, which is None where a row is one text.
    """
    seen_BL = jnp.cumsum(mask_BL, axis=1, dtype=jnp.int32)
    if segments_BL is None:
        return jnp.maximum(seen_BL - 1, 0)
    index_BL = jnp.where(mask_BL, jnp.arange(mask_BL.shape[1])[None], -1)
    last_BL = jnp.pad(
        jax.lax.cummax(index_BL, axis=1)[:, :-1], ((0, 0), (1, 0)), constant_values=-1
    )
    last_segment_BL = jnp.take_along_axis(segments_BL, jnp.maximum(last_BL, 0), axis=1)
    begins_BL = mask_BL & ((last_BL < 0) | (segments_BL != last_segment_BL))
    before_BL = jax.lax.cummax(jnp.where(begins_BL, seen_BL - 1, 0), axis=1)
    return jnp.maximum(seen_BL - 1 - before_BL, 0)


def visible(mask_BL, segments_BL) -> jax.Array:
    """[B, L, L] bool: each position may attend to itself and to what stands before it, if it is
    real and, where there are segments, of the same one."""
    length = mask_BL.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    allowed_BLL = causal[None] & mask_BL[:, None]
    if segments_BL is not None:
        allowed_BLL &= segments_BL[:, :, None] == segments_BL[:, None]
    return allowed_BLL


def cache_mask(mask_BS, cache: KVCache):
    """([B, S, C] bool, which slots each new position may attend to; the cache with its mask)."""
    length, capacity = mask_BS.shape[1], cache.mask.shape[1]
    begin = cache.index % capacity
    mask_BC = jax.lax.dynamic_update_slice_in_dim(cache.mask, mask_BS, begin, axis=1)
    # The new positions take slots 0, 1, ... from `begin` on; all others came before.
    order_C = (jnp.arange(capacity) - begin) % capacity
    causal_SC = (order_C[None] <= jnp.arange(length)[:, None]) | (order_C[None] >= length)
    return causal_SC[None] & mask_BC[:, None], cache.replace(mask=mask_BC)


def update_cache(cache, new_BGSK, slot, layer):
    """Keys and values of S new positions in their slots, which do not pass the ring's end.

    Args:
        cache: (keys, values), of one layer [B, G, C, K], or of all [N, B, G, C, K].
        new_BGSK: (keys, values).
        slot: [] int32, of the first.
        layer: None, or [] int32, the one of N.

    Returns:
        (the cache, (keys, values) of the layer [B, G, C, K]).
    """
    start = (0, 0, slot, 0) if layer is None else (layer, 0, 0, slot, 0)

    def put(old, new):
        new = new.astype(old.dtype).reshape((1,) * (old.ndim - 4) + new.shape)
        return jax.lax.dynamic_update_slice(old, new, start)

    cache = tuple(put(old, new) for old, new in zip(cache, new_BGSK, strict=True))
    if layer is None:
        return cache, cache
    return cache, tuple(jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in cache)


def refill_cache(cache: KVCache, fresh: KVCache, source_B: jax.Array) -> KVCache:
    """Sequences of a cache begin anew with a prompt, as if it had just been seen.

    Args:
        cache: of B sequences.
        fresh: of F prompts of P positions, P slots each, P <= C.
        source_B: [B] int32, which prompt each sequence begins with; -1 leaves it as it is.

    Returns:
        The cache. The prompts lie in the P slots before the next one, all among those that count
        as filled.
    """
    length, capacity = fresh.mask.shape[1], cache.mask.shape[1]
    index = jnp.maximum(cache.index, length)
    position_C = (jnp.arange(capacity) - index) % capacity - (capacity - length)
    prompt_C, position_C = position_C >= 0, jnp.maximum(position_C, 0)
    anew_B, source_B = source_B >= 0, jnp.maximum(source_B, 0)

    def moved(old_BGCK, new_FGPK):
        new_BGCK = new_FGPK[source_B][:, :, position_C]
        where_BC = anew_B[:, None] & prompt_C[None]
        return jnp.where(where_BC[:, None, :, None], new_BGCK.astype(old_BGCK.dtype), old_BGCK)

    stacked = jax.tree.leaves(cache.layers)[0].ndim == 5
    layers = jax.tree.map(jax.vmap(moved) if stacked else moved, cache.layers, fresh.layers)
    mask_BC = fresh.mask[source_B][:, position_C] & prompt_C[None]
    mask_BC = jnp.where(anew_B[:, None], mask_BC, cache.mask)
    return cache.replace(layers=layers, mask=mask_BC, index=index)


def rotary_frequencies(config: ModelConfig) -> list[float]:
    """Radians per position of each rotated pair, [K / 2], with the scaling of Llama 3."""
    base = [config.rope_theta ** (-i / config.head_dim) for i in range(0, config.head_dim, 2)]
    if config.rope_scaling is None:
        return base
    s = config.rope_scaling

    def scaled(frequency):
        turns = s.original_max_length * frequency / (2 * math.pi)  # within the original context
        ramp = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        keep = min(max(ramp, 0.0), 1.0)
        return keep * frequency + (1 - keep) * frequency / s.factor

    return [scaled(frequency) for frequency in base]


def rotate(x_BLHK: jax.Array, positions_BL: jax.Array, config: ModelConfig) -> jax.Array:
    """Rotary position embedding, in the half-split layout of Hugging Face."""
    frequencies = jnp.asarray(rotary_frequencies(config), jnp.float32)
    angles = positions_BL[:, :, None, None] * frequencies[None, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BLHK.dtype)


def attend(q_BSHK, k_BGCK, v_BGCK, allowed_BSC) -> jax.Array:
    """Softmax attention in float32, grouped queries without repeating keys."""
    B, S, H, K = q_BSHK.shape
    G = k_BGCK.shape[1]
    q_BSGRK = q_BSHK.reshape(B, S, G, H // G, K)
    scores_BGRSC = jnp.einsum(
        "BSGRK,BGCK->BGRSC", q_BSGRK, k_BGCK, preferred_element_type=jnp.float32
    )
    # A finite floor: a padded query that may attend to nothing gives an average, not NaN.
    floor = jnp.finfo(jnp.float32).min
    scores_BGRSC = jnp.where(allowed_BSC[:, None, None], scores_BGRSC / math.sqrt(K), floor)
    probs_BGRSC = jax.nn.softmax(scores_BGRSC, axis=-1).astype(v_BGCK.dtype)
    return jnp.einsum("BGRSC,BGCK->BSGRK", probs_BGRSC, v_BGCK).reshape(B, S, H, K)


def attend_cached(q_BSHK, k_BGCK, v_BGCK, seen) -> jax.Array:
    """`attend` over a cache.

    `seen` is (who may attend to which slot, how many slots hold something: the first ones).
    Accelerators read the blocks that hold something: decoding is as fast as memory is read, and
    there a slice is part of the product. A CPU copies a slice first and reads all sooner.
    """
    args = q_BSHK, k_BGCK, v_BGCK, *seen
    return jax.lax.platform_dependent(
        *args, cpu=lambda *args: attend(*args[:-1]), default=attend_blocks
    )


def attend_blocks(q_BSHK, k_BGCK, v_BGCK, allowed_BSC, filled) -> jax.Array:
    """`attend` over as many whole blocks of slots as hold the first `filled`."""
    capacity = k_BGCK.shape[2]
    block = BLOCK * -(-capacity // (BLOCK * MOST_BLOCKS))

    def upto(end):
        return lambda q, k, v, allowed: attend(q, k[:, :, :end], v[:, :, :end], allowed[:, :, :end])

    branches = [upto(min(end, capacity)) for end in range(block, capacity + block, block)]
    chosen = (filled - 1) // block
    return jax.lax.switch(chosen, branches, q_BSHK, k_BGCK, v_BGCK, allowed_BSC)
