"""Sampling and rollout at their edges."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax import rollout as rollout_function
from ppo_jax.core.types import Prompts
from ppo_jax.models.build import policy_network
from ppo_jax.rollout import decode, sampling
from tests.support import tiny
from tests.support.edges import (
    KEY,
    MASK,
    RANK,
    RIGHT_PADDED,
    TOKENS,
    assert_edge,
    cases,
)


def sampled(**numbers):
    return sampling.sample(KEY, jnp.array([[0.0, 3.0, 1.0]]), **numbers)


def traced(name, value):
    """What is drawn with a number that is traced."""
    return jax.jit(lambda x: sampled(**{name: x}))(value)


def rolled(tokens=None, mask=None, **numbers):
    """The rollout of a tiny policy, outside of a traced program."""
    tokens = jnp.full((2, 3), 5) if tokens is None else tokens
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask
    prompts, run = Prompts(tokens=tokens, mask=mask), tiny.setup()
    how = dict(sampling=tiny.sampling(response_length=2)) | numbers
    return rollout_function(run.networks.policy, run.policy_params, prompts, KEY, **how)


def outputs(response_length):
    return decode.response_outputs(None, {}, TOKENS, MASK, response_length=response_length)


# (function, edge, call, what is refused: a part of the message, or the value)
EDGES = [
    # sampling: what is known is refused, what is traced clamps
    (sampling.sample, "temperature -1", lambda: sampled(temperature=-1), "temperature must be"),
    (sampling.sample, "temperature 1e-38", lambda: sampled(temperature=1e-38), "got 1e-38"),
    (sampling.sample, "temperature nan", lambda: sampled(temperature=math.nan), "got nan"),
    (sampling.sample, "an array", lambda: sampled(temperature=jnp.float32(-1)), "temperature"),
    (sampling.sample, "temperature [1]", lambda: sampled(temperature=jnp.ones(1)), RANK),
    (sampling.sample, "min_p 1.5", lambda: sampled(min_p=1.5), "min_p must be at least 0 and at m"),
    (sampling.sample, "min_p -0.1", lambda: sampled(min_p=-0.1), "min_p must be at least 0"),
    (sampling.sample, "top_p -1", lambda: sampled(top_p=-1), "top_p must be at least 0"),
    (sampling.sample, "top_k 2.5", lambda: sampled(top_k=2.5), "top_k must be at least 0 and whol"),
    (sampling.sample, "traced temperature -1", lambda: traced("temperature", -1.0), [1]),
    (sampling.sample, "traced temperature 1e-38", lambda: traced("temperature", 1e-38), [1]),
    (sampling.sample, "traced min_p 1.5", lambda: traced("min_p", 1.5), [1]),
    (sampling.sample, "traced top_p -1", lambda: traced("top_p", -1.0), [1]),
    (
        sampling.sample,
        "traced min_p -0.1",
        lambda: traced("min_p", -0.1),
        [sampling.sample(KEY, jnp.array([[0.0, 3.0, 1.0]])).item()],
    ),
    (sampling.Sampling, "length 0", lambda: tiny.sampling(response_length=0), "response_length"),
    (sampling.Sampling, "top_p -1", lambda: tiny.sampling(top_p=-1), "top_p must be"),
    (sampling.Sampling, "top_k -1", lambda: tiny.sampling(top_k=-1), "top_k must be"),
    (sampling.Sampling, "min_p 2", lambda: tiny.sampling(min_p=2), "min_p must be"),
    (sampling.Sampling, "stop id -1", lambda: tiny.sampling(eos_ids=(2, -1)), r"eos_ids\[1\] must"),
    (sampling.Sampling, "samples 0", lambda: tiny.sampling(samples_per_prompt=0), "samples_per_pr"),
    (sampling.Sampling, "slots -1", lambda: tiny.sampling(max_concurrent=-1), "max_concurrent"),
    # rollout
    (
        rollout_function,
        "right-padded",
        lambda: rolled(mask=RIGHT_PADDED[:2, 2:]),
        "padded on the l",
    ),
    (rollout_function, "no prompt", lambda: rolled(jnp.zeros((0, 3), jnp.int32)), "there must be"),
    (rollout_function, "token V", lambda: rolled(jnp.full((2, 3), 50)), r"in \[0, 50\), got 50"),
    (rollout_function, "token -1", lambda: rolled(jnp.full((2, 3), -1)), "got -1 in row 0"),
    (rollout_function, "temperature [B]", lambda: rolled(temperature=jnp.ones(2)), RANK),
    (rollout_function, "temperature -1", lambda: rolled(temperature=-1), "temperature must be"),
    (rollout_function, "rows [3]", lambda: rolled(rows=jnp.arange(3)), "assert_shape"),
    (decode.response_outputs, "T = L", lambda: outputs(4), "from 1 to 3 of the 4 positions, got 4"),
    (decode.response_outputs, "T = 0", lambda: outputs(0), "got 0"),
    (
        decode.response_statistics,
        "T = L",
        lambda: decode.response_statistics(None, {}, TOKENS, MASK, TOKENS),
        "from 1 to 3",
    ),
]


@cases(EDGES)
def test_an_edge_is_refused_by_name_or_has_the_value_of_its_formula(call, expected):
    assert_edge(call, expected)


def test_with_wide_numbers_a_rollout_is_the_same():
    """jax_enable_x64: index dtypes, and noise that must not be another."""
    network = policy_network(tiny.model_config())
    params = tiny.random_params(network)
    prompts = tiny.prompts()

    def run(**slots):
        how = tiny.sampling(response_length=4, **slots)
        sample = jax.jit(lambda key: rollout_function(network, params, prompts, key, sampling=how))
        return jax.tree.map(np.asarray, sample(jax.random.key(0)))

    for slots in ({}, dict(max_concurrent=4), dict(max_concurrent=4, samples_per_prompt=2)):
        narrow = run(**slots)
        with jax.enable_x64():
            wide = run(**slots)
        np.testing.assert_array_equal(wide.response_tokens, narrow.response_tokens)
        np.testing.assert_allclose(wide.logprobs, narrow.logprobs, atol=1e-6)
        assert wide.response_tokens.dtype == np.int32 and wide.logprobs.dtype == np.float32
