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
from ppo_jax.models.attention import Outputs
from ppo_jax.models.axes import HIDDEN, ShardingConstraint, unconstrained
from ppo_jax.models.config import NORMS, ModelConfig
from ppo_jax.models.layers import ACTIVATIONS, Embedding, Head, Norm, Projection
from ppo_jax.models.moe import ROUTER, MoE
from ppo_jax.models.rope import rotate
from ppo_jax.models.stacks import scan_kinds
from ppo_jax.models.views import View, cache_views, row_views

# What is saved for the backward pass: products with parameters, or only a layer's input.
REMAT = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


ALL = Outputs()


class Attention(nn.Module):
    """Causal self-attention of some positions, `outputs`, over all of them and those in a cache."""

    config: ModelConfig
    constrain: ShardingConstraint = unconstrained

    @nn.compact
    def __call__(self, x_BSD, view: View, cache, layer, outputs):
        c, attention_fn = self.config, view.attention_fn
        project = functools.partial(Projection, constrain=self.constrain, lora_alpha=c.lora_alpha)
        queries = outputs if attention_fn.takes_some_queries else ALL
        q = project((c.num_heads, c.head_dim), c.qkv_bias, name="query")(queries.take(x_BSD))
        k = project((c.num_kv_heads, c.head_dim), c.qkv_bias, name="key")(x_BSD)
        v = project((c.num_kv_heads, c.head_dim), c.qkv_bias, name="value")(x_BSD)
        if c.qk_norm != "none":
            q, k = self.normed(q, "query_norm"), self.normed(k, "key_norm")
        if view.angles is not None:
            q, k = rotate(q, queries.take(view.angles)), rotate(k, view.angles)
        if c.score_scale:
            q = q * jnp.asarray(c.score_scale * math.sqrt(c.head_dim), q.dtype)
        k, v = (x.swapaxes(1, 2) for x in (k, v))
        if cache is not None:
            cache, (k, v) = view.write(cache, (k, v), layer)
        output = project(
            (c.embed_dim,),
            c.attention_output_bias,
            num_in=2,
            std=0.02 / math.sqrt(2 * c.num_layers),
            name="output",
        )
        attended = attention_fn.of(queries)(q, k, v)
        return output(attended if queries is outputs else outputs.take(attended)), cache

    def normed(self, x_BSHK, name):
        norm = Norm(self.config, name=name)
        if self.config.qk_norm == "head":
            return norm(x_BSHK)
        return norm(x_BSHK.reshape(*x_BSHK.shape[:2], -1)).reshape(x_BSHK.shape)


class MLP(nn.Module):
    """activation(up), or activation(gate) * up, then down."""

    config: ModelConfig
    constrain: ShardingConstraint = unconstrained

    @nn.compact
    def __call__(self, x_BSD):
        c = self.config
        project = functools.partial(Projection, constrain=self.constrain, lora_alpha=c.lora_alpha)
        up = project((c.mlp_dim,), c.mlp_bias, name="up")(x_BSD)
        if c.gated:
            gate = project((c.mlp_dim,), c.mlp_bias, name="gate")(x_BSD)
            hidden = ACTIVATIONS[c.mlp](gate) * up
        else:
            hidden = ACTIVATIONS[c.mlp](up)
        std = 0.02 / math.sqrt(2 * c.num_layers)
        return project((c.embed_dim,), c.mlp_bias, std=std, name="down")(hidden)


