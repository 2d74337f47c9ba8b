import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ppo_jax.core.distributions import token_logprobs
from ppo_jax.core.network import Network, merge_params
from ppo_jax.core.types import Prompts
from ppo_jax.models.build import policy_network, trunk_network
from ppo_jax.models.partition import split_params
from ppo_jax.rollout.decode import response_outputs
from tests.support import tiny

P, T = tiny.PROMPT_LENGTH, tiny.RESPONSE_LENGTH


@functools.cache
def model(start=None):
    """(keyword arguments of a rollout, the policy's parameters) of one model, whole or split."""
    config = tiny.model_config()
    params = tiny.random_params(policy_network(config))
    if start is None:
        return dict(policy=policy_network(config), params=params)
    parts = split_params(config, params, config.num_layers - start, start)
    return dict(
        policy=policy_network(config, start_layer=start),
        params=merge_params(parts.frozen, parts.trained),
        trunk=trunk_network(config, end_layer=start),
        trunk_params=parts.trunk,
    )


def roll(prompts, seed=0, start=None, sampling=None, **kwargs):
    """A rollout, as numpy arrays."""
    sampling = sampling or tiny.sampling()
    key = jax.random.key(seed)
    got = tiny.sample(prompts=prompts, key=key, sampling=sampling, **model(start), **kwargs)
    return jax.tree.map(np.asarray, got)


@functools.partial(jax.jit, static_argnames="network")
def full_forward(network, params, inputs, mask, tokens, temperature):
    logits = response_outputs(network, params, inputs, mask, response_length=tokens.shape[1])
    return logits, token_logprobs(logits, tokens, temperature=temperature)


def recomputed(rollout, start=None, temperature=1.0):
    """(logits, logprobs) of the responses, from one pass over whole sequences."""
    inputs = rollout.tokens if start is None else rollout.hidden_states
    kwargs = model(start)
    tokens = rollout.response_tokens
    args = (kwargs["params"], inputs, rollout.mask, tokens, temperature)
    return map(np.asarray, full_forward(kwargs["policy"], *args))


def counting_network() -> Network:
    """Not one of ours, and without parameters: the next token is the last one plus 1."""

    def decode(params, tokens, mask, cache, *, first_output=0):
        logits = 100.0 * jax.nn.one_hot(tokens + 1, tiny.VOCAB)
        return logits[:, first_output:], cache

    return Network(init=None, apply=None, init_cache=lambda *_: None, decode=decode)


def count_from(first, eos_ids, **kwargs):
    tokens = jnp.asarray(first, jnp.int32)[:, None]
    prompts = Prompts(tokens=tokens, mask=jnp.ones_like(tokens, bool))
    sampling = tiny.sampling(response_length=5, eos_ids=eos_ids)
    kwargs = dict(policy=COUNTING, params={}) | kwargs
    return tiny.sample(prompts=prompts, key=jax.random.key(0), sampling=sampling, **kwargs)


COUNTING = counting_network()


def test_a_response_ends_with_its_first_stop_token_which_is_inside_the_mask():
    rollout = count_from([10, 13, 20, 16], eos_ids=(14, 17))
    assert rollout.response_tokens.tolist() == [
        [11, 12, 13, 14, 0],
        [14, 0, 0, 0, 0],
        [21, 22, 23, 24, 25],
        [17, 0, 0, 0, 0],
    ]
    assert rollout.response_mask.sum(axis=1).tolist() == [4, 1, 5, 1]
    assert rollout.response_mask.tolist() == (rollout.response_tokens != 0).tolist()
    assert rollout.has_eos.tolist() == [True, True, False, True]


def test_a_stop_token_in_the_last_place_counts_as_one():
    assert count_from([9, 8], eos_ids=(14,)).has_eos.tolist() == [True, False]


def test_without_stop_tokens_all_tokens_are_sampled():
    rollout = count_from([10], eos_ids=())
    assert rollout.response_tokens.tolist() == [[11, 12, 13, 14, 15]]
    assert rollout.response_mask.all() and not rollout.has_eos.any()


def test_the_loop_ends_when_every_row_has_stopped():
    # This trunk leaves a mark wherever it was run.
    def decode(params, tokens, mask, cache, *, first_output=0):
        return jnp.ones((*tokens.shape, 1)), cache

    def upper(params, hidden, mask, cache, *, first_output=0):
        last = jnp.full((2, 1), 12)
        return COUNTING.decode(params, last, mask, cache)

    trunk = COUNTING._replace(decode=decode)
    policy = COUNTING._replace(decode=upper)
    rollout = count_from([12, 12], eos_ids=(13,), policy=policy, trunk=trunk, trunk_params={})
    assert rollout.response_tokens.tolist() == [[13, 0, 0, 0, 0]] * 2
    assert rollout.hidden_states[0, :, 0].tolist() == [1, 1, 0, 0, 0, 0]
    rollout = count_from([12, 12], eos_ids=(9,), policy=policy, trunk=trunk, trunk_params={})
    assert rollout.hidden_states[0, :, 0].tolist() == [1, 1, 1, 1, 1, 1]


def test_every_row_and_position_has_noise_of_its_own():
    def decode(params, tokens, mask, cache, *, first_output=0):
        return jnp.zeros((tokens.shape[0], 1, 4)), cache

    flat = COUNTING._replace(decode=decode)
    tokens = count_from(np.zeros(2000), eos_ids=(), policy=flat).response_tokens
    tokens = np.asarray(tokens)
    # Uniform, and independent of the token before and of the row above.
    for pair in [tokens, 4 * tokens[:, 1:] + tokens[:, :-1], 4 * tokens[1:] + tokens[:-1]]:
        counts = np.bincount(pair.ravel())
        expected = pair.size / len(counts)
        assert len(counts) in (4, 16)
        assert np.abs(counts - expected).max() < 4.5 * np.sqrt(expected)


