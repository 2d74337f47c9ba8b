"""A forward pass that scoring and update have in common is made once, and nothing else changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.algorithms import update as update_module
from ppo_jax.algorithms.passes import passes_in_common
from ppo_jax.algorithms.ppo import update_from_rollout
from ppo_jax.core.covariance import clip_cov_policy_loss
from ppo_jax.core.critic_free import rloo_advantages
from ppo_jax.core.off_policy_losses import decoupled_policy_loss
from ppo_jax.core.sequence_losses import gspo_policy_loss
from ppo_jax.core.types import Optimizer
from tests.algorithms.test_shared_critic import shared_run
from tests.support import tiny

ONE = dict(num_epochs=1, num_minibatches=1)
OWN = dict(value_optimizer=Optimizer(learning_rate=2e-3, max_grad_norm=0.5))
RECOMPUTE = dict(old_logprobs="recompute")
FREE = dict(sampling=tiny.sampling(samples_per_prompt=2), advantage=rloo_advantages)
CLIP_COV = dict(covariance_fraction=0.2, covariance_low=0.05, covariance_high=1.5)
DISPUTE = dict(agreed_fraction=0.3, disputed_fraction=0.2)

CASES = {  # kind of a run, options, numbers, the passes in common
    "critic": ("whole", {}, {}, ("value",)),
    "on a trunk": ("trunk", {}, {}, ("value",)),
    "top layers": ("frozen", {}, {}, ("value",)),
    "bins": ("whole of bins", {}, dict(value_range=[-3.0, 2.0]), ("value",)),
    "recomputed": ("whole", RECOMPUTE, dict(tis_clip_high=2.0), ("policy", "value")),
    "recomputed on a trunk": ("trunk", RECOMPUTE, {}, ("policy", "value")),
    "no critic": ("critic-free", FREE, {}, ()),
    "no critic, recomputed": ("critic-free", FREE | RECOMPUTE, {}, ("policy",)),
    "own optimizer": ("whole", {}, OWN, ("value",)),
    "own optimizer, recomputed": ("whole", RECOMPUTE, OWN, ("policy", "value")),
    "own minibatches": ("whole", RECOMPUTE | dict(value_num_minibatches=2), OWN, ("policy",)),
    "own single minibatch": (
        "whole",
        RECOMPUTE | dict(num_minibatches=2, value_num_minibatches=1),
        OWN,
        ("value",),
    ),
    "more updates of its own": ("whole", dict(value_updates=2), OWN, ()),
    "shared": ("shared", {}, {}, ("value",)),
    "shared, recomputed": ("shared", RECOMPUTE, {}, ("policy", "value")),
    "shared, two heads": ("two heads", dict(num_critics=2), DISPUTE, ("value",)),
    "stopped": ("whole", {}, dict(stop_kl=0.0), ("value",)),
    "not stopped": ("whole", RECOMPUTE, dict(stop_kl=1.0), ("policy", "value")),
    "chosen tokens": ("whole", dict(loss=clip_cov_policy_loss), CLIP_COV, ("value",)),
    "whole sequences": (
        "whole",
        dict(loss=gspo_policy_loss, aggregation="sequence_mean"),
        {},
        ("value",),
    ),
    "two policies": (
        "whole",
        RECOMPUTE | dict(loss=decoupled_policy_loss),
        {},
        ("policy", "value"),
    ),
    "all that is measured": (
        "whole",
        dict(whiten_rewards=True, kl_control="adaptive"),
        dict(kl_loss_coef=0.1, penalty_target_kl=0.01, target_entropy=1.0),
        ("value",),
    ),
    "some samples": ("whole", dict(sampling=tiny.sampling(samples_per_prompt=4), keep_samples=2),
                     {}, ()),
    "two epochs": ("whole", dict(num_epochs=2), {}, ()),
    "two minibatches": ("whole", dict(num_minibatches=2), {}, ()),
    "two micro-batches": ("whole", dict(num_micro_batches=2), {}, ()),
    "packing": ("whole", dict(packing=True), {}, ()),
}  # fmt: skip


def make_run(kind, chosen, numbers):
    if kind in ("shared", "two heads"):
        return shared_run("whole", chosen, num_critics=1 + (kind == "two heads"), **numbers)
    if kind != "critic-free":
        return tiny.Run(kind, tiny.options(**chosen), **numbers)
    run = tiny.Run("whole", tiny.options(**chosen), **numbers)
    networks = run.setup.networks._replace(value=None)
    frozen = run.setup.frozen.replace(value={})
    run.setup = run.setup._replace(networks=networks, frozen=frozen, value_params=None)
    run.state = run.setup.start(run.numbers)
    run.parts |= dict(networks=networks, frozen=frozen)
    return run


def lower(run, rollout, scores):
    """`update_from_rollout` of a run: traced anew, whatever was before."""
    step = jax.jit(functools.partial(update_from_rollout, **run.parts))
    return step.lower(run.state, run.numbers, rollout, scores, tiny.RUN_KEY)


def apart(monkeypatch, make):
    """What comes of a function with every pass made where it is needed."""
    with monkeypatch.context() as patch:
        patch.setattr(update_module, "passes_in_common", lambda *_, **__: ())
        return make()


@pytest.mark.parametrize("case", CASES)
def test_an_update_is_that_of_passes_apart(case, monkeypatch):
    kind, chosen, numbers, expected = CASES[case]
    run = make_run(kind, ONE | chosen, numbers)
    rollout = run.rollout()
    scores = run.scores(rollout)
    in_common = passes_in_common(
        run.parts["options"],
        has_critic=run.state.value_params is not None,
        own_optimizer=run.numbers.value_optimizer is not None,
    )
    assert in_common == expected
    lowered = functools.partial(lower, run, rollout, scores)
    together, one_by_one = lowered(), apart(monkeypatch, lowered)
    if not expected:
        assert together.as_text() == one_by_one.as_text()
        return
    together, one_by_one = together.compile(), one_by_one.compile()
    flops = [x.cost_analysis()["flops"] for x in (together, one_by_one)]
    assert flops[0] < 0.9 * flops[1]
    given = (run.state, run.numbers, rollout, scores, tiny.RUN_KEY)
    (state, metrics), (plain, its_metrics) = together(*given), one_by_one(*given)
    assert metrics.keys() == its_metrics.keys()
    tiny.leaves_close(metrics, its_metrics, rtol=2e-4, atol=2e-5)
    moments = [jax.tree.leaves(x.opt_state) for x in (state, plain)]
    tiny.leaves_close(*moments, rtol=1e-3, atol=1e-6)
    tiny.leaves_close(state, plain, rtol=1e-4, atol=3e-5)
    if case != "stopped":
        assert tiny.leaves_differ(state.policy_params, run.state.policy_params)


def test_the_ratio_of_recomputed_logprobs_is_exactly_1_and_has_a_gradient():
    run = make_run("whole", ONE | RECOMPUTE, {})
    rollout = run.rollout()
    _, metrics = run.update_from_rollout(rollout, run.scores(rollout))
    assert metrics["policy/ratio_max"] == metrics["policy/ratio_mean"].round(6) == 1
    assert metrics["policy/approx_kl"] == 0 and metrics["policy/grad_norm"] > 0.01
    assert metrics["value/clip_fraction"] == 0


def test_the_pieces_that_a_user_calls_one_by_one_give_the_same():
    run = make_run("whole", ONE | RECOMPUTE, {})
    rollout = run.rollout()
    state, _ = run.update_from_rollout(rollout, run.scores(rollout))
    experience, _ = run.experience(rollout)
    plain, _ = run.update(experience)
    tiny.leaves_close(state.policy_params, plain.policy_params, atol=3e-5)
    tiny.leaves_close(state.value_params, plain.value_params, atol=3e-5)


def test_lanes_have_their_own_passes():
    run = make_run("whole", ONE | RECOMPUTE, {})
    rollout = run.rollout()
    scores = jnp.stack([run.scores(rollout), jnp.linspace(-1.0, 2.0, tiny.BATCH)])
    rates = jnp.array([1.0, 0.5])

    def one(scores, factor):
        numbers = run.numbers.replace(kl_coef=run.numbers.kl_coef * factor)
        return update_from_rollout(run.state, numbers, rollout, scores, tiny.RUN_KEY, **run.parts)

    both, alone = jax.jit(jax.vmap(one))(scores, rates), jax.jit(one)
    for i in range(2):
        expected = alone(scores[i], rates[i])
        found = jax.tree.map(lambda x, i=i: np.asarray(x)[i], both)
        tiny.leaves_close(found, expected, rtol=1e-4, atol=3e-5)
