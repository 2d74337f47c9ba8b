"""Attention as functions of arrays: who sees whom, where a token stands, what it takes from others.

Dimension key: B sequences, L positions, S new positions, C cache slots, H heads, G key/value heads,
R = H / G queries per key, K head size.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from ppo_jax.shapes import ModelConfig


class KVCache(struct.PyTreeNode):
    """Keys and values of the positions seen so far.

    `layers` is one (keys, values) pair of [B, C, G, K] a layer, or one pair with a leading layer
    axis when layers are scanned. Slots from `index` on are unused; `mask` is False there and on
    padding.
    """

    layers: Any
    mask: jax.Array  # [B, C] bool
    index: jax.Array  # [] int32, the next free slot


def visible(mask_BS, segments_BS, cache: KVCache | None):
    """([B, S, C] bool, which slots each new position may attend to; the cache with its mask)."""
    length = mask_BS.shape[1]
    if cache is None:
        causal = jnp.tril(jnp.ones((length, length), bool))
        allowed_BSS = causal[None] & mask_BS[:, None]
        if segments_BS is not None:
            allowed_BSS &= segments_BS[:, :, None] == segments_BS[:, None]
        return allowed_BSS, None
    mask_BC = jax.lax.dynamic_update_slice_in_dim(cache.mask, mask_BS, cache.index, axis=1)
    slots = jnp.arange(mask_BC.shape[1])
    causal = slots[None] <= cache.index + jnp.arange(length)[:, None]
    return causal[None] & mask_BC[:, None], cache.replace(mask=mask_BC)


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


def attend(q_BSHK, k_BCGK, v_BCGK, allowed_BSC) -> jax.Array:
    """Softmax attention in float32, grouped queries without repeating keys."""
    B, S, H, K = q_BSHK.shape
    G = k_BCGK.shape[2]
    q_BSGRK = q_BSHK.reshape(B, S, G, H // G, K)
    scores_BGRSC = jnp.einsum(
        "BSGRK,BCGK->BGRSC", q_BSGRK, k_BCGK, preferred_element_type=jnp.float32
    )
    # A finite floor: a padded query that may attend to nothing gives an average, not NaN.
    floor = jnp.finfo(jnp.float32).min
    scores_BGRSC = jnp.where(allowed_BSC[:, None, None], scores_BGRSC / math.sqrt(K), floor)
    probs_BGRSC = jax.nn.softmax(scores_BGRSC, axis=-1).astype(v_BCGK.dtype)
    return jnp.einsum("BGRSC,BCGK->BSGRK", probs_BGRSC, v_BCGK).reshape(B, S, H, K)
