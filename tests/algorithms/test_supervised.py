import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ppo_jax.algorithms.supervised import reward_step, sft_loss, sft_step, text_scores
from ppo_jax.core.distributions import token_logprobs
from ppo_jax.core.optimizer import init_optimizer
from ppo_jax.core.types import Optimizer, PreferenceBatch, TextBatch, TrainState
from ppo_jax.models.build import policy_network, reward_network, trunk_network
from ppo_jax.models.partition import split_params
from tests.support import tiny

N, L = 8, 7
CONFIG = tiny.model_config(num_layers=1)
POLICY, REWARD = policy_network(CONFIG), reward_network(CONFIG)
PLAIN = Optimizer(learning_rate=1.0, max_grad_norm=jnp.inf, eps=1e6)
TRAIN = Optimizer(learning_rate=1e-2)
sft = tiny.program(sft_step)
reward = tiny.program(reward_step)


def start(network, params=None, optimizer=PLAIN):
    params = tiny.random_params(network) if params is None else params
    return TrainState(step=jnp.int32(0), params=params, opt_state=init_optimizer(optimizer, params))


def gradient_of(after):
    """The gradient of the first step: Adam's first moment, which began at zero, is 1 - b1 of it."""
    return jax.tree.map(
        lambda m: np.asarray(m) / 0.1, optax.tree_utils.tree_get(after.opt_state, "mu")
    )


@functools.cache
def texts():
    """Texts whose first token (the prompt) is not learned, with very unequal lengths."""
    tokens, mask = tiny.tokens_and_mask(1, N, L, least=2, side="right")
    mask = mask.at[-2:, 2:].set(False)  # the last micro-batch has the fewest tokens
    return TextBatch(inputs=tokens, tokens=tokens, mask=mask, loss_mask=mask.at[:, 0].set(False))


@pytest.mark.parametrize("num_micro_batches", [2, 4])
def test_micro_batches_do_not_change_the_sft_gradient(num_micro_batches):
    batch, state = texts(), start(POLICY)
    counts = np.asarray(batch.loss_mask).reshape(num_micro_batches, -1).sum(axis=1)
    assert len(set(counts)) > 1
    whole, metrics = sft(state, batch, PLAIN, network=POLICY, frozen={})
    got, micro_metrics = sft(
        state, batch, PLAIN, network=POLICY, frozen={}, num_micro_batches=num_micro_batches
    )
    expected = gradient_of(whole)
    tiny.leaves_close(gradient_of(got), expected, atol=1e-6, rtol=1e-4)
    tiny.leaves_close(micro_metrics, metrics, rtol=1e-5)


def test_the_sft_loss_is_the_mean_over_learned_tokens():
    batch, state = texts(), start(POLICY)
    _, metrics = sft(state, batch, PLAIN, network=POLICY, frozen={})
    logits = jax.jit(POLICY.apply)(state.params, batch.tokens, batch.mask)
    terms = [
        -jax.nn.log_softmax(np.asarray(logits)[n, t - 1])[batch.tokens[n, t]]
        for n, t in np.argwhere(batch.loss_mask)
    ]
    np.testing.assert_allclose(metrics["sft/loss"], np.mean(terms), rtol=1e-5)
    assert metrics["sft/learning_rate"] == 1.0 and metrics["sft/grad_norm"] > 0.0


def test_the_step_is_counted_and_the_rate_scheduled():
    settings = PLAIN.replace(schedule="linear", total_steps=4.0)
    state, rates = start(POLICY), []
    for _ in range(3):
        state, metrics = sft(state, texts(), settings, network=POLICY, frozen={})
        rates.append(float(metrics["sft/learning_rate"]))
    assert state.step == 3 and rates == [1.0, 0.75, 0.5]
    assert optax.tree_utils.tree_get(state.opt_state, "count") == 3


def test_a_pad_id_that_is_the_stop_token_changes_nothing():
    # Texts of 5 tokens and a stop token, then padding with another id, and with that same id.
    eos = 1
    tokens, _ = tiny.tokens_and_mask(2, N, L)
    tokens = tokens.at[:, 4].set(eos)
    mask = jnp.broadcast_to(jnp.arange(L)[None] < 5, (N, L))
    state = start(POLICY, optimizer=TRAIN)

    def batch(pad_id):
        padded = jnp.where(mask, tokens, pad_id)
        return TextBatch(
            inputs=padded, tokens=padded, mask=mask, loss_mask=mask.at[:, 0].set(False)
        )

    @jax.jit
    def logprob_of_eos(params):
        logits = POLICY.apply(params, tokens[:, :4], mask[:, :4])
        return token_logprobs(logits[:, 3], tokens[:, 4]).mean()

    ends = []
    for pad_id in (0, eos):
        trained = state
        for _ in range(3):
            trained, _ = sft(trained, batch(pad_id), TRAIN, network=POLICY, frozen={})
        ends.append(trained.params)
    tiny.leaves_close(*ends, rtol=0.0)
    # And the model learns to stop.
    assert logprob_of_eos(ends[1]) > logprob_of_eos(state.params) + 1.0


