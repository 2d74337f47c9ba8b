"""Responses that share rows: where each stands, and that nothing of an update depends on it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ppo_jax.algorithms.minibatches import accumulate_packed
from ppo_jax.algorithms.options import PPONetworks
from ppo_jax.algorithms.update import experience_loss, ppo_update
from ppo_jax.core.network import Network
from ppo_jax.core.optimizer import init_optimizer
from ppo_jax.core.types import Experience, FrozenParams, PPOState
from ppo_jax.models.build import policy_network, value_network
from ppo_jax.rollout.packing import first_fit, pack_rows, packed_experience
from tests.support import tiny

B, P, T = 12, 5, 8
W = P + T - 1
# From one token to all, most of them short.
LENGTHS = np.array([8, 1, 2, 1, 3, 1, 1, 5, 2, 1, 8, 2])
PROMPTS = np.array([5, 5, 1, 2, 5, 3, 1, 2, 4, 5, 1, 2])
ADAM = optax.tree_utils.tree_get


def masks(lengths=LENGTHS, prompts=PROMPTS):
    """Left-padded prompts and right-padded responses, as [B, L] and [B, T]."""
    responses = np.arange(T) < lengths[:, None]
    return np.concatenate([np.arange(P)[::-1] < prompts[:, None], responses], axis=1), responses


def first_fit_decreasing(sizes, room):
    """Rows of indices, in plain Python: the longest first, each into the first row with room."""
    rows = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i][0]):
        for row in rows:
            if all(sum(sizes[j][k] for j in row) + sizes[i][k] <= room[k] for k in (0, 1)):
                row.append(i)
                break
        else:
            rows.append([i])
    return rows


pack = jax.jit(pack_rows)


@pytest.mark.parametrize("seed", range(6))
def test_the_rows_are_those_of_first_fit_decreasing(seed):
    rng = np.random.default_rng(seed)
    width, most = 20, 12
    counts = rng.integers(1, most + 1, size=30)
    lengths = np.minimum(counts + rng.integers(0, 9, size=30), width)
    got = jax.jit(functools.partial(first_fit, width=width, max_tokens=most))(lengths, counts)
    row, begin, token_begin, number = map(np.asarray, got)
    expected = first_fit_decreasing(list(zip(lengths, counts, strict=True)), (width, most))
    assert len(expected) < 30
    for i, members in enumerate(expected):
        assert (row[members] == i).all()
        assert number[members].tolist() == list(range(1, len(members) + 1))
        for of, sizes in ((begin, lengths), (token_begin, counts)):
            ends = np.cumsum(sizes[members])
            assert of[members].tolist() == [0, *ends[:-1]]


def test_every_response_is_whole_and_once_in_a_row():
    mask, response_mask = masks()
    rows, used = jax.tree.map(np.asarray, pack(mask, response_mask))
    sizes = list(zip(PROMPTS + LENGTHS - 1, LENGTHS, strict=True))
    assert used == len(first_fit_decreasing(sizes, (W, T))) < B
    assert not rows.segment_ids[used:].any() and not rows.mask[used:].any()
    seen = []
    for positions, segment_ids, tokens, real, at in zip(
        rows.positions, rows.segment_ids, rows.tokens, rows.mask, rows.output_positions, strict=True
    ):
        held = segment_ids.max()
        assert (np.diff(segment_ids[segment_ids > 0]) >= 0).all()  # text after text, padding last
        assert segment_ids[: (segment_ids > 0).sum()].all()
        for number in range(1, held + 1):
            places = np.flatnonzero(segment_ids == number)
            response, position = np.divmod(positions[places], P + T)
            (response,) = set(response)
            first, last = P - PROMPTS[response], P + LENGTHS[response] - 1
            np.testing.assert_array_equal(position, np.arange(first, last))
            mine = np.flatnonzero(real & (tokens // T == response))
            np.testing.assert_array_equal(tokens[mine] % T, np.arange(LENGTHS[response]))
            # Each is predicted by the position before it.
            np.testing.assert_array_equal(positions[at[mine]] % (P + T), P - 1 + tokens[mine] % T)
            assert (segment_ids[at[mine]] == number).all()
            seen.append(response)
        assert real.sum() == sum(LENGTHS[r] for r in seen[len(seen) - held :])
    assert sorted(seen) == list(range(B))


def test_rows_of_their_own_are_enough_for_the_longest():
    full = np.full(B, T), np.full(B, P)
    rows, used = pack(*masks(*full))
    assert used == B and (rows.segment_ids == 1).all()
    np.testing.assert_array_equal(
        rows.output_positions, np.broadcast_to(np.arange(P - 1, W), (B, T))
    )


# --- the gradient ---------------------------------------------------------------------------------

KINDS = {
    "gpt2": {},
    "llama": {},
    "scanned": {},
    "experts": {},
    "qk_norm": {},
    "hidden": {},
    "chunk": dict(logits_chunk=3),
}


@functools.cache
def networks_of(kind):
    """(networks, their parameters)."""
    config = tiny.model_config(**tiny.SHAPES.get(kind, {}))
    start = 1 if kind == "hidden" else None
    policy = policy_network(config, start_layer=start, **KINDS[kind])
    value = value_network(config, start_layer=start)
    params = {"policy": tiny.random_params(policy), "value": tiny.random_params(value, 1)}
    return PPONetworks(policy=policy, value=value), params


def make_experience(kind, seed=0):
    """Random experience; padding holds what must not matter."""
    rng = np.random.default_rng(seed)
    mask, response_mask = masks()
    tokens = rng.integers(5, tiny.VOCAB, size=mask.shape).astype(np.int32)
    inputs = tokens
    if kind == "hidden":
        inputs = np.where(mask[:, :, None], rng.normal(size=(*mask.shape, 32)), np.nan)
    numbers = [np.where(response_mask, rng.normal(size=(B, T)), np.nan) for _ in range(4)]
    fields = dict(zip(("logprobs", "values", "advantages", "returns"), numbers, strict=True))
    fields["logprobs"] = fields["logprobs"] * 0.1 - 4.0
    experience = Experience(
        policy_inputs=inputs,
        value_inputs=inputs,
        mask=mask,
        response_tokens=tokens[:, P:],
        response_mask=response_mask,
        **fields,
    )
    as_jax = {"f": jnp.float32, "i": jnp.int32, "b": bool}
    return jax.tree.map(lambda x: jnp.asarray(x, as_jax[x.dtype.kind]), experience)


def update(kind, experience, chosen, **numbers):
    """What one update gives: the state, and the metrics of its steps."""
    networks, params = networks_of(kind)
    numbers = tiny.hyperparameters(temperature=0.8, **numbers)
    state = PPOState(
        step=jnp.int32(0),
        episodes=jnp.int32(0),
        policy_params=params["policy"],
        value_params=params["value"],
        opt_state=init_optimizer(numbers.optimizer, params),
        kl_coef=jnp.float32(0.0),
    )
    frozen = FrozenParams(ref_policy={})
    parts = dict(frozen=frozen, networks=networks, options=chosen)
    return tiny.update(state, experience, numbers, tiny.RUN_KEY, **parts)


def options(packing, **changes):
    base = dict(num_epochs=1, num_minibatches=1, num_micro_batches=6)
    return tiny.options(**base | changes, packing=packing)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_rows_of_their_own(kind):
    e = make_experience(kind)
    (expected, metrics), (got, packed_metrics) = (
        update(kind, e, options(packing), optimizer=dict(max_grad_norm=np.inf))
        for packing in (False, True)
    )
    expected, got = (ADAM(x.opt_state, "mu") for x in (expected, got))
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    tiny.leaves_close(got, expected, rtol=1e-5, atol=1e-6 * largest)
    fill = packed_metrics.pop("ppo/packing_efficiency")
    tiny.leaves_close(packed_metrics, metrics, rtol=1e-5, atol=1e-6)
    # Pieces of two rows, as many as first fit decreasing needs, and fewer than six.
    sizes = list(zip(PROMPTS + LENGTHS - 1, LENGTHS, strict=True))
    turns = -(-len(first_fit_decreasing(sizes, (W, T))) // 2)
    assert turns < 6
    np.testing.assert_allclose(fill, sum(n for n, _ in sizes) / (turns * 2 * W), rtol=1e-6)


def test_several_steps_are_those_of_rows_of_their_own():
    e = make_experience("llama")
    steps = dict(num_epochs=2, num_minibatches=3, num_micro_batches=4)
    expected, got = (update("llama", e, options(packing, **steps))[0] for packing in (False, True))
    for name in ("policy_params", "value_params"):  # a tenth of the learning rate
        tiny.leaves_close(getattr(got, name), getattr(expected, name), atol=1e-4)
    assert tiny.leaves_differ(got.policy_params, networks_of("llama")[1]["policy"])


@functools.cache
def counted():
    """(networks whose value network counts its calls, the calls)."""
    networks, _ = networks_of("llama")
    calls = []

    def apply(*args, **kwargs):
        jax.debug.callback(lambda: calls.append(1))
        return networks.value.apply(*args, **kwargs)

    return networks._replace(value=networks.value._replace(apply=apply)), calls


@pytest.mark.parametrize("num_micro_batches", [1, 3, 6, 12])
def test_as_many_micro_batches_are_computed_as_there_are_rows_for(num_micro_batches):
    networks, calls = counted()
    _, params = networks_of("llama")
    e, calls[:] = make_experience("llama"), []

    def loss(params, micro_batch):
        numbers = tiny.hyperparameters()
        return experience_loss(
            params, micro_batch, numbers, frozen=FrozenParams(ref_policy={}), networks=networks
        )

    args = jax.grad(loss, has_aux=True), params, e, num_micro_batches
    jax.block_until_ready(jax.jit(lambda: accumulate_packed(*args))())
    jax.effects_barrier()
    used, size = int(pack(e.mask, e.response_mask)[1]), B // num_micro_batches
    assert used < B - 2 and len(calls) == -(-used // size)


def test_rows_hold_nothing_of_what_padding_holds():
    e = make_experience("hidden")
    rows, used = pack(e.mask, e.response_mask)
    packed = packed_experience(e, rows)
    assert packed.policy_inputs.shape == (B, W, 32) and packed.advantages.shape == (B, T)
    for x in (packed.logprobs, packed.values, packed.advantages, packed.returns):
        assert not np.isnan(x).any() and not np.asarray(x)[~np.asarray(packed.response_mask)].any()
    assert not np.isnan(np.asarray(packed.policy_inputs)[np.asarray(packed.mask)]).any()
    assert (packed.mask.sum(), packed.response_mask.sum()) == (
        (PROMPTS + LENGTHS - 1).sum(),
        LENGTHS.sum(),
    )


def test_a_network_that_does_not_take_packed_rows_is_refused():
    networks, _ = networks_of("llama")
    own = Network(
        init=networks.value.init, apply=lambda params, inputs, mask, *, first_output=0: None
    )
    with pytest.raises(
        ValueError, match=r"Network.supports_packing\), got policy True, value False"
    ):
        ppo_update(
            None,
            None,
            None,
            None,
            frozen=None,
            networks=networks._replace(value=own),
            options=options(True),
        )
