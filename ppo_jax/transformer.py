"""A decoder-only Transformer in Flax Linen. Nothing but `networks` sees these Modules.

Dimension key: B sequences, L positions, S new positions, C cache slots, D model, H heads,
G key/value heads, R = H / G queries per key, K head size, F feed-forward, V vocabulary.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from ppo_jax.shapes import ModelConfig

Params = dict[str, Any]


class KVCache(struct.PyTreeNode):
    """Keys and values of the positions seen so far.

    `layers` is one (keys, values) pair of [B, C, G, K] a layer, or one pair with a leading layer
    axis when layers are scanned. Slots from `index` on are unused; `mask` is False there and on
    padding.
    """

    layers: Any
    mask: jax.Array  # [B, C] bool
    index: jax.Array  # [] int32, the next free slot


class Norm(nn.Module):
    """LayerNorm or RMSNorm, computed in float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x):
        size = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (size,))
        y = x.astype(jnp.float32)
        if self.config.norm == "layernorm":
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.config.norm_eps)
        y = y * scale.reshape((1,) * (x.ndim - 1) + (size,))
        if self.config.norm == "layernorm":
            bias = self.param("bias", nn.initializers.zeros, (size,))
            y = y + bias.reshape((1,) * (x.ndim - 1) + (size,))
        return y.astype(x.dtype)


class Projection(nn.Module):
    """A linear map from the last `num_in` axes to `shape`; one plain matrix product inside."""

    shape: tuple[int, ...]
    use_bias: bool
    num_in: int = 1
    std: float = 0.02

    @nn.compact
    def __call__(self, x):
        in_shape = x.shape[x.ndim - self.num_in :]
        kernel = self.param("kernel", nn.initializers.normal(self.std), (*in_shape, *self.shape))
        kernel = kernel.reshape(math.prod(in_shape), math.prod(self.shape)).astype(x.dtype)
        y = x.reshape(*x.shape[: x.ndim - self.num_in], -1) @ kernel
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, self.shape).astype(x.dtype)
            y = y + bias.reshape((1,) * (y.ndim - 1) + (-1,))
        return y.reshape(*y.shape[:-1], *self.shape)


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


class Attention(nn.Module):
    """Causal self-attention; with a cache, over the cached and the new positions."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BSD, positions_BS, allowed_BSC, layer_cache, index):
        c = self.config
        q = Projection((c.num_heads, c.head_dim), c.qkv_bias, name="query")(x_BSD)
        k = Projection((c.num_kv_heads, c.head_dim), c.qkv_bias, name="key")(x_BSD)
        v = Projection((c.num_kv_heads, c.head_dim), c.qkv_bias, name="value")(x_BSD)
        if c.qk_norm:
            q = Norm(c, name="query_norm")(q)
            k = Norm(c, name="key_norm")(k)
        if c.positions == "rotary":
            q, k = rotate(q, positions_BS, c), rotate(k, positions_BS, c)
        if layer_cache is not None:
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), index, axis=1)
                for old, new in zip(layer_cache, (k, v), strict=True)
            )
            layer_cache = (k, v)
        mixed = attend(q, k, v, allowed_BSC)
        output = Projection(
            (c.embed_dim,),
            c.attention_output_bias,
            num_in=2,
            std=0.02 / math.sqrt(2 * c.num_layers),
            name="output",
        )
        return output(mixed), layer_cache


class MLP(nn.Module):
    """gelu(up) or silu(gate) * up, then down."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BSD):
        c = self.config
        hidden = Projection((c.mlp_dim,), c.mlp_bias, name="up")(x_BSD)
        if c.mlp == "gelu":
            hidden = jax.nn.gelu(hidden, approximate=True)
        else:
            gate = Projection((c.mlp_dim,), c.mlp_bias, name="gate")(x_BSD)
            hidden = jax.nn.silu(gate) * hidden
        std = 0.02 / math.sqrt(2 * c.num_layers)
        return Projection((c.embed_dim,), c.mlp_bias, std=std, name="down")(hidden)


