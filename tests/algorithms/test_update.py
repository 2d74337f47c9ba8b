import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ppo_jax.algorithms.experience import make_experience, response_rewards
from ppo_jax.algorithms.options import PPONetworks
from ppo_jax.algorithms.update import experience_loss, ppo_update
from ppo_jax.core.advantages import gae
from ppo_jax.core.distributions import token_logprobs
from ppo_jax.core.network import Network, merge_params
from ppo_jax.core.rewards import token_rewards, token_scores
from ppo_jax.core.types import Experience, FrozenParams
from ppo_jax.rollout.decode import response_outputs
from tests.support import tiny

ONE_STEP = tiny.options(num_epochs=1, num_minibatches=1)


@functools.cache
def fixed_experience(kind):
    run = tiny.Run(kind)
    return run.experience(run.rollout())[0]


@functools.partial(jax.jit, static_argnames="network")
def logprobs_now(network, params, inputs, mask, tokens, temperature):
    logits = response_outputs(network, params, inputs, mask, response_length=tokens.shape[1])
    return token_logprobs(logits, tokens, temperature=temperature)


@pytest.mark.parametrize("temperature", [0.5, 0.7, 1.0])
@pytest.mark.parametrize("kind", ["whole", "trunk"])
def test_before_the_first_step_the_ratio_is_1(kind, temperature):
    run = tiny.Run(kind, ONE_STEP, temperature=temperature)
    e, _ = run.experience(run.rollout())
    params = merge_params(run.setup.frozen.policy, run.state.policy_params)
    now = logprobs_now(
        run.setup.networks.policy, params, e.policy_inputs, e.mask, e.response_tokens, temperature
    )
    ratio = np.exp(np.asarray(now) - np.asarray(e.logprobs))[np.asarray(e.response_mask)]
    np.testing.assert_allclose(ratio, 1.0, atol=1e-5, rtol=0.0)
    _, metrics = run.update(e)
    np.testing.assert_allclose(metrics["policy/ratio_max"], [1.0], atol=1e-5)
    np.testing.assert_allclose(metrics["policy/ratio_mean"], [1.0], atol=1e-5)
    assert metrics["policy/approx_kl"] < 1e-8 and metrics["policy/clip_fraction"] == 0.0


def test_after_the_first_step_the_ratio_is_not_1():
    run = tiny.Run("whole")
    _, metrics = run.update(fixed_experience("whole"))
    kl = np.asarray(metrics["policy/approx_kl"])
    assert kl.shape == (4,)  # 2 epochs of 2 minibatches
    assert kl[0] < 1e-8 and (kl[1:] > 1e-6).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("kind", ["whole", "trunk"])
def test_the_kl_to_itself_is_zero(kind, temperature):
    run = tiny.Run(kind, ref_policy=True, temperature=temperature)
    rollout = run.rollout()
    _, metrics = run.experience(rollout)
    np.testing.assert_allclose(metrics["kl/ref"], 0.0, atol=1e-5)
    # Exactly 0 when both sides come from a full forward at the same temperature.
    params = merge_params(run.setup.frozen.policy, run.setup.frozen.ref_policy)
    inputs = rollout.tokens if rollout.hidden_states is None else rollout.hidden_states
    network = run.setup.networks.policy

    @jax.jit
    def kl(state, numbers, rollout, scores):
        length = rollout.response_mask.shape[1]
        logits = response_outputs(network, params, inputs, rollout.mask, response_length=length)
        same = token_logprobs(logits, rollout.response_tokens, temperature=numbers.temperature)
        rollout = rollout.replace(logprobs=jnp.where(rollout.response_mask, same, 0.0))
        _, metrics = make_experience(rollout, scores, state, numbers, **run.parts)
        return metrics["kl/ref"], metrics["reward/kl_penalty"]

    exact, penalty = kl(run.state, run.numbers, rollout, run.scores(rollout))
    assert exact == 0.0
    np.testing.assert_allclose(penalty, 0.0, atol=1e-6)


def table_network() -> Network:
    """Its parameters are its outputs, whatever it reads."""
    return Network(
        init=None,
        apply=lambda params, inputs, mask, *, first_output=0: params["outputs"],
        init_cache=None,
        decode=None,
    )


