"""The matrix products of our Transformer, counted from its shape: what a program should cost.

Floating-point operations, 2 for a multiplication and its addition. Elementwise operations, norms,
softmax and the optimizer are left out: together they are of lower order.

Dimension key: N sequences, S positions, C attended slots, O positions with an output, D model,
H heads, G key/value heads, K head size, F feed-forward, V vocabulary, P prompt tokens, T response
tokens.
"""

import math

from ppo_jax.attention_kernels import kernel_of, splash_blocks
from ppo_jax.chunks import chunk_shape
from ppo_jax.shapes import ModelConfig


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
    config: ModelConfig, *, sequences: int, positions: int, attended: float, outputs: int, head: str
) -> float:
    """N (S layers (projections + attention over C) + O head).

    Args:
        config: the model.
        sequences: N.
        positions: S, of each sequence.
        attended: C; without a cache see `attended_in_row`.
        outputs: O, the positions of a sequence that have logits or a value.
        head: "logits" or "scalar".
    """
    layer = projection_flops(config) + attention_flops(config, attended)
    return sequences * (positions * config.num_layers * layer + outputs * head_flops(config, head))


def recomputed_flops(
    config: ModelConfig, *, sequences: int, positions: int, attended: float
) -> float:
    """What the backward pass computes again, by the model's `remat`.

    N S layers times: nothing for "none"; the attention for "dots", which keeps the products with
    parameters; for "full" all but the layer's last product, which nobody asks for again:
    projections - 2 F D + attention.
    """
    c, attention = config, attention_flops(config, attended)
    whole = projection_flops(c) - 2 * c.mlp_dim * c.embed_dim + attention
    again = {"none": 0, "dots": attention, "full": whole}[c.remat]
    return sequences * positions * c.num_layers * again


def training_flops(
    config: ModelConfig,
    *,
    sequences: int,
    positions: int,
    outputs: int,
    head: str,
    platform: str | None = None,
) -> float:
    """Forward and backward of all parameters: 3 x forward + what is computed again.

    Each product y = x w costs two of the same size in the backward pass, dx = dy w' and
    dw = x' dy. The TPU kernel of attention needs 7 for its 2, as it keeps no scores.
    """
    attended = attended_in_row(config, positions, platform)
    where = dict(sequences=sequences, positions=positions, attended=attended)
    forward = forward_flops(config, outputs=outputs, head=head, **where)
    scores_again = 0.0
    if kernel_of(config, platform, positions) == "splash":
        scores_again = 1.5 * attention_flops(config, attended)
    again = recomputed_flops(config, **where)
    return 3 * forward + again + sequences * positions * config.num_layers * scores_again


def rollout_flops(
    policy: ModelConfig,
    *,
    sequences: int,
    prompt_length: int,
    response_length: int,
    samples_per_prompt: int = 1,
) -> int:
    """Prompts through the policy, then T single tokens, each over the whole cache of P + T slots.

    The worst case: the decode loop ends earlier when every row has stopped, and accelerators leave
    out blocks of the cache that hold nothing. Several samples of a
    prompt share its pass, which is over the prompt alone.
    """
    capacity = prompt_length + response_length
    where = dict(outputs=1, head="logits")
    prefill = forward_flops(
        policy,
        sequences=sequences // samples_per_prompt,
        positions=prompt_length,
        attended=capacity if samples_per_prompt == 1 else prompt_length,
        **where,
    )
    token = forward_flops(policy, sequences=sequences, positions=1, attended=capacity, **where)
    return prefill + response_length * token


def scoring_flops(
    policy: ModelConfig,
    value: ModelConfig,
    reward: ModelConfig | None,
    *,
    sequences: int,
    prompt_length: int,
    response_length: int,
    logits_chunk: int = 0,
    policy_passes: int = 1,
    platform: str | None = None,
) -> float:
    """Reference and critic over P + T - 1 positions, the reward model over P + T; T outputs each.

    Args:
        policy: the policy and its reference.
        value: the critic.
        reward: the reward model; None where scores come from outside.
        sequences: N.
        prompt_length: P.
        response_length: T.
        logits_chunk: see `filled_outputs`.
        policy_passes: 2 where the log-probs of the policy are computed beside the reference's.
        platform: see `attention_kernels.kernel_of`.
    """
    length = prompt_length + response_length
    total = 0
    for config, positions, head, chunk in (
        *[(policy, length - 1, "logits", logits_chunk)] * policy_passes,
        (value, length - 1, "scalar", 0),
        (reward, length, "scalar", 0),
    ):
        if config is not None:
            total += forward_flops(
                config,
                sequences=sequences,
                positions=positions,
                attended=attended_in_row(config, positions, platform),
                outputs=filled_outputs(response_length, chunk),
                head=head,
            )
    return total


def update_flops(
    policy: ModelConfig,
    value: ModelConfig,
    *,
    sequences: int,
    prompt_length: int,
    response_length: int,
    num_epochs: int,
    logits_chunk: int = 0,
    platform: str | None = None,
) -> float:
    """num_epochs x (training of the policy + training of the critic) over P + T - 1 positions.

    The same for any number of minibatches and micro-batches. All layers are trained. Logits in
    chunks are computed once more in the backward pass.
    """
    positions = prompt_length + response_length - 1
    where = dict(sequences=sequences, positions=positions, platform=platform)
    outputs = filled_outputs(response_length, logits_chunk)
    again = sequences * outputs * head_flops(policy, "logits") if logits_chunk else 0
    return num_epochs * (
        training_flops(policy, head="logits", outputs=outputs, **where)
        + again
        + training_flops(value, head="scalar", outputs=response_length, **where)
    )


def filled_outputs(response_length: int, logits_chunk: int) -> int:
    """Positions that have logits: T, filled up to whole chunks."""
    if not logits_chunk:
        return response_length
    return math.prod(chunk_shape(response_length, logits_chunk))
