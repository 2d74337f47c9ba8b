"""Inputs of a network from a data set: tokens, or the hidden states of a frozen trunk.

The states of each text are computed once and kept without padding; a batch pads them again.
A row of packed texts (see `packing`) counts as a text here.
Dimension key: N texts, L positions, D model.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import numpy as np

from ppo_jax.core.network import Network
from ppo_jax.core.types import Params
from ppo_jax.data.encode import TokenizedTexts
from ppo_jax.data.packing import pack
from ppo_jax.data.shared_states import SharedStates
from ppo_jax.distributed.layout import Layout, fetch, one_device

MULTIPLE = 16  # batches are as wide as their longest text, rounded up: few compiled shapes
TRUNK_BATCH = 32  # rows at a time
TRUNK_ROW = 64  # tokens; shorter texts share a row

Rows = np.ndarray
Inputs = Callable[[Rows, int], jax.Array]
# tokens, mask and segment_ids, or None for one text a row, each [N, L] -> states [N, L, D], or
# other outputs [N, L]
Trunk = Callable[[np.ndarray, np.ndarray, np.ndarray | None], jax.Array]


def make_inputs(
    texts: TokenizedTexts,
    trunk: Network | None,
    trunk_params: Params | None,
    *,
    cache_gb: float,
    context: int = TRUNK_ROW,
    layout: Layout | None = None,
    num_exits: int = 1,
    used: Rows | None = None,
    known: SharedStates | None = None,
    later: SharedStates | None = None,
) -> Inputs:
    """A function (rows [N], width L) -> inputs of these texts: [N, L] or [N, L, D].

    Args:
        texts: N of them.
        trunk: the frozen layers, or None where the network reads tokens.
        trunk_params: on the devices.
        cache_gb: the states of all texts are kept where they fit into this much memory; otherwise,
            and with several processes, the trunk runs for each batch.
        context: tokens that the model can read.
        layout: of the trunk's batches, whose rows it divides.
        num_exits: of the trunk, whose last is what the network reads.
        used: the rows that will be asked for; None is all.
        known: states after the trunk's last layer, which are not computed again; None is none.
        later: keeps the states after the trunk's first exit; None keeps none.
    """
    if trunk is None:
        return lambda rows, width: texts.tokens[rows, :width]
    run = jax.jit(trunk.apply)

    def states_of(tokens, mask, segment_ids):
        tokens, mask, segment_ids = layout.shard_batch((tokens, mask, segment_ids))
        return run(trunk_params, tokens, mask, segment_ids=segment_ids)

    shape = jax.eval_shape(trunk.apply, trunk_params, texts.tokens[:1], texts.mask[:1])
    size = shape.shape[-1] // num_exits
    used = np.arange(len(texts.mask)) if used is None else np.unique(used)
    gigabytes = texts.mask[used].sum() * shape.shape[-1] * shape.dtype.itemsize / 1e9
    if gigabytes > cache_gb or jax.process_count() > 1:
        if num_exits == 1:
            return lambda rows, width: states_of(*row_arrays(texts, rows, width))
        return lambda rows, width: states_of(*row_arrays(texts, rows, width))[..., -size:]
    states = {} if known is None else known.of(texts, used)
    unknown = np.array([row for row in used.tolist() if row not in states], int)
    for row, outputs in packed_outputs(texts, states_of, context, layout, unknown):
        states[row] = outputs if num_exits == 1 else outputs[:, -size:].copy()
        if later is not None:
            later.keep(texts, row, outputs[:, :size])

    def look_up(rows, width):
        out = np.zeros((len(rows), width, size), shape.dtype)
        for i, row in enumerate(rows):
            out[i, : len(states[row])] = states[row]
        return out

    return look_up


def packed_outputs(
    texts: TokenizedTexts,
    run: Trunk,
    context: int,
    layout: Layout | None = None,
    used: Rows | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """(row, what a network gives at its tokens [its length, ...]) of each used text, in no
    particular order. Short texts share rows.

    `context` is the tokens that the model can read. Without a layout it runs on the first device.
    `used` are the rows that are asked for; None is all.
    """
    layout, lengths = layout or one_device(), texts.mask.sum(axis=1)
    used = np.arange(len(texts.mask)) if used is None else used
    for source, rows, numbers, width in trunk_batches(texts, used, min(TRUNK_ROW, context)):
        # The last batch is padded with its own first row, so that no new shape is compiled; a few
        # long rows are not made many.
        few = source is texts and len(used) <= TRUNK_BATCH
        padded = layout.pad_batch(rows, 1 << (len(rows) - 1).bit_length() if few else TRUNK_BATCH)
        outputs = fetch(run(*row_arrays(source, padded, width)))[: len(rows)]
        of_texts = np.split(outputs[source.mask[rows, :width]], np.cumsum(lengths[numbers])[:-1])
        yield from zip(numbers.tolist(), of_texts, strict=True)


def trunk_batches(
    texts: TokenizedTexts, used: Rows, shared_row: int
) -> Iterator[tuple[TokenizedTexts, Rows, Rows, int]]:
    """(rows to read from, which of them, the texts in these one after the other, their width).

    Texts of at most `shared_row` tokens share rows of so many. Longer ones have one each, sorted by
    length: little of them is padding, and a kernel of whole rows does not pay for what it masks.
    """
    lengths = texts.mask.sum(axis=1)
    fits = (lengths[used] <= shared_row) & (texts.segment_ids is None)
    short, long = used[fits], used[~fits]
    if len(short):
        packed, texts_of_row = pack_some(texts, short, shared_row)
        for begin in range(0, len(texts_of_row), TRUNK_BATCH):
            numbers = texts_of_row[begin : begin + TRUNK_BATCH]
            rows = np.arange(begin, begin + len(numbers))
            yield packed, rows, np.concatenate(numbers), packed.mask.shape[1]
    order = long[np.argsort(lengths[long], kind="stable")]
    for begin in range(0, len(order), TRUNK_BATCH):
        rows = order[begin : begin + TRUNK_BATCH]
        yield texts, rows, rows, batch_width(texts, rows)


def pack_some(
    texts: TokenizedTexts, chosen: Rows, width: int
) -> tuple[TokenizedTexts, list[np.ndarray]]:
    """(R packed rows of some texts, which of them are in each); rows are at most `width` wide."""
    tokens, mask, loss_mask = (x[chosen] for x in (texts.tokens, texts.mask, texts.loss_mask))
    packed = pack(TokenizedTexts(tokens, mask, loss_mask, chosen), max_length=width)
    counts = packed.segment_ids.max(axis=1)
    wide = min(-(-packed.mask.shape[1] // MULTIPLE) * MULTIPLE, width)  # few compiled shapes
    room = ((0, 0), (0, wide - packed.mask.shape[1]))
    arrays = ("tokens", "mask", "loss_mask", "segment_ids")
    packed = dataclasses.replace(packed, **{x: np.pad(vars(packed)[x], room) for x in arrays})
    return packed, np.split(packed.records, np.cumsum(counts)[:-1])


def row_arrays(
    texts: TokenizedTexts, rows: Rows, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Tokens, mask and segment_ids of some rows, [N, width]."""
    segment_ids = None if texts.segment_ids is None else texts.segment_ids[rows, :width]
    return texts.tokens[rows, :width], texts.mask[rows, :width], segment_ids


def batch_width(texts: TokenizedTexts, rows: Rows) -> int:
    """Positions that a batch of these texts needs."""
    longest = int(texts.mask[rows].sum(axis=1).max())
    return min(-(-longest // MULTIPLE) * MULTIPLE, texts.mask.shape[1])