def test_a_few_steps_of_sft_lower_the_loss():
    state, losses = start(POLICY, optimizer=TRAIN), []
    for _ in range(20):
        state, metrics = sft(state, texts(), TRAIN, network=POLICY, frozen={})
        losses.append(float(metrics["sft/loss"]))
    assert losses[-1] < 0.2 * losses[0]


def test_cached_hidden_states_train_like_tokens():
    config, batch = tiny.model_config(), texts()
    policy = policy_network(config)
    params = tiny.random_params(policy)
    whole = split_params(config, params, 1, None)
    upper = split_params(config, params, 1, 1)
    trunk = trunk_network(config, end_layer=1)
    hidden = jax.jit(trunk.apply)(upper.trunk, batch.tokens, batch.mask)
    network = policy_network(config, start_layer=1)
    cached = batch.replace(inputs=hidden)
    got, _ = sft(start(network, upper.trained), cached, PLAIN, network=network, frozen=upper.frozen)
    expected, _ = sft(
        start(policy, whole.trained), batch, PLAIN, network=policy, frozen=whole.frozen
    )
    tiny.leaves_close(gradient_of(got), gradient_of(expected), atol=1e-5, rtol=1e-4)


def test_the_normalizer_of_the_sft_loss_is_its_own_count_by_default():
    batch, params = texts(), tiny.random_params(POLICY)
    loss = jax.jit(functools.partial(sft_loss, POLICY))
    count = batch.loss_mask.sum().astype(jnp.float32)
    mean, total = loss(params, batch)[0], loss(params, batch, normalizer=jnp.float32(1.0))[0]
    np.testing.assert_allclose(total, mean * count, rtol=1e-5)


def packed(batch):
    """Two texts a row; the padding of the first stays between them."""
    rows = jax.tree.map(lambda x: x.reshape(N // 2, 2 * L), batch)
    numbers = jnp.arange(2 * L)[None] // L + 1
    return rows.replace(segment_ids=jnp.where(rows.mask, numbers, 0))


@pytest.mark.parametrize("num_micro_batches", [1, 2, 4])
def test_packed_rows_give_the_gradient_of_their_texts(num_micro_batches):
    batch, state = texts(), start(POLICY)
    got, metrics = sft(
        state, packed(batch), PLAIN, network=POLICY, frozen={}, num_micro_batches=num_micro_batches
    )
    expected, single = sft(state, batch, PLAIN, network=POLICY, frozen={})
    tiny.leaves_close(gradient_of(got), gradient_of(expected), atol=1e-6, rtol=1e-4)
    tiny.leaves_close(metrics, single, rtol=1e-5)


def test_a_network_that_knows_no_segments_learns_from_single_texts():
    def apply(params, inputs, mask, *, first_output=0):
        return POLICY.apply(params, inputs, mask, first_output=first_output)

    network, params, batch = (
        POLICY._replace(apply=apply, summed_logprobs=None),
        tiny.random_params(POLICY),
        texts(),
    )
    assert sft_loss(network, params, batch)[0] > 0.0
    with pytest.raises(TypeError, match="segment_ids"):
        sft_loss(network, params, packed(batch))


@functools.cache
def routed():
    """(a network with experts, its start, texts that end before their rows do)."""
    network = policy_network(tiny.model_config(**tiny.SHAPES["experts"]))
    wider = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 1))), texts())
    return network, start(network, tiny.random_params(network, std=0.1)), wider


def balance(network, params, batch):
    """(loss of the routers, positions that it is of)."""
    loss = jax.jit(functools.partial(sft_loss, network, router_coef=1.0))
    return float(loss(params, batch)[1]["sft/router_loss"]), int(batch.mask[:, :-1].sum())


