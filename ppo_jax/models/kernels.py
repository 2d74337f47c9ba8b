"""Self-attention without a cache, by the platform's fused kernel where there is one.

A fused kernel never holds the scores of all pairs of positions: its memory is linear in the length
of a row. Only `kernel_of` knows which platform has which.

Dimension key: B sequences, L positions, N positions padded to whole blocks, H heads,
G key/value heads, K head size.
"""

import functools
import math

import jax
import jax.numpy as jnp

from ppo_jax.core.shared_prompts import SharedPrompt
from ppo_jax.models.attention import AttentionFn, plain_attention
from ppo_jax.models.axes import ShardingConstraint
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.shared_prompts import SharedPromptAttention, share_prompts

LANES = 128  # of a TPU; block sizes are multiples of it
MAX_BLOCK = 512  # positions
MAX_HEAD_DIM = 256  # the largest head size with which such blocks fit into VMEM
ROWS = ("batch", None)
QUERIES = ("batch", None, "heads", None)
# Each device has the keys of its own queries, however the heads of a KV cache are sharded.
KEYS = ("batch", "heads", None, None)


def kernel_of(config: ModelConfig, platform: str | None, length: int, packed: bool = False) -> str:
    """The kernel for rows of `length`: "splash" (Pallas, TPUs), "cudnn" (GPUs) or "plain".

    The fused kernel of the platform, unless `config.attention` is "plain" or the kernel does not
    support such rows. `platform` is None without a mesh; `packed` rows hold several texts. Layers
    of all kinds have the same kernel.
    """
    if config.attention == "plain":
        return "plain"
    if platform == "tpu" and splash_supports(config, length):
        return "splash"
    if platform == "gpu" and not packed and cudnn_supports(config, length):
        return "cudnn"
    return "plain"


def make_attention(
    config: ModelConfig,
    constrain: ShardingConstraint,
    mask: jax.Array,
    segments: jax.Array | None,
    shared: SharedPrompt | None = None,
    *,
    window: int = 0,
) -> AttentionFn | SharedPromptAttention:
    """The attention of every layer in a call without a cache.

    `mask` is [B, L] bool, True on real positions; `segments` is [B, L] int32 or None, `shared` the
    shape of joined rows, see `core.network.Network`. With a `window` a position attends to so many
    places, its own included.
    """
    if shared is not None:
        apart = make_attention(config, constrain, shared.split(mask), None, window=window)
        return share_prompts(apart, mask, shared, window)
    how = dict(constrain=constrain, window=window if window < mask.shape[1] else 0)
    match kernel_of(config, constrain.platform, mask.shape[1], segments is not None):
        case "splash":
            segments = jnp.where(mask, 1 if segments is None else segments, 0)
            how |= dict(score_cap=config.score_cap)
            return AttentionFn(segments, functools.partial(splash_attention, **how))
        case "cudnn":
            return AttentionFn(left_align(mask), functools.partial(cudnn_attention, **how))
    return plain_attention(mask, segments, window, config.score_cap)


def shard_kernel(constrain, kernel, q_BLHK, k_BGLK, v_BGLK, *masks):
    """A kernel is one call that XLA cannot partition: each device makes its own, for its heads."""
    local = constrain.shard_shape(QUERIES, q_BLHK.shape)[2]
    num_shards, heads = q_BLHK.shape[2] // local, k_BGLK.shape[1]
    # With fewer key heads than shards, devices share them.
    repeats = math.lcm(num_shards, heads) // heads
    if repeats > 1:
        k_BGLK, v_BGLK = (jnp.repeat(x, repeats, axis=1) for x in (k_BGLK, v_BGLK))
    axes = QUERIES, KEYS, KEYS, *(ROWS[: x.ndim] for x in masks)
    return constrain.shard_map(kernel, axes, q_BLHK, k_BGLK, v_BGLK, *masks)


# --- TPU ------------------------------------------------------------------------------------------


def splash_supports(config: ModelConfig, length: int) -> bool:
    """Whether the TPU kernel supports the model, and rows of this length are worth it."""
    fits = config.head_dim <= MAX_HEAD_DIM and config.dtype in ("float32", "bfloat16")
    return fits and length >= LANES


def splash_blocks(length: int) -> tuple[int, int]:
    """(block size, number of blocks): the fewest that cover a row.

    >>> splash_blocks(511), splash_blocks(513), splash_blocks(1300)
    ((512, 1), (384, 2), (512, 3))
    """
    count = math.ceil(length / MAX_BLOCK)
    return LANES * math.ceil(length / count / LANES), count


