"""The kernels of TPUs and GPUs compute what plain attention computes; where which is used."""

import functools
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from ppo_jax.models import attention, axes
from ppo_jax.models import kernels as attention_kernels
from ppo_jax.models.attention import attend, causal_mask, text_positions
from ppo_jax.models.build import policy_network
from ppo_jax.models.config import LayerKind
from tests.support import tiny
from tests.support.meshes import WIDE, layout_of

ROOT = pathlib.Path(__file__).parents[2]
B, L, H, K = 4, 200, 4, 16  # two blocks of 128, the second padded


@pytest.fixture
def interpreted(monkeypatch):
    """The TPU kernel runs on a CPU, in blocks of 128."""
    make = functools.partial(splash.make_splash_mha_single_device, interpret=True)
    monkeypatch.setattr(splash, "make_splash_mha_single_device", make)
    monkeypatch.setattr(attention_kernels, "MAX_BLOCK", 128)


@pytest.fixture
def on(monkeypatch):
    """Makes the devices of all meshes those of a platform."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)

    def set_platform(name):
        known = property(lambda constrain: constrain.sharding and name)
        monkeypatch.setattr(axes.ShardingConstraint, "platform", known)

    return set_platform


def rows(length=L):
    """(mask, segments): padding on the left, on the right, in the middle, and three texts."""
    rng = np.random.default_rng(0)
    place = np.arange(length)[None]
    mask = np.repeat(place >= 0, B, axis=0)
    mask[0] = place >= length // 3
    mask[1] = place < length // 2
    mask[2] = rng.random(length) < 0.8
    texts = np.broadcast_to(1 + (place > length // 4) + (place > length // 2), mask.shape)
    return jnp.asarray(mask), jnp.asarray(np.where(mask, texts, 0), jnp.int32)


def inputs(kv_heads, length=L, **changes):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(B, length, H, K), (B, kv_heads, length, K), (B, kv_heads, length, K)]
    return [
        jax.random.normal(key, shape, **changes) for key, shape in zip(keys, shapes, strict=True)
    ]


def outputs_and_gradients(attention, arrays, mask):
    """Outputs at real positions, and gradients of a sum over them; all finite."""

    def loss(*arrays):
        out = attention(*arrays)
        weights = jax.random.normal(jax.random.key(1), out.shape)
        return (out * jnp.where(mask[:, :, None, None], weights, 0)).sum(), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
    assert np.isfinite(out).all()
    return [np.where(mask[:, :, None, None], out, 0), *gradients]


def assert_as_plain(attention, arrays, mask, segments=None, window=0, score_cap=0.0):
    def plain(q, k, v):
        return attend(q, k, v, causal_mask(mask, segments, window), score_cap)

    found, expected = (outputs_and_gradients(f, arrays, mask) for f in (attention, plain))
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


# --- TPU ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kv_heads", "packed"), [(4, True), (1, False)])
def test_the_tpu_kernel_is_plain_attention(interpreted, kv_heads, packed):
    mask, segments = rows()
    texts = segments if packed else mask.astype(jnp.int32)
    constrain = layout_of((1, 1, 1)).constrain

    def attention(q, k, v):
        return attention_kernels.splash_attention(q, k, v, texts, constrain=constrain)

    assert_as_plain(attention, inputs(kv_heads), mask, segments if packed else None)


@pytest.mark.parametrize(
    ("window", "score_cap", "packed"),
    [(1, 0.0, False), (50, 0.0, True), (129, 0.7, False), (0, 0.7, True)],
)
def test_the_tpu_kernel_has_windows_and_caps(interpreted, window, score_cap, packed):
    mask, segments = rows()
    texts = segments if packed else mask.astype(jnp.int32)
    how = dict(constrain=layout_of((1, 1, 1)).constrain, window=window, score_cap=score_cap)

    def attention(q, k, v):
        return attention_kernels.splash_attention(q, k, v, texts, **how)

    segments = segments if packed else None
    assert_as_plain(attention, inputs(2), mask, segments, window, score_cap)


@pytest.mark.parametrize("shape", [(2, 2, 2), (2, 1, 4)])
def test_each_device_has_the_keys_of_its_queries(interpreted, shape):
    """Two key heads for four shards of the query heads: a mesh may have more."""
    mask, _ = rows()
    constrain = layout_of(shape).constrain

    def attention(q, k, v):
        return attention_kernels.splash_attention(
            q, k, v, mask.astype(jnp.int32), constrain=constrain
        )

    assert_as_plain(attention, inputs(2), mask)


def test_a_population_under_vmap_has_the_kernel_too(interpreted):
    """As sweeps of hyper-parameters do: queries and keys differ, rows are the same."""
    mask, _ = rows()
    constrain = layout_of((1, 1, 1)).constrain
    attention = functools.partial(attention_kernels.splash_attention, constrain=constrain)
    several = [jnp.stack([x, x[::-1] + 1]) for x in inputs(2)]
    found = jax.jit(jax.vmap(attention, in_axes=(0, 0, 0, None)))(*several, mask.astype(jnp.int32))
    for i in range(2):
        expected = attend(*(x[i] for x in several), causal_mask(mask, None))
        real = np.asarray(mask)
        np.testing.assert_allclose(found[i][real], expected[real], atol=1e-5)


WINDOWS = dict(layer_kinds=(LayerKind(window=40), LayerKind()), score_cap=1.0)


@pytest.mark.parametrize(("packed", "kinds"), [(False, {}), (True, {}), (False, WINDOWS)])
def test_a_network_is_the_same_with_the_kernel(interpreted, on, packed, kinds):
    """Scanned layers, computed again in the backward pass, on a mesh that shards every axis."""
    mask, segments = rows()
    tokens = jax.random.randint(jax.random.key(0), mask.shape, 0, 64)
    packing = dict(segment_ids=segments) if packed else {}
    found = {}
    for platform in ("cpu", "tpu"):
        on(platform)
        config = tiny.model_config(**WIDE, **kinds, scan_layers=True, remat="dots", max_length=L)
        network = policy_network(config, constrain=layout_of((2, 1, 2)).constrain)

        def loss(params, network=network):
            logits = network.apply(params, tokens, mask, **packing)
            return jnp.where(mask[:, :, None], logits, 0).var(), logits

        graph = jax.make_jaxpr(jax.grad(loss, has_aux=True))(
            params := tiny.random_params(network, 0)
        )
        assert ("pallas_call" in str(graph)) == (platform == "tpu")
        gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
        found[platform] = gradients, jnp.where(mask[:, :, None], logits, 0)
    tiny.leaves_close(found["tpu"], found["cpu"], atol=5e-5)


def lowered(platform, config, mask, gradient=True):
    """The text of a network's pass over rows, for a platform that need not be there."""
    network = policy_network(config, constrain=layout_of((2, 1, 2)).constrain)
    params = jax.eval_shape(network.init, jax.random.key(0))

    def loss(params, mask):
        return network.apply(params, jnp.zeros(mask.shape, jnp.int32), mask).sum()

    function = jax.grad(loss) if gradient else loss
    shape = jax.ShapeDtypeStruct(mask.shape, bool)
    return jax.jit(function).trace(params, shape).lower(lowering_platforms=(platform,)).as_text()


