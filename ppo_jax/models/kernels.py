"""Self-attention of whole rows, by the fused kernel of the platform where there is one.

No kernel holds scores of all pairs of positions, so that memory grows with the length of a row and
not with its square. `kernel_of` alone says which platform has which.

Dimension key: B sequences, L positions, N positions filled up to whole blocks, H heads,
G key/value heads, K head size.
"""

import functools
import math

import jax
import jax.numpy as jnp

from ppo_jax.models.attention import Sight, attend, visible
from ppo_jax.models.axes import ShardingConstraint
from ppo_jax.models.config import ModelConfig

LANES = 128  # of a TPU: blocks of positions are multiples of it
MOST = 512  # positions of a block
MOST_HEAD = 256  # numbers of a head with which such blocks still fit near the core
ROWS = ("batch", None)
QUERIES = ("batch", None, "heads", None)
# Each device has the keys of its own queries, however a mesh cuts the heads of a KV cache.
KEYS = ("batch", "heads", None, None)


def kernel_of(config: ModelConfig, platform: str | None, length: int, packed: bool = False) -> str:
    """What computes attention over whole rows: "splash" (Pallas, TPUs), "cudnn" (GPUs) or "plain".

    The kernel of the platform, unless `config.attention` asks for "plain" or the kernel does not
    take such rows.

    Args:
        config: the model's shape.
        platform: of the devices; None where no mesh says what they are.
        length: L.
        packed: whether several texts share a row.
    """
    if config.attention == "auto" and platform == "tpu" and splash_takes(config, length):
        return "splash"
    if (
        config.attention == "auto"
        and platform == "gpu"
        and not packed
        and cudnn_takes(config, length)
    ):
        return "cudnn"
    return "plain"


def choose_sight(
    config: ModelConfig, constrain: ShardingConstraint, mask: jax.Array, segments: jax.Array | None
) -> Sight:
    """Who sees whom in every layer of a call without a cache, for what computes attention there.

    Args:
        config: the model's shape.
        constrain: of the mesh, whose devices say what the platform is.
        mask: [B, L] bool, True on real positions.
        segments: [B, L] int32 or None, see `networks.Network`.
    """
    match kernel_of(config, constrain.platform, mask.shape[1], segments is not None):
        case "splash":
            texts = jnp.where(mask, 1 if segments is None else segments, 0)
            return Sight(texts, functools.partial(splash_attention, constrain=constrain))
        case "cudnn":
            return Sight(left_align(mask), functools.partial(cudnn_attention, constrain=constrain))
    return Sight(visible(mask, segments), attend)


def by_device(constrain, function, q_BLHK, k_BGLK, v_BGLK, *of_rows):
    """A kernel is one call that XLA cannot cut: each device makes its own, for its own heads."""
    local = constrain.piece(QUERIES, q_BLHK.shape)[2]
    pieces, heads = q_BLHK.shape[2] // local, k_BGLK.shape[1]
    # Fewer key heads than pieces: those of one device are also another's.
    repeats = math.lcm(pieces, heads) // heads
    if repeats > 1:
        k_BGLK, v_BGLK = (jnp.repeat(x, repeats, axis=1) for x in (k_BGLK, v_BGLK))
    axes = QUERIES, KEYS, KEYS, *(ROWS[: x.ndim] for x in of_rows)
    return constrain.by_device(function, axes, q_BLHK, k_BGLK, v_BGLK, *of_rows)


# --- TPU ------------------------------------------------------------------------------------------


def splash_takes(config: ModelConfig, length: int) -> bool:
    """Whether the TPU kernel takes such a model, and rows of this length are worth it."""
    fits = config.head_dim <= MOST_HEAD and config.dtype in ("float32", "bfloat16")
    return fits and length >= LANES


def splash_blocks(length: int) -> tuple[int, int]:
    """(positions of a block, number of blocks): the fewest that cover a row.

    >>> splash_blocks(511), splash_blocks(513), splash_blocks(1300)
    ((512, 1), (384, 2), (512, 3))
    """
    count = math.ceil(length / MOST)
    return LANES * math.ceil(length / count / LANES), count


def splash_attention(q_BLHK, k_BGLK, v_BGLK, texts_BL, *, constrain):
    """Causal attention within texts, by the Pallas kernel for TPUs.

    Args:
        q_BLHK: queries.
        k_BGLK: keys.
        v_BGLK: values.
        texts_BL: int32, the text of a position; 0 in padding, which sees itself alone.
        constrain: of the mesh.

    Returns:
        [B, L, H, K].
    """
    return by_device(constrain, _splash, q_BLHK, k_BGLK, v_BGLK, texts_BL)


