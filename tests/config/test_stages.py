"""Numbers are data: none recompiles, each matters. Choices are code: each matters too."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.algorithms.experience import make_experience, sample_responses
from ppo_jax.algorithms.options import PPOOptions
from ppo_jax.algorithms.ppo import ppo_iteration
from ppo_jax.core.covariance import clip_cov_policy_loss, kl_cov_policy_loss
from ppo_jax.core.off_policy_losses import (
    cispo_policy_loss,
    decoupled_policy_loss,
    dppo_policy_loss,
)
from ppo_jax.core.optimizer import schedule
from ppo_jax.core.policy_losses import dual_clip_policy_loss, kl_penalty_policy_loss
from ppo_jax.core.types import Hyperparameters, Optimizer
from tests.support import tiny

KEY = jax.random.key(5)
# Options with which every number has a part to play, with enough epochs for the clips to bind.
EVERYTHING = tiny.options(kl_control="adaptive", missing_eos="penalty", old_logprobs="recompute")
NUMBERS = dict(
    optimizer=dict(
        learning_rate=3e-3,
        max_grad_norm=0.5,
        weight_decay=0.1,
        warmup_steps=1.0,
        total_steps=3.0,
        final_fraction=0.1,
        schedule="linear",
    ),
    value_learning_rate=3e-3,
    missing_eos_score=0.5,
    clip_range_high=0.2,
    value_clip_range=0.01,
    gamma=0.9,
    tis_clip_low=0.0,
    tis_clip_high=2.0,
    stop_kl=1e9,
    score_clip=1e9,
    overlong_tokens=1.0,
    length_penalty=1e-6,
    value_gae_lambda=0.9,
    kl_loss_coef=0.1,
    target_entropy=1.0,
)
CHANGES = {
    "learning_rate": 2e-3,
    "max_grad_norm": 0.05,
    "b1": 0.5,
    "b2": 0.9,
    "eps": 1e-3,
    "weight_decay": 0.5,
    "warmup_steps": 2.0,
    "total_steps": 2.0,
    "final_fraction": 0.5,
    "value_learning_rate": 1e-3,
    "temperature": 0.8,
    "kl_coef": 0.2,
    "target_kl": 4.0,
    "kl_horizon": 50.0,
    "gamma": 0.5,
    "gae_lambda": 0.5,
    "clip_range": 0.02,
    "clip_range_high": 0.02,
    "value_clip_range": 0.1,
    "vf_coef": 0.5,
    "entropy_coef": 0.1,
    "missing_eos_score": 2.0,
    "tis_clip_low": 1.5,
    "tis_clip_high": 0.5,
    "stop_kl": 1e-6,
    "score_clip": 0.01,
    "overlong_tokens": 8.0,
    "length_penalty": 0.5,
    "length_penalty_free": 4.0,
    "critic_warmup": 2.0,
    "value_gae_lambda": 0.3,
    "kl_loss_coef": 0.5,
    "target_entropy": 100.0,
    "entropy_coef_step": 0.1,
}
OF_CHOICES = {  # numbers that one choice reads: (it, a value, another)
    "dual_clip": (dict(loss=dual_clip_policy_loss), 1.001, 1.2),
    "penalty_coef": (dict(loss=kl_penalty_policy_loss), 0.1, 2.0),
    "ref_ema_decay": ({}, 0.1, 0.9),
    "ref_reset_every": ({}, 1.0, 100.0),
    "penalty_target_kl": (dict(loss=kl_penalty_policy_loss), 1e-7, 10.0),
    "divergence_limit": (dict(loss=dppo_policy_loss), 1e-4, 0.5),
    "covariance_fraction": (dict(loss=kl_cov_policy_loss), 0.05, 0.5),
    "covariance_low": (dict(loss=clip_cov_policy_loss), 0.0, 4.9),
    "covariance_high": (dict(loss=clip_cov_policy_loss), 1.001, 100.0),
    "behavior_weight_limit": (dict(loss=decoupled_policy_loss), 0.3, 2.0),
    "gae_lambda_alpha": ({}, 0.3, 1.0),
    "value_optimizer": ({}, Optimizer(learning_rate=1e-3), Optimizer(learning_rate=2e-3)),
}


def numbers(**changes):
    of_optimizer = {f.name for f in dataclasses.fields(Optimizer)}
    optimizer = {k: v for k, v in changes.items() if k in of_optimizer}
    rest = {k: v for k, v in changes.items() if k not in of_optimizer}
    changed = NUMBERS | rest | {"optimizer": NUMBERS["optimizer"] | optimizer}
    return tiny.hyperparameters(**changed)


def three_iterations(hyperparameters, options=EVERYTHING):
    setup = tiny.setup(1, True)
    parts = dict(frozen=setup.frozen, networks=setup.networks, options=options)
    state, every = setup.start(hyperparameters), []
    for i in range(3):
        key = jax.random.fold_in(KEY, i)
        state, metrics = tiny.iterate(state, hyperparameters, tiny.prompts(), key, **parts)
        every.append(metrics)
    return jax.tree.map(np.asarray, (state, every))


base_run = functools.cache(lambda: three_iterations(numbers()))


def test_the_changes_name_every_number():
    fields = [*dataclasses.fields(Hyperparameters), *dataclasses.fields(Optimizer)]
    of_choices = OF_CHOICES.keys() | {"optimizer", "schedule"}
    # Of other critics, see `test_critics`.
    of_choices |= {"value_range", "agreed_fraction", "disputed_fraction"}
    of_choices |= {"baseline_decay", "critic_warmup_tolerance"}  # see `test_adaptation`
    assert CHANGES.keys() == {f.name for f in fields} - of_choices


@pytest.mark.parametrize("name", OF_CHOICES)
def test_every_number_of_a_choice_matters(name):
    choice, *values = OF_CHOICES[name]
    options = dataclasses.replace(EVERYTHING, **choice)
    (one, _), (other, _) = (three_iterations(numbers(**{name: value}), options) for value in values)
    trained = [(s.policy_params, s.value_params) for s in (one, other)]
    assert tiny.leaves_differ(*trained)


@pytest.mark.parametrize("name", CHANGES)
def test_every_number_matters_and_none_recompiles(name):
    (base, _), before = base_run(), tiny.TRACES["ppo_iteration"]
    changed, _ = three_iterations(numbers(**{name: CHANGES[name]}))
    assert tiny.TRACES["ppo_iteration"] == before
    # Not in the metrics alone: in what is trained.
    trained = [(s.policy_params, s.value_params) for s in (base, changed)]
    assert tiny.leaves_differ(*trained)


@pytest.mark.parametrize("kind", ["constant", "cosine"])
def test_the_kind_of_schedule_matters(kind):
    base, changed = numbers().optimizer, numbers(schedule=kind).optimizer
    assert (changed.schedule, base.schedule) == (kind, "linear")
    assert schedule(changed, 2) != schedule(base, 2)


def later_less(rewards, values, mask, *, gamma):
    """An estimator of the user's: with a critic, and without returns of its own."""
    return 0.5 * (rewards - values) * mask + gamma


