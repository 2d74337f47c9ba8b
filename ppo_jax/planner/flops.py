"""Analytic flops of our Transformer: what a program should cost by the shape of its models.

2 for a multiplication and its addition. Elementwise operations, norms, softmax and the optimizer
are left out: together they are of lower order.

Dimension key: N sequences, S positions, C attended positions, O positions with an output, D model,
H heads, G key/value heads, K head size, F feed-forward, E experts, k of a token, V vocabulary, P
prompt tokens, T response tokens.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

from ppo_jax.core.distributions import chunk_shape
from ppo_jax.models.config import NORMS, ModelConfig
from ppo_jax.planner.layers import (
    attended_in_cache,
    attended_in_row,
    attention_flops,
    by_layer,
    everywhere_flops,
    expert_flops,
    head_flops,
    projection_flops,
    rows_of,
    scores_again,
)
from ppo_jax.rollout.continuous_batching import DECODING, REFILLS, max_trip_counts
from ppo_jax.rollout.decode import max_steps


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
    products, attended = (x[c.num_layers - depth :] for x in (projection_flops(c), every))
    if output_attended is None:
        output_attended = attended[-1] if depth else 0
    attention = [attention_flops(c, count) for count in attended]
    at_outputs = outputs, attention_flops(c, output_attended)
    everywhere = everywhere_flops(c, length or positions, platform)
    layers = untrained_flops(positions, products, attention, at_outputs, everywhere)
    return sequences * (layers + (logits or outputs) * head_flops(c, head))


def untrained_flops(
    positions: int,
    products: Sequence[int],
    attention: Sequence[float],
    at_outputs: tuple[int, float],
    everywhere: tuple[int, bool],
) -> float:
    """Some layers of one sequence, where the last is read at its outputs.

    Args:
        positions: S.
        products: of each layer, for one position.
        attention: of each, for one.
        at_outputs: (O, the attention of one of them).
        everywhere: see `everywhere_flops`.
    """
    if not products:
        return 0
    (outputs, attention_there), (keys, attends) = at_outputs, everywhere
    whole = sum(products[:-1]) + sum(attention[:-1]) + keys + attends * attention[-1]
    return positions * whole + outputs * (products[-1] - keys + (not attends) * attention_there)


# --- training -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedParts:
    """Which parts of a network have gradients; by default all of it."""

    trunk: int = 0  # the lowest layers: computed elsewhere
    frozen_layers: int = 0  # the lowest above them: forward only
    adapter_flops: int = 0  # of a layer, for one position; its kernels have no gradients then
    key_adapter_flops: int = 0  # of these, the keys' and values'
    head: bool = True  # the matrix of the outputs has


ALL = TrainedParts()


@dataclasses.dataclass(frozen=True)
class LayerFlops:
    """Of a layer, or of a part of it, for one position."""

    products: float  # with parameters
    attention: float
    adapters: float
    scores_again: float  # see `scores_again`
    experts: float = 0.0  # of the products

    def trained(self, config: ModelConfig, *, frozen: bool) -> float:
        """Forward and backward: 3 x forward + what is computed again - what has no gradient.

        By the model's `remat` the backward pass computes nothing again for "none"; for "dots",
        which keeps the products with parameters, the attention and the products of experts, for
        these are in loops or kernels; for "full" all, but for the layer's last product (2 F D),
        which only experts and a norm behind it need. Where attention keeps no scores its backward
        pass has `scores_again` of it more. With adapters the kernels below them are `frozen`.
        """
        again = {
            "none": 0,
            "dots": self.attention + self.experts,
            "full": self.products + self.attention,
        }[config.remat]
        flops = 3 * (self.products + self.attention + self.adapters) + again
        flops += self.scores_again * self.attention
        if frozen:
            flops += (self.adapters if config.remat == "full" else 0) - self.products
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
    c = config
    sizes = dict(sequences=sequences, positions=positions, outputs=outputs)
    rows = rows_of(c, platform, prompt_length=prompt_length, samples=samples, **sizes)
    attention = [attention_flops(c, count) for count in rows.attended]
    at_outputs = rows.outputs, attention_flops(c, rows.output_attended)
    depth = c.num_layers - trained.trunk - trained.frozen_layers
    everywhere, body = everywhere_flops(c, rows.length, platform), c.num_layers - depth
    if not depth:
        own = projection_flops(c)[trained.trunk :], attention[trained.trunk :]
        layers = untrained_flops(rows.positions, *own, at_outputs, everywhere)
    else:
        scores = by_layer(c, lambda window: again * scores_again(c, platform, rows.length, window))
        below = slice(trained.trunk, body)
        layers = rows.positions * (sum(projection_flops(c)[below]) + sum(attention[below]))
        own = rows.positions, attention, scores, at_outputs, everywhere
        layers += trained_layers_flops(c, body, trained, *own)
    # Two products: without its own gradient, or without that of a body that has no trained layers.
    head_products = 3 if trained.head and depth else 2
    head = (logits or sizes["outputs"]) * head_products * head_flops(c, head)
    return rows.sequences * layers + sequences * head


def trained_layers_flops(
    config: ModelConfig,
    begin: int,
    trained: TrainedParts,
    positions: int,
    attention: Sequence[float],
    scores: Sequence[float],
    at_outputs: tuple[int, float],
    everywhere: tuple[int, bool],
) -> float:
    """Forward and backward of the layers from `begin` on; arguments as `untrained_flops`, of all
    layers, and `scores_again` of each."""
    c, products, (outputs, attention_there) = config, projection_flops(config), at_outputs
    adapters, (keys, attends), last = trained.adapter_flops, everywhere, c.num_layers - 1
    of_keys = adapters if c.scan_layers else trained.key_adapter_flops
    experts = [expert_flops(c, i) for i in range(c.num_layers)]
    parts = [
        (positions, LayerFlops(products[i], attention[i], adapters, scores[i], experts[i]))
        for i in range(begin, last)
    ]
    experts_at_outputs = 0 if c.scan_layers else experts[last]
    rest = products[last] - keys, (not attends) * attention_there, adapters - of_keys
    parts.append((outputs, LayerFlops(*rest, scores[last], experts_at_outputs)))
    whole = keys, attends * attention[last], of_keys, scores[last]
    parts.append((positions, LayerFlops(*whole, experts[last] - experts_at_outputs)))
    flops = sum(count * part.trained(c, frozen=adapters > 0) for count, part in parts)
    if c.remat == "full" and not NORMS[c.residual][1]:  # which reads what the last product gives
        read = [positions] * last + [positions if c.scan_layers else outputs]
        dense = (i for i in range(begin, c.num_layers) if not c.has_experts(i))
        flops -= 2 * c.mlp_dim * c.embed_dim * sum(read[i] for i in dense)
    return flops


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