@pytest.mark.parametrize(
    ("high", "expected", "clipped"),
    [(0.3, -0.225, 0.5), (0.2, -0.2, 1.0), (None, -0.2, 1.0)],  # -1.25 + 0.8, or -1.2 + 0.8
)
def test_the_upper_clip_is_one_of_its_own(high, expected, clipped):
    # One token became likelier, by 1.25, and was good; one less likely, by 0.7, and was bad.
    now, before = jnp.array([[0.5, 0.35]]), jnp.array([[0.4, 0.5]])
    taken, zeros = jnp.array([[0, 0]]), jnp.zeros((1, 2))
    mask = jnp.ones((1, 2), bool)
    experience = Experience(
        policy_inputs=jnp.zeros((1, 3), jnp.int32),
        value_inputs=jnp.zeros((1, 3), jnp.int32),
        mask=jnp.ones((1, 3), bool),
        response_tokens=taken,
        response_mask=mask,
        logprobs=jnp.log(before),
        values=zeros,
        advantages=jnp.array([[1.0, -1.0]]),
        returns=zeros,
    )
    logits = jnp.log(jnp.stack([now, 1.0 - now], axis=-1))
    numbers = tiny.hyperparameters(clip_range=0.2, clip_range_high=high, entropy_coef=0.0)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(logits):
        params = {"policy": {"outputs": logits}, "value": {"outputs": zeros}}
        frozen, networks = (
            FrozenParams(ref_policy={}),
            PPONetworks(table_network(), table_network()),
        )
        return experience_loss(params, experience, numbers, frozen=frozen, networks=networks)

    (got, metrics), gradient = loss(logits)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert metrics["policy/clip_fraction"] == clipped
    # The good token still gains below its own limit; the bad one has reached the other.
    assert gradient[0, 0].any() == (high == 0.3) and not gradient[0, 1].any()


def test_every_minibatch_is_an_optimizer_step():
    for epochs, minibatches in [(1, 1), (2, 2), (3, 8)]:
        run = tiny.Run("trunk", tiny.options(num_epochs=epochs, num_minibatches=minibatches))
        state, metrics = run.update(fixed_experience("trunk"))
        assert optax.tree_utils.tree_get(state.opt_state, "count") == epochs * minibatches
        assert {v.shape for v in metrics.values()} == {(epochs * minibatches,)}
        assert state.step == 0  # iterations are counted by `update_from_rollout`


def test_every_epoch_is_a_new_order_of_all_rows():
    # Rows one by one at learning rate 0: the value loss tells which row it was.
    options = tiny.options(num_epochs=3, num_minibatches=tiny.BATCH)
    run = tiny.Run("trunk", options, optimizer=dict(learning_rate=0.0), value_learning_rate=0.0)
    _, metrics = run.update(fixed_experience("trunk"))
    epochs = np.asarray(metrics["value/loss"]).reshape(3, tiny.BATCH)
    assert len(np.unique(epochs[0])) == tiny.BATCH
    np.testing.assert_allclose(np.sort(epochs), np.sort(epochs[:1]).repeat(3, axis=0), rtol=1e-6)
    orders = {tuple(np.argsort(epoch)) for epoch in epochs}
    assert len(orders) == 3 and tuple(np.argsort(np.argsort(epochs[0]))) != tuple(range(8))


@pytest.mark.parametrize("num_micro_batches", [2, 4])
def test_micro_batches_do_not_change_the_update(num_micro_batches):
    e = fixed_experience("trunk")
    assert len(set(np.asarray(e.response_mask.sum(axis=1)).tolist())) > 2
    options = dict(num_epochs=1, num_minibatches=1)
    # Adam's first step is the sign of the gradient, which rounding may flip: compare gradients.
    whole, metrics = tiny.Run("trunk", tiny.options(**options)).update(e)
    options = tiny.options(**options, num_micro_batches=num_micro_batches)
    got, micro_metrics = tiny.Run("trunk", options).update(e)
    mean = functools.partial(optax.tree_utils.tree_get, key="mu")
    tiny.leaves_close(mean(got.opt_state), mean(whole.opt_state), atol=1e-7, rtol=1e-4)
    tiny.leaves_close(got.policy_params, whole.policy_params, atol=1e-4)
    tiny.leaves_close(micro_metrics, metrics, rtol=1e-4, atol=1e-7)


