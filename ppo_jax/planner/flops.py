"""The matrix products of our Transformer, counted from its shape: what a program should cost.

Floating-point operations, 2 for a multiplication and its addition. Elementwise operations, norms,
softmax and the optimizer are left out: together they are of lower order.

Dimension key: N sequences, S positions, C attended slots, O positions with an output, D model,
H heads, G key/value heads, K head size, F feed-forward, V vocabulary, P prompt tokens, T response
tokens.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

from ppo_jax.core.distributions import chunk_shape
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.kernels import kernel_of, splash_blocks
from ppo_jax.rollout.continuous_batching import FIRST, LATER, REFILLS, max_trip_counts


def projection_flops(config: ModelConfig) -> int:
    """Products with parameters in one layer, for one position: 2 D (2 H K + 2 G K + m F), where m
    is 3 with a gate and 2 without."""
    c = config
    heads = 2 * c.num_heads * c.head_dim + 2 * c.num_kv_heads * c.head_dim
    return 2 * c.embed_dim * (heads + (3 if c.mlp == "gated_silu" else 2) * c.mlp_dim)


def attention_flops(config: ModelConfig, attended: float) -> float:
    """Scores and their mix of values in one layer, for one position: 4 H K C.

    Over all C slots: masked ones are computed, too.
    """
    return 4 * config.num_heads * config.head_dim * attended


def adapter_flops(config: ModelConfig, targets: Sequence[str], rank: int) -> int:
    """Products with the adapters of one layer, for one position: 2 r (I + O) for each target."""
    c = config
    heads, groups = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    other = dict(query=heads, output=heads, key=groups, value=groups)  # its width besides D
    return 2 * rank * sum(c.embed_dim + other.get(name, c.mlp_dim) for name in targets)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """What of a network has gradients of its own; by default all of it."""

    trunk: int = 0  # the lowest layers: computed elsewhere
    frozen_layers: int = 0  # the lowest above them: forward alone
    adapters: int = 0  # flops of a layer's adapters for one position; its kernels have none then
    head: bool = True  # the matrix of the outputs has


ALL = Trained()


def attended_in_row(config: ModelConfig, length: int, platform: str | None) -> float:
    """C of a whole row of S positions, on average: S, or for the TPU kernel, which leaves out the
    blocks above the diagonal, N (N + b) / 2 S where it fills the row up to N in blocks of b."""
    if kernel_of(config, platform, length) != "splash":
        return length
    block, count = splash_blocks(length)
    filled = count * block
    return filled * (filled + block) / 2 / length


def head_flops(config: ModelConfig, head: str) -> int:
    """The output of one position: 2 D V for "logits", 2 D for a "scalar"."""
    return 2 * config.embed_dim * (config.vocab_size if head == "logits" else 1)


def forward_flops(
    config: ModelConfig,
    *,
    sequences: int,
    positions: int,
    attended: float,
    outputs: int,
    head: str,
    num_layers: int | None = None,
) -> float:
    """N (S layers (projections + attention over C) + O head).

    Args:
        config: the model.
        sequences: N.
        positions: S, of each sequence.
        attended: C; without a cache see `attended_in_row`.
        outputs: O, the positions of a sequence that have logits or a value.
        head: "logits" or "scalar".
        num_layers: those that are computed; None is all of the model.
    """
    depth = config.num_layers if num_layers is None else num_layers
    layer = projection_flops(config) + attention_flops(config, attended)
    return sequences * (positions * depth * layer + outputs * head_flops(config, head))


def recomputed_flops(config: ModelConfig, attended: float) -> float:
    """What the backward pass computes again of a layer, for one position, by the model's `remat`.

    Nothing for "none"; the attention for "dots", which keeps the products with
    parameters; for "full" all but the layer's last product, which nobody asks for again:
    projections - 2 F D + attention.
    """
    c, attention = config, attention_flops(config, attended)
    whole = projection_flops(c) - 2 * c.mlp_dim * c.embed_dim + attention
    return {"none": 0, "dots": attention, "full": whole}[c.remat]


def training_flops(
    config: ModelConfig,
    *,
    sequences: int,
    positions: int,
    outputs: int,
    head: str,
    platform: str | None = None,
    trained: Trained = ALL,
) -> float:
    """Forward and backward: 3 x forward + what is computed again - what has no gradient.

    Each product y = x w costs two of the same size in the backward pass, dx = dy w' and
    dw = x' dy; beside adapters kernels have no dw. Frozen layers below all that is trained have
    neither, but in a stack (`scan_layers`) that holds trained ones as well: XLA computes their
    gradients, too, and more than is counted here. The lowest layer of adapters needs a little less.
    The TPU kernel of attention needs 7 for its 2, as it keeps no scores.
    """
    c, of = config, trained
    attended = attended_in_row(c, positions, platform)
    where = dict(sequences=sequences, positions=positions, attended=attended, head=head)
    depth = c.num_layers - of.trunk - of.frozen_layers
    layers = sequences * positions * depth  # of all positions
    below = forward_flops(c, outputs=0, num_layers=of.frozen_layers, **where)
    forward = forward_flops(c, outputs=outputs, num_layers=depth, **where) + layers * of.adapters
    without = layers * projection_flops(c) if of.adapters else 0
    # Its own gradient, or that of a body without trained layers.
    if not of.head or depth == 0:
        without += sequences * outputs * head_flops(c, head)
    again = recomputed_flops(c, attended) + (of.adapters if c.remat == "full" else 0)
    if kernel_of(c, platform, positions) == "splash":
        again += 1.5 * attention_flops(c, attended)
    return below + 3 * forward - without + layers * again


def rollout_flops(
    policy: ModelConfig,
    *,
    sequences: int,
    prompt_length: int,
    response_length: int,
    samples_per_prompt: int = 1,
    slots: int = 0,
    group: int = 0,
) -> float:
    """Prompts through the policy, then T single tokens, each over the whole cache of P + T slots.

    With fewer `slots` than sequences, prompts that wait enter in groups, and each step is one of
    all slots: as many steps as `slots.max_trip_counts` has.

    The worst case: the decode loop ends earlier when every row has stopped, and accelerators leave
    out blocks of the cache that hold nothing. Several samples of a
    prompt share its pass, which is over the prompt alone.
    """
    capacity, at_once = prompt_length + response_length, slots or sequences
    prefill = functools.partial(
        forward_flops, policy, positions=prompt_length, outputs=1, head="logits"
    )
    first = prefill(
        sequences=at_once // samples_per_prompt,
        attended=capacity if samples_per_prompt == 1 else prompt_length,
    )
    token = forward_flops(
        policy, sequences=at_once, positions=1, attended=capacity, outputs=1, head="logits"
    )
    if at_once == sequences:
        return first + response_length * token
    turns = max_trip_counts(sequences, at_once, group, response_length)
    refill = prefill(sequences=group // samples_per_prompt, attended=prompt_length)
    later = turns[REFILLS] * (refill + turns[LATER] * token)
    return first + turns[FIRST] * token + later


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
) -> float:
    """Reference and critic over P + T - 1 positions, the reward model over P + T; T outputs each.

    Args:
        policy: the policy and its reference.
        value: the critic; None without one.
        reward: the reward model; None where scores come from outside.
        sequences: N.
        prompt_length: P.
        response_length: T.
        logits_chunk: see `filled_outputs`.
        policy_passes: 2 where the log-probs of the policy are computed beside the reference's.
        platform: see `attention_kernels.kernel_of`.
        trunks: of policy, critic and reward model the lowest layers that the rollout computed.
    """
    length = prompt_length + response_length
    total = 0
    for config, positions, head, chunk, trunk in (
        *[(policy, length - 1, "logits", logits_chunk, trunks[0])] * policy_passes,
        (value, length - 1, "scalar", 0, trunks[1]),
        (reward, length, "scalar", 0, trunks[2]),
    ):
        if config is not None:
            total += forward_flops(
                config,
                sequences=sequences,
                positions=positions,
                attended=attended_in_row(config, positions, platform),
                outputs=filled_outputs(response_length, chunk),
                head=head,
                num_layers=config.num_layers - trunk,
            )
    return total


def update_flops(
    policy: ModelConfig,
    value: ModelConfig | None,
    *,
    sequences: int,
    prompt_length: int,
    response_length: int,
    num_epochs: int,
    logits_chunk: int = 0,
    platform: str | None = None,
    trained: Sequence[Trained] = (ALL, ALL),
) -> float:
    """num_epochs x (training of the policy + training of the critic) over P + T - 1 positions.

    The same for any number of minibatches and micro-batches. Logits in chunks are computed once
    more in the backward pass. `trained` is what of policy and critic has gradients.
    """
    positions = prompt_length + response_length - 1
    where = dict(sequences=sequences, positions=positions, platform=platform)
    outputs = filled_outputs(response_length, logits_chunk)
    again = sequences * outputs * head_flops(policy, "logits") if logits_chunk else 0
    total = training_flops(policy, head="logits", outputs=outputs, trained=trained[0], **where)
    if value is not None:
        how = dict(head="scalar", outputs=response_length, trained=trained[1])
        total += training_flops(value, **how, **where)
    return num_epochs * (total + again)


def filled_outputs(response_length: int, logits_chunk: int) -> int:
    """Positions that have logits: T, filled up to whole chunks."""
    if not logits_chunk:
        return response_length
    return math.prod(chunk_shape(response_length, logits_chunk))
