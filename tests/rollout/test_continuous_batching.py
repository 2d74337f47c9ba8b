"""N responses in S slots: the same responses for any S, and less work where lengths differ."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.config.mesh import ROLLOUT_RULES
from ppo_jax.core.network import Network, merge_params
from ppo_jax.core.types import Prompts
from ppo_jax.models.build import policy_network, trunk_network
from ppo_jax.models.partition import split_params
from ppo_jax.planner.hlo.text import parse_module
from ppo_jax.rollout.continuous_batching import DECODING, DRAINING, REFILLS, max_trip_counts
from ppo_jax.rollout.rollout import rollout
from tests.rollout.test_layer_kinds import LAYERS
from tests.support import tiny
from tests.support.meshes import WIDE, layout_of

NUM_ROWS = 13
KEY = jax.random.key(5)


def responses(kind="llama", *, trunk=False, num_prompts=NUM_ROWS, **shape):
    config = tiny.model_config(**tiny.SHAPES[kind])
    params = tiny.random_params(policy_network(config))
    parts = dict(policy=policy_network(config), params=params)
    if trunk:
        split = split_params(config, params, 1, 1)
        parts = dict(
            policy=policy_network(config, start_layer=1),
            params=merge_params(split.frozen, split.trained),
            trunk=trunk_network(config, end_layer=1),
            trunk_params=split.trunk,
        )
    prompts = tiny.prompts(batch_size=num_prompts)
    return tiny.sample(prompts=prompts, key=KEY, sampling=tiny.sampling(**shape), **parts)


def assert_same(got, expected):
    for name in ("prompt_tokens", "prompt_mask", "response_tokens", "response_mask", "has_eos"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), name)
    np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-5, rtol=1e-5)
    if expected.hidden_states is not None:
        real = np.asarray(expected.mask)[:, :, None]
        both = (np.where(real, x, 0) for x in (got.hidden_states, expected.hidden_states))
        np.testing.assert_allclose(*both, atol=1e-4)


SLOTS = [(1, 1), (4, 1), (4, 3), (5, 5), (12, 0)]


@pytest.mark.parametrize(
    ("kind", "slots", "refill"),
    [*(("llama", *slots) for slots in SLOTS), ("gpt2", 4, 3), ("scanned", 4, 3)],
)
def test_responses_do_not_depend_on_the_slots(kind, slots, refill):
    expected = responses(kind)
    lengths = expected.response_mask.sum(axis=1)
    assert lengths.min() < lengths.max() == tiny.RESPONSE_LENGTH
    assert_same(responses(kind, max_concurrent=slots, min_free_slots=refill), expected)


@pytest.mark.parametrize("slots", [3, 8])
def test_hidden_states_come_with_their_responses(slots):
    assert_same(responses(trunk=True, max_concurrent=slots), responses(trunk=True))


def test_more_slots_than_responses_are_not_made():
    assert_same(responses(max_concurrent=100, min_free_slots=100), responses())


@pytest.mark.parametrize(
    ("kind", "trunk", "slots"),
    [
        *(("llama", True, slots) for slots in (0, 3, 6, 12)),
        ("gpt2", False, 6),
        ("scanned", False, 0),
        ("scanned", False, 6),
    ],
)
def test_several_samples_of_a_prompt_are_responses_to_its_copies(kind, trunk, slots):
    """The same as if each prompt stood three times in the batch."""
    got = responses(kind, trunk=trunk, num_prompts=5, samples_per_prompt=3, max_concurrent=slots)
    config = tiny.model_config(**tiny.SHAPES[kind])
    copies = jax.tree.map(lambda x: jnp.repeat(x, 3, axis=0), tiny.prompts(batch_size=5))
    expected = tiny.sample(
        policy=policy_network(config),
        params=tiny.random_params(policy_network(config)),
        prompts=copies,
        key=KEY,
        sampling=tiny.sampling(),
    )
    assert_same(got.replace(hidden_states=None), expected)
    first, second = (np.asarray(got.response_tokens)[i::3] for i in (0, 1))
    assert (first != second).any(axis=1).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "layers"),
    [((8, 1, 1), {}), ((2, 2, 2), {}), ((1, 1, 8), {}), ((2, 2, 2), LAYERS)],
    ids=["data", "all axes", "model", "windows and experts"],
)
def test_slots_on_a_mesh_give_the_responses_of_one_device(shape, layers):
    """And the decode loops send only what tensor parallelism sums: nothing of caches or prompts."""
    config = tiny.model_config(**WIDE, **layers)
    params = tiny.random_params(policy_network(config))

    def compiled(shape, **slots):
        layout = layout_of(shape, ROLLOUT_RULES)
        policy = policy_network(config, constrain=layout.constrain)
        prompts = layout.shard_batch(jax.tree.map(np.asarray, tiny.prompts(batch_size=32)))
        args = layout.shard_params(params), prompts, layout.replicate(KEY)
        sampling = tiny.sampling(**slots)
        program = jax.jit(lambda *args: rollout(policy, *args, sampling=sampling))
        program = program.lower(*args).compile()
        return program.as_text(), jax.device_get(program(*args))

    text, got = compiled(shape, max_concurrent=16, min_free_slots=8)
    assert_same(got, compiled((1, 1, 1))[1])
    # A program that was kept from before may lack the name scopes: they are no part of its key.
    of_loop = re.compile(rf"/while/body/({DECODING}/)?while/body/|{DRAINING}/while/body/")
    inner = [line for line in text.splitlines() if of_loop.search(line)]
    assert any(DRAINING in line for line in inner)
    moves = r" (all-gather|all-to-all|collective-permute)(-start)?\("
    assert not [line for line in inner if re.search(moves, line)]


def counted(calls: collections.Counter) -> Network:
    """Emits the token after the last one, and counts its calls by the positions of each."""

    def decode(params, tokens, mask, cache, *, first_output=0):
        rows, length = tokens.shape
        kind = "decode" if length == 1 else "prefill"
        jax.debug.callback(lambda: calls.update({kind: 1, f"{kind} rows": rows}))
        return 100.0 * jax.nn.one_hot(tokens + 1, tiny.VOCAB)[:, first_output:], cache

    return Network(
        init=None,
        apply=None,
        init_cache=lambda *_: None,
        decode=decode,
        refill=lambda cache, fresh, source: cache,
        map_rows=lambda function, cache: cache,
    )


def count_to_20(first, **shape):
    """Responses that end with 20; `first` are the last tokens of their prompts."""
    calls: collections.Counter = collections.Counter()
    tokens = jnp.stack([jnp.zeros(len(first), jnp.int32), jnp.asarray(first, jnp.int32)], axis=1)
    prompts = Prompts(tokens=tokens, mask=jnp.ones_like(tokens, bool))
    sampling = tiny.sampling(response_length=16, eos_ids=(20,), **shape)
    found = tiny.sample(
        policy=counted(calls), params={}, prompts=prompts, key=KEY, sampling=sampling
    )
    jax.effects_barrier()
    expected = [min(20 - token, 16) for token in first]
    assert found.response_mask.sum(axis=1).tolist() == expected
    assert found.has_eos.tolist() == [token >= 4 for token in first]
    return calls


def test_nobody_waits_for_the_longest_response():
    """Each group of four has one long response: 4 x 15 steps one group after the other."""
    first = [4, 19, 19, 18] * 4
    assert count_to_20(first)["decode"] == 15
    calls = count_to_20(first, max_concurrent=4, min_free_slots=1)
    assert calls["decode"] <= 20  # 4 x 15 + 4 tokens before the last ones, in four slots
    assert calls["prefill"] == 16


def test_prompts_enter_together():
    calls = count_to_20([18] * 12, max_concurrent=4, min_free_slots=4)
    assert calls == {"decode": 3, "decode rows": 12, "prefill": 3, "prefill rows": 12}
    # A first token that is the last one needs no step.
    calls = count_to_20([19] * 12, max_concurrent=4, min_free_slots=4)
    assert calls == {"prefill": 3, "prefill rows": 12}
    # The last ones do not wait until more slots are free than there are prompts.
    calls = count_to_20([19, 4, 4, 4, 18], max_concurrent=4, min_free_slots=4)
    assert (calls["decode"], calls["prefill"]) == (15, 2)


@pytest.mark.parametrize(("slots", "group"), [(5, 2), (7, 3), (6, 4), (11, 0)])
def test_all_slots_are_filled_at_first_whatever_the_groups(slots, group):
    calls = count_to_20([4] * slots * 2, max_concurrent=slots, min_free_slots=group)
    assert calls["prefill"] == 2 * -(-slots // (group or slots // 4))
    assert calls["decode"] == 2 * 15


def test_the_last_responses_move_into_fewer_rows():
    """Two long ones among twelve: after two steps of all eight slots they have two rows alone."""
    first = [4, 5] + [18] * 10
    calls = count_to_20(first, max_concurrent=8)
    assert calls["decode"] == 15 and calls["decode rows"] == 2 * 8 + 13 * 2
    assert calls["prefill rows"] == 12
    assert count_to_20(first[::-1], max_concurrent=8)["decode rows"] == 2 * 8 + 14 * 2


def test_a_network_that_cannot_move_rows_keeps_its_slots():
    calls: collections.Counter = collections.Counter()
    fixed = counted(calls)._replace(map_rows=None)
    tokens = jnp.asarray([[0, 4], [0, 18], [0, 18], [0, 18], [0, 18]], jnp.int32)
    found = tiny.sample(
        policy=fixed,
        params={},
        prompts=Prompts(tokens=tokens, mask=jnp.ones_like(tokens, bool)),
        key=KEY,
        sampling=tiny.sampling(response_length=16, eos_ids=(20,), max_concurrent=4),
    )
    jax.effects_barrier()
    assert found.response_mask.sum(axis=1).tolist() == [16, 2, 2, 2, 2]
    assert calls["decode rows"] == 15 * 4


def test_a_trunk_also_computes_the_last_tokens():
    """Whose hidden states a reward model reads; they are no reason for more than one more step."""
    calls: collections.Counter = collections.Counter()
    trunk = counted(collections.Counter())._replace(
        decode=lambda params, tokens, mask, cache, **_: (tokens[:, :, None] * 1.0, cache)
    )
    policy = counted(calls)
    above = policy._replace(
        decode=lambda params, states, *args, **kwargs: policy.decode(
            params, states[:, :, 0].astype(jnp.int32), *args, **kwargs
        )
    )
    tokens = jnp.asarray([[0, 19], [0, 18], [0, 4], [0, 0]], jnp.int32)
    for slots, steps in ((0, 16), (2, 18)):
        calls.clear()
        found = tiny.sample(
            policy=above,
            params={},
            trunk=trunk,
            trunk_params={},
            prompts=Prompts(tokens=tokens, mask=jnp.ones_like(tokens, bool)),
            key=KEY,
            sampling=tiny.sampling(
                response_length=16, eos_ids=(20,), max_concurrent=slots, min_free_slots=slots // 2
            ),
        )
        jax.effects_barrier()
        assert calls["decode"] == steps
        states = np.where(found.response_mask, found.hidden_states[:, 2:, 0], 0)
        np.testing.assert_array_equal(states, found.response_tokens)


def test_the_decode_loop_carries_no_logits_and_copies_no_cache():
    config = tiny.model_config()
    policy = policy_network(config)
    args = tiny.random_params(policy), tiny.prompts(batch_size=12), KEY
    sampling = tiny.sampling(max_concurrent=8)
    program = jax.jit(lambda *args: rollout(policy, *args, sampling=sampling)).lower(*args)
    module = parse_module(program.compile().as_text())
    capacity = tiny.PROMPT_LENGTH + tiny.RESPONSE_LENGTH
    wide, narrow = ((n, config.num_kv_heads, capacity, config.head_dim) for n in (8, 2))
    instructions = [i for c in module.computations.values() for i in c]
    loops = [i for i in instructions if i.opcode == "while" and {wide, narrow} & set(shapes(i))]
    assert [wide in shapes(i) for i in loops].count(True) == 2  # REFILLS and DECODING in it
    assert [narrow in shapes(i) for i in loops].count(True) == 1  # DRAINING
    assert not [i.name for i in loops if {(8, tiny.VOCAB), (2, tiny.VOCAB)} & set(shapes(i))]
    copies = [i for i in instructions if i.opcode == "copy" and {wide, narrow} & set(shapes(i))]
    assert not [i.name for i in copies if re.search(f"{DECODING}|{DRAINING}", i.op_name)]


def shapes(instruction):
    return [array.dims for array in instruction.outputs]


@pytest.mark.parametrize(
    ("rows", "slots", "refill"), [(12, 4, 2), (13, 4, 4), (12, 4, 3), (9, 8, 1)]
)
def test_no_lengths_need_more_turns_than_full_ones(rows, slots, refill):
    turns = max_trip_counts(rows, slots, refill, 15)
    most = turns[REFILLS] * turns[DECODING]
    full = count_to_20([4] * rows, max_concurrent=slots, min_free_slots=refill)
    assert full["prefill"] == turns[REFILLS]
    assert full["decode"] == most
    if slots % refill == 0:
        assert most == 15 * -(-rows // slots)
    for first in np.random.default_rng(0).integers(0, 20, size=(3, rows)).tolist():
        calls = count_to_20(first, max_concurrent=slots, min_free_slots=refill)
        assert calls["prefill"] == turns[REFILLS] and calls["decode"] <= most


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="min_free_slots must be at most 4 .* got 5"):
        responses(max_concurrent=4, min_free_slots=5)
    with pytest.raises(
        ValueError, match=r"max_concurrent must be a multiple of samples_per_prompt \(3\)"
    ):
        responses(num_prompts=5, samples_per_prompt=3, max_concurrent=4)
    plain = counted(collections.Counter())._replace(refill=None)
    with pytest.raises(ValueError, match="need a network with `refill`, this one has none"):
        tiny.sample(
            policy=plain,
            params={},
            prompts=tiny.prompts(),
            key=KEY,
            sampling=tiny.sampling(max_concurrent=4),
        )
