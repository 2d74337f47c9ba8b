"""A decoder-only Transformer in Flax Linen. Only `build` uses these Modules.

`constrain` of a Module pins the sharding of activations by logical axes (`axes`); without a mesh it
does nothing.

Dimension key: B sequences, L positions, S new positions, C cache slots, D model, H heads,
G key/value heads, R = H / G queries per key, K head size, F feed-forward, V vocabulary.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from ppo_jax.core import cpu
from ppo_jax.models.attention import (
    AttentionFn,
    Outputs,
    attend_cached,
    cache_mask,
    rotary_angles,
    rotate,
    text_positions,
    update_cache,
)
from ppo_jax.models.axes import HIDDEN, ShardingConstraint, unconstrained
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.kernels import make_attention
from ppo_jax.models.layers import Embedding, Head, Norm, Projection

# What is saved for the backward pass: products with parameters, or only a layer's input.
REMAT = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


ALL = Outputs()


class Attention(nn.Module):
    """Causal self-attention of some positions, `outputs`, over all of them and those in a cache.

    `angles` are `rotary_angles`, None without rotary positions.
    """

    config: ModelConfig
    constrain: ShardingConstraint = unconstrained

    @nn.compact
    def __call__(self, x_BSD, angles, attention_fn, cache, layer, next_slot, outputs):
        c = self.config
        project = functools.partial(Projection, constrain=self.constrain, lora_alpha=c.lora_alpha)
        queries = outputs if attention_fn.takes_some_queries else ALL
        q = project((c.num_heads, c.head_dim), c.qkv_bias, name="query")(queries.take(x_BSD))
        k = project((c.num_kv_heads, c.head_dim), c.qkv_bias, name="key")(x_BSD)
        v = project((c.num_kv_heads, c.head_dim), c.qkv_bias, name="value")(x_BSD)
        if c.qk_norm:
            q = Norm(c, name="query_norm")(q)
            k = Norm(c, name="key_norm")(k)
        if angles is not None:
            q, k = rotate(q, queries.take(angles)), rotate(k, angles)
        k, v = (x.swapaxes(1, 2) for x in (k, v))
        if cache is not None:
            cache, (k, v) = update_cache(cache, (k, v), next_slot, layer)
        output = project(
            (c.embed_dim,),
            c.attention_output_bias,
            num_in=2,
            std=0.02 / math.sqrt(2 * c.num_layers),
            name="output",
        )
        attended = attention_fn.of(queries)(q, k, v)
        return output(attended if queries is outputs else outputs.take(attended)), cache


class MLP(nn.Module):
    """gelu(up) or silu(gate) * up, then down."""

    config: ModelConfig
    constrain: ShardingConstraint = unconstrained

    @nn.compact
    def __call__(self, x_BSD):
        c = self.config
        project = functools.partial(Projection, constrain=self.constrain, lora_alpha=c.lora_alpha)
        hidden = project((c.mlp_dim,), c.mlp_bias, name="up")(x_BSD)
        if c.mlp == "gelu":
            hidden = jax.nn.gelu(hidden, approximate=True)
        else:
            gate = project((c.mlp_dim,), c.mlp_bias, name="gate")(x_BSD)
            hidden = jax.nn.silu(gate) * hidden
        std = 0.02 / math.sqrt(2 * c.num_layers)
        return project((c.embed_dim,), c.mlp_bias, std=std, name="down")(hidden)


class Block(nn.Module):
    """One pre-norm layer, whose result is that at `outputs` alone. The order of arguments and
    results is that of `nn.scan`.

    `cache` is the layer's own, or that of all layers when they are scanned: then `layer` is its
    index, and every layer writes into the one array. Scanned over as an input and an output, it
    would be copied whole for each token.
    """

    config: ModelConfig
    constrain: ShardingConstraint = unconstrained

    @nn.compact
    def __call__(self, carry, layer, angles, attention_fn, next_slot, outputs=ALL):
        c, constrain, (x_BSD, cache) = self.config, self.constrain, carry
        normed = Norm(c, name="attention_norm")(x_BSD)
        output, cache = Attention(c, constrain, name="attention")(
            normed, angles, attention_fn, cache, layer, next_slot, outputs
        )
        x_BSD = outputs.take(x_BSD) + output
        x_BSD = x_BSD + MLP(c, constrain, name="mlp")(Norm(c, name="mlp_norm")(x_BSD))
        return (constrain(x_BSD, HIDDEN), cache), None


class Layers(nn.Module):
    """Layers `start` to `end`, one after the other or as one scanned body.

    The result is that at `outputs`, after each of the layers in `exits`. What only other positions
    would read, the last layer does not compute, unless it is scanned.
    """

    config: ModelConfig
    start: int
    end: int
    exits: tuple[int, ...]
    constrain: ShardingConstraint = unconstrained

    @nn.compact
    def __call__(self, x_BSD, caches, *args, outputs=ALL):
        if self.start == self.end:
            return [outputs.take(x_BSD)], caches
        block = Block
        if self.config.remat != "none":
            # Under a scan there is no common subexpression to prevent.
            prevent_cse = not self.config.scan_layers
            block = nn.remat(Block, prevent_cse=prevent_cse, policy=REMAT[self.config.remat])
        count = self.end - self.start
        if self.config.scan_layers:
            stack = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
                length=count,
            )
            layers = stack(self.config, self.constrain, name="stack")
            (x_BSD, caches), _ = layers((x_BSD, caches), jnp.arange(count, dtype=jnp.int32), *args)
            return [outputs.take(x_BSD)], caches
        states, updated = [], []
        for i, cache in enumerate(caches or [None] * count, start=self.start):
            layer = block(self.config, self.constrain, name=str(i))
            read = outputs if i + 1 == self.end else ALL
            (x_BSD, cache), _ = layer((x_BSD, cache), None, *args, read)
            updated.append(cache)
            if i + 1 in self.exits:
                states.append(x_BSD if i + 1 == self.end else outputs.take(x_BSD))
        return states, (None if caches is None else tuple(updated))


class Transformer(nn.Module):
    """Layers `start` to `end`, with the embedding below and the head above them.

    `start=None` reads tokens, a number the hidden states after that many layers. `head` is
    "logits", "scalar" or "none" (hidden states, no final norm). Hidden states, those that are read
    as well as those returned, are the ones after each layer in `exits`, side by side on the last
    axis. With "logits", `read` may take (the function (weights, hidden states) -> logits, weights,
    hidden states) and return less than all logits. A "scalar" head has `num_outputs`, the last axis
    where they are several.
    """

    config: ModelConfig
    start: int | None
    end: int
    head: str
    head_std: float = 0.0
    exits: tuple[int, ...] = ()  # () is the one layer at which the trunk ends
    num_outputs: int = 1
    constrain: ShardingConstraint = unconstrained

    @nn.compact
    def __call__(self, inputs, mask_BS, segments_BS, cache, outputs, read=None):
        c = self.config
        if cache is None:
            rows = mask_BS, segments_BS, outputs.shared
            positions = text_positions(*rows)
            attention_fn = make_attention(c, self.constrain, *rows)
        else:
            allowed_BSC, cache = cache_mask(mask_BS, cache)
            # A token attends to itself and all real ones before it: their count gives its position.
            positions = jnp.maximum(allowed_BSC.sum(axis=2, dtype=jnp.int32) - 1, 0)
            filled = jnp.minimum(cache.index + mask_BS.shape[1], cache.mask.shape[1])
            attention_fn = AttentionFn((allowed_BSC, filled), attend_cached)
        needs_table = self.start is None or (self.head == "logits" and c.tie_embeddings)
        # Above a trunk only the token table is needed.
        table_config = c if self.start is None else dataclasses.replace(c, positions="rotary")
        embed = Embedding(table_config, self.constrain, name="embed") if needs_table else None
        if self.start is None:
            x = embed(jnp.where(mask_BS, inputs, 0), positions)
        else:
            if self.exits:
                place = self.exits.index(self.start)
                inputs = inputs[..., place * c.embed_dim : (place + 1) * c.embed_dim]
            x = jnp.where(mask_BS[:, :, None], inputs, 0).astype(c.dtype)
            x = self.constrain(x, HIDDEN)
        exits = self.exits if self.head == "none" and self.exits else (self.end,)
        layers = Layers(c, self.start or 0, self.end, exits, self.constrain, name="layers")
        next_slot = None if cache is None else cache.index % cache.mask.shape[1]
        caches = None if cache is None else cache.layers
        angles = rotary_angles(positions, c) if c.positions == "rotary" else None
        states, caches = layers(x, caches, angles, attention_fn, next_slot, outputs=outputs)
        if cache is not None:
            cache = cache.replace(layers=caches, index=cache.index + mask_BS.shape[1])
        if self.head == "none":
            return jnp.concatenate(states, axis=-1), cache
        return self.finish(states[-1], embed, read or all_logits), cache

    def finish(self, x_BSD, embed, read):
        x_BSD = Norm(self.config, name="final_norm")(x_BSD)
        if self.head == "scalar":
            shape, std = (self.num_outputs,), self.head_std
            outputs = Projection(shape, True, 1, std, self.constrain, name="head")(
                x_BSD.astype(jnp.float32)
            )
            return outputs[..., 0] if self.num_outputs == 1 else outputs
        tied, constrain = self.config.tie_embeddings, self.constrain
        weights = embed.table("tokens") if tied else Head(self.config, constrain, name="head")()

        def logits(weights, x_BSD):
            # Arrays alone, no Module: it may run in a scan.
            z = cpu.matmul(x_BSD, weights.T, "float32") if tied else cpu.matmul(x_BSD, weights)
            return constrain(z, ("batch", None, "vocab"))

        return read(logits, weights, x_BSD)


def all_logits(logits, weights, x_BSD):
    return logits(weights, x_BSD).astype(jnp.float32)