def test_advantages_are_those_of_gae_whitened_over_the_batch():
    run = tiny.Run("whole", gamma=0.9, gae_lambda=0.8, kl_coef=0.3)
    rollout = run.rollout()
    scores = run.scores(rollout)
    e, metrics = run.experience(rollout, scores)
    mask = np.asarray(e.response_mask)
    ref = logprobs_now(
        run.setup.networks.policy,
        run.setup.frozen.ref_policy,
        rollout.tokens,
        rollout.mask,
        rollout.response_tokens,
        1.0,
    )
    rewards = token_rewards(scores, rollout.logprobs, ref, rollout.response_mask, kl_coef=0.3)
    advantages, returns = gae(rewards, e.values, e.response_mask, gamma=0.9, gae_lambda=0.8)
    np.testing.assert_allclose(e.returns, returns, atol=1e-4)
    plain = np.asarray(advantages)[mask]
    whitened = (plain - plain.mean()) / np.sqrt(plain.var() + 1e-8)
    np.testing.assert_allclose(np.asarray(e.advantages)[mask], whitened, atol=1e-4)
    for array in (e.logprobs, e.values, e.advantages, e.returns):
        assert not np.asarray(array)[~mask].any()
    # The decision to stop is trained like any other.
    last = np.asarray(rollout.has_eos), mask.sum(axis=1) - 1
    stops = np.asarray(e.advantages)[np.flatnonzero(last[0]), last[1][last[0]]]
    assert len(stops) > 1 and stops.all()
    kl = np.where(mask, np.asarray(rollout.logprobs) - np.asarray(ref), 0.0).sum(axis=1).mean()
    np.testing.assert_allclose(metrics["kl/ref"], kl, rtol=1e-4)
    np.testing.assert_allclose(metrics["reward/kl_penalty"], 0.3 * kl, rtol=1e-4)
    np.testing.assert_allclose(metrics["reward/score_mean"], np.mean(scores), rtol=1e-6)
    np.testing.assert_allclose(metrics["response/length"], mask.sum(axis=1).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["response/eos_fraction"], rollout.has_eos.mean(), rtol=1e-6)


def test_experience_and_update_are_the_same_on_eight_devices():
    run = tiny.Run("trunk", ONE_STEP)
    rollout = run.rollout()
    scores = run.scores(rollout)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    one, one_metrics = run.experience(rollout, scores)
    many, many_metrics = run.experience(*jax.device_put((rollout, scores), rows))
    assert len(many.advantages.sharding.device_set) == 8
    tiny.leaves_close(many, one, atol=1e-5)
    tiny.leaves_close(many_metrics, one_metrics, atol=1e-5)
    mean = functools.partial(optax.tree_utils.tree_get, key="mu")
    expected, got = run.update(one)[0], run.update(jax.device_put(one, rows))[0]
    tiny.leaves_close(mean(got.opt_state), mean(expected.opt_state), atol=1e-7, rtol=1e-4)


def test_the_trunk_gives_the_experience_of_whole_networks():
    whole, trunk = tiny.Run("frozen"), tiny.Run("trunk")
    pairs = [run.experience(run.rollout()) for run in (whole, trunk)]
    (expected, expected_metrics), (got, metrics) = pairs
    assert got.policy_inputs.shape == (*expected.policy_inputs.shape, 32)
    inputs = dict(policy_inputs=None, value_inputs=None)
    tiny.leaves_close(got.replace(**inputs), expected.replace(**inputs), atol=2e-5)
    tiny.leaves_close(metrics, expected_metrics, atol=1e-5, rtol=1e-5)
    mean = functools.partial(optax.tree_utils.tree_get, key="mu")
    states = [run.update(e)[0] for run, e in zip((whole, trunk), (expected, got), strict=True)]
    moments = [mean(state.opt_state) for state in states]
    tiny.leaves_close(moments[1], moments[0], atol=1e-5, rtol=1e-3)


# --- the brake on the updates of an iteration -----------------------------------------------------

SIX = tiny.options(num_epochs=6, num_minibatches=1)  # whole batches: an epoch's order is no matter


