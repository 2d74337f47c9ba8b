"""A user's own estimator or loss, called with shapes before anything is allocated."""

import dataclasses
import functools

import jax.numpy as jnp
import pytest

from ppo_jax.config.objectives import advantage_function, loss_function, needs_groups
from ppo_jax.config.parsing import FunctionFailed
from ppo_jax.core.critic_free import reinforce_plus_plus_advantages
from ppo_jax.core.named import call_named
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


def forgets(scores):
    scores.sum()


def lists(scores):
    return [scores]


def triples(scores):
    return scores, None, None


def branches(scores, gamma):
    return scores if gamma < 2 else -scores


def good(rewards, values, mask, *, gamma, greedy_scores):
    return gamma * rewards - values - greedy_scores[:, None], rewards


def alone(logprobs, mask):
    return jnp.where(mask, logprobs, 0.0).sum()


def of_each(logprobs):
    return logprobs, {}


def wide_metric(logprobs, mask, weights=None):
    return jnp.where(mask, logprobs, 0.0).sum(), {"policy/wide": logprobs}


def text_metric(logprobs, mask):
    return jnp.where(mask, logprobs, 0.0).sum(), {"policy/kind": "x"}


def loss_branches(logprobs, mask, clip_range):
    return (logprobs * mask).sum() if clip_range < 1 else 0.0, {}


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
        ("forgets", r"forgets must return advantages \[8\] or \[8, 6\] in floats, got a NoneType"),
        ("lists", "lists must return advantages .* got a list"),
        ("triples", r"must return advantages, or \(advantages, returns\), got 3 values"),
        ("branches", "branches raised TracerBoolConversionError"),
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
        (
            "text_metric",
            "must return one number as the metric 'policy/kind', got a str",
        ),
        ("loss_branches", "loss_branches raised TracerBoolConversionError"),
    ],
)
def test_a_loss_that_cannot_be_one_is_told_by_its_name(loss, message):
    with pytest.raises((ValueError, FunctionFailed), match=message) as error:
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


halved = functools.partial(good, gamma=0.5)
ungrouped = functools.partial(reinforce_plus_plus_advantages, group_size=None)


def test_what_a_partial_has_bound_stays_bound():
    function = advantage_function(f"{HERE}:halved")
    given = dict(rewards=jnp.ones((1, 2)), values=jnp.zeros((1, 2)), mask=None, gamma=0.9)
    found, _ = call_named(function, given | {"greedy_scores": jnp.zeros(1)})
    assert found.tolist() == [[0.5, 0.5]]
    assert not needs_groups(f"{HERE}:ungrouped")


@dataclasses.dataclass
class Scaled:
    factor: float

    def __call__(self, scores):
        return self.factor * scores[:2]


scaled = Scaled(2.0)


def test_an_object_that_can_be_called_is_a_function_too():
    with pytest.raises(ValueError, match=r"Scaled\(factor=2.0\) must return advantages"):
        check_objectives(settings(advantage=f"{HERE}:scaled"))
