"""What the layers of a model see of the positions: angles, and which attend to which. Layers of one
kind (`config.LayerKind`) have the same view.

Dimension key: B sequences, L positions, S new positions, C cache slots, H heads, G key/value heads,
K head size.
"""

import jax
import jax.numpy as jnp
from flax import struct

from ppo_jax.core.shared_prompts import SharedPrompt
from ppo_jax.models.attention import (
    AttentionFn,
    KVCache,
    LastSlots,
    NextSlots,
    Outputs,
    attend_cached,
    cache_mask,
    plain_attention,
    ring_mask,
    take_slots,
    text_positions,
)
from ppo_jax.models.axes import ShardingConstraint
from ppo_jax.models.config import LayerKind, ModelConfig
from ppo_jax.models.kernels import make_attention
from ppo_jax.models.rope import rotary_angles
from ppo_jax.models.shared_prompts import SharedPromptAttention


class View(struct.PyTreeNode):
    """What a layer sees."""

    angles: jax.Array | None  # `rotary_angles`, None without rotary positions
    attention_fn: AttentionFn | SharedPromptAttention
    write: NextSlots | LastSlots | None = None  # of keys and values, into a cache


def row_views(
    config: ModelConfig,
    constrain: ShardingConstraint,
    mask: jax.Array,
    segments: jax.Array | None,
    shared: SharedPrompt | None,
) -> tuple[jax.Array, tuple[View, ...]]:
    """(positions [B, L], a view for each of `config.kinds`) of rows; arguments as
    `kernels.make_attention`."""
    positions = text_positions(mask, segments, shared)
    length = mask.shape[1]
    if shared is not None:
        length = shared.length + shared.response_length(length)
    # Layers that differ in their angles alone share one mask.
    attention_of = {
        window: make_attention(config, constrain, mask, segments, shared, window=window)
        for window in {kind.window for kind in config.kinds}
    }
    views = (
        View(angles_of(config, kind, positions, length), attention_of[kind.window])
        for kind in config.kinds
    )
    return positions, tuple(views)


def cache_views(
    config: ModelConfig, mask_BS: jax.Array, cache: KVCache
) -> tuple[jax.Array, tuple[View, ...], KVCache]:
    """(positions [B, S], a view for each of `config.kinds`, the cache with its mask) of new
    positions that attend to those in a cache as well."""
    before, (allowed_BSC, age_SC, cache) = cache, cache_mask(mask_BS, cache)
    # A token attends to itself and all real ones before it: their count gives its position.
    positions = jnp.maximum(allowed_BSC.sum(axis=2, dtype=jnp.int32) - 1, 0)
    capacity, index = cache.mask.shape[1], cache.index + mask_BS.shape[1]

    def cached(allowed, slots):
        mask = allowed, jnp.minimum(index, slots)
        return AttentionFn(mask, attend_cached, config.score_cap), NextSlots(cache.index % slots)

    def attention(kind):
        slots = config.cache_slots(kind, capacity)
        if slots < capacity and mask_BS.shape[1] > 1:
            # Of a row of what the layer's own ring has and the new positions, these.
            row = jnp.concatenate([ring_mask(before, cache.index, slots), mask_BS], axis=1)
            rows = plain_attention(row, None, kind.window, config.score_cap)
            return rows.of(Outputs(first=slots)), LastSlots(cache.index)
        if slots < capacity:
            in_order = ring_mask(cache, index, slots)  # all of them are within the window
            return cached(take_slots(in_order, -index, slots, slots, axis=1)[:, None], slots)
        if kind.window and kind.window < capacity:
            return cached(allowed_BSC & (age_SC < kind.window)[None], slots)
        return cached(allowed_BSC, slots)

    views = (
        View(angles_of(config, kind, positions, capacity), *attention(kind))
        for kind in config.kinds
    )
    return positions, tuple(views), cache


def angles_of(
    config: ModelConfig, kind: LayerKind, positions: jax.Array, length: int
) -> jax.Array | None:
    """`rotary_angles` of the layers of a kind in rows of `length` positions."""
    c = config
    if c.positions != "rotary" or not kind.rotary:
        return None
    own = kind.rope_theta, None
    theta, scaling = own if kind.rope_theta else (c.rope_theta, c.rope_scaling)
    return rotary_angles(positions, theta, c.num_rotated, scaling, length)
