"""An old keyword works for one release, and says what to write instead."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from ppo_jax import Sampling, kl_estimate, policy_network, token_rewards
from ppo_jax.core.renamed import renamed
from ppo_jax.core.types import TextBatch
from tests.support import tiny


def test_old_keywords_give_what_the_new_ones_give():
    logprobs, ref_logprobs = jnp.array([[-1.0, -2.0]]), jnp.array([[-1.5, -1.0]])
    with pytest.warns(FutureWarning, match="kl_estimate: kind is now estimator; the old name"):
        old = kl_estimate(logprobs, ref_logprobs, kind="k3")
    assert (old == kl_estimate(logprobs, ref_logprobs, estimator="k3")).all()
    args = jnp.array([1.0]), logprobs, ref_logprobs, jnp.ones((1, 2), bool)
    with pytest.warns(FutureWarning, match="token_rewards: kl_kind is now estimator"):
        old = token_rewards(*args, kl_coef=0.1, kl_kind="k2")
    assert (old == token_rewards(*args, kl_coef=0.1, estimator="k2")).all()


def test_old_fields_of_a_struct_are_taken():
    with pytest.warns(FutureWarning) as caught:
        sampling = Sampling(response_length=4, eos_ids=(), slots=2, refill=1)
    assert sorted(str(x.message).split(";")[0] for x in caught) == [
        "Sampling: refill is now min_free_slots",
        "Sampling: slots is now max_concurrent",
    ]
    assert (sampling.max_concurrent, sampling.min_free_slots) == (2, 1)
    with pytest.warns(FutureWarning, match="importance_high is now tis_clip_high"):
        numbers = tiny.hyperparameters(importance_high=2.0)
    assert numbers.tis_clip_high == 2.0


def test_old_fields_are_read_and_replaced():
    sampling = Sampling(response_length=4, eos_ids=(), max_concurrent=2)
    assert sampling.slots == 2
    with pytest.warns(FutureWarning, match="slots is now max_concurrent"):
        assert dataclasses.replace(sampling, slots=4).max_concurrent == 4
    numbers = tiny.hyperparameters()
    with pytest.warns(FutureWarning, match="importance_high is now tis_clip_high"):
        assert numbers.replace(importance_high=2.0).tis_clip_high == 2.0


def test_old_keywords_of_our_networks_are_taken():
    network, tokens = policy_network(tiny.model_config()), jnp.ones((1, 4), jnp.int32)
    params, mask = network.init(jax.random.key(0)), tokens > 0
    with pytest.warns(FutureWarning, match="apply: start is now first_output"):
        old = network.apply(params, tokens, mask, start=3)
    assert (old == network.apply(params, tokens, mask, first_output=3)).all()
    with pytest.warns(FutureWarning) as caught:
        network.apply(params, tokens, mask, segments=tokens, at=jnp.array([[1]]))
        TextBatch(inputs=tokens, tokens=tokens, mask=mask, loss_mask=mask, segments=tokens)
    assert [str(x.message).split(";")[0] for x in caught if "TextBatch" in str(x.message)] == [
        "TextBatch: segments is now segment_ids"
    ]
    assert len(caught) == 3


def test_both_names_at_once_are_refused():
    @renamed(kind="estimator")
    def estimate(*, estimator):
        return estimator

    with pytest.raises(TypeError, match="estimate: kind is now estimator, got both"):
        estimate(kind="k1", estimator="k1")