def splash_pairs(length: int, window: int = 0) -> int:
    """Pairs of a query and a key that are computed: of whole blocks that have one in the mask.

    >>> splash_pairs(512), splash_pairs(1024) // 512**2, splash_pairs(2048, 512) // 512**2
    (262144, 3, 7)
    """
    block, count = splash_blocks(length)
    diagonals = min(count, 1 + math.ceil((window - 1) / block)) if window else count
    return block**2 * (count * diagonals - diagonals * (diagonals - 1) // 2)


def splash_attention(q_BLHK, k_BGLK, v_BGLK, segments_BL, *, constrain, window=0, score_cap=0.0):
    """[B, L, H, K], causal attention within segments, by the Pallas kernel for TPUs.

    Padding is segment 0 and attends to itself only. Blocks outside of a `window` are skipped.
    """
    kernel = functools.partial(_splash, window=window, score_cap=score_cap)
    return shard_kernel(constrain, kernel, q_BLHK, k_BGLK, v_BGLK, segments_BL)


def _splash(q_BLHK, k_BGLK, v_BGLK, segments_BL, *, window, score_cap):
    # Experimental in jax, and needed on TPUs only.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    _, length, heads, size = q_BLHK.shape
    block, count = splash_blocks(length)
    q_BHLK = (q_BLHK / math.sqrt(size)).astype(q_BLHK.dtype).swapaxes(1, 2)
    padding = count * block - length
    q_BHNK, k_BGNK, v_BGNK = (
        jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0))) for x in (q_BHLK, k_BGLK, v_BGLK)
    )
    segments_BN = jnp.pad(segments_BL, ((0, 0), (0, padding)))
    sides = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    whole = (count * block,) * 2
    mask = splash.LocalMask(whole, (window - 1, 0), 0) if window else splash.CausalMask(whole)
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(**dict.fromkeys(sides, block)),
        attn_logits_soft_cap=score_cap or None,
    )
    segment_ids = splash.SegmentIds(segments_BN, segments_BN)
    output_BHNK = jax.vmap(kernel)(q_BHNK, k_BGNK, v_BGNK, segment_ids)
    return output_BHNK[:, :, :length].swapaxes(1, 2)


# --- GPU ------------------------------------------------------------------------------------------


def cudnn_supports(config: ModelConfig, length: int) -> bool:
    """Whether jax finds a cuDNN kernel for this dtype, head size and GPU. None caps scores."""
    if config.score_cap:
        return False
    query, key = (
        jax.ShapeDtypeStruct((1, length, heads, config.head_dim), config.dtype)
        for heads in (config.num_heads, config.num_kv_heads)
    )
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    try:
        for window in {kind.window for kind in config.kinds}:
            jax.eval_shape(functools.partial(_cudnn, window=window), query, key, key, lengths)
    except (NotImplementedError, RuntimeError):
        return False
    return True


def left_align(mask_BL):
    """The permutation that moves real positions to the left, for cuDNN's row lengths.

    Returns (lengths [B] int32, at least 1; the stable permutation [B, L]; its inverse [B, L]).
    """
    lengths_B = mask_BL.sum(axis=1, dtype=jnp.int32)
    order_BL = jnp.argsort(~mask_BL, axis=1, stable=True)
    return jnp.maximum(lengths_B, 1), order_BL, jnp.argsort(order_BL, axis=1)


def cudnn_attention(q_BLHK, k_BGLK, v_BGLK, alignment, *, constrain, window=0):
    """[B, L, H, K], causal attention of real positions by cuDNN; 0 in padding.

    `alignment` is the result of `left_align`. A `window` counts real positions, which are its
    places where padding is on the sides of a row.
    """

    def on_device(q_BLHK, k_BGLK, v_BGLK, lengths_B, order_BL, inverse_BL):
        # Under vmap jax wants either all arguments of cuDNN to be batched, or none: this makes the
        # lengths batched wherever one is, and `zero_padding` all of them. XLA optimises it away.
        firsts = jnp.stack([x[:, 0, 0, 0] for x in (q_BLHK, k_BGLK, v_BGLK)])
        lengths_B = jnp.where((firsts == firsts).all(axis=0), lengths_B, lengths_B)
        real_BL = jnp.arange(order_BL.shape[1])[None] < lengths_B[:, None]

        def permute(x_BLHK, order_BL):
            return x_BLHK.at[jnp.arange(len(x_BLHK))[:, None], order_BL].get(
                unique_indices=True, mode="promise_in_bounds"
            )

        def zero_padding(x_BLHK):
            # The kernel's output beyond the end of a row is undefined, in gradients as well.
            return jnp.where(real_BL[:, :, None, None], x_BLHK, 0)

        qkv = q_BLHK, k_BGLK.swapaxes(1, 2), v_BGLK.swapaxes(1, 2)
        q, k, v = (zero_padding(permute(x, order_BL)) for x in qkv)
        return permute(zero_padding(_cudnn(q, k, v, lengths_B, window=window)), inverse_BL)

    return shard_kernel(constrain, on_device, q_BLHK, k_BGLK, v_BGLK, *alignment)


def _cudnn(q_BLHK, k_BLGK, v_BLGK, lengths_B, *, window):
    return jax.nn.dot_product_attention(
        q_BLHK,
        k_BLGK,
        v_BLGK,
        is_causal=True,
        query_seq_lengths=lengths_B,
        key_value_seq_lengths=lengths_B,
        local_window_size=(window - 1, 0) if window else None,
        implementation="cudnn",
    )
