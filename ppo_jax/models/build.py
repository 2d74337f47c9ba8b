"""Transformers as `Network`s: plain functions.

A network of your own (NNX, Equinox, plain JAX) takes part in everything by the first four.
`constrain` pins the sharding of activations by logical axes (see `axes` and `layout.Layout`); by
default it does nothing.

Dimension key: B sequences, L positions, D model, V vocabulary.
"""

import functools
import math
from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp

from ppo_jax.core import distributions
from ppo_jax.core.checks import assert_ids
from ppo_jax.core.distributions import CHUNK_LOGITS, chunked_token_statistics, positions_at_once
from ppo_jax.core.network import Network
from ppo_jax.core.renamed import renamed
from ppo_jax.core.types import Params
from ppo_jax.models.attention import KVCache, Outputs, map_cache_rows, refill_cache
from ppo_jax.models.axes import CACHE, ShardingConstraint, unconstrained
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.layers import Projection
from ppo_jax.models.routed import routed_network
from ppo_jax.models.transformer import Transformer, all_logits

OLD_NAMES = dict(start="first_output", segments="segment_ids", at="output_positions")


def make_network(
    config, start, end, head, constrain, exits=(), head_std=0.0, num_outputs=1
) -> Network:
    """The functions of one Transformer module.

    Raises:
        ValueError: the exits do not fit, see `check_exits`.
    """
    if exits:
        check_exits(config, exits, end if head == "none" else start, last=head == "none")
    module = Transformer(
        config, start, end, head, head_std, tuple(exits), num_outputs, constrain=constrain
    )

    def init(key):
        mask = jnp.ones((1, 1), bool)
        shape = (1, 1) if start is None else (1, 1, max(1, len(exits)) * config.embed_dim)
        inputs = jnp.zeros(shape, jnp.int32 if start is None else config.dtype)
        # One row cannot be sharded; the caller shards the parameters.
        free = module.clone(constrain=unconstrained)
        return free.init(key, inputs, mask, None, None, Outputs())["params"]

    arguments = functools.partial(call_arguments, module)

    @renamed(**OLD_NAMES)
    def apply(params, inputs, mask, **where):
        return module.apply({"params": params}, *arguments(inputs, mask, **where))[0]

    def init_cache(batch_size, length):
        return empty_cache(config, range(module.start or 0, end), batch_size, length, constrain)

    @renamed(start="first_output")
    def decode(params, inputs, mask, cache, *, first_output=0):
        check_inputs(config, module.start, inputs, mask)
        outputs = Outputs(first=first_output)
        return module.apply({"params": params}, inputs, mask, None, cache, outputs)

    def pinned(cache):
        axes = (None, *CACHE) if config.scan_layers else CACHE
        return cache.replace(layers=jax.tree.map(lambda x: constrain(x, axes), cache.layers))

    def refill(cache, fresh, source):
        return pinned(refill_cache(cache, fresh, source))

    def map_rows(function, cache):
        return pinned(map_cache_rows(function, cache))

    def supports_shared_prompts(num_prompts, samples):
        return num_prompts % num_batch_shards(constrain, num_prompts * samples) == 0

    shards = functools.partial(num_batch_shards, constrain)
    of_caches = dict(init_cache=init_cache, refill=refill, map_rows=map_rows, num_shards=shards)
    more = dict(supports_packing=True, supports_shared_prompts=supports_shared_prompts)
    network = Network(init=init, apply=apply, decode=decode, **of_caches, **more)
    return network._replace(routed=routed_network(network, module, arguments))


def call_arguments(
    module: Transformer,
    inputs,
    mask,
    *,
    first_output=0,
    segment_ids=None,
    output_positions=None,
    output_mask=None,
    shared_prompt=None,
    read=None,
) -> tuple:
    """What the module is called with, from the arguments of `Network.apply`, which are checked."""
    where = segment_ids, output_positions, shared_prompt
    check_inputs(module.config, module.start, inputs, mask, *where)
    first = 0 if output_positions is not None else first_output
    outputs = Outputs(output_positions, output_mask, first, shared_prompt)
    return inputs, mask, segment_ids, None, outputs, read


def empty_cache(
    config: ModelConfig,
    numbers: Sequence[int],
    batch_size: int,
    length: int,
    constrain: ShardingConstraint,
) -> KVCache:
    """A cache of the layers with these numbers, for sequences of `length`."""

    def pair(slots, lead, axes):
        shape = (batch_size, config.num_kv_heads, slots, config.head_dim)
        empty = jnp.zeros((*lead, *shape), config.dtype)
        return tuple(constrain(empty, axes) for _ in range(2))

    if config.scan_layers:
        layers = pair(length, (len(numbers),), (None, *CACHE))
    else:
        slots = (config.cache_slots(config.kind_of(i), length) for i in numbers)
        layers = tuple(pair(count, (), CACHE) for count in slots)
    mask = constrain(jnp.zeros((batch_size, length), bool), ("batch", None))
    return KVCache(layers=layers, mask=mask, index=jnp.zeros((), jnp.int32))


