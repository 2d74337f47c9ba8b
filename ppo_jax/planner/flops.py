"""Analytic flops of our Transformer: what a program should cost by the shape of its models.

2 for a multiplication and its addition. Elementwise operations, norms, softmax and the optimizer
are left out: together they are of lower order.

Dimension key: N sequences, S positions, C attended positions, O positions with an output, D model,
H heads, G key/value heads, K head size, F feed-forward, V vocabulary, P prompt tokens, T response
tokens.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from ppo_jax.core.distributions import chunk_shape
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.kernels import kernel_of, splash_pairs
from ppo_jax.models.long_rows import LONG, num_pairs
from ppo_jax.rollout.continuous_batching import DECODING, REFILLS, max_trip_counts
from ppo_jax.rollout.decode import max_steps


def projection_flops(config: ModelConfig) -> int:
    """Products with parameters in one layer, for one position: 2 D (2 H K + 2 G K + m F), where m
    is 3 with a gate and 2 without."""
    c = config
    heads = 2 * c.num_heads * c.head_dim + 2 * c.num_kv_heads * c.head_dim
    router = expert_share(c) * (c.experts.num_experts if c.experts else 0)
    return round(2 * c.embed_dim * (heads + (3 if c.gated else 2) * mlp_width(c) + router))


def expert_share(config: ModelConfig) -> float:
    """The share of layers with experts."""
    return sum(map(config.has_experts, range(config.num_layers))) / config.num_layers


def mlp_width(config: ModelConfig) -> float:
    """F of one position, on average over the layers: with experts that of the chosen ones."""
    c, share = config, expert_share(config)
    return (1 - share) * c.mlp_dim + (share and share * c.experts.num_chosen * c.experts.dim)


def attention_flops(config: ModelConfig, attended: float) -> float:
    """Scores and their products with values in one layer, for one position: 4 H K C.

    Masked positions are computed, too.
    """
    return 4 * config.num_heads * config.head_dim * attended


def adapter_flops(config: ModelConfig, targets: Sequence[str], rank: int) -> int:
    """Products with the adapters of one layer, for one position: 2 r (I + O) for each target."""
    c = config
    heads, groups = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    other = dict(query=heads, output=heads, key=groups, value=groups)  # its width besides D
    return 2 * rank * sum(c.embed_dim + other.get(name, c.mlp_dim) for name in targets)


def head_flops(config: ModelConfig, head: str | int) -> int:
    """The output of one position: 2 D V for "logits", 2 D for a "scalar", 2 D n for n numbers."""
    numbers = {"logits": config.vocab_size, "scalar": 1}
    return 2 * config.embed_dim * numbers.get(head, head)


def attended_in_row(
    config: ModelConfig, length: int, platform: str | None, window: int = 0
) -> float:
    """C of a row of S positions in layers with a window, on average: S, or what kernels do not
    skip.

    The TPU kernel computes whole blocks, see `kernels.splash_pairs`; the blocks of cuDNN are not
    documented. Plain attention skips blocks of long rows, see `long_rows.cuts`.
    """
    match kernel_of(config, platform, length):
        case "splash":
            return splash_pairs(length, window) / length
        case "cudnn":
            return min(length, window or length)
    return plain_pairs(length, 0, length, window) / length


def plain_pairs(queries: int, first: int, length: int, window: int = 0) -> int:
    """Pairs of the queries behind the `first` positions with the keys of a row, by plain
    attention."""
    if length < LONG:
        return queries * length
    return num_pairs(queries, first, length, window if window < length else 0)


def by_layer(config: ModelConfig, of_window: Callable[[int], float]) -> tuple[float, ...]:
    """A number of each layer, by its window."""
    found = {window: of_window(window) for window in {kind.window for kind in config.kinds}}
    return tuple(found[config.kind_of(i).window] for i in range(config.num_layers))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows as a network reads them: of one response each, or joined ones, see `SharedPrompt`."""

    sequences: int  # N
    positions: int  # S
    attended: tuple[float, ...]  # C in each layer, on average
    outputs: int  # O
    output_attended: float  # by these, in the last layer
    length: int  # of a row of one response, for which the kernel of attention is chosen


