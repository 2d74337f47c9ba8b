"""Modules with parameters: norms, projections, embeddings, the head.

Dimension key: B sequences, L positions, S new positions, D model, V vocabulary.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from ppo_jax.core import cpu
from ppo_jax.models.axes import (
    HIDDEN,
    KERNELS,
    LORA,
    TABLES,
    ShardingConstraint,
    gathered,
    unconstrained,
)
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.lora import lora_scale

ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_erf": functools.partial(jax.nn.gelu, approximate=False),
    "gated_gelu": functools.partial(jax.nn.gelu, approximate=True),
    "gated_silu": jax.nn.silu,
}


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis, computed in float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x):
        c, shape = self.config, (1,) * (x.ndim - 1) + x.shape[-1:]
        from_one = c.norm == "rmsnorm_plus_one"  # the parameter is what is added to 1
        init = nn.initializers.zeros if from_one else nn.initializers.ones
        scale = self.param("scale", init, x.shape[-1:]).reshape(shape)
        y = x.astype(jnp.float32)
        if c.norm == "layernorm":
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + c.norm_eps)
        y = y * (1 + scale if from_one else scale)
        if c.norm == "layernorm":
            y = y + self.param("bias", nn.initializers.zeros, x.shape[-1:]).reshape(shape)
        return y.astype(x.dtype)


class Projection(nn.Module):
    """A linear map from the last `num_in` axes to `shape`, as one matrix product.

    An adapter among its parameters is added (see `lora`).
    """

    shape: tuple[int, ...]
    use_bias: bool
    num_in: int = 1
    std: float = 0.02
    constrain: ShardingConstraint = unconstrained
    lora_alpha: float = 0.0

    @nn.compact
    def __call__(self, x):
        in_shape = x.shape[x.ndim - self.num_in :]
        before, after = KERNELS[self.name]
        kernel = self.param("kernel", nn.initializers.normal(self.std), (*in_shape, *self.shape))
        kernel = self.constrain(kernel.astype(x.dtype), gathered(before + after))
        kernel = kernel.reshape(math.prod(in_shape), math.prod(self.shape))
        x = x.reshape(*x.shape[: x.ndim - self.num_in], -1)
        y = cpu.matmul(x, kernel)
        if self.has_variable("params", "lora_a"):
            y = y + self.low_rank(x)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, self.shape).astype(x.dtype)
            y = y + bias.reshape((1,) * (y.ndim - 1) + (-1,))
        y = y.reshape(*y.shape[:-1], *self.shape)
        return self.constrain(y, ("batch", None, *gathered(after)))

    def low_rank(self, x):
        before, after = KERNELS[self.name]
        a, b = (jnp.asarray(self.get_variable("params", name)).astype(x.dtype) for name in LORA)
        rank = b.shape[0]
        a = self.constrain(a, gathered((*before, None))).reshape(-1, rank)
        b = self.constrain(b, gathered((None, *after))).reshape(rank, -1)
        inner = self.constrain(cpu.matmul(x, a), HIDDEN)
        return cpu.matmul(inner, b) * lora_scale(self.lora_alpha, rank)


class Embedding(nn.Module):
    """Token table and, for GPT-2, position table."""

    config: ModelConfig
    constrain: ShardingConstraint = unconstrained

    def setup(self):
        c, init = self.config, nn.initializers.normal(0.02)
        self.tokens = self.param("tokens", init, (c.vocab_size, c.embed_dim))
        if c.positions == "learned":
            self.positions = self.param("positions", init, (c.max_length, c.embed_dim))

    def __call__(self, tokens_BS, positions_BS):
        x = self.table("tokens")[tokens_BS]
        if self.config.embed_scale != 1:
            x = x * jnp.asarray(self.config.embed_scale, x.dtype)
        if self.config.positions == "learned":
            x = x + self.table("positions")[positions_BS]
        return self.constrain(x, HIDDEN)

    def table(self, name):
        # Parameters may be numpy arrays, which a tracer cannot index.
        values = jnp.asarray(getattr(self, name)).astype(self.config.dtype)
        return self.constrain(values, gathered(TABLES[name]))


class Head(nn.Module):
    """The output matrix of a model whose embeddings are not tied."""

    config: ModelConfig
    constrain: ShardingConstraint = unconstrained

    @nn.compact
    def __call__(self):
        shape = (self.config.embed_dim, self.config.vocab_size)
        kernel = self.param("kernel", nn.initializers.normal(0.02), shape)
        return self.constrain(kernel.astype(self.config.dtype), gathered(sum(KERNELS["head"], ())))
