"""Networks as plain functions.

A network is the functions of `Network`. Ours are Transformers; a network of your own (NNX, Equinox,
plain JAX) takes part in everything by giving the first four.

`constrain` of the functions here pins how arrays lie on a mesh by their logical axes (see `axes`
and `sharding.Layout`); by default it does nothing.

Dimension key: B sequences, L positions, D model, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from ppo_jax.attention import KVCache, refill_cache
from ppo_jax.axes import CACHE, Constrain, uncut
from ppo_jax.chunks import chunked_token_statistics
from ppo_jax.shapes import ModelConfig, RopeScaling
from ppo_jax.transformer import Params, Transformer

__all__ = [
    "KVCache",
    "ModelConfig",
    "Network",
    "Params",
    "RopeScaling",
    "policy_apply",
    "policy_network",
    "reward_network",
    "trunk_network",
    "value_network",
]


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


def make_network(config, start, end, head, constrain, head_std=0.0) -> Network:
    """The functions of one Transformer module."""
    module = Transformer(config, start, end, head, head_std, constrain)

    def init(key):
        mask = jnp.ones((1, 1), bool)
        shape = (1, 1) if start is None else (1, 1, config.embed_dim)
        inputs = jnp.zeros(shape, jnp.int32 if start is None else config.dtype)
        # One row cannot be cut: where parameters lie is for whoever calls to say.
        return module.clone(constrain=uncut).init(key, inputs, mask, None, None, 0)["params"]

    def apply(params, inputs, mask, *, start=0, segments=None, at=None):
        check_inputs(config, module.start, inputs, mask, segments, at)
        outputs = start if at is None else at
        return module.apply({"params": params}, inputs, mask, segments, None, outputs)[0]

    def init_cache(batch_size, length):
        shape = (batch_size, config.num_kv_heads, length, config.head_dim)
        count = end - (module.start or 0)

        def pair(lead, axes):
            empty = jnp.zeros((*lead, *shape), config.dtype)
            return tuple(constrain(empty, axes) for _ in range(2))

        if config.scan_layers:
            layers = pair((count,), (None, *CACHE))
        else:
            layers = tuple(pair((), CACHE) for _ in range(count))
        mask = constrain(jnp.zeros((batch_size, length), bool), ("batch", None))
        return KVCache(layers=layers, mask=mask, index=jnp.zeros((), jnp.int32))

    def decode(params, inputs, mask, cache, *, start=0):
        check_inputs(config, module.start, inputs, mask)
        return module.apply({"params": params}, inputs, mask, None, cache, start)

    def refill(cache, fresh, source):
        cache = refill_cache(cache, fresh, source)
        axes = (None, *CACHE) if config.scan_layers else CACHE
        return cache.replace(layers=jax.tree.map(lambda x: constrain(x, axes), cache.layers))

    functions = dict(init=init, apply=apply, init_cache=init_cache, decode=decode, refill=refill)
    return Network(**functions, packs=True)


def check_inputs(config, start_layer, inputs, mask, segments=None, at=None):
    chex.assert_rank([mask, inputs], [2, 2 if start_layer is None else 3])
    chex.assert_equal_shape_prefix([inputs, mask], 2)
    chex.assert_type([inputs, mask], [int if start_layer is None else float, bool])
    if segments is not None:
        chex.assert_equal_shape([mask, segments])
        chex.assert_type(segments, int)
    if at is not None:
        chex.assert_rank(at, 2)
        chex.assert_type(at, int)
    if config.positions == "learned" and inputs.shape[1] > config.max_length:
        raise ValueError(
            f"{inputs.shape[1]} positions, but the model has {config.max_length} (model.max_length)"
        )


def policy_network(
    config: ModelConfig,
    *,
    start_layer: int | None = None,
    constrain: Constrain = uncut,
    logits_chunk: int = 0,
) -> Network:
    """Tokens (or hidden states after `start_layer` layers) to logits, float32.

    With a `logits_chunk` its `token_statistics` hold the logits of so many positions at a time, and
    compute them again in the backward pass.
    """
    network = make_network(config, start_layer, config.num_layers, "logits", constrain)
    if not logits_chunk:
        return network
    module = Transformer(config, start_layer, config.num_layers, "logits", constrain=constrain)

    def token_statistics(
        params, inputs, mask, tokens, temperature, *, start=0, segments=None, at=None
    ):
        check_inputs(config, start_layer, inputs, mask, segments, at)
        outputs = start if at is None else at

        def read(*head):
            return chunked_token_statistics(
                *head, tokens, temperature=temperature, chunk=logits_chunk
            )

        return module.apply({"params": params}, inputs, mask, segments, None, outputs, read)[0]

    return network._replace(token_statistics=token_statistics)


def reward_network(
    config: ModelConfig, *, start_layer: int | None = None, constrain: Constrain = uncut
) -> Network:
    """One scalar a position; the head starts with std 1 / sqrt(D + 1), bias 0.

    Reference: Stiennon et al. 2020, https://arxiv.org/abs/2009.01325 (the released code).
    """
    std = 1.0 / math.sqrt(config.embed_dim + 1)
    return make_network(config, start_layer, config.num_layers, "scalar", constrain, std)


def value_network(
    config: ModelConfig, *, start_layer: int | None = None, constrain: Constrain = uncut
) -> Network:
    """One scalar a position; the head starts at zero, so that the first values are 0."""
    return make_network(config, start_layer, config.num_layers, "scalar", constrain)


def trunk_network(config: ModelConfig, *, end_layer: int, constrain: Constrain = uncut) -> Network:
    """Tokens to the hidden states after `end_layer` layers: what networks above it start from."""
    return make_network(config, None, end_layer, "none", constrain)


def policy_apply(
    config: ModelConfig, params: Params, tokens: jax.Array, mask: jax.Array
) -> jax.Array:
    """Logits of a policy.

    Args:
        config: the model's shape.
        params: as `ppo_jax.hf.load_policy` or `policy_network(config).init` give them.
        tokens: [B, L] int32.
        mask: [B, L] bool, True on real tokens. Padding may stand on either side; positions are
            counted from the mask.

    Returns:
        [B, L, V] float32; row t predicts token t + 1. Undefined but finite where mask is False.
    """
    return policy_network(config).apply(params, tokens, mask)