def rows_of(
    config: ModelConfig,
    platform: str | None,
    *,
    sequences: int,
    positions: int,
    outputs: int,
    prompt_length: int = 0,
    samples: int = 1,
) -> Rows:
    """The rows of N responses of S positions and O outputs, joined where prompts have several.

    Plain attention is then that of prompts to themselves, P², and of R positions of each response
    to P + R, less what long rows skip; a fused kernel has the rows apart.
    """
    plain = kernel_of(config, platform, positions) == "plain"
    rest, width = positions - prompt_length, positions
    if samples > 1:
        width = prompt_length + samples * rest

    def attended(window):
        apart = attended_in_row(config, positions, platform, window)
        if samples == 1:
            return apart
        if not plain:
            return samples * positions * apart / width
        pairs = plain_pairs(prompt_length, 0, prompt_length, window)
        return (pairs + samples * plain_pairs(rest, prompt_length, positions, window)) / width

    last = config.kind_of(config.num_layers - 1).window
    output_attended = attended_in_row(config, positions, platform, last)
    if plain:
        output_attended = plain_pairs(outputs, positions - outputs, positions, last) / outputs
    return Rows(
        sequences=sequences // samples,
        positions=width,
        attended=by_layer(config, attended),
        outputs=samples * outputs,
        output_attended=output_attended,
        length=positions,
    )


def everywhere_flops(config: ModelConfig, positions: int, platform: str | None) -> tuple[int, bool]:
    """Of a last layer that is read at O of S positions, what all S need, for one: (projections, is
    attention among it?).

    Keys and values: 4 D G K. A fused kernel takes the queries of all, 2 D H K, and a stack
    (`scan_layers`) has no layer of its own kind.
    """
    c = config
    if c.scan_layers:
        return projection_flops(c), True
    keys, queries = (2 * c.embed_dim * n * c.head_dim for n in (2 * c.num_kv_heads, c.num_heads))
    fused = kernel_of(c, platform, positions) != "plain"
    return keys + fused * queries, fused


def forward_flops(
    config: ModelConfig,
    *,
    sequences: int,
    positions: int,
    attended: float | Sequence[float],
    outputs: int,
    head: str,
    platform: str | None = None,
    num_layers: int | None = None,
    logits: int | None = None,
    output_attended: float | None = None,
    length: int | None = None,
) -> float:
    """N (S layers (projections + attention over C) + O head); the last layer is that of S positions
    in its keys and values alone, see `everywhere_flops`.

    `attended` is C, one for all layers or that of each, see `rows_of`; `outputs` is O; `num_layers`
    are those that are computed, None is all of the model; `logits` is O with the padding of chunks.
    In joined rows outputs attend to `output_attended`, and the kernel is that of rows of `length`.
    """
    c, depth = config, config.num_layers if num_layers is None else num_layers
    every = attended if isinstance(attended, Sequence) else [attended] * c.num_layers
    attended = every[c.num_layers - depth :]
    if output_attended is None:
        output_attended = attended[-1] if depth else 0
    attention = [attention_flops(c, count) for count in attended]
    parts = (positions, outputs, attention, attention_flops(c, output_attended))
    layers = untrained_flops(c, depth, *parts, *everywhere_flops(c, length or positions, platform))
    return sequences * (layers + (logits or outputs) * head_flops(c, head))


def untrained_flops(
    config: ModelConfig,
    depth: int,
    positions: int,
    outputs: int,
    attention: Sequence[float],
    output_attention: float,
    products: int,
    attends: bool,
) -> float:
    """The layers of one sequence, where the last is read at `outputs`: with what `everywhere_flops`
    gives, and attention of each layer for one position, and of the last for one with an output."""
    if not depth:
        return 0
    projections = projection_flops(config)
    whole = (depth - 1) * projections + sum(attention[:-1]) + products + attends * attention[-1]
    return positions * whole + outputs * (projections - products + (not attends) * output_attention)