CHOICES = {
    "num_epochs": 3,
    "num_minibatches": 4,
    "kl_estimator": "k3",
    "kl_control": "adaptive",
    "missing_eos": "penalty",
    "old_logprobs": "recompute",
    "whiten_advantages": False,
    "whiten_rewards": True,
    "advantage": later_less,
    "loss": cispo_policy_loss,
    "aggregation": "sequence_mean",
    "value_updates": 2,
    "value_num_minibatches": 4,
    "keep_samples": 2,
}


@functools.cache
def learned(**choice):
    groups = dict(sampling=tiny.sampling(samples_per_prompt=4), any_kl_estimator=True)
    setup, options = tiny.setup(1, True), tiny.options(**groups, **choice)
    hyperparameters = numbers(schedule="constant", value_optimizer=Optimizer(learning_rate=1e-3))
    parts = dict(frozen=setup.frozen, networks=setup.networks)
    state = setup.start(hyperparameters)
    rollout = tiny.sample_responses(
        state, hyperparameters, tiny.prompts(), KEY, **parts, options=tiny.options()
    )
    scores = tiny.response_scores(rollout, **parts)
    return tiny.update_from_rollout(
        state, hyperparameters, rollout, scores, KEY, **parts, options=options
    )[0]


@pytest.mark.parametrize("name", CHOICES)
def test_every_option_matters(name):
    assert tiny.leaves_differ(learned(), learned(**{name: CHOICES[name]}))


