"""A token's attention to the cache: all of it, or the blocks that hold something."""

import collections
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.models import attention, views
from ppo_jax.models.attention import attend, attend_blocks, attend_cached
from ppo_jax.models.build import policy_network
from ppo_jax.planner.hlo.text import parse_module
from ppo_jax.rollout.rollout import rollout
from tests.support import tiny

B, H, G, K = 2, 4, 2, 8
BOTH = {"samples_per_prompt": 2, "max_concurrent": 4, "min_free_slots": 2}


def arrays(capacity, filled, new=1):
    rng = np.random.default_rng(0)
    shapes = (B, new, H, K), (B, G, capacity, K), (B, G, capacity, K)
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    allowed = rng.random((B, new, capacity)) < 0.7
    allowed[:, :, 0] = True
    return q, k, v, jnp.asarray(allowed & (np.arange(capacity) < filled))


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("capacity", [4, 8, 9, 16, 31, 33])
def test_blocks_that_hold_something_are_enough(monkeypatch, capacity, new):
    monkeypatch.setattr(attention, "CACHE_BLOCK", 2)
    blocks = jax.jit(lambda *args: attend_blocks(*args))  # traced with these blocks
    for filled in range(new, capacity + 1):
        args = arrays(capacity, filled, new)
        np.testing.assert_allclose(blocks(*args, jnp.int32(filled)), attend(*args), atol=1e-6)


def test_no_more_is_read_than_blocks_that_hold_something(monkeypatch):
    """What lies behind them may be anything: it has no part in the sums."""
    monkeypatch.setattr(attention, "CACHE_BLOCK", 4)
    q, k, v, allowed = arrays(16, 5)
    expected = attend(q, k, v, allowed)
    bad = v.at[:, :, 8:].set(jnp.nan)
    got = jax.jit(lambda *args: attend_blocks(*args))(q, k, bad, allowed, jnp.int32(5))
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert np.isnan(attend(q, k, bad, allowed)).any()  # the whole cache is another matter


@pytest.mark.parametrize("shape", ["gpt2", "scanned"])
@pytest.mark.parametrize(
    "of_rollout", [{}, {"max_concurrent": 3}, {"samples_per_prompt": 2}, BOTH], ids=str
)
def test_a_rollout_by_blocks_samples_the_same_responses(monkeypatch, shape, of_rollout):
    """Also where the ring of the cache has gone round, and where a prompt is handed on."""
    config = tiny.model_config(**tiny.SHAPES[shape])
    network = policy_network(config)
    params, sampling = tiny.random_params(network), tiny.sampling(**of_rollout)

    def sample():
        run = functools.partial(rollout, network, sampling=sampling)
        return jax.jit(run)(params, tiny.prompts(), tiny.RUN_KEY)

    expected = sample()
    monkeypatch.setattr(attention, "CACHE_BLOCK", 2)
    monkeypatch.setattr(views, "attend_cached", lambda q, k, v, x: attend_blocks(q, k, v, *x))
    got = sample()
    assert (got.response_tokens == expected.response_tokens).all()
    np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-5)


def test_the_platform_chooses():
    q, k, v, allowed = arrays(1000, 5)
    args = q, k, v, (allowed, jnp.int32(5))
    program = jax.jit(attend_cached)
    parts = [f"tensor<{B}x{G}x{end}x{K}xf32>" for end in (256, 512, 768)]
    elsewhere = program.trace(*args).lower(lowering_platforms=("tpu",)).as_text()
    assert all(part in elsewhere for part in parts)
    here = program.lower(*args)
    assert not any(part in here.as_text() for part in parts)
    assert "conditional" not in here.compile().as_text()


@pytest.mark.parametrize("slots", [0, 4, 8])
@pytest.mark.parametrize("shape", ["gpt2", "llama", "scanned"])
def test_no_token_copies_the_cache(shape, slots):
    """A token's keys and values are written where they belong; nothing of the cache is moved, but
    for the one row that is left of four slots: XLA copies the cache of a single row."""
    config = tiny.model_config(**tiny.SHAPES[shape])
    network = policy_network(config)
    run = functools.partial(rollout, network, sampling=tiny.sampling(max_concurrent=slots))
    args = tiny.random_params(network), tiny.prompts(batch_size=12), tiny.RUN_KEY
    module = parse_module(jax.jit(run).lower(*args).compile().as_text())
    of_cache = (tiny.PROMPT_LENGTH + tiny.RESPONSE_LENGTH, config.head_dim)
    found = collections.defaultdict(list)
    for computation in module.computations.values():
        for i in computation:
            caches = [x for x in i.outputs if x.dims[-2:] == of_cache and x.dims[-4:-3] != (1,)]
            if caches and computation != module.entry:
                found[i.opcode].append(i.op_name)
    assert found["dynamic-update-slice"]
    # Where a prompt enters a slot its keys and values are gathered, a row at a time.
    assert not [name for name in found["copy"] if not name.endswith("/gather")]


def plain(q_BSHK, k_BGCK, v_BGCK, allowed_BSC):
    """The formula with keys repeated for each head, and autodiff's gradient."""
    k, v = (jnp.repeat(x, q_BSHK.shape[2] // x.shape[1], axis=1) for x in (k_BGCK, v_BGCK))
    scores = jnp.einsum("bshk,bhck->bhsc", q_BSHK, k).astype(jnp.float32)
    scores = scores / math.sqrt(q_BSHK.shape[3])
    scores = jnp.where(allowed_BSC[:, None], scores, jnp.finfo(jnp.float32).min)
    return jnp.einsum("bhsc,bhck->bshk", jax.nn.softmax(scores).astype(v.dtype), v)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-6), ("bfloat16", 0.06)])
@pytest.mark.parametrize("new", [1, 5, 7])
def test_attention_and_its_gradient_are_those_of_the_formula(new, dtype, tolerance):
    """With queries that attend to nothing, as those of padding do."""
    q, k, v, allowed = arrays(7, 7, new)
    allowed = allowed.at[0, 0].set(False)
    g = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), dtype)
    q, k, v = (x.astype(dtype) for x in (q, k, v))

    def both(f):
        output, backward = jax.vjp(lambda *qkv: f(*qkv, allowed), q, k, v)
        return output, *backward(g)

    for got, expected in zip(both(attend), both(plain), strict=True):
        assert got.dtype == expected.dtype
        got, expected = (np.asarray(x, np.float32) for x in (got, expected))
        np.testing.assert_allclose(got, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("num_layers", [1, 4])
def test_rotary_angles_are_computed_once(num_layers):
    """A cosine for each position and pair, not for each head of each layer, forward and back."""
    config = tiny.model_config(**tiny.SHAPES["llama"] | dict(num_layers=num_layers))
    network = policy_network(config)
    tokens, mask = tiny.tokens_and_mask(0, 3, 9)

    def loss(params):
        return network.apply(params, tokens, mask).sum()

    text = jax.jit(jax.grad(loss)).lower(tiny.random_params(network)).compile().as_text()
    cosines = [
        i
        for computation in parse_module(text).computations.values()
        for i in computation
        if i.opcode == "cosine"
    ]
    assert sum(math.prod(i.outputs[0].dims) for i in cosines) == 3 * 9 * config.head_dim // 2