def pairs(text, length=L):
    """Arrays of all pairs of positions."""
    return re.findall(rf"tensor<(?:\d+x)*{length}x{length}x\w+>", text)


def test_with_the_kernel_nothing_is_as_large_as_all_pairs(on, monkeypatch):
    mask, _ = rows()
    on("tpu")
    config = tiny.model_config(**WIDE, dtype="bfloat16")
    text = lowered("tpu", config, mask)
    assert text.count("@tpu_custom_call(") >= 3 and not pairs(text)
    config = tiny.model_config(**WIDE, dtype="bfloat16", attention="plain")
    plain = lowered("tpu", config, mask)
    assert "@tpu_custom_call(" not in plain and not pairs(plain)
    monkeypatch.setattr(attention, "LONG", L + 1)
    assert pairs(lowered("tpu", config, mask))


ON_A_TPU = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from ppo_jax.models import kernels
from ppo_jax.planner.hlo.cost import cost_analysis

device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
length, heads, size = 2048, 4, 128
for window, score_cap in ((0, 0.0), (512, 0.0), (600, 50.0)):
    def loss(*args):
        out = kernels._splash(*args, window=window, score_cap=score_cap)
        return out.astype(jnp.float32).sum()

    shapes = [(1, length, heads, size), *[(1, 2, length, size)] * 2, (1, length)]
    dtypes = [*[jnp.bfloat16] * 3, jnp.int32]
    where = jax.sharding.SingleDeviceSharding(device)
    args = [jax.ShapeDtypeStruct(*x, sharding=where) for x in zip(shapes, dtypes)]
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*args).compile()
    expected = 2 * (2 + 3 + 4) * heads * size * kernels.splash_pairs(length, window)
    assert cost_analysis(compiled).flops == expected, (window, score_cap)
