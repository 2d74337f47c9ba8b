"""A user's own estimator or loss, called with shapes before anything is allocated."""

import jax.numpy as jnp
import pytest

from ppo_jax.config.objectives import advantage_function, loss_function
from ppo_jax.config.parsing import FunctionFailed
from ppo_jax.core.policy_losses import clipped_policy_loss
from ppo_jax.training.objectives import check_objectives
from tests.training.test_ppo_setup import ppo_settings

HERE = __name__


def three(scores):
    return jnp.zeros(3)


def whole_numbers(scores, group_size):
    return jnp.zeros(scores.shape, int)


def short_returns(rewards, values, mask):
    return rewards - values, rewards[:, 1:]


def looks(scores):
    return scores if scores[0] > 0 else -scores


def breaks(scores):
    raise KeyError("nothing")


def good(rewards, values, mask, *, gamma, greedy_scores):
    return gamma * rewards - values - greedy_scores[:, None], rewards


def alone(logprobs, mask):
    return jnp.where(mask, logprobs, 0.0).sum()


def of_each(logprobs):
    return logprobs, {}


def wide_metric(logprobs, mask, weights=None):
    return jnp.where(mask, logprobs, 0.0).sum(), {"policy/wide": logprobs}


def of_whole_numbers(logprobs, mask):
    return mask.sum(), {}


def good_loss(logprobs, old_logprobs, advantages, mask, segment_ids, normalizer, weights):
    return (logprobs * mask).sum() / normalizer, {"policy/loss": 0.0}


@pytest.mark.parametrize(
    ("advantage", "message"),
    [
        (
            "three",
            r"three must return advantages \[8\] or \[8, 6\] in floats, got \[3\] in float32",
        ),
        ("whole_numbers", r"in floats, got \[8\] in int32"),
        ("short_returns", r"short_returns must return returns \[8, 6\] in floats, got \[8, 5\]"),
        ("looks", f"ppo.advantage {HERE}:looks raised TracerBoolConversionError: Attempted bool"),
        ("breaks", f"ppo.advantage {HERE}:breaks raised KeyError: 'nothing'"),
    ],
)
def test_an_estimator_that_cannot_be_one_is_told_by_its_name(advantage, message):
    with pytest.raises((ValueError, FunctionFailed), match=message) as error:
        check_objectives(settings(advantage=f"{HERE}:{advantage}"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("alone", r"alone must return \(loss, \{metric: number\}\), got one "),
        ("of_each", r"of_each must return one float as its loss, got \[8, 6\] in float32"),
        ("of_whole_numbers", r"must return one float as its loss, got \[\] in int32"),
        ("wide_metric", r"wide_metric must return one number as the metric 'policy/wide', got"),
        ("breaks", "breaks asks for scores; there is logprobs"),
    ],
)
def test_a_loss_that_cannot_be_one_is_told_by_its_name(loss, message):
    with pytest.raises(ValueError, match=message) as error:
        check_objectives(settings(loss=f"{HERE}:{loss}"))
    assert "\n" not in str(error.value)


def settings(**changes):
    sizes = dict(rollout_batch_size=8, response_length=6, samples_per_prompt=2)
    return ppo_settings(**sizes | changes)


@pytest.mark.parametrize(
    "how", [{}, {"aggregation": "sequence_mean"}, {"packing": True, "num_micro_batches": 2}]
)
def test_those_that_can_be_are_called_and_nothing_is_computed(how):
    check_objectives(settings(advantage=f"{HERE}:good", loss=f"{HERE}:good_loss", **how))


def test_a_loaded_function_is_one_object_so_that_programs_are_compiled_once():
    name = f"{HERE}:good"
    assert advantage_function(name) is advantage_function(name)
    given = dict(rewards=jnp.ones((1, 2)), values=jnp.zeros((1, 2)), mask=None, gamma=0.5)
    assert advantage_function(name)(**given, greedy_scores=jnp.zeros(1))[0].sum() == 1.0
    assert loss_function("clip") is clipped_policy_loss
