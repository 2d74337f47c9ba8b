"""Attention within a window, and with a cap on scores, against the formula in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.core.shared_prompts import SharedPrompt
from ppo_jax.models import long_rows
from ppo_jax.models.attention import Outputs, attend, attend_any, plain_attention
from ppo_jax.models.build import policy_network, trunk_network
from ppo_jax.models.config import Experts, LayerKind
from ppo_jax.models.shared_prompts import share_prompts
from ppo_jax.planner.hlo.cost import cost_analysis
from tests.support import tiny

B, H, G, K = 3, 4, 2, 8


def formula(q, k, v, g, allowed, cap):
    """(outputs, gradients of q, k, v) of queries [B, S, H, K] over keys [B, G, C, K]."""
    q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, g))
    repeats = q.shape[2] // k.shape[1]
    k, v = (np.repeat(x, repeats, axis=1) for x in (k, v))
    scores = np.einsum("bshk,bhck->bhsc", q, k) / np.sqrt(q.shape[-1])
    slope = 1.0
    if cap:
        scores, slope = cap * np.tanh(scores / cap), 1 / np.cosh(scores / cap) ** 2
    weights = np.where(allowed[:, None], np.exp(scores - scores.max(axis=-1, keepdims=True)), 0)
    probs = weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)
    of_probs = np.einsum("bshk,bhck->bhsc", g, v)
    of_scores = probs * (of_probs - (probs * of_probs).sum(axis=-1, keepdims=True))
    of_scores = of_scores * slope / np.sqrt(q.shape[-1])
    of_keys = (
        np.einsum("bhsc,bshk->bhck", of_scores, q),
        np.einsum("bhsc,bshk->bhck", probs, g),
    )
    grouped = (x.reshape(len(x), -1, repeats, *x.shape[2:]).sum(axis=2) for x in of_keys)
    of_q = np.einsum("bhsc,bhck->bshk", of_scores, k)
    return np.einsum("bhsc,bhck->bshk", probs, v), of_q, *grouped


def pairs(mask, segments, window):
    """[B, L, L] bool, by the words: to itself and what is before it, no further than the window."""
    mask, length = np.asarray(mask), mask.shape[1]
    query, key = np.arange(length)[:, None], np.arange(length)[None]
    allowed = (key <= query)[None] & mask[:, None]
    if window:
        allowed &= query - key < window
    if segments is not None:
        segments = np.asarray(segments)
        allowed &= segments[:, :, None] == segments[:, None]
    return allowed


def rows(length, padding):
    """(mask [B, L], segments): of a row at least a part is padding, on one side."""
    place = np.arange(length)
    least = place >= np.array([[0], [length // 2], [length * 3 // 4]])
    mask = least if padding == "left" else least[:, ::-1]
    texts = np.broadcast_to(1 + (place > length // 4) + (place > length // 2), mask.shape)
    return jnp.asarray(mask), jnp.asarray(np.where(mask, texts, 0), jnp.int32)


def arrays(length, queries=None, batch=B):
    rng = np.random.default_rng(length)
    queries = queries or length
    shapes = [(batch, queries, H, K), *[(batch, G, length, K)] * 2, (batch, queries, H, K)]
    return [jnp.asarray(2 * rng.normal(size=shape), jnp.float32) for shape in shapes]


def compare(attend_rows, real, args, allowed, cap):
    """Outputs and gradients at real queries."""
    *qkv, g = args
    g = jnp.where(real[..., None, None], g, 0)

    def both(*qkv):
        output, backward = jax.vjp(attend_rows, *qkv)
        return output, *backward(g)

    found, expected = jax.jit(both)(*qkv), formula(*qkv, g, allowed, cap)
    real = np.asarray(real)
    np.testing.assert_allclose(np.asarray(found[0])[real], expected[0][real], atol=2e-5)
    for x, y in zip(found[1:], expected[1:], strict=True):
        assert np.isfinite(x).all()
        np.testing.assert_allclose(x, y, atol=2e-5, rtol=2e-5)


SIZES = [  # of a row and of a window
    *[(7, 1), (7, 5), (7, 7), (79, 30), (79, 80), (81, 1), (81, 64), (81, 100)],
    *[(200, 5), (200, 100), (513, 1), (513, 100), (513, 300), (513, 513)],
]


@pytest.mark.parametrize(("length", "window"), SIZES)
def test_a_window_is_that_of_the_formula(length, window):
    """Whatever pads a row; with a cap where padding is on the right."""
    for padding, cap in (("left", 0.0), ("right", 1.5)):
        mask, _ = rows(length, padding)
        fn = plain_attention(mask, None, window, cap)
        assert (fn.fn is attend) == (length < long_rows.LONG)
        compare(fn, mask, arrays(length), pairs(mask, None, window), cap)


@pytest.mark.parametrize("window", [0, 3, 30, 300])
@pytest.mark.parametrize("length", [79, 200])
def test_packed_rows_have_windows_and_caps(length, window):
    mask, segments = rows(length, "right")
    fn = plain_attention(mask, segments, window, 2.0)
    compare(fn, mask, arrays(length), pairs(mask, segments, window), 2.0)


@pytest.mark.parametrize("window", [1, 9, 90])
@pytest.mark.parametrize("first", [1, 77, 400])
def test_some_queries_have_their_window(first, window):
    mask, _ = rows(513, "left")
    queries = Outputs(first=first)
    q, k, v, g = arrays(513)
    fn = plain_attention(mask, None, window).of(queries)
    args, allowed = (queries.take(q), k, v, queries.take(g)), pairs(mask, None, window)
    compare(fn, queries.take(mask), args, allowed[:, first:], 0.0)


def test_queries_at_any_positions_have_their_window():
    mask, segments = rows(200, "right")
    positions = jnp.asarray(np.random.default_rng(0).integers(0, 200, (B, 90)), jnp.int32)
    queries, index = Outputs(positions), np.arange(B)[:, None]
    q, k, v, g = arrays(200)
    fn = plain_attention(mask, segments, 20, 1.0).of(queries)
    allowed = pairs(mask, segments, 20)[index, positions]
    compare(fn, queries.take(mask), (queries.take(q), k, v, queries.take(g)), allowed, 1.0)


def test_blocks_of_a_cache_have_a_cap():
    args = arrays(150, queries=90)
    allowed = np.random.default_rng(1).random((B, 90, 150)) < 0.3
    allowed[:, :, 4] = True

    def cached(q, k, v):
        return attend_any(q, k, v, jnp.asarray(allowed), 1.5)

    compare(cached, jnp.ones((B, 90), bool), args, allowed, 1.5)


@pytest.mark.parametrize("window", [2, 20, 70, 300])
@pytest.mark.parametrize(("prompt", "response"), [(5, 7), (90, 120)])
def test_joined_rows_have_the_windows_of_rows_apart(prompt, response, window):
    shared = SharedPrompt(prompt, 3)
    mask = np.ones((6, prompt + response), bool)
    mask[3:, : prompt // 2] = False
    mask[1, prompt + 3 :] = mask[4, -2:] = False
    mask = jnp.asarray(mask)
    q, k, v, _ = arrays(prompt + response, batch=6)
    k, v = (x.swapaxes(1, 2) for x in (k, v))
    q, k, v = (shared.split(shared.join(x)) for x in (q, k, v))
    apart = plain_attention(mask, None, window, 1.5)
    joined = share_prompts(apart, shared.join(mask), shared, window)
    of_joined = q, k, v = [shared.join(x) for x in (q, k, v)]
    found = joined(q, *(x.swapaxes(1, 2) for x in of_joined[1:]))
    q, k, v = (shared.split(x) for x in of_joined)
    expected = apart(q, *(x.swapaxes(1, 2) for x in (k, v)))
    real = np.asarray(mask)
    np.testing.assert_allclose(shared.split(found)[real], expected[real], atol=2e-5)
    formulas = formula(q, *(x.swapaxes(1, 2) for x in (k, v)), q, pairs(mask, None, window), 1.5)
    np.testing.assert_allclose(np.asarray(expected)[real], formulas[0][real], atol=2e-5)


def program(window, length):
    """The compiled gradient of attention in rows of so many positions."""
    mask = jnp.ones((1, length), bool)

    def loss(q, k, v):
        return plain_attention(mask, None, window)(q, k, v).sum()

    shapes = [jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)]
    shapes += [jax.ShapeDtypeStruct((1, 1, length, 8), jnp.float32)] * 2
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes).compile()


def test_long_rows_cost_their_length_times_the_window():
    flops, memory = {}, {}
    for window, length in [(64, 1024), (64, 2048), (256, 2048), (0, 2048)]:
        compiled = program(window, length)
        flops[window, length] = cost_analysis(compiled).flops
        memory[window, length] = compiled.memory_analysis().temp_size_in_bytes
    assert flops[64, 2048] == pytest.approx(2 * flops[64, 1024], rel=0.01)
    width = {window: long_rows.BLOCK + window - 1 for window in (64, 256)}
    assert flops[256, 2048] == pytest.approx(flops[64, 2048] * width[256] / width[64], rel=0.01)
    assert flops[64, 2048] < flops[0, 2048] / 8
    assert memory[64, 2048] < 2.1 * memory[64, 1024] and memory[64, 2048] < memory[0, 2048]


def test_the_pairs_that_are_computed_within_a_window():
    assert long_rows.num_pairs(1024, 0, 1024, 65) == 1024 * 128
    assert long_rows.num_pairs(256, 0, 256, 65) == 64 * (64 + 3 * 128)  # one by one
    assert long_rows.num_pairs(1024, 0, 1024, 1024) == long_rows.num_pairs(1024, 0, 1024)
    assert long_rows.num_pairs(640, 400, 1040, 65) == 640 * 128
    assert long_rows.num_pairs(512, None, 1024, 65) == 512 * 1024


# --- models ---------------------------------------------------------------------------------------

KINDS = (LayerKind(window=4, rope_theta=100.0), LayerKind(window=7), LayerKind(rotary=False))
MODELS = {
    "windows": dict(num_layers=3, layer_kinds=KINDS, score_cap=1.5),
    "a window": dict(layer_kinds=(LayerKind(window=6),) * 2, positions="learned"),
    "scanned windows": dict(num_layers=3, layer_kinds=KINDS, scan_layers=True, score_cap=1.5),
}


@functools.cache
def model(name):
    network = policy_network(tiny.model_config(**MODELS[name]))
    return network, tiny.random_params(network)


@pytest.mark.parametrize("prompt", [1, 3, 9])
@pytest.mark.parametrize("name", MODELS)
def test_tokens_after_a_prompt_have_the_logits_of_the_whole_row(name, prompt):
    """Far beyond the windows, and beyond a prompt that is longer or shorter than they are."""
    (network, params), length = model(name), 30
    tokens, mask = tiny.tokens_and_mask(0, 4, prompt)
    more = jax.random.randint(jax.random.key(1), (4, length - prompt), 5, tiny.VOCAB)
    tokens = jnp.concatenate([tokens, more], axis=1)
    mask = jnp.concatenate([mask, jnp.ones((4, length - prompt), bool)], axis=1)
    expected = jax.jit(network.apply)(params, tokens, mask)[:, prompt - 1 :]
    step = jax.jit(network.decode)
    first, cache = jax.jit(functools.partial(network.decode, first_output=prompt - 1))(
        params, tokens[:, :prompt], mask[:, :prompt], network.init_cache(4, length)
    )
    found = [first]
    for t in range(prompt, length):
        logits, cache = step(params, tokens[:, t : t + 1], mask[:, t : t + 1], cache)
        found.append(logits)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), expected, atol=1e-4)


@pytest.mark.parametrize("sizes", [(3, 2, 2, 9, 1), (12, 5), (1, 16)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_row_may_come_in_pieces(name, sizes):
    network, params = model(name)
    tokens, mask = tiny.tokens_and_mask(0, 4, sum(sizes))
    expected, found = jax.jit(network.apply)(params, tokens, mask), []
    cache, step = network.init_cache(4, sum(sizes)), jax.jit(network.decode)
    ends = np.cumsum(sizes)
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        logits, cache = step(params, tokens[:, begin:end], mask[:, begin:end], cache)
        found.append(logits)
    found = jnp.concatenate(found, axis=1)
    np.testing.assert_allclose(found[mask], expected[mask], atol=1e-4)


@pytest.mark.parametrize("sizes", [(9, 2, 13), (100, 30, 1)], ids=str)
def test_texts_of_a_packed_row_have_the_logits_of_each_alone(sizes):
    """Texts that are longer than the windows, in rows that are computed at once and in blocks."""
    kinds = (*KINDS, LayerKind(window=20, dense=True))
    experts = Experts(num_experts=3, num_chosen=2, dim=12)
    network = policy_network(
        tiny.model_config(num_layers=4, layer_kinds=kinds, experts=experts, max_length=160)
    )
    params, length = tiny.random_params(network), sum(sizes) + 3
    tokens, _ = tiny.tokens_and_mask(0, 1, length)
    ends = np.cumsum(sizes)
    segments = jnp.asarray(1 + np.searchsorted(ends, np.arange(length), side="right"))[None]
    real = jnp.arange(length)[None] < ends[-1]
    apply = jax.jit(network.apply)
    found = apply(params, tokens, real, segment_ids=jnp.where(real, segments, 0))
    # A text alone is one row of several, which ends where it does.
    texts = zip(ends, sizes, strict=True)
    rows = [jnp.pad(tokens[0, end - n : end], (0, max(sizes) - n)) for end, n in texts]
    masks = jnp.arange(max(sizes))[None] < jnp.asarray(sizes)[:, None]
    alone = apply(params, jnp.stack(rows), masks)
    expected = jnp.concatenate([alone[i, :n] for i, n in enumerate(sizes)])
    np.testing.assert_allclose(found[0, : ends[-1]], expected, atol=1e-4)


SLOTS = dict(max_concurrent=4, min_free_slots=2)


@pytest.mark.parametrize(
    ("name", "of_slots"),
    [
        ("windows", SLOTS),
        ("windows", SLOTS | dict(samples_per_prompt=2)),
        ("scanned windows", dict(max_concurrent=3)),
        ("a window", dict(samples_per_prompt=4)),
    ],
    ids=str,
)
def test_a_rollout_in_slots_has_the_same_tokens(name, of_slots):
    network, params = model(name)
    samples = of_slots.get("samples_per_prompt", 1)
    prompts = tiny.prompts(batch_size=12 // samples)
    length = dict(response_length=14)

    def run(prompts, **shape):
        sampling = tiny.sampling(**length, **shape)
        return tiny.sample(network, params, prompts, tiny.RUN_KEY, sampling=sampling)

    found = run(prompts, **of_slots)
    expected = run(jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), prompts))
    np.testing.assert_array_equal(found.response_tokens, expected.response_tokens)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)
    whole = jnp.concatenate([expected.prompt_tokens, expected.response_tokens], axis=1)
    mask = jnp.concatenate([expected.prompt_mask, expected.response_mask], axis=1)
    logits = jax.jit(network.apply)(params, whole, mask)[:, prompts.tokens.shape[1] - 1 : -1]
    logprobs = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(logprobs, expected.response_tokens[..., None], axis=2)[..., 0]
    real = np.asarray(expected.response_mask)
    np.testing.assert_allclose(expected.logprobs[real], chosen[real], atol=1e-4)


def cache_bytes(cache):
    return sum(x.nbytes for x in jax.tree.leaves(cache.layers))


def test_the_cache_of_a_layer_is_no_longer_than_its_window():
    """Unless layers are scanned: then it is one array."""
    network, _ = model("windows")
    cache = network.init_cache(2, 40)
    slots = [pair[0].shape[2] for pair in cache.layers]
    assert slots == [4, 7, 40] and cache.mask.shape == (2, 40)
    a_slot = 2 * 2 * 2 * 8 * 4  # keys and values of two rows, two heads of eight float32
    assert cache_bytes(cache) == sum(slots) * a_slot
    assert [pair[0].shape[2] for pair in network.init_cache(2, 5).layers] == [4, 5, 5]
    assert cache_bytes(model("scanned windows")[0].init_cache(2, 40)) == 3 * 40 * a_slot
    config = tiny.model_config(**MODELS["windows"])
    assert len(trunk_network(config, end_layer=1).init_cache(2, 40).layers) == 1
    above = policy_network(config, start_layer=1).init_cache(2, 40)
    assert [pair[0].shape[2] for pair in above.layers] == [7, 40]


@pytest.mark.parametrize("prompt", [90, 150])
def test_a_long_prompt_leaves_its_last_positions_in_the_cache(prompt):
    """In blocks: no query reads more than its window and its block."""
    kinds = LayerKind(window=20), LayerKind()
    network = policy_network(tiny.model_config(layer_kinds=kinds, max_length=200))
    params, length = tiny.random_params(network), prompt + 30
    tokens, mask = tiny.tokens_and_mask(0, 3, length, least=length - 40)
    expected = jax.jit(network.apply)(params, tokens, mask)
    cache, step = network.init_cache(3, length), jax.jit(network.decode)
    assert cache.layers[0][0].shape[2] == 20
    logits, cache = step(params, tokens[:, :prompt], mask[:, :prompt], cache)
    found = [logits]
    for t in range(prompt, length):
        logits, cache = step(params, tokens[:, t : t + 1], mask[:, t : t + 1], cache)
        found.append(logits)
    found = np.concatenate(found, axis=1)
    np.testing.assert_allclose(found[mask], np.asarray(expected)[mask], atol=1e-4)