def test_packed_rows_have_the_loss_of_the_routers_of_their_texts():
    network, state, batch = routed()
    rows = jax.tree.map(lambda x: x.reshape(N // 2, -1), batch)
    numbers = jnp.arange(rows.mask.shape[1])[None] // (L + 1) + 1
    rows = rows.replace(segment_ids=jnp.where(rows.mask, numbers, 0))
    expected, count = balance(network, state.params, batch)
    assert count == batch.mask.sum()
    np.testing.assert_allclose(balance(network, state.params, rows)[0], expected, rtol=1e-5)


def test_the_loss_of_the_routers_is_the_mean_over_micro_batches_by_their_positions():
    network, state, batch = routed()
    parts = [jax.tree.map(lambda x, i=i: x[i::2], batch) for i in range(2)]
    each = [balance(network, state.params, part) for part in parts]
    expected = np.average([x for x, _ in each], weights=[count for _, count in each])

    def step(count, coef):
        how = dict(network=network, frozen={}, num_micro_batches=count, router_coef=coef)
        return jax.jit(functools.partial(sft_step, **how))(state, batch, PLAIN)

    plain, metrics = step(2, 0.0)
    assert "sft/router_loss" not in metrics
    half, whole = step(2, 0.5), step(2, 1.0)
    np.testing.assert_allclose(half[1]["sft/router_loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(half[1]["sft/loss"], metrics["sft/loss"], rtol=1e-5)
    gradients = [gradient_of(x) for x in (plain, half[0], whole[0])]
    more = jax.tree.map(lambda a, b: b - a, gradients[0], gradients[2])
    assert max(np.abs(x).max() for x in jax.tree.leaves(more)) > 1e-3
    between = jax.tree.map(lambda a, b: a + b / 2, gradients[0], more)
    tiny.leaves_close(gradients[1], between, atol=1e-6, rtol=1e-4)


def test_the_loss_of_the_routers_needs_experts():
    with pytest.raises(ValueError, match="router_coef must be 0 for a network without experts"):
        sft_loss(POLICY, start(POLICY).params, texts(), router_coef=0.1)


def preferences(pairs, valid=None):
    tokens, mask = tiny.tokens_and_mask(3, 4, L, least=3, side="right")
    valid = [True] * len(pairs) if valid is None else valid
    return PreferenceBatch(
        inputs=tokens, mask=mask, pairs=jnp.asarray(pairs, jnp.int32), valid=jnp.asarray(valid)
    )


ALL_PAIRS = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


@pytest.mark.parametrize("num_micro_batches", [2, 4])
def test_micro_batches_do_not_change_the_reward_gradient(num_micro_batches):
    batch, state = preferences(ALL_PAIRS), start(REWARD)
    whole, metrics = reward(state, batch, PLAIN, network=REWARD, frozen={})
    got, micro_metrics = reward(
        state, batch, PLAIN, network=REWARD, frozen={}, num_micro_batches=num_micro_batches
    )
    tiny.leaves_close(gradient_of(got), gradient_of(whole), atol=1e-6, rtol=1e-4)
    tiny.leaves_close(micro_metrics, metrics, rtol=1e-5)


def packed_preferences():
    """`preferences(ALL_PAIRS)`, its four texts in two rows and one of padding that is for sharding.

    The second text of a row that has one alone is text 5 of the pairs, and in none of them.
    """
    batch, order = preferences(ALL_PAIRS), [(2, 0), (3,), (1,), ()]
    tokens, lengths = np.asarray(batch.inputs), np.asarray(batch.mask.sum(axis=1))
    packed, segment_ids = np.full((4, 2 * L), 9, np.int32), np.zeros((4, 2 * L), np.int32)
    ends, number = np.zeros((4, 2), np.int32), np.zeros(4, np.int32)
    for row, texts in enumerate(order):
        begin = 0
        for place, text in enumerate(texts):
            end = begin + lengths[text]
            packed[row, begin:end] = tokens[text, : lengths[text]]
            segment_ids[row, begin:end], ends[row, place] = place + 1, end - 1
            number[text], begin = 2 * row + place, end
    return batch.replace(
        inputs=packed,
        mask=segment_ids > 0,
        segment_ids=segment_ids,
        ends=ends,
        pairs=number[np.asarray(batch.pairs)],
    )


@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_texts_that_share_a_row_do_not_change_the_reward_gradient(num_micro_batches):
    state = start(REWARD)
    single, metrics = reward(state, preferences(ALL_PAIRS), PLAIN, network=REWARD, frozen={})
    packed, packed_metrics = reward(
        state,
        packed_preferences(),
        PLAIN,
        network=REWARD,
        frozen={},
        num_micro_batches=num_micro_batches,
    )
    tiny.leaves_close(gradient_of(packed), gradient_of(single), atol=1e-6, rtol=1e-4)
    tiny.leaves_close(packed_metrics, metrics, rtol=1e-5)


def test_texts_are_scored_at_their_last_token():
    batch, params = preferences(ALL_PAIRS), tiny.random_params(REWARD)
    score = jax.jit(text_scores, static_argnums=0, static_argnames="num_micro_batches")
    values = np.asarray(jax.jit(REWARD.apply)(params, batch.inputs, batch.mask))
    lengths = np.asarray(batch.mask.sum(axis=1))
    expected = values[np.arange(4), lengths - 1]
    for count in (1, 2, 4):
        got = score(REWARD, params, batch.inputs, batch.mask, num_micro_batches=count)
        np.testing.assert_allclose(got, expected, atol=1e-5)
    other = jnp.where(batch.mask, batch.inputs, 9)
    np.testing.assert_allclose(score(REWARD, params, other, batch.mask), expected, atol=1e-5)
    left = [np.roll(x, L - n) for x, n in zip(np.asarray(batch.inputs), lengths, strict=True)]
    mask = np.arange(L)[None] >= L - lengths[:, None]
    np.testing.assert_allclose(score(REWARD, params, np.stack(left), mask), expected, atol=1e-5)


def test_all_pairs_of_one_batch_are_the_mean_over_the_pairs():
    state = start(REWARD)
    together, metrics = reward(state, preferences(ALL_PAIRS), PLAIN, network=REWARD, frozen={})
    one_by_one = [
        reward(state, preferences([pair]), PLAIN, network=REWARD, frozen={}) for pair in ALL_PAIRS
    ]
    mean = jax.tree.map(
        lambda *xs: sum(xs) / len(xs), *(gradient_of(after) for after, _ in one_by_one)
    )
    tiny.leaves_close(gradient_of(together), mean, atol=1e-6, rtol=1e-4)
    for name in ("reward_model/loss", "reward_model/accuracy", "reward_model/margin"):
        expected = np.mean([m[name] for _, m in one_by_one])
        np.testing.assert_allclose(metrics[name], expected, rtol=1e-5)


def test_ties_do_not_count():
    state = start(REWARD)
    padded = preferences(ALL_PAIRS, valid=[True, False, True, True, False, False])
    got, metrics = reward(state, padded, PLAIN, network=REWARD, frozen={})
    expected, expected_metrics = reward(
        state, preferences([(0, 1), (0, 3), (1, 2)]), PLAIN, network=REWARD, frozen={}
    )
    tiny.leaves_close(gradient_of(got), gradient_of(expected), atol=1e-6, rtol=1e-4)
    tiny.leaves_close(metrics, expected_metrics, rtol=1e-5)


def test_a_margin_is_what_the_loss_asks_of_the_difference():
    state, margins = start(REWARD), np.float32([0, 3, 0.5, 1, 2, 0])
    batch = preferences(ALL_PAIRS).replace(margins=margins)
    scores = np.float64(text_scores(REWARD, state.params, batch.inputs, batch.mask))
    gaps = np.array([scores[i] - scores[j] for i, j in ALL_PAIRS])
    _, metrics = reward(state, batch, PLAIN, network=REWARD, frozen={})
    expected = np.mean(np.log1p(np.exp(margins - gaps)))
    np.testing.assert_allclose(metrics["reward_model/loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["reward_model/margin"], gaps.mean(), atol=1e-6)


def test_the_reward_model_learns_an_order():
    state = start(REWARD, optimizer=TRAIN)
    batch = preferences([(2, 0), (2, 3), (2, 1), (0, 3), (0, 1), (3, 1)])
    for _ in range(30):
        state, metrics = reward(state, batch, TRAIN, network=REWARD, frozen={})
    assert metrics["reward_model/accuracy"] == 1.0 and metrics["reward_model/margin"] > 1.0
    scores = jax.jit(text_scores, static_argnums=0)(REWARD, state.params, batch.inputs, batch.mask)
    assert np.argsort(-np.asarray(scores)).tolist() == [2, 0, 3, 1]


def test_frozen_leaves_are_read_and_the_rest_moves():
    params = tiny.random_params(REWARD)
    frozen = {"embed": params.pop("embed")}
    batch = preferences(ALL_PAIRS)
    after, metrics = reward(
        start(REWARD, params, TRAIN), batch, TRAIN, network=REWARD, frozen=frozen
    )
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), after.params, params)
    moved["head"].pop("bias")  # no difference of two scores depends on it
    assert all(jax.tree.leaves(moved))
    other = {"embed": {"tokens": -frozen["embed"]["tokens"]}}
    _, changed = reward(start(REWARD, params, TRAIN), batch, TRAIN, network=REWARD, frozen=other)
    assert changed["reward_model/loss"] != metrics["reward_model/loss"]