@pytest.mark.parametrize("temperature", [0.5, 0.7, 1.0])
@pytest.mark.parametrize("start", [None, 1, 0])
def test_logprobs_are_those_of_a_full_forward(start, temperature):
    rollout = roll(tiny.prompts(), start=start, temperature=temperature)
    _, expected = recomputed(rollout, start, temperature)
    mask = rollout.response_mask
    np.testing.assert_allclose(rollout.logprobs[mask], expected[mask], atol=1e-5)
    assert not rollout.logprobs[~mask].any() and not rollout.response_tokens[~mask].any()
    # The fixture is worth something: some rows have stopped, some have not.
    assert 0 < rollout.has_eos.sum() < len(rollout.has_eos)


def test_with_and_without_a_trunk_the_responses_are_the_same():
    whole, split = roll(tiny.prompts()), roll(tiny.prompts(), start=1)
    np.testing.assert_array_equal(whole.response_tokens, split.response_tokens)
    np.testing.assert_allclose(whole.logprobs, split.logprobs, atol=1e-5)
    assert whole.hidden_states is None


def test_the_kept_hidden_states_are_those_of_the_trunk():
    rollout = roll(tiny.prompts(), start=1)
    kwargs = model(1)
    expected = jax.jit(kwargs["trunk"].apply)(kwargs["trunk_params"], rollout.tokens, rollout.mask)
    expected = np.asarray(expected)
    np.testing.assert_allclose(
        rollout.hidden_states[rollout.mask], expected[rollout.mask], atol=1e-5
    )


def test_copies_of_a_prompt_get_different_responses():
    one = tiny.prompts()
    copies = jax.tree.map(lambda x: jnp.repeat(x[:1], tiny.BATCH, axis=0), one)
    tokens = roll(copies).response_tokens
    assert len({tuple(row) for row in tokens.tolist()}) == tiny.BATCH


def test_the_key_alone_decides():
    a, b, c = (roll(tiny.prompts(), seed=seed).response_tokens for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any(axis=1).all()


def test_a_response_does_not_depend_on_the_batch_it_is_sampled_in():
    whole = roll(tiny.prompts())
    rows = np.array([6, 1, 4])
    some = roll(jax.tree.map(lambda x: x[rows], tiny.prompts()), rows=jnp.asarray(rows))
    np.testing.assert_array_equal(some.response_tokens, whole.response_tokens[rows])
    np.testing.assert_allclose(some.logprobs, whole.logprobs[rows], atol=1e-5)


def test_a_response_does_not_depend_on_padding():
    prompts = tiny.prompts()
    wider = Prompts(
        tokens=jnp.pad(prompts.tokens, ((0, 0), (3, 0)), constant_values=9),
        mask=jnp.pad(prompts.mask, ((0, 0), (3, 0))),
    )
    narrow, wide = roll(prompts), roll(wider)
    np.testing.assert_array_equal(wide.response_tokens, narrow.response_tokens)
    np.testing.assert_allclose(wide.logprobs, narrow.logprobs, atol=1e-5)


@pytest.mark.parametrize("start", [None, 1])
def test_a_response_does_not_depend_on_the_number_of_devices(start):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    prompts = jax.device_put(tiny.prompts(), sharding)
    args = dict(prompts=prompts, key=jax.random.key(0), sampling=tiny.sampling())
    many = tiny.sample(**args, **model(start))
    assert len(many.response_tokens.sharding.device_set) == 8
    one = roll(tiny.prompts(), start=start)
    np.testing.assert_array_equal(many.response_tokens, one.response_tokens)
    np.testing.assert_allclose(many.logprobs, one.logprobs, atol=1e-5)


def test_temperature_0_and_top_k_1_are_greedy():
    cold = roll(tiny.prompts(), temperature=0.0)
    logits, logprobs = recomputed(cold, temperature=1.0)
    mask = cold.response_mask
    np.testing.assert_array_equal(cold.response_tokens[mask], logits.argmax(axis=-1)[mask])
    np.testing.assert_allclose(cold.logprobs[mask], logprobs[mask], atol=1e-5)
    one = roll(tiny.prompts(), sampling=tiny.sampling(top_k=1))
    np.testing.assert_array_equal(one.response_tokens, cold.response_tokens)


def test_filters_shape_what_is_sampled_but_not_the_logprobs():
    free, filtered = roll(tiny.prompts()), roll(tiny.prompts(), sampling=tiny.sampling(top_k=3))
    logits, logprobs = recomputed(filtered)
    mask, tokens = filtered.response_mask, filtered.response_tokens
    chosen = np.take_along_axis(logits, tokens[..., None], axis=-1)
    rank = (logits > chosen).sum(axis=-1)[mask]
    assert rank.max() == 2  # the third of the largest, and none below
    np.testing.assert_allclose(filtered.logprobs[mask], logprobs[mask], atol=1e-5)
    logits, _ = recomputed(free)
    chosen = np.take_along_axis(logits, free.response_tokens[..., None], axis=-1)
    assert (logits > chosen).sum(axis=-1)[free.response_mask].max() > 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("response_length", 4),
        ("eos_ids", (5, 6, 7, 8, 9)),
        ("top_k", 2),
        ("top_p", 0.5),
        ("min_p", 0.5),
    ],
)
def test_every_field_of_sampling_changes_the_responses(field, value):
    changed = roll(tiny.prompts(), sampling=tiny.sampling(**{field: value})).response_tokens
    base = roll(tiny.prompts()).response_tokens
    assert changed.shape != base.shape or (changed != base).any()