class Block(nn.Module):
    """One layer, whose result is that at `outputs` alone. The order of arguments and results is
    that of `nn.scan`.

    Attention and MLP read their input with or without a norm, and what they add may have one, see
    `config.NORMS`; in parallel both read the input of the layer.

    `cache` is the layer's own, or that of all layers when they are scanned: then `layer` is its
    index, and every layer writes into the one array. Scanned over as an input and an output, it
    would be copied whole for each token. Padding, where `real_BS` is False, has no experts.
    """

    config: ModelConfig
    constrain: ShardingConstraint = unconstrained
    has_experts: bool = False

    @nn.compact
    def __call__(self, carry, layer, view, real_BS, outputs=ALL):
        c, constrain, (x_BSD, cache) = self.config, self.constrain, carry
        attention = Attention(c, constrain, name="attention")
        mlp = self.feed_forward(outputs.are_real(real_BS))
        added, cache = attention(self.before("attention", x_BSD), view, cache, layer, outputs)
        x_BSD = outputs.take(x_BSD)
        if c.residual == "parallel":
            added = added + mlp(self.before("mlp", x_BSD))
            x_BSD = x_BSD + self.scaled(added)
        else:
            x_BSD = x_BSD + self.scaled(self.after("attention", added))
            added = mlp(self.before("mlp", x_BSD))
            x_BSD = x_BSD + self.scaled(self.after("mlp", added))
        return (constrain(x_BSD, HIDDEN), cache), None

    def feed_forward(self, real_BS):
        if not self.has_experts:
            return MLP(self.config, self.constrain, name="mlp")
        return functools.partial(MoE(self.config, self.constrain, name="experts"), real_BS=real_BS)

    def before(self, part, x_BSD):
        first, _ = NORMS[self.config.residual]
        return Norm(self.config, name=f"{part}_norm")(x_BSD) if first else x_BSD

    def after(self, part, x_BSD):
        _, last = NORMS[self.config.residual]
        return Norm(self.config, name=f"{part}_post_norm")(x_BSD) if last else x_BSD

    def scaled(self, x_BSD):
        scale = self.config.residual_scale
        return x_BSD if scale == 1 else x_BSD * jnp.asarray(scale, x_BSD.dtype)


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
    def __call__(self, x_BSD, caches, views, real_BS, outputs=ALL):
        if self.start == self.end:
            return [outputs.take(x_BSD)], caches
        c, count = self.config, self.end - self.start
        kinds = [c.kinds.index(c.kind_of(i)) for i in range(self.start, self.end)]
        views = [views[kind] for kind in kinds]
        if c.scan_layers:
            several = len(set(kinds)) > 1 and not self.is_initializing()
            scan = self.scan_kinds if several else self.scan
            x_BSD, caches = scan((x_BSD, caches), kinds, views, real_BS)
            return [outputs.take(x_BSD)], caches
        block, states, updated = self.block(in_loop=False), [], []
        for i, cache, view in zip(
            range(self.start, self.end), caches or [None] * count, views, strict=True
        ):
            layer = block(c, self.constrain, c.has_experts(i), name=str(i))
            read = outputs if i + 1 == self.end else ALL
            (x_BSD, cache), _ = layer((x_BSD, cache), None, view, real_BS, read)
            updated.append(cache)
            if i + 1 in self.exits:
                states.append(x_BSD if i + 1 == self.end else outputs.take(x_BSD))
        return states, (None if caches is None else tuple(updated))

    def block(self, in_loop):
        """`Block`, or what computes it again in the backward pass."""
        remat = self.config.remat
        if remat == "none":
            return Block
        # In a loop there is no common subexpression to prevent.
        return nn.remat(Block, prevent_cse=not in_loop, policy=REMAT[remat])

    def scan(self, carry, kinds, views, real_BS):
        """All layers, of one kind, as the body of a loop."""
        stack = nn.scan(
            self.block(in_loop=True),
            variable_axes=dict.fromkeys(("params", *ROUTER), 0),
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=len(kinds),
        )
        layers = stack(self.config, self.constrain, self.has_experts, name="stack")
        return layers(carry, jnp.arange(len(kinds), dtype=jnp.int32), views[0], real_BS)[0]

    def scan_kinds(self, carry, kinds, views, real_BS):
        """All layers, of several kinds, with the variables that `scan` would have."""
        stack = {name: own["stack"] for name, own in self.variables.items() if "stack" in own}
        view_of, written = dict(zip(kinds, views, strict=True)), self.scope.mutable or []
        numbers, decodes = jnp.arange(len(kinds), dtype=jnp.int32), carry[1] is not None

        def step(carry, own, kind, alone):
            number, own = own
            if decodes:
                own = jax.tree.map(lambda x: jnp.asarray(x)[number], stack)
            block = self.block(in_loop=not alone)(self.config, self.constrain, self.has_experts)
            args = carry, number, view_of[kind], real_BS
            (carry, _), new = block.apply(own, *args, mutable=written)
            return carry, new

        # Decoding reads each layer where it is: a part of a stack would be copied for every token.
        xs = numbers, None if decodes else stack
        carry, new = scan_kinds(step, carry, xs, kinds)
        for name, values in new.items():
            self.put_variable(name, "stack", values)
        return carry

    @property
    def has_experts(self):
        """Whether layers that are scanned do."""
        return self.config.has_experts(self.start)


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
            positions, views = row_views(c, self.constrain, *rows)
        else:
            positions, views, cache = cache_views(c, mask_BS, cache)
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
        caches = None if cache is None else cache.layers
        states, caches = layers(x, caches, views, mask_BS, outputs=outputs)
        if cache is not None:
            cache = cache.replace(layers=caches, index=cache.index + mask_BS.shape[1])
        if self.head == "none":
            return jnp.concatenate(states, axis=-1), cache
        return self.finish(states[-1], embed, read or all_logits), cache

    def finish(self, x_BSD, embed, read):
        c, constrain = self.config, self.constrain
        x_BSD = Norm(c, name="final_norm")(x_BSD)
        if self.head == "scalar":
            shape, std = (self.num_outputs,), self.head_std
            outputs = Projection(shape, True, 1, std, constrain, name="head")(
                x_BSD.astype(jnp.float32)
            )
            return outputs[..., 0] if self.num_outputs == 1 else outputs
        tied = c.tie_embeddings
        weights = embed.table("tokens") if tied else Head(c, constrain, name="head")()

        def logits(weights, x_BSD):
            # Arrays alone, no Module: it may run in a scan.
            z = cpu.matmul(x_BSD, weights.T, "float32") if tied else cpu.matmul(x_BSD, weights)
            if c.logits_divisor != 1:
                z = z / c.logits_divisor
            if c.logits_cap:
                z = c.logits_cap * jnp.tanh(z / c.logits_cap)
            return constrain(z, ("batch", None, "vocab"))

        return read(logits, weights, x_BSD)


def all_logits(logits, weights, x_BSD):
    return logits(weights, x_BSD).astype(jnp.float32)