def num_batch_shards(constrain: ShardingConstraint, num_rows: int) -> int:
    """How many parts the mesh cuts a batch of so many rows into."""
    if constrain.sharding is None:
        return 1
    return num_rows // constrain.shard_shape(("batch",), (num_rows,))[0]


def check_exits(config: ModelConfig, exits: Sequence[int], layer: int | None, *, last: bool):
    """A trunk ends with its `last` exit, and a network above it starts at one of them.

    Raises:
        ValueError: exits are not ascending, from 1 on (or 0 alone), and with scan_layers one.
    """
    several_fit = len(exits) == 1 or (exits[0] > 0 and not config.scan_layers)
    ascend = several_fit and list(exits) == sorted(set(exits))
    if not ascend or layer not in exits or (last and layer != exits[-1]):
        raise ValueError(
            f"exits must hold layer {layer}{' as the last' if last else ''}, be ascending from 1 "
            f"on, and one alone with scan_layers, got {list(exits)}"
        )


def check_inputs(
    config, start_layer, inputs, mask, segment_ids=None, output_positions=None, shared_prompt=None
):
    chex.assert_rank([mask, inputs], [2, 2 if start_layer is None else 3])
    chex.assert_equal_shape_prefix([inputs, mask], 2)
    chex.assert_type([inputs, mask], [int if start_layer is None else float, bool])
    if start_layer is None:
        assert_ids(inputs, mask, config.vocab_size)
    if segment_ids is not None:
        chex.assert_equal_shape([mask, segment_ids])
        chex.assert_type(segment_ids, int)
    if output_positions is not None:
        chex.assert_rank(output_positions, 2)
        chex.assert_type(output_positions, int)
    if segment_ids is not None and shared_prompt is not None:
        raise ValueError("rows hold several texts or a shared prompt: one of the two must be None")
    length = inputs.shape[1]
    if shared_prompt is not None:
        length = shared_prompt.length + shared_prompt.response_length(length)
    if config.positions == "learned" and length > config.max_length:
        raise ValueError(
            f"{length} positions, but the model has {config.max_length} (model.max_length)"
        )


def policy_network(
    config: ModelConfig,
    *,
    start_layer: int | None = None,
    exits: Sequence[int] = (),
    constrain: ShardingConstraint = unconstrained,
    logits_chunk: int = 0,
) -> Network:
    """Tokens (or hidden states after `start_layer` layers) to logits, float32.

    `exits` are those of the trunk, see `trunk_network`.

    Its `token_statistics` hold the logits of at most `logits_chunk` positions of a row at a time,
    and recompute them in the backward pass; 0 is as many as `positions_at_once` says.
    """

    @renamed(**OLD_NAMES)
    def token_statistics(apply, params, inputs, mask, tokens, temperature, **where):
        def read(*of_head):
            chunk = chunk_of(config, constrain, tokens, chunk=logits_chunk)
            return read_statistics(*of_head, tokens, temperature, chunk)

        return apply(params, inputs, mask, read=read, **where)

    def summed_logprobs(apply, params, inputs, mask, tokens, factors, **where):
        def read(*of_head):
            chunk = chunk_of(config, constrain, tokens, most=CHUNK_LOGITS)
            if chunk < tokens.shape[1]:
                return distributions.summed_logprobs(*of_head, tokens, factors, chunk=chunk)
            logprobs = distributions.token_logprobs(all_logits(*of_head), tokens)
            return distributions.weighted_sum(logprobs, factors)

        return apply(params, inputs, mask, read=read, **where)

    network = make_network(config, start_layer, config.num_layers, "logits", constrain, exits)
    return with_readers(network, token_statistics=token_statistics, summed_logprobs=summed_logprobs)


def reward_network(
    config: ModelConfig,
    *,
    start_layer: int | None = None,
    exits: Sequence[int] = (),
    constrain: ShardingConstraint = unconstrained,
) -> Network:
    """One scalar a position; the head starts with std 1 / sqrt(D + 1), bias 0.

    Reference: Stiennon et al. 2020, https://arxiv.org/abs/2009.01325 (the released code).
    """
    std = 1.0 / math.sqrt(config.embed_dim + 1)
    return make_network(config, start_layer, config.num_layers, "scalar", constrain, exits, std)