class Block(nn.Module):
    """One pre-norm layer. The order of arguments and results is what `nn.scan` wants."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BSD, layer_cache, positions_BS, allowed_BSC, index):
        normed = Norm(self.config, name="attention_norm")(x_BSD)
        mixed, layer_cache = Attention(self.config, name="attention")(
            normed, positions_BS, allowed_BSC, layer_cache, index
        )
        x_BSD = x_BSD + mixed
        x_BSD = x_BSD + MLP(self.config, name="mlp")(Norm(self.config, name="mlp_norm")(x_BSD))
        return x_BSD, layer_cache


class Layers(nn.Module):
    """Layers `start` to `end`, one after the other or as one scanned body."""

    config: ModelConfig
    start: int
    end: int

    @nn.compact
    def __call__(self, x_BSD, layer_caches, *where):
        if self.start == self.end:
            return x_BSD, layer_caches
        if self.config.scan_layers:
            stack = nn.scan(
                Block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
                length=self.end - self.start,
            )
            return stack(self.config, name="stack")(x_BSD, layer_caches, *where)
        caches = []
        for i in range(self.start, self.end):
            cache = None if layer_caches is None else layer_caches[i - self.start]
            x_BSD, cache = Block(self.config, name=str(i))(x_BSD, cache, *where)
            caches.append(cache)
        return x_BSD, (None if layer_caches is None else tuple(caches))


class Embedding(nn.Module):
    """Token table and, for GPT-2, position table."""

    config: ModelConfig

    def setup(self):
        c, init = self.config, nn.initializers.normal(0.02)
        self.tokens = self.param("tokens", init, (c.vocab_size, c.embed_dim))
        if c.positions == "learned":
            self.positions = self.param("positions", init, (c.max_length, c.embed_dim))

    def __call__(self, tokens_BS, positions_BS):
        # Parameters may be numpy arrays, which a tracer cannot index.
        x = jnp.asarray(self.tokens)[tokens_BS]
        if self.config.positions == "learned":
            x = x + jnp.asarray(self.positions)[positions_BS]
        return x.astype(self.config.dtype)

    def logits(self, x_BSD):
        return jnp.einsum(
            "BSD,VD->BSV",
            x_BSD,
            self.tokens.astype(x_BSD.dtype),
            preferred_element_type=jnp.float32,
        )


class Transformer(nn.Module):
    """Layers `start` to `end` with what belongs below and above them.

    `start=None` begins with tokens, a number with the hidden states after that many layers.
    `head` is "logits", "scalar" or "none" (hidden states, no final norm).
    """

    config: ModelConfig
    start: int | None
    end: int
    head: str
    head_std: float = 0.0

    @nn.compact
    def __call__(self, inputs, mask_BS, segments_BS, cache, output_start):
        c = self.config
        allowed_BSC, cache = visible(mask_BS, segments_BS, cache)
        # A token sees itself and all real ones of its text before it: counting them places it.
        positions = jnp.maximum(allowed_BSC.sum(axis=2, dtype=jnp.int32) - 1, 0)
        needs_table = self.start is None or (self.head == "logits" and c.tie_embeddings)
        # Only the token table is needed above a trunk, so positions are not asked for there.
        table_config = c if self.start is None else dataclasses.replace(c, positions="rotary")
        embed = Embedding(table_config, name="embed") if needs_table else None
        if self.start is None:
            x = embed(jnp.where(mask_BS, inputs, 0), positions)
        else:
            x = jnp.where(mask_BS[:, :, None], inputs, 0).astype(c.dtype)
        layers = Layers(c, self.start or 0, self.end, name="layers")
        index = None if cache is None else cache.index
        caches = None if cache is None else cache.layers
        x, caches = layers(x, caches, positions, allowed_BSC, index)
        if cache is not None:
            cache = cache.replace(layers=caches, index=index + mask_BS.shape[1])
        return self.finish(x[:, output_start:], embed), cache

    def finish(self, x_BSD, embed):
        if self.head == "none":
            return x_BSD
        x_BSD = Norm(self.config, name="final_norm")(x_BSD)
        if self.head == "scalar":
            project = Projection((1,), True, std=self.head_std, name="head")
            return project(x_BSD.astype(jnp.float32))[..., 0]
        if self.config.tie_embeddings:
            return embed.logits(x_BSD)
        project = Projection((self.config.vocab_size,), False, name="head")
        return project(x_BSD).astype(jnp.float32)


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
