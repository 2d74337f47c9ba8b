"""A critic that is a head on the policy's own body: both losses train the body."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.algorithms.critics import critic_loss, take_critic
from ppo_jax.algorithms.update import experience_loss
from ppo_jax.core import Optimizer
from ppo_jax.core.network import merge_params
from ppo_jax.models.build import policy_value_network, value_network
from ppo_jax.rollout.decode import response_outputs
from tests.support import tiny

VF_COEF = 0.7
BINS = dict(value_range=[-3.0, 2.0])
KINDS = {
    "whole": (("all", False), 0, 0),
    "in chunks": (("all", False), 0, 3),
    "top layer": ((1, False), 0, 0),
    "trunk": ((1, True), 0, 0),
    "bins": (("all", False), 6, 0),
}


def shared_run(kind, chosen=None, num_critics=1, **numbers):
    """`tiny.Run` whose critic is on the policy, with heads that are not zero."""
    how, num_bins, logits_chunk = KINDS[kind]
    numbers = dict(vf_coef=VF_COEF) | (BINS if num_bins else {}) | numbers
    run = tiny.Run("whole", tiny.options(**(chosen or {})), **numbers)
    plain, config = tiny.setup(*how), tiny.model_config()
    start = 1 if how[1] else None
    network = policy_value_network(
        config, start_layer=start, logits_chunk=logits_chunk, num_bins=num_bins
    )
    draw = np.random.default_rng(5)
    lead = () if num_critics == 1 else (num_critics,)
    head = {
        "kernel": draw.normal(size=(*lead, config.embed_dim, num_bins or 1)).astype(np.float32),
        "bias": draw.normal(size=(*lead, num_bins or 1)).astype(np.float32),
    }
    networks = plain.networks._replace(value=network, value_on_policy=True)
    frozen = plain.frozen.replace(value={})
    run.setup = plain._replace(networks=networks, frozen=frozen, value_params={"value_head": head})
    run.state = run.setup.start(run.numbers)
    run.parts |= dict(frozen=frozen, networks=networks)
    return run


def trained(run):
    return {"policy": run.state.policy_params, "value": run.state.value_params}


def with_own_body(run, params):
    """The parameters of a critic of its own, with the body of the policy and this head."""
    body = merge_params(run.setup.frozen.policy, params["policy"])
    body.pop("head", None)
    return {**body, "head": params["value"]["value_head"]}


def outputs_of_its_own(run, params, experience, kind):
    how, num_bins, _ = KINDS[kind]
    network = value_network(
        tiny.model_config(), start_layer=1 if how[1] else None, num_bins=num_bins
    )
    where = dict(response_length=experience.response_mask.shape[1])

    def outputs(head):
        one = {"policy": params["policy"], "value": {"value_head": head}}
        inputs = (experience.value_inputs, experience.mask)
        return response_outputs(network, with_own_body(run, one), *inputs, **where)

    head = params["value"]["value_head"]
    if head["kernel"].ndim == 2:
        return outputs(head)
    return take_critic(jax.vmap(outputs)(head), experience.critics)


@pytest.mark.parametrize("kind", KINDS)
def test_its_values_are_those_of_a_critic_with_this_body(kind):
    run = shared_run(kind)
    experience, _ = run.experience(run.rollout())
    expected = outputs_of_its_own(run, trained(run), experience, kind)
    if KINDS[kind][1]:
        centres = np.linspace(-3, 2, 13)[1::2]
        expected = jax.nn.softmax(expected) @ centres
    mask = experience.response_mask
    np.testing.assert_allclose(experience.values[mask], expected[mask], rtol=1e-4, atol=1e-5)
    assert np.ptp(experience.values[mask]) > 0.1


@pytest.mark.parametrize(
    ("kind", "num_critics"), [*((kind, 1) for kind in KINDS), ("whole", 2), ("trunk", 2)]
)
def test_its_gradient_is_the_sum_of_those_of_two_losses(kind, num_critics):
    """That of the policy's loss alone, and vf_coef times that of a critic with this body."""
    options = dict(num_critics=num_critics, sampling=tiny.sampling(samples_per_prompt=2))
    run = shared_run(kind, options, num_critics)
    experience, _ = run.experience(run.rollout())
    noise = 0.2 * np.random.default_rng(0).normal(size=experience.logprobs.shape)
    experience = experience.replace(
        logprobs=experience.logprobs + noise.astype(np.float32) * experience.response_mask
    )
    parts = run.parts

    def both(params):
        return experience_loss(params, experience, run.numbers, **parts)[0]

    def apart(params):
        alone = {"policy": params["policy"]}
        networks = parts["networks"]._replace(value=None, value_on_policy=False)
        how = parts | dict(networks=networks)
        of_policy, _ = experience_loss(alone, experience, run.numbers, **how)
        outputs = outputs_of_its_own(run, params, experience, kind)
        data = (experience.values, experience.returns, experience.response_mask)
        of_critic, _ = critic_loss(outputs, *data, run.numbers)
        return of_policy + VF_COEF * of_critic

    params = trained(run)
    got, expected = (jax.jit(jax.grad(loss))(params) for loss in (both, apart))
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    tiny.leaves_close(got, expected, rtol=1e-4, atol=1e-5 * largest)
    assert np.abs(got["value"]["value_head"]["kernel"]).max() > 0


@pytest.mark.parametrize("num_critics", [1, 2])
@pytest.mark.parametrize("kind", ["whole", "trunk"])
def test_micro_batches_and_packed_rows_give_the_same_update(kind, num_critics):
    numbers = dict(optimizer=dict(eps=1e-2))
    options = dict(num_critics=num_critics, sampling=tiny.sampling(samples_per_prompt=2))
    whole = shared_run(kind, options | dict(num_minibatches=1), num_critics, **numbers)
    experience, _ = whole.experience(whole.rollout())
    expected, metrics = whole.update(experience)
    assert tiny.leaves_differ(expected.value_params, whole.state.value_params)
    parts = options | dict(num_minibatches=1, num_micro_batches=2, packing=True)
    got, found = shared_run(kind, parts, num_critics, **numbers).update(experience)
    for name in ("policy_params", "value_params"):
        tiny.leaves_close(getattr(got, name), getattr(expected, name), atol=2e-5)
    for name in ("value/loss", "policy/loss"):
        np.testing.assert_allclose(found[name], metrics[name], rtol=1e-4, atol=1e-6)


def test_it_takes_no_steps_of_its_own():
    run = shared_run("whole", value_optimizer=Optimizer(learning_rate=2e-3))
    with pytest.raises(ValueError, match="a critic on the policy takes its steps"):
        run.iterate()


def test_the_policy_stays_while_the_critic_warms_up():
    run = shared_run("whole", critic_warmup=2)
    state, _ = run.iterate()
    assert not tiny.leaves_differ(state.policy_params, run.state.policy_params)
    assert tiny.leaves_differ(state.value_params, run.state.value_params)