def test_there_are_no_other_options():
    # Sampling has tests of its own; micro-batches change the memory, see below, and nothing else,
    # packing the time, see `test_packing`; for where a score is read see `test_ppo`;
    # `any_kl_estimator` lets others be chosen; for weights of recomputed log-probs see
    # `test_old_logprobs`, for further rollouts `test_dynamic_sampling`.
    fields = {f.name for f in dataclasses.fields(PPOOptions)}
    others = {"sampling", "num_micro_batches", "packing", "score_eos"}
    others |= {"num_critics", "reference_responses"}  # see `test_critics`, `test_references`
    others |= {"any_kl_estimator", "importance", "max_rollouts"}
    others |= {"replay_experts"}  # of a policy with experts, see `test_replay`
    assert fields == CHOICES.keys() | others


def test_micro_batches_save_memory():
    setup, hyperparameters = tiny.setup(1, True), numbers(schedule="constant")
    rollout = dict(batch_size=64, length=16)
    prompts = tiny.prompts(**rollout)

    def memory(num_micro_batches):
        options = tiny.options(num_minibatches=1, num_micro_batches=num_micro_batches)
        parts = dict(frozen=setup.frozen, networks=setup.networks, options=options)
        state = setup.start(hyperparameters)
        run = functools.partial(sample_responses, **parts)
        responses = jax.eval_shape(run, state, hyperparameters, prompts, KEY)
        scores = jax.ShapeDtypeStruct((64,), jnp.float32)
        experience, _ = jax.eval_shape(
            functools.partial(make_experience, **parts),
            responses,
            scores,
            state,
            hyperparameters,
        )
        lowered = tiny.update.lower(state, experience, hyperparameters, KEY, **parts)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert memory(8) < 0.6 * memory(1)


def test_frozen_parameters_are_arguments_not_constants_of_the_program():
    setup, hyperparameters = tiny.setup(1, True), numbers()
    args = (setup.start(hyperparameters), hyperparameters, tiny.prompts(), KEY)
    parts = dict(networks=setup.networks, options=EVERYTHING)

    def constants(function, *args, **kwargs):
        return sum(np.size(x) for x in jax.make_jaxpr(function)(*args, **kwargs).consts)

    iteration = functools.partial(ppo_iteration, **parts)
    assert constants(iteration, *args, frozen=setup.frozen) < 100
    # The measure sees what is closed over: the trunk, reference and reward model.
    closed = functools.partial(iteration, frozen=setup.frozen)
    assert constants(closed, *args) > sum(x.size for x in jax.tree.leaves(setup.frozen.trunk))
    # Another reference and another reward model are other data for the same program.
    _, base = three_iterations(hyperparameters)
    traces = tiny.TRACES["ppo_iteration"]
    for name in ("ref_policy", "reward"):
        other = jax.tree.map(lambda x: 0.9 * x, getattr(setup.frozen, name))
        frozen = setup.frozen.replace(**{name: other})
        _, metrics = tiny.iterate(*args, frozen=frozen, **parts)
        metric = dict(ref_policy="kl/ref", reward="reward/score_mean")[name]
        assert abs(metrics[metric] - base[0][metric]) > 1e-3
    assert tiny.TRACES["ppo_iteration"] == traces