def six_updates(stop_kl=None, chosen=SIX, kind="whole"):
    return tiny.Run(kind, chosen, stop_kl=stop_kl).update(fixed_experience(kind))


@functools.cache
def kl_without_brake():
    kl = np.asarray(six_updates()[1]["policy/approx_kl"])
    assert (np.diff(kl[:4]) > 0).all()  # so that a limit between two of them stops at the later
    return kl


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_the_updates_end_at_the_minibatch_whose_kl_is_too_large(steps):
    """The parameters are those of as many updates without a brake."""
    kl = kl_without_brake()
    stop_kl = float(kl[steps - 1 : steps + 1].mean()) if steps < 6 else 1e9
    state, metrics = six_updates(stop_kl)
    plain = tiny.options(num_epochs=steps, num_minibatches=1)
    expected, expected_metrics = six_updates(chosen=plain)
    for name in ("policy_params", "value_params", "opt_state"):
        tiny.leaves_close(getattr(state, name), getattr(expected, name), rtol=1e-3, atol=2e-5)
    computed = min(steps + 1, 6)
    assert metrics["ppo/taken"].tolist() == [1.0] * steps + [0.0] * (6 - steps)
    assert metrics["ppo/computed"].tolist() == [1.0] * computed + [0.0] * (6 - computed)
    np.testing.assert_allclose(metrics["policy/approx_kl"][:computed], kl[:computed], rtol=1e-3)
    assert "ppo/taken" not in expected_metrics


def test_the_metrics_of_an_iteration_are_of_what_was_computed():
    kl, run = kl_without_brake(), tiny.Run("whole", SIX)
    rollout = run.rollout()
    scores = run.scores(rollout)
    braked = tiny.Run("whole", SIX, stop_kl=float(kl[1:3].mean()))
    _, metrics = braked.update_from_rollout(rollout, scores)
    assert metrics["ppo/updates"] == 2
    np.testing.assert_allclose(metrics["policy/approx_kl"], kl[:3].mean(), rtol=1e-3)
    np.testing.assert_allclose(
        metrics["policy/learning_rate"], run.numbers.optimizer.learning_rate, rtol=1e-6
    )
    assert "ppo/updates" not in run.update_from_rollout(rollout, scores)[1]
    assert not {"ppo/taken", "ppo/computed"} & metrics.keys()