def value_network(
    config: ModelConfig,
    *,
    start_layer: int | None = None,
    exits: Sequence[int] = (),
    constrain: ShardingConstraint = unconstrained,
    num_bins: int = 0,
) -> Network:
    """One scalar a position; the head starts at zero, so that the first values are 0.

    With `num_bins` logits [B, O, N] of so many bins of returns, see `values_from`; at zero, so that
    the first values are the middle of the range.
    """
    numbers = dict(num_outputs=num_bins or 1)
    return make_network(
        config, start_layer, config.num_layers, "scalar", constrain, exits, **numbers
    )


def policy_value_network(
    config: ModelConfig,
    *,
    start_layer: int | None = None,
    exits: Sequence[int] = (),
    constrain: ShardingConstraint = unconstrained,
    logits_chunk: int = 0,
    num_bins: int = 0,
) -> Network:
    """The policy's body with a second head, which gives values: for `PPONetworks.value_on_policy`.

    Its parameters are those of `policy_network` and `value_head`, which starts at zero. `apply`
    gives values, as a `value_network` does, and `token_statistics` (logprobs, entropies, values) of
    one forward pass.

    Reference: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593 (the released code).
    """
    policy = make_network(config, start_layer, config.num_layers, "logits", constrain, exits)
    head = Projection((num_bins or 1,), True, 1, 0.0, constrain, name="value_head")

    def values(params, hidden):
        outputs = head.apply({"params": params["value_head"]}, hidden.astype(jnp.float32))
        return outputs if num_bins else outputs[..., 0]

    def init(key):
        own = head.init(key, jnp.zeros((1, 1, config.embed_dim)))["params"]
        return {**policy.init(key), "value_head": own}

    def values_alone(apply, params, inputs, mask, **where):
        def read(logits, weights, hidden):
            return values(params, hidden)

        return apply(params, inputs, mask, read=read, **where)

    def token_statistics(apply, params, inputs, mask, tokens, temperature, **where):
        def read(*of_head):
            chunk = chunk_of(config, constrain, tokens, chunk=logits_chunk)
            both = read_statistics(*of_head, tokens, temperature, chunk)
            return *both, values(params, of_head[-1])

        return apply(params, inputs, mask, read=read, **where)

    unused = dict.fromkeys(("init_cache", "decode", "refill", "map_rows", "summed_logprobs"))
    readers = dict(apply=values_alone, token_statistics=token_statistics)
    routed = policy.routed and policy.routed._replace(init=init, **unused)
    return with_readers(policy._replace(init=init, routed=routed, **unused), **readers)


def with_readers(network: Network, **readers: Callable) -> Network:
    """The network with functions whose first argument is its `apply`, and `routed` alike."""
    own = {name: functools.partial(reader, network.apply) for name, reader in readers.items()}
    routed = None if network.routed is None else with_readers(network.routed, **readers)
    return network._replace(**own, routed=routed)


def chunk_of(
    config: ModelConfig, constrain: ShardingConstraint, tokens: jax.Array, **limits: int
) -> int:
    """Positions of each row whose logits are computed at a time, see `positions_at_once`."""
    sizes = *tokens.shape, config.vocab_size
    return positions_at_once(*sizes, devices=constrain.num_devices, **limits)


def read_statistics(logits, weights, hidden, tokens, temperature, chunk):
    """`token_statistics` of the logits of hidden states, `chunk` positions of a row at a time."""
    numbers = dict(temperature=temperature)
    if chunk < tokens.shape[1]:
        how = dict(chunk=chunk, **numbers)
        return chunked_token_statistics(logits, weights, hidden, tokens, **how)
    return distributions.token_statistics(all_logits(logits, weights, hidden), tokens, **numbers)


def trunk_network(
    config: ModelConfig,
    *,
    end_layer: int,
    exits: Sequence[int] = (),
    constrain: ShardingConstraint = unconstrained,
) -> Network:
    """Tokens to the hidden states after `end_layer` layers: what networks above it start from.

    Networks that start at different layers share one trunk: its `exits`, ascending and the last of
    them `end_layer`, are the layers that they start from; its outputs [B, L, E D] are the states
    after each of the E, side by side. Scanned layers have one exit.
    """
    return make_network(config, None, end_layer, "none", constrain, exits)


def policy_apply(
    config: ModelConfig, params: Params, tokens: jax.Array, mask: jax.Array
) -> jax.Array:
    """Logits of a policy.

    Args:
        config: the model's shape.
        params: from `ppo_jax.hf.load_policy` or `policy_network(config).init`.
        tokens: [B, L] int32.
        mask: [B, L] bool, True on real tokens. Padding may be on either side; positions are
            counted from the mask.

    Returns:
        [B, L, V] float32; row t predicts token t + 1. Undefined but finite where mask is False.
    """
    return policy_network(config).apply(params, tokens, mask)
