"""The algorithms at their edges."""

import jax.numpy as jnp

from ppo_jax import algorithms, core
from tests.support import tiny
from tests.support.edges import (
    ADAM,
    KEY,
    NEARLY,
    RANK,
    RIGHT_PADDED,
    ROW,
    assert_edge,
    cases,
)


def options(**changes):
    return lambda: tiny.options(**changes)


def texts(function, **how):
    """A step on three texts, with micro-batches that do not divide them."""
    run = tiny.setup()
    tokens, mask = tiny.tokens_and_mask(0, 3, 4, side="right")
    batch = core.TextBatch(inputs=tokens, tokens=tokens, mask=mask, loss_mask=mask)
    pairs = dict(pairs=jnp.zeros((1, 2), jnp.int32), valid=jnp.ones(1, bool))
    if function is algorithms.reward_step:
        batch = core.PreferenceBatch(inputs=tokens, mask=mask, **pairs)
    params = run.policy_params
    state = core.TrainState(step=jnp.int32(0), params=params, opt_state=None)
    network = run.networks.policy
    if function is algorithms.text_scores:
        return function(network, params, tokens, mask, **how)
    if function is algorithms.sft_loss:
        return function(network, params, batch, **how)
    return function(state, batch, ADAM, network=network, frozen={}, **how)


def experience(rows=8, **changes):
    zeros = jnp.zeros((rows, 8))
    tokens, mask = jnp.full((rows, 13), 5), jnp.ones((rows, 13), bool)
    given = dict(logprobs=zeros, values=zeros, advantages=zeros, returns=zeros)
    names = dict(policy_inputs=tokens, value_inputs=tokens, mask=mask)
    response = dict(response_tokens=tokens[:, 5:], response_mask=mask[:, 5:])
    return core.Experience(**names, **response, **given | changes)


def updated(how=None, rows=8, **numbers):
    run, numbers = tiny.setup(), tiny.hyperparameters().replace(**numbers)
    parts = dict(frozen=run.frozen, networks=run.networks, options=tiny.options(**how or {}))
    state = run.start(tiny.hyperparameters())
    return algorithms.ppo_update(state, experience(rows), numbers, KEY, **parts)


def experienced(scores, function="make_experience"):
    run, numbers = tiny.setup(), tiny.hyperparameters()
    parts = dict(frozen=run.frozen, networks=run.networks, options=tiny.options())
    state, e = run.start(numbers), experience()
    rollout = core.Rollout(
        prompt_tokens=e.policy_inputs[:, :5],
        prompt_mask=e.mask[:, :5],
        response_tokens=e.response_tokens,
        response_mask=e.response_mask,
        logprobs=e.logprobs,
        has_eos=jnp.ones(8, bool),
    )
    if function == "make_experience":
        return algorithms.make_experience(rollout, scores, state, numbers, **parts)
    return algorithms.update_from_rollout(state, numbers, rollout, scores, KEY, **parts)


def iterated(function, **prompts):
    run, numbers = tiny.setup(), tiny.hyperparameters()
    parts = dict(frozen=run.frozen, networks=run.networks, options=tiny.options())
    batch = tiny.prompts().replace(**prompts)
    return function(run.start(numbers), numbers, batch, KEY, **parts)


def with_networks(function, **missing):
    run = tiny.setup()
    return function(None, frozen=run.frozen, networks=run.networks._replace(**missing))


def started(**numbers):
    return algorithms.init_ppo({}, None, tiny.hyperparameters(**numbers))


def of_policy(token):
    run, e = tiny.setup(), experience()
    tokens = jnp.full((8, 5), token)
    rollout = core.Rollout(
        prompt_tokens=tokens,
        prompt_mask=e.mask[:, :5],
        response_tokens=e.response_tokens,
        response_mask=e.response_mask,
        logprobs=e.logprobs,
        has_eos=jnp.ones(8, bool),
    )
    parts = dict(frozen=run.frozen, networks=run.networks, policy_inputs=rollout.tokens)
    params, numbers = run.policy_params, tiny.hyperparameters()
    return algorithms.policy_logprobs(rollout, params, numbers, **parts)


