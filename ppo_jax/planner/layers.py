"""Analytic flops of one layer, and of its attention the pairs of positions that are computed.

Dimension key as in `flops`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from ppo_jax.models.config import ModelConfig
from ppo_jax.models.kernels import kernel_of, splash_pairs
from ppo_jax.models.long_rows import LONG, num_pairs


def projection_flops(config: ModelConfig) -> tuple[int, ...]:
    """Products with parameters in each layer, for one position: 2 D (2 H K + 2 G K + m F), where m
    is 3 with a gate and 2 without.

    With experts F is that of the chosen ones, and the router has 2 D E.
    """
    c = config
    heads = 2 * c.num_heads * c.head_dim + 2 * c.num_kv_heads * c.head_dim
    rest = 2 * c.embed_dim * (heads + (3 if c.gated else 2) * c.mlp_dim)

    def of_layer(layer):
        if not c.has_experts(layer):
            return rest
        return expert_flops(c, layer) + 2 * c.embed_dim * (heads + c.experts.num_experts)

    return tuple(map(of_layer, range(c.num_layers)))


def expert_flops(config: ModelConfig, layer: int) -> int:
    """Products of a position with its experts, 6 D k F; 0 in a dense layer."""
    c = config
    if not c.has_experts(layer):
        return 0
    return 6 * c.embed_dim * c.experts.num_chosen * c.experts.dim


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
        return projection_flops(c)[-1], True
    keys, queries = (2 * c.embed_dim * n * c.head_dim for n in (2 * c.num_kv_heads, c.num_heads))
    fused = kernel_of(c, platform, positions) != "plain"
    return keys + fused * queries, fused


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
