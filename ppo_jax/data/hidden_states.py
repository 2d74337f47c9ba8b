"""Inputs of a network from a data set: tokens, or the hidden states of a frozen trunk.

The states of each text are computed once and kept without padding; a batch pads them again.
A row of packed texts (see `packing`) counts as a text here.
Dimension key: N texts, L positions, D model.
"""

from collections.abc import Callable, Iterator

import jax
import numpy as np

from ppo_jax.core.network import Network
from ppo_jax.core.types import Params
from ppo_jax.data.encode import TokenizedTexts
from ppo_jax.distributed.layout import Layout, one_device

MULTIPLE = 16  # batches are as wide as their longest text, rounded up: few compiled shapes
TRUNK_BATCH = 32  # texts at a time

Rows = np.ndarray
Inputs = Callable[[Rows, int], jax.Array]


def make_inputs(
    texts: TokenizedTexts,
    trunk: Network | None,
    trunk_params: Params | None,
    *,
    cache_gb: float,
    layout: Layout | None = None,
    used: Rows | None = None,
) -> Inputs:
    """A function (rows [N], width L) -> inputs of these texts: [N, L] or [N, L, D].

    Args:
        texts: N of them.
        trunk: the frozen layers, or None where the network reads tokens.
        trunk_params: on the devices.
        cache_gb: the states of all texts are kept where they fit into this much memory; otherwise,
            and with several processes, the trunk runs for each batch.
        layout: of the trunk's batches, whose rows it divides.
        used: the rows that will be asked for; None is all.
    """
    if trunk is None:
        return lambda rows, width: texts.tokens[rows, :width]
    run = jax.jit(trunk.apply)

    def compute(rows, width):
        segment_ids = None if texts.segment_ids is None else texts.segment_ids[rows, :width]
        batch = (texts.tokens[rows, :width], texts.mask[rows, :width], segment_ids)
        tokens, mask, segment_ids = layout.shard_batch(batch)
        return run(trunk_params, tokens, mask, segment_ids=segment_ids)

    shape = jax.eval_shape(trunk.apply, trunk_params, texts.tokens[:1], texts.mask[:1])
    used = np.arange(len(texts.mask)) if used is None else np.unique(used)
    gigabytes = texts.mask[used].sum() * shape.shape[-1] * shape.dtype.itemsize / 1e9
    if gigabytes > cache_gb or jax.process_count() > 1:
        return compute
    states = {row: kept.copy() for row, kept in text_states(texts, used, compute, layout)}

    def look_up(rows, width):
        out = np.zeros((len(rows), width, shape.shape[-1]), shape.dtype)
        for i, row in enumerate(rows):
            out[i, : len(states[row])] = states[row]
        return out

    return look_up


def text_states(
    texts: TokenizedTexts, used: Rows, compute: Inputs, layout: Layout | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """(row, the trunk's states [its length, D]) of each used text, sorted by length.

    `compute` is (rows [N], width L) -> states [N, L, D]; without a layout it is the first device's.
    """
    lengths, layout = texts.mask.sum(axis=1), layout or one_device()
    order = used[np.argsort(lengths[used], kind="stable")]
    for begin in range(0, len(order), TRUNK_BATCH):
        # The last batch is padded with its own first row, so that no new shape is compiled.
        rows = order[begin : begin + TRUNK_BATCH]
        padded = layout.pad_batch(rows, TRUNK_BATCH)
        hidden = np.asarray(compute(padded, batch_width(texts, rows)))
        for i, row in enumerate(rows):
            yield row, hidden[i, : lengths[row]]


def batch_width(texts: TokenizedTexts, rows: Rows) -> int:
    """Positions that a batch of these texts needs."""
    longest = int(texts.mask[rows].sum(axis=1).max())
    return min(-(-longest // MULTIPLE) * MULTIPLE, texts.mask.shape[1])