# --- training -------------------------------------------------------------------------------------


def scores_again(config: ModelConfig, platform: str | None, length: int, window: int = 0) -> float:
    """What the backward pass of attention has more than twice its forward pass, in passes: the TPU
    kernel needs 7 products for its 2, plain attention 5 where it is a loop over blocks.

    In a stack (`scan_layers`) every block is computed in other loops than those of the forward
    pass, unless `remat` computes that again.
    """
    kernel = kernel_of(config, platform, length)
    if kernel != "plain" or length < LONG:
        return 1.5 if kernel == "splash" else 0.0
    if config.scan_layers and config.remat == "none":
        return 0.5
    rows = length, 0, length, window if window < length else 0
    return 0.5 * num_pairs(*rows, in_loops=True) / num_pairs(*rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedParts:
    """Which parts of a network have gradients; by default all of it."""

    trunk: int = 0  # the lowest layers: computed elsewhere
    frozen_layers: int = 0  # the lowest above them: forward only
    adapter_flops: int = 0  # of a layer, for one position; its kernels have no gradients then
    key_adapter_flops: int = 0  # of these, the keys' and values'
    head: bool = True  # the matrix of the outputs has


ALL = TrainedParts()


def trained_layer_flops(
    config: ModelConfig,
    projections: float,
    attention: float,
    adapters: float,
    *,
    frozen: bool,
    scores_again: float,
) -> float:
    """Forward and backward of a layer, or of a part of it, for one position.

    3 x forward + what is computed again - what has no gradient. By the model's `remat` the backward
    pass computes nothing again for "none"; the attention for "dots", which keeps the products with
    parameters; for "full" all, but for the layer's last product (2 F D, see `training_flops`).
    Where attention keeps no scores its backward pass has `scores_again` of it more.
    """
    again = {"none": 0, "dots": attention, "full": projections + attention}[config.remat]
    flops = 3 * (projections + attention + adapters) + again + scores_again * attention
    if frozen:  # the kernels below the adapters
        flops += (adapters if config.remat == "full" else 0) - projections
    return flops


def training_flops(
    config: ModelConfig,
    *,
    sequences: int,
    positions: int,
    outputs: int,
    head: str,
    platform: str | None = None,
    trained: TrainedParts = ALL,
    logits: int | None = None,
    prompt_length: int = 0,
    samples: int = 1,
    again: bool = True,
) -> float:
    """Forward and backward of all positions, but in the last layer, see `forward_flops`; in joined
    rows where prompts have several `samples`, see `rows_of`. `again` counts the scores of attention
    that the backward pass computes once more.

    Each product y = x w costs two of the same size in the backward pass, dx = dy w' and
    dw = x' dy; kernels with adapters have no dw. Frozen layers below all trained ones have neither.
    In a stack (`scan_layers`) with trained ones XLA computes their gradients, too, which is more
    than is counted here. The lowest layer of adapters needs a little less.
    """
    c, adapters = config, trained.adapter_flops
    sizes = dict(sequences=sequences, positions=positions, outputs=outputs)
    rows = rows_of(c, platform, prompt_length=prompt_length, samples=samples, **sizes)
    positions, outputs = rows.positions, rows.outputs
    projections, attention = projection_flops(c), [attention_flops(c, n) for n in rows.attended]
    of_outputs = attention_flops(c, rows.output_attended)
    depth = c.num_layers - trained.trunk - trained.frozen_layers
    scores = by_layer(c, lambda window: again * scores_again(c, platform, rows.length, window))
    products, attends = everywhere_flops(c, rows.length, platform)
    if not depth:
        attention = attention[trained.trunk :]
        parts = (positions, outputs, attention, of_outputs, products, attends)
        layers = untrained_flops(c, trained.frozen_layers, *parts)
    else:
        keys = adapters if c.scan_layers else trained.key_adapter_flops
        read = projections - products, (not attends) * of_outputs, adapters - keys
        body = c.num_layers - depth
        layers = positions * trained.frozen_layers * projections
        layers += positions * sum(attention[trained.trunk : body])
        trained_layer = functools.partial(trained_layer_flops, c, frozen=adapters > 0)
        for own, again_own in list(zip(attention, scores, strict=True))[body:-1]:
            layers += positions * trained_layer(projections, own, adapters, scores_again=again_own)
        trained_layer = functools.partial(trained_layer, scores_again=scores[-1])
        layers += outputs * trained_layer(*read)
        layers += positions * trained_layer(products, attends * attention[-1], keys)
        if c.remat == "full":  # the last product of a layer is not computed again
            at_top = positions if c.scan_layers else outputs
            layers -= 2 * mlp_width(c) * c.embed_dim * (positions * (depth - 1) + at_top)
    # Two products: without its own gradient, or without that of a body that has no trained layers.
    head_products = 3 if trained.head and depth else 2
    head = (logits or sizes["outputs"]) * head_products * head_flops(c, head)
    return rows.sequences * layers + sequences * head


# --- the phases of an iteration -------------------------------------------------------------------


def rollout_flops(
    policy: ModelConfig,
    *,
    sequences: int,
    prompt_length: int,
    response_length: int,
    samples_per_prompt: int = 1,
    slots: int = 0,
    group: int = 0,
    trunk: bool = False,
) -> float:
    """Prefill of the prompts, then single tokens, each over the whole cache of P + T positions, or
    of a layer's window: all of a response but the last, which only a `trunk` computes.

    With fewer `slots` than sequences, prompts are admitted in groups, and each decode step is one
    of all slots: as many steps as `continuous_batching.max_trip_counts` has.

    The worst case: the decode loop ends earlier when every row has stopped, and accelerators skip
    empty blocks of the cache. Several samples of a prompt share its prefill, which is over the
    prompt alone.
    """
    capacity, num_rows = prompt_length + response_length, slots or sequences
    steps = max_steps(response_length, trunk)
    forward = functools.partial(forward_flops, policy, outputs=1, head="logits")
    step = forward(sequences=num_rows, positions=1, **attended_in_cache(policy, 1, capacity))

    def prefill(num_prompts, slots):
        attended = attended_in_cache(policy, prompt_length, slots)
        return forward(sequences=num_prompts, positions=prompt_length, **attended)

    if num_rows == sequences:
        slots = capacity if samples_per_prompt == 1 else prompt_length
        return prefill(num_rows // samples_per_prompt, slots) + steps * step
    trips = max_trip_counts(sequences, num_rows, group, steps)
    refill = prefill(group // samples_per_prompt, prompt_length)
    return trips[REFILLS] * (refill + trips[DECODING] * step)


def attended_in_cache(config: ModelConfig, positions: int, capacity: int) -> dict[str, Any]:
    """C of new positions in each layer, and of the last of them in the last: the slots of the
    cache; several positions of a layer with a ring of its own attend to that and themselves."""

    def attended(kind, queries):
        slots = config.cache_slots(kind, capacity)
        if slots == capacity or positions == 1:
            return slots
        row = slots + positions
        return plain_pairs(queries, row - queries, row, kind.window) / queries

    kinds = [config.kind_of(i) for i in range(config.num_layers)]
    of_layer = [attended(kind, positions) for kind in kinds]
    return dict(attended=of_layer, output_attended=attended(kinds[-1], 1))


def scoring_flops(
    policy: ModelConfig,
    value: ModelConfig | None,
    reward: ModelConfig | None,
    *,
    sequences: int,
    prompt_length: int,
    response_length: int,
    logits_chunk: int = 0,
    policy_passes: int = 1,
    platform: str | None = None,
    trunks: Sequence[int] = (0, 0, 0),
    value_outputs: int = 1,
    num_critics: int = 1,
    samples: int = 1,
) -> float:
    """Reference and critic over P + T - 1 positions, with T outputs; the reward model over P + T,
    with one.

    Args:
        policy: the policy and its reference.
        value: the critic; None without one.
        reward: the reward model; None where scores come from outside.
        policy_passes: 2 where the policy's log-probs are computed as well as the reference's.
        trunks: how many lowest layers of each of the three the rollout has computed.
        value_outputs: what the critic gives for a position.
        num_critics: how many there are.
        samples: responses that share their prompt, see `rows_of`.
    """
    length, logits = prompt_length + response_length, padded_outputs(response_length, logits_chunk)
    passes = [(policy, length - 1, response_length, "logits", trunks[0])] * policy_passes
    passes += [(value, length - 1, response_length, value_outputs, trunks[1])] * num_critics
    passes.append((reward, length, 1, "scalar", trunks[2]))
    shared = dict(sequences=sequences, prompt_length=prompt_length, samples=samples)
    return sum(
        forward_flops(
            config,
            **vars(rows_of(config, platform, positions=positions, outputs=outputs, **shared)),
            head=head,
            platform=platform,
            num_layers=config.num_layers - trunk,
            logits=samples * logits if head == "logits" else None,
        )
        for config, positions, outputs, head, trunk in passes
        if config is not None
    )


def score_flops(config: ModelConfig, texts: int, width: int, platform: str | None) -> float:
    """One score for each of some texts of so many tokens, by a reward model that reads tokens."""
    return forward_flops(
        config,
        sequences=texts,
        positions=width,
        attended=by_layer(config, lambda w: attended_in_row(config, width, platform, w)),
        outputs=1,
        head="scalar",
        platform=platform,
    )


def update_flops(
    policy: ModelConfig,
    value: ModelConfig | None,
    *,
    sequences: int,
    prompt_length: int,
    response_length: int,
    num_epochs: int,
    value_updates: int = 1,
    logits_chunk: int = 0,
    platform: str | None = None,
    trained: Sequence[TrainedParts] = (ALL, ALL),
    value_outputs: int = 1,
    num_critics: int = 1,
    samples: Sequence[int] = (1, 1),
    again: bool = True,
) -> float:
    """num_epochs x (training of the policy + value_updates x training of the critic) over P + T - 1
    positions.

    The same for any number of minibatches and micro-batches. Logits in chunks are computed again in
    the backward pass, and scores of long rows: what is counted with `again`. `trained` is of policy
    and critic, and so are `samples`, the responses that share their prompt, see `rows_of`.
    """
    positions = prompt_length + response_length - 1
    training = functools.partial(
        training_flops, sequences=sequences, positions=positions, platform=platform, again=again
    )
    training = functools.partial(training, outputs=response_length, prompt_length=prompt_length)
    logits = padded_outputs(response_length, logits_chunk)
    total = training(policy, head="logits", trained=trained[0], samples=samples[0], logits=logits)
    if value is not None:
        critic = dict(head=value_outputs, trained=trained[1], samples=samples[1])
        total += num_critics * value_updates * training(value, **critic)
    if again and in_chunks(response_length, logits_chunk):
        total += sequences * logits * head_flops(policy, "logits")
    return num_epochs * total


def in_chunks(response_length: int, logits_chunk: int) -> bool:
    """Whether the logits of fewer than T positions are computed at a time; 0 is of all."""
    return 0 < logits_chunk < response_length


def padded_outputs(response_length: int, logits_chunk: int) -> int:
    """Positions that have logits: T, padded to whole chunks."""
    if not in_chunks(response_length, logits_chunk):
        return response_length
    return math.prod(chunk_shape(response_length, logits_chunk))
