"""Attention block by block: the same outputs and gradients, with memory linear in the length."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.models import attention, long_rows
from ppo_jax.models.attention import Outputs, attend, attend_any, causal_mask, plain_attention

B, H, K = 3, 6, 8


@pytest.fixture
def short(monkeypatch):
    """Rows of two positions are long, and blocks have eight queries."""
    monkeypatch.setattr(long_rows, "BLOCK", 8)
    monkeypatch.setattr(attention, "LONG", 2)


def arrays(length, heads=H, kv_heads=2, dtype="float32", size=K):
    keys = jax.random.split(jax.random.key(length), 4)
    shapes = [
        (B, length, heads, size),
        *[(B, kv_heads, length, size)] * 2,
        (B, length, heads, size),
    ]
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]


def rows(length):
    """(mask, segments): most of a row is padding on the left, on the right, anywhere."""
    place = np.arange(length)[None]
    mask = np.repeat(place >= 0, B, axis=0)
    mask[0] = place >= length * 3 // 4
    mask[1] = place < (length + 1) // 2
    mask[2] = np.random.default_rng(0).random(length) < 0.8
    texts = np.broadcast_to(1 + (place > length // 4) + (place > length // 2), mask.shape)
    return jnp.asarray(mask), jnp.asarray(np.where(mask, texts, 0), jnp.int32)


def outputs_and_gradients(attend_rows, real, q, k, v, g):
    """At real queries."""

    def both(q, k, v, g):
        output, backward = jax.vjp(attend_rows, q, k, v)
        return output, *backward(g)

    output, *gradients = jax.jit(both)(q, k, v, jnp.where(real[..., None, None], g, 0))
    return [jnp.where(real[..., None, None], output, 0), *gradients]


def assert_close(found, expected, tolerance):
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype
        x, y = (np.asarray(z, np.float32) for z in (x, y))
        assert np.isfinite(x).all()
        np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance)


def compare(mask, segments, args, queries=Outputs(), tolerance=5e-6):  # noqa: B008
    blocks = plain_attention(mask, segments).of(queries)
    assert blocks.fn is long_rows.attend_in_blocks
    allowed, real = queries.take(causal_mask(mask, segments)), queries.take(mask)
    q, k, v, g = args
    args = queries.take(q), k, v, queries.take(g)

    def plain(q, k, v):
        return attend(q, k, v, allowed)

    found, expected = (outputs_and_gradients(f, real, *args) for f in (blocks, plain))
    assert_close(found, expected, tolerance)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [2, 9, 63])
def test_blocks_are_plain_attention(short, length, packed):
    mask, segments = rows(length)
    compare(mask, segments if packed else None, arrays(length))


@pytest.mark.parametrize("length", [257, 513, 1000])
def test_blocks_of_their_own_size_are_plain_attention(length):
    compare(*rows(length), arrays(length))


@pytest.mark.parametrize("heads", [(1, 1), (9, 3), (4, 4), (5, 1)], ids=str)
def test_heads_in_groups(short, heads):
    mask, _ = rows(21)
    compare(mask, None, arrays(21, *heads, size=24))


def test_bfloat16(short):
    mask, _ = rows(40)
    compare(mask, None, arrays(40, dtype="bfloat16"), tolerance=0.06)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("first", [1, 20, 39])
def test_the_queries_behind_a_prompt(short, first, packed):
    mask, segments = rows(40)
    compare(mask, segments if packed else None, arrays(40), Outputs(first=first))


@pytest.mark.parametrize("packed", [False, True])
def test_queries_at_any_positions(short, packed):
    mask, segments = rows(40)
    positions = jnp.asarray(np.random.default_rng(0).integers(0, 40, (B, 17)), jnp.int32)
    compare(mask, segments if packed else None, arrays(40), Outputs(positions))


def test_pairs_of_a_cache(short):
    q, k, v, g = arrays(30)
    allowed = jnp.asarray(np.random.default_rng(1).random((B, 19, 30)) < 0.3).at[:, :, 4].set(True)
    args = jnp.ones((B, 19), bool), q[:, :19], k, v, g[:, :19]
    found, expected = (
        outputs_and_gradients(lambda q, k, v, f=f: f(q, k, v, allowed), *args)
        for f in (attend_any, attend)
    )
    assert_close(found, expected, 5e-6)


def test_a_query_that_attends_to_nothing_gives_nothing(short):
    q, k, v, g = arrays(12)
    nothing = plain_attention(jnp.zeros((B, 12), bool), None)
    found = outputs_and_gradients(nothing, jnp.ones((B, 12), bool), q, k, v, g)
    assert all((np.asarray(x) == 0).all() for x in found)


def test_nan_is_seen(short):
    q, k, v, g = arrays(12)
    blocks = plain_attention(jnp.ones((B, 12), bool), None)
    found = np.isnan(blocks(q.at[0, 7, 0].set(jnp.nan), k, v)).any(axis=(2, 3))
    assert found.sum() == 1 and found[0, 7]
    assert np.isnan(blocks(q, k.at[0, 0, 0].set(jnp.nan), v))[0].any(axis=(1, 2)).all()


def test_members_of_a_population_under_vmap(short):
    mask, _ = rows(21)
    several = [jnp.stack([x, x[::-1] + 1]) for x in arrays(21)[:3]]
    blocks = jax.jit(jax.vmap(plain_attention(mask, None)))(*several)
    for i in range(2):
        expected = attend(*(x[i] for x in several), causal_mask(mask, None))
        np.testing.assert_allclose(blocks[i][mask], expected[mask], atol=5e-6)


def test_the_pairs_that_are_computed():
    whole = functools.partial(long_rows.num_pairs, first=0)
    assert whole(1024, num_keys=1024) == 1024 * 1024 * 5 / 8
    assert whole(128, num_keys=128) == 128 * 128 * 3 / 4
    assert long_rows.num_pairs(512, None, 1024) == 512 * 1024
    assert long_rows.num_pairs(512, 512, 1024) == 128 * (640 + 768 + 896 + 1024)
    assert long_rows.num_pairs(1, 999, 1000) == 1000