"""


@pytest.mark.slow
def test_kernels_with_windows_and_caps_compile_for_a_tpu():
    """With libtpu, in a process of its own: the program has as many blocks as are counted."""
    pytest.importorskip("libtpu")
    command = [sys.executable, "-c", ON_A_TPU]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_blocks_cover_a_row_with_little_to_spare():
    for length in range(128, 3000, 37):
        block, count = attention_kernels.splash_blocks(length)
        assert block % 128 == 0 and block <= 512
        assert length <= block * count < length + 128 * count


# --- GPU ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 4)])
def test_rows_are_left_aligned_for_cudnn_and_back(monkeypatch, shape, kv_heads):
    """In the place of cuDNN an attention that leaves NaN behind the end of each row."""
    mask, _ = rows()

    def by_lengths(q, k, v, lengths, window):
        assert not window
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True, key_value_seq_lengths=lengths)
        real = jnp.arange(q.shape[1])[None] < lengths[:, None]
        return jnp.where(real[:, :, None, None], out, jnp.nan)

    monkeypatch.setattr(attention_kernels, "_cudnn", by_lengths)
    constrain = layout_of(shape).constrain
    attention = functools.partial(attention_kernels.cudnn_attention, constrain=constrain)
    alignment = attention_kernels.left_align(mask)
    assert_as_plain(lambda q, k, v: attention(q, k, v, alignment), inputs(kv_heads), mask)


@pytest.mark.parametrize("window", [1, 30])
def test_cudnn_has_windows(monkeypatch, window):
    """Of real positions, which are those of the row where padding is on its sides."""
    mask = rows()[0].at[2].set(True).at[3, L - 20 :].set(False)

    def by_xla(q, k, v, lengths, window):
        how = dict(is_causal=True, key_value_seq_lengths=lengths)
        return jax.nn.dot_product_attention(q, k, v, local_window_size=(window - 1, 0), **how)

    monkeypatch.setattr(attention_kernels, "_cudnn", by_xla)
    how = dict(constrain=layout_of((1, 1, 1)).constrain, window=window)
    alignment = attention_kernels.left_align(mask)

    def attention(q, k, v):
        return attention_kernels.cudnn_attention(q, k, v, alignment, **how)

    assert_as_plain(attention, inputs(2), mask, window=window)


def test_the_program_of_a_gpu_names_its_windows(on):
    mask, _ = rows()
    on("gpu")
    kinds = LayerKind(window=40), LayerKind()
    text = lowered("cuda", tiny.model_config(**WIDE, dtype="bfloat16", layer_kinds=kinds), mask)
    found = re.findall(r'sliding_window_length[\\"2]*: (\d+)', text)
    assert set(found) == {"40", "0"} and len(found) == 4 and not pairs(text)


def test_a_population_under_vmap_calls_cudnn_too(on):
    """Even where keys are the same for all, as the rows are."""
    mask, _ = rows()
    on("gpu")
    constrain = layout_of((1, 1, 1)).constrain

    def loss(q, k, v):
        alignment = attention_kernels.left_align(mask)
        return attention_kernels.cudnn_attention(q, k, v, alignment, constrain=constrain).sum()

    q, k, v = inputs(2, dtype=jnp.bfloat16)
    several = jax.vmap(jax.grad(loss, argnums=(0, 1, 2)), in_axes=(0, None, 0))
    traced = jax.jit(several).trace(jnp.stack([q] * 3), k, jnp.stack([v] * 3))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "@__cudnn$fmhaSoftmaxBackward(" in text and f"tensor<{3 * B}x{L}x4x16xbf16>" in text


def test_a_row_of_nothing_but_padding_is_finite():
    lengths, order, inverse = attention_kernels.left_align(jnp.zeros((1, 3), bool))
    assert (lengths.tolist(), order.tolist(), inverse.tolist()) == ([1], [[0, 1, 2]], [[0, 1, 2]])


@pytest.mark.parametrize("gradient", [False, True])
def test_the_program_of_a_gpu_calls_cudnn(on, gradient):
    """Lowered for CUDA; the calls are of one device's rows and heads."""
    mask, _ = rows()
    on("gpu")
    text = lowered("cuda", tiny.model_config(**WIDE, dtype="bfloat16"), mask, gradient)
    calls = re.findall(r"@(__cudnn\$\w+)\(.*: \(tensor<([\dx]+)xbf16>", text)
    names = {"__cudnn$fmhaSoftmax"} | ({"__cudnn$fmhaSoftmaxBackward"} if gradient else set())
    assert {name for name, _ in calls} == names
    assert text.count("PADDING_CAUSAL") == len(calls)
    assert {shape for _, shape in calls} == {f"{B // 2}x{L}x4x8"} and not pairs(text)