# (function, edge, call, what is refused: a part of the message, or the value)
EDGES = [
    # options of an iteration
    (algorithms.PPOOptions, "num_epochs 0", options(num_epochs=0), "num_epochs must be at least 1"),
    (algorithms.PPOOptions, "minibatches -1", options(num_minibatches=-1), "num_minibatches"),
    (algorithms.PPOOptions, "micro 1.5", options(num_micro_batches=1.5), "num_micro_batches"),
    (algorithms.PPOOptions, "k9", options(kl_estimator="k9"), "unknown kl_estimator 'k9'"),
    (algorithms.PPOOptions, "k2", options(kl_estimator="k2"), "away from the reference, got 'k2'"),
    (algorithms.PPOOptions, "k3", options(kl_estimator="k3"), "away from the reference, got 'k3'"),
    # updates
    (
        algorithms.ppo_update,
        "3 minibatches of 8",
        lambda: updated(dict(num_minibatches=3)),
        r"num_minibatches x num_micro_batches \(3 x 1\) must divide the 8 responses",
    ),
    (algorithms.ppo_update, "rate [2]", lambda: updated(value_learning_rate=ROW), RANK),
    (algorithms.ppo_update, "vf_coef [2]", lambda: updated(vf_coef=jnp.ones(2)), RANK),
    (algorithms.experience_loss, "clip_range [B]", lambda: updated(clip_range=ROW), RANK),
    (algorithms.trained_params, "no critic", lambda: len(algorithms.trained_params({}, None)), 1),
    # scores and experience
    (
        algorithms.make_experience,
        "scores [B, 1]",
        lambda: experienced(jnp.ones((8, 1))),
        "assert_shape",
    ),
    (
        algorithms.make_experience,
        "equal scores",
        lambda: experienced(jnp.full(8, 0.1))[1]["reward/score_std"],
        0.0,
    ),
    (
        algorithms.make_experience,
        "scores equal but for rounding",
        lambda: experienced(NEARLY[0, :8])[1]["reward/score_std"],
        0.0,
    ),
    (
        algorithms.sample_responses,
        "right-padded",
        lambda: iterated(algorithms.sample_responses, mask=RIGHT_PADDED),
        "padded on the left, got row 1",
    ),
    (
        algorithms.response_scores,
        "no reward model",
        lambda: with_networks(algorithms.response_scores, reward=None),
        "needs a reward model",
    ),
    (algorithms.policy_logprobs, "token -1", lambda: of_policy(-1), r"in \[0, 50\), got -1"),
    (
        algorithms.update_from_rollout,
        "scores [1]",
        lambda: experienced(jnp.ones(1), "update_from_rollout"),
        "assert_shape",
    ),
    (
        algorithms.ppo_iteration,
        "token V",
        lambda: iterated(algorithms.ppo_iteration, tokens=jnp.full((8, 5), 50)),
        "got 50",
    ),
    (algorithms.init_ppo, "kl_coef", lambda: started(kl_coef=0.5).kl_coef, 0.5),
    # SFT and the reward model
    (
        algorithms.sft_step,
        "2 micro-batches of 3",
        lambda: texts(algorithms.sft_step, num_micro_batches=2),
        "divide the 3",
    ),
    (
        algorithms.reward_step,
        "2 micro-batches of 3",
        lambda: texts(algorithms.reward_step, num_micro_batches=2),
        "divide the 3",
    ),
    (
        algorithms.text_scores,
        "0 micro-batches",
        lambda: texts(algorithms.text_scores, num_micro_batches=0),
        "num_micro_batches must be at least 1",
    ),
    (
        algorithms.sft_loss,
        "normalizer [2]",
        lambda: texts(algorithms.sft_loss, normalizer=ROW),
        RANK,
    ),
]


@cases(EDGES)
def test_an_edge_is_refused_by_name_or_has_the_value_of_its_formula(call, expected):
    assert_edge(call, expected)