def _splash(q_BLHK, k_BGLK, v_BGLK, texts_BL):
    # Experimental in jax, and not needed elsewhere.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    _, length, heads, size = q_BLHK.shape
    block, count = splash_blocks(length)
    q_BHLK = (q_BLHK / math.sqrt(size)).astype(q_BLHK.dtype).swapaxes(1, 2)
    fill = count * block - length
    q_BHNK, k_BGNK, v_BGNK = (
        jnp.pad(x, ((0, 0), (0, 0), (0, fill), (0, 0))) for x in (q_BHLK, k_BGLK, v_BGLK)
    )
    texts_BN = jnp.pad(texts_BL, ((0, 0), (0, fill)))
    sides = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([splash.CausalMask((count * block,) * 2)] * heads),
        block_sizes=splash.BlockSizes(**dict.fromkeys(sides, block)),
    )
    mixed_BHNK = jax.vmap(kernel)(q_BHNK, k_BGNK, v_BGNK, splash.SegmentIds(texts_BN, texts_BN))
    return mixed_BHNK[:, :, :length].swapaxes(1, 2)


# --- GPU ------------------------------------------------------------------------------------------


def cudnn_takes(config: ModelConfig, length: int) -> bool:
    """Whether cuDNN is there and has a kernel for this dtype, head size and GPU: jax says so."""
    query, key = (
        jax.ShapeDtypeStruct((1, length, heads, config.head_dim), config.dtype)
        for heads in (config.num_heads, config.num_kv_heads)
    )
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    try:
        jax.eval_shape(_cudnn, query, key, key, lengths)
    except (NotImplementedError, RuntimeError):
        return False
    return True


def left_align(mask_BL):
    """cuDNN takes rows by their lengths, so that real positions must come first, in their order.

    Returns:
        (lengths [B] int32, at least 1; the position [B, L] that comes to each place; the place
        [B, L] of each position).
    """
    lengths_B = mask_BL.sum(axis=1, dtype=jnp.int32)
    order_BL = jnp.argsort(~mask_BL, axis=1, stable=True)
    return jnp.maximum(lengths_B, 1), order_BL, jnp.argsort(order_BL, axis=1)


def cudnn_attention(q_BLHK, k_BGLK, v_BGLK, moves, *, constrain):
    """Causal attention of real positions, by cuDNN.

    Args:
        q_BLHK: queries.
        k_BGLK: keys.
        v_BGLK: values.
        moves: what `left_align` gives.
        constrain: of the mesh.

    Returns:
        [B, L, H, K]; 0 in padding.
    """

    def on_device(q_BLHK, k_BGLK, v_BGLK, lengths_B, order_BL, place_BL):
        # Under vmap jax wants either all arguments of cuDNN to be batched, or none: the lengths are
        # wherever one is, and with `real` so are all. XLA leaves nothing of it.
        firsts = jnp.stack([x[:, 0, 0, 0] for x in (q_BLHK, k_BGLK, v_BGLK)])
        lengths_B = jnp.where((firsts == firsts).all(axis=0), lengths_B, lengths_B)
        real_BL = jnp.arange(order_BL.shape[1])[None] < lengths_B[:, None]

        def moved(x_BLHK, where_BL):
            return x_BLHK.at[jnp.arange(len(x_BLHK))[:, None], where_BL].get(
                unique_indices=True, mode="promise_in_bounds"
            )

        def real(x_BLHK):
            # What the kernel leaves behind the end of a row is undefined, in gradients as well.
            return jnp.where(real_BL[:, :, None, None], x_BLHK, 0)

        q, k, v = (
            real(moved(x, order_BL)) for x in (q_BLHK, k_BGLK.swapaxes(1, 2), v_BGLK.swapaxes(1, 2))
        )
        return moved(real(_cudnn(q, k, v, lengths_B)), place_BL)

    return by_device(constrain, on_device, q_BLHK, k_BGLK, v_BGLK, *moves)


def _cudnn(q_BLHK, k_BLGK, v_BLGK, lengths_B):
    return jax.nn.dot_product_attention(
        q_BLHK,
        k_BLGK,
        v_BLGK,
        is_causal=True,
        query_seq_lengths=lengths_B,
        key_value_seq_lengths=lengths_B,
        implementation="cudnn",
    )