@pytest.mark.parametrize("packing", [False, True])
def test_each_lane_of_a_sweep_has_its_own_brake(packing):
    kl, chosen = kl_without_brake(), tiny.options(num_epochs=6, num_minibatches=1)
    if packing:
        chosen = tiny.options(num_epochs=6, num_minibatches=1, num_micro_batches=2, packing=True)
    run = tiny.Run("whole", chosen)
    limits = jnp.array([kl[:2].mean(), kl[2:4].mean(), 1e9], jnp.float32)

    def lane(stop_kl):
        numbers = run.numbers.replace(stop_kl=stop_kl)
        experience = fixed_experience("whole")
        return ppo_update(run.state, experience, numbers, tiny.RUN_KEY, **run.parts)

    states, metrics = jax.jit(jax.vmap(lane))(limits)
    assert metrics["ppo/taken"].sum(axis=1).tolist() == [1.0, 3.0, 6.0]
    alone = [six_updates(float(x), chosen)[0].policy_params for x in limits]
    expected = jax.tree.map(lambda *x: jnp.stack(x), *alone)
    tiny.leaves_close(states.policy_params, expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("num_minibatches", [1, 2])
def test_the_brake_is_of_the_whole_batch_on_eight_devices(num_minibatches):
    """One shard alone would stop elsewhere: the mean is over all of them."""
    chosen = tiny.options(num_epochs=6 // num_minibatches, num_minibatches=num_minibatches)
    kl = np.asarray(six_updates(chosen=chosen)[1]["policy/approx_kl"])
    run = tiny.Run("whole", chosen, stop_kl=float(np.sort(kl)[2:4].mean()))
    expected, expected_metrics = run.update(fixed_experience("whole"))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    experience = jax.device_put(fixed_experience("whole"), rows)
    replicated = NamedSharding(mesh, PartitionSpec())
    run.state, run.numbers, run.setup = jax.device_put(
        (run.state, run.numbers, run.setup.frozen), replicated
    )
    run.parts["frozen"] = run.setup
    state, metrics = run.update(experience)
    assert metrics["ppo/taken"].tolist() == expected_metrics["ppo/taken"].tolist()
    assert 0 < metrics["ppo/taken"].sum() < 6
    tiny.leaves_close(state.policy_params, expected.policy_params, rtol=1e-3, atol=2e-5)


def test_scores_of_tokens_are_credited_to_their_tokens_and_counted_as_their_sum():
    """With the score at the last token it is the iteration of one score a response, bit for bit."""
    run = tiny.Run("whole")
    rollout = run.rollout()
    mask = rollout.response_mask
    scores = jnp.linspace(-1.0, 1.0, len(mask))
    at_end = token_scores(scores, mask)
    for missing_eos in ("keep", "replace"):
        run.parts["options"] = tiny.options(missing_eos=missing_eos)
        whole, metrics = run.experience(rollout, scores)
        same, same_metrics = run.experience(rollout, at_end)
        chex.assert_trees_all_equal(same.returns, whole.returns)
        chex.assert_trees_all_equal(same_metrics, metrics)


@pytest.mark.parametrize("of_tokens", [False, True])
def test_scores_are_clipped_then_the_eos_rule_then_the_penalty_of_length(of_tokens):
    numbers = dict(score_clip=2.0, overlong_tokens=4.0, missing_eos_score=-5.0, kl_coef=0.0)
    run = tiny.Run("whole", **numbers)
    options, rollout = tiny.options(missing_eos="replace"), run.rollout()
    width, count = rollout.response_mask.shape[1], len(rollout.has_eos)
    lengths = width - np.arange(count) % 6
    mask = jnp.arange(width)[None] < lengths[:, None]
    has_eos = jnp.arange(count) != 1
    rollout = dataclasses.replace(rollout, response_mask=mask, has_eos=has_eos)
    given = np.linspace(-4.0, 4.0, count).astype(np.float32)
    scores = token_scores(jnp.asarray(given), mask) if of_tokens else jnp.asarray(given)
    rewards, metrics = response_rewards(
        rollout, scores, rollout.logprobs, run.state, run.numbers, options
    )
    expected = np.clip(given, -2.0, 2.0)
    expected[1] = -5.0
    expected -= np.clip((lengths - (width - 4)) / 4, 0.0, 1.0)
    np.testing.assert_allclose(rewards.sum(axis=1), expected, atol=1e-5)
    np.testing.assert_allclose(rewards[np.arange(count), lengths - 1], expected, atol=1e-5)
    assert metrics["reward/adjusted_score_mean"] == pytest.approx(expected.mean(), abs=1e-5)
    assert metrics["reward/score_mean"] == pytest.approx(given.mean(), abs=1e-5)  # as it came


@pytest.mark.parametrize("missing_eos", ["keep", "penalty", "replace"])
def test_the_missing_eos_rule_sees_the_sum_of_a_responses_token_scores(missing_eos):
    run = tiny.Run("whole", missing_eos_score=3.0, kl_coef=0.0)
    options = tiny.options(missing_eos=missing_eos)
    rollout = run.rollout()
    rollout = dataclasses.replace(rollout, has_eos=jnp.arange(len(rollout.has_eos)) % 2 == 0)
    scores = jax.random.normal(jax.random.key(3), rollout.response_mask.shape)
    rewards, metrics = response_rewards(
        rollout, scores, rollout.logprobs, run.state, run.numbers, options
    )
    expected = np.where(rollout.response_mask, scores, 0.0).astype(np.float64)
    for row, mask in enumerate(np.asarray(rollout.response_mask)):
        if rollout.has_eos[row] or missing_eos == "keep":
            continue
        if missing_eos == "replace":
            expected[row] = 0.0
        expected[row, mask.sum() - 1] += 3.0 if missing_eos == "replace" else -3.0
    np.testing.assert_allclose(rewards, expected, atol=1e-5)
    mean = expected.sum(axis=1).mean()
    assert metrics["reward/adjusted_score_mean"] == pytest.approx(mean, abs=1e-5)
