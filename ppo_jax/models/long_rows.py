"""Plain attention of many queries, block by block: its memory grows with the length of a row, not
with its square.

Dimension key: B sequences, S queries, C keys, n blocks of b queries, E keys that a block reads, H
heads, G key/value heads, R = H / G queries per key, N = R b, K head size.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from ppo_jax.core.distributions import chunk_shape

LONG = 80  # queries, from which on blocks are faster; they need less memory, too
BLOCK = 64  # queries
MAX_CUTS = 4  # each is one more loop to compile
# Of scores: a query that attends to nothing gives an average, or 0, not NaN.
FLOOR = float(jnp.finfo(jnp.float32).min)


class CausalRows(struct.PyTreeNode):
    """Queries attend to themselves and to earlier real positions of their row, with `segments` to
    those of their own segment, with a `window` to so many places, their own included. They are
    those from `first` on, or at `positions`."""

    mask: jax.Array  # [B, C] bool
    segments: jax.Array | None = None  # [B, C] int
    positions: jax.Array | None = None  # [B, S] int
    first: int | None = struct.field(pytree_node=False, default=0)  # None: at any positions
    window: int = struct.field(pytree_node=False, default=0)

    def of(self, first: int, positions: jax.Array | None) -> "CausalRows":
        """Those of these queries from `first` on, or at `positions`."""
        if positions is None:
            return self.replace(first=self.first + first)
        return self.replace(first=None, positions=positions + self.first)

    def of_queries(self, num_queries: int) -> tuple[jax.Array, ...]:
        """(slots [B, S], with segments also these [B, S])."""
        slots_BS = self.positions
        if slots_BS is None:
            slots_S = self.first + jnp.arange(num_queries, dtype=jnp.int32)
            slots_BS = jnp.broadcast_to(slots_S, (len(self.mask), num_queries))
        if self.segments is None:
            return (slots_BS,)
        return slots_BS, jnp.take_along_axis(self.segments, slots_BS, axis=1)

    def allowed(self, of_block: tuple[jax.Array, ...], keys: "Keys") -> jax.Array:
        """[B, b, E] bool, of what `of_queries` has of b queries."""
        slots_Bb, *segments_Bb = of_block
        keys_11E = keys.start + jnp.arange(keys.count, dtype=jnp.int32)[None, None]
        allowed_BbE = keys_11E <= slots_Bb[:, :, None]
        allowed_BbE &= keys.of(self.mask, axis=1)[:, None]
        if self.window:
            allowed_BbE &= keys_11E > slots_Bb[:, :, None] - self.window
        for own_Bb in segments_Bb:
            allowed_BbE &= own_Bb[:, :, None] == keys.of(self.segments, axis=1)[:, None]
        return allowed_BbE


class GivenPairs(struct.PyTreeNode):
    """As `CausalRows`, for an array [B, S, C] bool that says which keys a query attends to."""

    mask: jax.Array
    first = None
    window = 0

    def of_queries(self, num_queries: int) -> jax.Array:
        return self.mask

    def allowed(self, of_block: jax.Array, keys: "Keys") -> jax.Array:
        return keys.of(of_block, axis=2)


class Keys(NamedTuple):
    """Those that a block of queries reads, one after another."""

    start: Any  # int, or an array [] int32 where each block of a loop has its own
    count: int

    @property
    def move(self) -> bool:
        return isinstance(self.start, jax.Array)

    def of(self, x: jax.Array, axis: int) -> jax.Array:
        if self.move:
            return jax.lax.dynamic_slice_in_dim(x, self.start, self.count, axis)
        return jax.lax.slice_in_dim(x, self.start, self.start + self.count, axis=axis)

    def add(self, sums: jax.Array, x_BGEK: jax.Array) -> jax.Array:
        """To sums of these keys; where they move, to those of all keys in their place."""
        if not self.move:
            return sums + x_BGEK
        moved = self.of(sums, axis=2) + x_BGEK
        return jax.lax.dynamic_update_slice_in_dim(sums, moved, self.start, axis=2)


class Cut(NamedTuple):
    """Blocks of queries that are one loop, and how many keys each of them reads."""

    begin: int
    end: int
    count: int
    starts: tuple[int, ...]  # the first key of each block, or one for all

    @property
    def moves(self) -> bool:
        return len(self.starts) > 1


def cuts(num_queries: int, first: int | None, num_keys: int, window: int = 0) -> list[Cut]:
    """The blocks of queries that read so many keys.

    Queries in the order of a row, its position `first` and those that follow, need no keys behind
    the last of them. Of whole rows of many blocks that leaves 5/8 of all pairs. Queries at any
    positions (None) read all keys.

    Within a `window` they need no keys far before them, either. Where that is less, each block has
    keys of its own, and pairs are as many as queries times the window and a block.

    >>> [cut[:3] for cut in cuts(1024, 0, 1024)]
    [(0, 4, 256), (4, 8, 512), (8, 12, 768), (12, 16, 1024)]
    >>> [(cut[:3], cut.starts[:4]) for cut in cuts(1024, 0, 1024, window=65)]
    [((0, 16, 128), (0, 0, 64, 128))]
    """
    blocks, size = chunk_shape(num_queries, BLOCK)
    if first is None:
        return [Cut(0, blocks, num_keys, (0,))]
    parts = min(blocks, MAX_CUTS)
    ends = [blocks * (i + 1) // parts for i in range(parts)]
    fixed = []
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        start = max(0, first + begin * size - window + 1) if window else 0
        fixed.append(Cut(begin, end, min(num_keys, first + end * size) - start, (start,)))
    count = min(num_keys, size + window - 1)
    befores = (first + i * size - window + 1 for i in range(blocks))
    starts = tuple(min(max(0, before), num_keys - count) for before in befores)
    moving = [Cut(0, blocks, count, starts)]
    return moving if window and pairs_of(moving, size) < pairs_of(fixed, size) else fixed


def pairs_of(parts: list[Cut], size: int) -> int:
    """Scores of blocks of so many queries."""
    return sum((part.end - part.begin) * size * part.count for part in parts)


def num_pairs(
    num_queries: int, first: int | None, num_keys: int, window: int = 0, *, in_loops: bool = False
) -> int:
    """Scores that are computed of a head; `in_loops` those of several blocks with the same keys,
    which are one loop. XLA finds the scores of single blocks in the forward pass, and the backward
    pass does not compute them again."""
    size, parts = chunk_shape(num_queries, BLOCK)[1], cuts(num_queries, first, num_keys, window)
    return pairs_of([p for p in parts if p.end - p.begin > 1 or not in_loops], size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend_in_blocks(
    q_BSHK, k_BGCK, v_BGCK, pairs: CausalRows | GivenPairs, score_cap: float = 0.0
) -> jax.Array:
    """`attention.attend`, [B, S, H, K], a block of queries at a time.

    The forward pass keeps outputs and normalizers, and the backward pass computes the probabilities
    again: p = exp(q k' / √K - normalizer), of rows up to `MAX_CUTS` blocks from scores that XLA
    keeps. The output of a query that attends to nothing is 0.
    Reverse mode only: `jax.jvp` is refused.
    """
    return _forward(q_BSHK, k_BGCK, v_BGCK, pairs, score_cap)[0]


def _forward(q_BSHK, k_BGCK, v_BGCK, pairs, score_cap):
    S = q_BSHK.shape[1]
    scores_of = _scores_of(q_BSHK, k_BGCK, pairs, score_cap)

    def attend_block(keys, kv, _, block):
        (k_BGEK, v_BGEK), (q_BGNK, of_block) = kv, block
        scores_BGNE = scores_of(q_BGNK, k_BGEK, of_block, keys)
        top_BGN = scores_BGNE.max(axis=-1)
        exp_BGNE = jnp.exp(scores_BGNE - top_BGN[..., None])
        sum_BGN = exp_BGNE.sum(axis=-1)
        output_BGNK = _product("BGNE,BGEK->BGNK", exp_BGNE.astype(v_BGEK.dtype), v_BGEK)
        none_BGN = top_BGN == FLOOR  # not of NaN, which is to be seen
        output_BGNK = jnp.where(none_BGN[..., None], 0.0, output_BGNK / sum_BGN[..., None])
        normalizer_BGN = jnp.where(none_BGN, jnp.inf, top_BGN + jnp.log(sum_BGN))
        return None, (output_BGNK.astype(v_BGEK.dtype), normalizer_BGN)

    of_queries = _blocks_of(pairs.of_queries(S), S)
    blocks = _grouped_blocks(q_BSHK, k_BGCK), of_queries
    outputs = []
    for cut in cuts(S, pairs.first, k_BGCK.shape[2], pairs.window):
        outputs.append(_loop(attend_block, cut, (k_BGCK, v_BGCK), None, blocks)[1])
    output_nBGNK, normalizer_nBGN = (jnp.concatenate(x) for x in zip(*outputs, strict=True))
    output_BSHK = _rows_of(output_nBGNK, S)
    return output_BSHK, (q_BSHK, k_BGCK, v_BGCK, pairs, output_BSHK, normalizer_nBGN)


def _backward(score_cap, saved, g_BSHK):
    q_BSHK, k_BGCK, v_BGCK, pairs, output_BSHK, normalizer_nBGN = saved
    S, K = q_BSHK.shape[1], q_BSHK.shape[3]
    scores_of = _scores_of(q_BSHK, k_BGCK, pairs, score_cap)
    dtype = q_BSHK.dtype
    mean_BSH1 = _wide(g_BSHK * _wide(output_BSHK)).sum(axis=-1, keepdims=True)

    def block_gradient(keys, kv, sums, block):
        (k_BGEK, v_BGEK), (q_BGNK, g_BGNK, mean_BGN1, normalizer_BGN, of_block) = kv, block
        scores_BGNE = scores_of(q_BGNK, k_BGEK, of_block, keys)
        probs_BGNE = jnp.exp(scores_BGNE - normalizer_BGN[..., None])
        of_probs_BGNE = _product("BGNK,BGEK->BGNE", g_BGNK, v_BGEK)
        of_scores_BGNE = probs_BGNE * (of_probs_BGNE - mean_BGN1) / math.sqrt(K)
        if score_cap:  # a score that is masked has p = 0
            of_scores_BGNE *= slope_of_cap(jnp.maximum(scores_BGNE, -score_cap), score_cap)
        of_scores_BGNE = of_scores_BGNE.astype(dtype)
        of_q_BGNK = _product("BGNE,BGEK->BGNK", of_scores_BGNE, k_BGEK)
        of_k_BGEK = _product("BGNE,BGNK->BGEK", of_scores_BGNE, q_BGNK)
        of_v_BGEK = _product("BGNE,BGNK->BGEK", probs_BGNE.astype(dtype), g_BGNK)
        sums = keys.add(sums[0], of_k_BGEK), keys.add(sums[1], of_v_BGEK)
        return sums, of_q_BGNK.astype(dtype)

    grouped = (_grouped_blocks(x, k_BGCK) for x in (q_BSHK, g_BSHK, mean_BSH1))
    blocks = *grouped, normalizer_nBGN, _blocks_of(pairs.of_queries(S), S)
    kv, of_q = (k_BGCK, v_BGCK), []
    of_keys = tuple(jnp.zeros(x.shape, jnp.float32) for x in kv)
    for cut in cuts(S, pairs.first, k_BGCK.shape[2], pairs.window):
        read = slice(cut.starts[0], cut.starts[0] + cut.count)
        sums = of_keys if cut.moves else tuple(jnp.zeros_like(x[:, :, read]) for x in of_keys)
        sums, of_blocks = _loop(block_gradient, cut, kv, sums, blocks)
        of_q.append(of_blocks)
        if not cut.moves:
            sums = tuple(x.at[:, :, read].add(y) for x, y in zip(of_keys, sums, strict=True))
        of_keys = sums
    of_q_BSHK = _rows_of(jnp.concatenate(of_q), S)
    return of_q_BSHK, of_keys[0].astype(k_BGCK.dtype), of_keys[1].astype(v_BGCK.dtype), None


attend_in_blocks.defvjp(_forward, _backward)


def scaled_scores(q_BGNK, k_BGCK, score_cap):
    """q k' / √K in float32, [B, G, N, C]; with a cap c, c tanh(score / c)."""
    scores_BGNC = _product("BGNK,BGCK->BGNC", q_BGNK, k_BGCK) / math.sqrt(q_BGNK.shape[-1])
    return score_cap * jnp.tanh(scores_BGNC / score_cap) if score_cap else scores_BGNC


def slope_of_cap(scores, score_cap):
    """The derivative of a score with a cap by the one without: 1 - (score / c)^2."""
    return 1 - jnp.square(scores / score_cap)


def _scores_of(q_BSHK, k_BGCK, pairs, score_cap):
    """A function of a block of queries, keys, what `pairs` says of the queries, and which keys they
    are: [B, G, N, E] float32, `FLOOR` where a query does not attend to a key."""
    repeats = q_BSHK.shape[2] // k_BGCK.shape[1]

    def scores_of(q_BGNK, k_BGEK, of_block, keys):
        scores_BGNE = scaled_scores(q_BGNK, k_BGEK, score_cap)
        allowed_BbE = pairs.allowed(of_block, keys)
        B, G, N, E = scores_BGNE.shape
        scores_BGRbE = scores_BGNE.reshape(B, G, repeats, N // repeats, E)
        scores_BGRbE = jnp.where(allowed_BbE[:, None, None], scores_BGRbE, FLOOR)
        return scores_BGRbE.reshape(B, G, N, E)

    return scores_of


def _loop(body: Callable, cut: Cut, kv: Any, carry: Any, blocks: Any) -> tuple[Any, Any]:
    """`jax.lax.scan` of body(keys, their part of `kv`, carry, block) over the blocks of a cut; of
    one block without a loop."""
    fixed = Keys(cut.starts[0], cut.count)
    body_of = functools.partial(body, fixed, tuple(fixed.of(x, axis=2) for x in kv))
    if cut.end - cut.begin == 1:
        carry, output = body_of(carry, jax.tree.map(lambda x: x[cut.begin], blocks))
        return carry, jax.tree.map(lambda x: x[None], output)
    blocks = jax.tree.map(lambda x: x[cut.begin : cut.end], blocks)
    if not cut.moves:
        return jax.lax.scan(body_of, carry, blocks)

    def moved(carry, block):
        start, block = block
        keys = Keys(start, cut.count)
        return body(keys, tuple(keys.of(x, axis=2) for x in kv), carry, block)

    return jax.lax.scan(moved, carry, (jnp.asarray(cut.starts, jnp.int32), blocks))


def _product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _blocks_of(tree: Any, num_queries: int) -> Any:
    """[B, S, ...] -> [n, B, b, ...], padded with zeros."""
    count, size = chunk_shape(num_queries, BLOCK)

    def split(x):
        padding = [(0, 0), (0, count * size - num_queries)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, padding).reshape(-1, count, size, *x.shape[2:]).swapaxes(0, 1)

    return jax.tree.map(split, tree)


def _grouped_blocks(x_BSHK, k_BGCK):
    """[n, B, G, N, K]."""
    blocks_nBbHK = _blocks_of(x_BSHK, x_BSHK.shape[1])
    return jax.vmap(lambda x: by_group(x, k_BGCK.shape[1]))(blocks_nBbHK)


def _rows_of(x_nBGNK, num_queries):
    """The inverse of `_grouped_blocks`, [B, S, H, K]."""
    size = chunk_shape(num_queries, BLOCK)[1]
    blocks_nBbHK = jax.vmap(lambda x: by_position(x, size))(x_nBGNK)
    _, B, _, H, K = blocks_nBbHK.shape
    return blocks_nBbHK.swapaxes(0, 1).reshape(B, -1, H, K)[:, :num_queries]


def by_group(x_BSHK, num_groups):
    """[B, G, R S, K]: with the queries of a group side by side each product is one of matrices,
    whose result a CPU need not transpose number by number."""
    B, S, H, K = x_BSHK.shape
    x_BSGRK = x_BSHK.reshape(B, S, num_groups, H // num_groups, K)
    return x_BSGRK.transpose(0, 2, 3, 1, 4).reshape(B, num_groups, -1, K)


def by_position(x_BGNK, num_positions):
    """The inverse of `by_group`."""
    B, G, N, K = x_BGNK.shape
    x_BGRSK = x_BGNK.reshape(B, G, N // num_positions, num_positions, K)
    return x_BGRSK.transpose(0, 3, 1, 2, 4).reshape(B, num_positions, -1, K)