# --- the choice -----------------------------------------------------------------------------------

HALF = dict(dtype="bfloat16", head_dim=64)
CHOICES = [  # what changes in a model, the platform, the length, packed, what is taken
    (HALF, "tpu", 128, True, "splash"),
    (dict(dtype="float32"), "tpu", 128, False, "splash"),
    (HALF, "tpu", 127, False, "plain"),
    (dict(dtype="float16"), "tpu", 128, False, "plain"),
    (dict(dtype="bfloat16", head_dim=258), "tpu", 128, False, "plain"),
    (HALF, "gpu", 7, False, "cudnn"),
    (dict(dtype="float16"), "gpu", 7, False, "cudnn"),
    (HALF, "gpu", 7, True, "plain"),
    (dict(dtype="float32"), "gpu", 7, False, "plain"),
    (dict(dtype="bfloat16", head_dim=12), "gpu", 7, False, "plain"),
    (HALF, "cpu", 512, False, "plain"),
    (HALF, None, 512, False, "plain"),
    (HALF | WINDOWS, "tpu", 128, True, "splash"),
    (HALF | WINDOWS, "gpu", 7, False, "plain"),
    (HALF | WINDOWS | dict(score_cap=0.0), "gpu", 7, False, "cudnn"),
    (HALF | dict(attention="plain"), "tpu", 512, False, "plain"),
    (HALF | dict(attention="plain"), "gpu", 512, False, "plain"),
]


@pytest.mark.parametrize(("changes", "platform", "length", "packed", "expected"), CHOICES)
def test_the_platform_chooses_and_plain_takes_the_rest(
    on, changes, platform, length, packed, expected
):
    config = tiny.model_config(**changes)
    assert attention_kernels.kernel_of(config, platform, length, packed) == expected


def test_a_gpu_without_cudnn_computes_plain_attention():
    """As this machine is one without cuDNN."""
    assert attention_kernels.kernel_of(tiny.model_config(**HALF), "gpu", 8) == "plain"


def test_a_mesh_knows_its_platform_and_no_mesh_knows_none():
    assert layout_of((2, 2, 2)).constrain.platform == "cpu"
    assert axes.unconstrained.platform is None


# --- positions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_a_position_counts_what_it_sees(packed):
    mask, segments = rows()
    segments = segments if packed else None
    seen = causal_mask(mask, segments).sum(axis=2) - 1
    found = text_positions(mask, segments)
    np.testing.assert_array_equal(np.asarray(found)[mask], np.asarray(seen)[mask])
    assert found.min() >= 0 and found.max() < L
