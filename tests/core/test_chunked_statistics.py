"""Logits in chunks: the same numbers and gradients, and nothing of [B, T, V] in memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.algorithms.update import experience_loss
from ppo_jax.core.distributions import summed_logprobs, token_logprobs
from ppo_jax.core.types import Experience, FrozenParams
from ppo_jax.models.build import policy_network, value_network
from ppo_jax.rollout.decode import response_statistics
from tests.support import tiny

B, P, T = 4, 5, 12
VOCAB = 1000  # an array of all logits is larger than any other


def config_of(kind):
    return tiny.model_config(**tiny.SHAPES.get(kind, {}) | dict(vocab_size=VOCAB))


@functools.cache
def loss_program(kind, chunk):
    """(compiled loss and gradients of a piece of experience, its results)."""
    config = config_of(kind)
    policy, value = policy_network(config, logits_chunk=chunk), value_network(config)
    parts = dict(policy=tiny.random_params(policy), value=tiny.random_params(value, 1))
    tokens, mask = tiny.tokens_and_mask(0, B, P + T)
    response_mask = mask[:, P:]
    rng = np.random.default_rng(1)
    numbers = [jnp.asarray(rng.normal(size=(B, T)), jnp.float32) for _ in range(4)]
    experience = Experience(
        policy_inputs=tokens,
        value_inputs=tokens,
        mask=mask,
        response_tokens=tokens[:, P:],
        response_mask=response_mask,
        logprobs=numbers[0] - 5.0,
        values=numbers[1],
        advantages=numbers[2],
        returns=numbers[3],
    )
    networks = tiny.setup().networks._replace(policy=policy, value=value)
    loss = functools.partial(experience_loss, frozen=FrozenParams(ref_policy={}), networks=networks)
    grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    args = parts, experience, tiny.hyperparameters(temperature=0.8)
    compiled = grad.lower(*args).compile()
    return compiled, compiled(*args)


@pytest.mark.parametrize(
    ("kind", "chunk"),
    [*(("gpt2", chunk) for chunk in (1, 5, 12, 100)), ("qk_norm", 5), ("scanned", 5)],
)
def test_loss_and_gradients_are_those_of_all_logits_at_once(kind, chunk):
    ((loss, metrics), gradients), ((one_loss, one_metrics), expected) = (
        loss_program(kind, c)[1] for c in (chunk, 0)
    )
    np.testing.assert_allclose(loss, one_loss, rtol=1e-5)
    tiny.leaves_close(gradients, expected, rtol=1e-5, atol=1e-6)
    tiny.leaves_close(metrics, one_metrics, rtol=1e-5, atol=1e-6)


def largest_array(compiled):
    """Elements of the largest float array of a program."""
    shapes = re.findall(r"f(?:32|16|64)\[([\d,]+)\]", compiled.as_text())
    return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)


def test_no_array_of_all_logits_is_in_the_program():
    whole, chunked = loss_program("llama", 0)[0], loss_program("llama", 3)[0]
    assert largest_array(whole) == B * T * VOCAB
    assert largest_array(chunked) < B * T * VOCAB
    peak, less = (x.memory_analysis().temp_size_in_bytes for x in (whole, chunked))
    assert less < peak - 4 * B * T * VOCAB / 2


def test_a_network_without_the_function_goes_by_its_logits():
    config = config_of("llama")
    chunked = policy_network(config, logits_chunk=5)
    plain = chunked._replace(token_statistics=None)
    params = tiny.random_params(plain)
    tokens, mask = tiny.tokens_and_mask(2, B, P + T)
    args = params, tokens, mask, tokens[:, P:]
    got, expected = (response_statistics(n, *args, temperature=0.7) for n in (chunked, plain))
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 5, 7])
def test_summed_logprobs_and_their_gradients_are_those_of_all_logits(chunk):
    """Also where a position without a factor has a token that is none."""
    rng = np.random.default_rng(0)
    weights, hidden = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((6, 11), (2, 7, 6)))
    tokens = jnp.asarray(rng.integers(0, 11, (2, 7)), jnp.int32).at[0, 3].set(-1)
    factors = jnp.asarray(rng.normal(size=(2, 7)), jnp.float32).at[0, 3].set(0.0)

    def matmul(weights, hidden):
        return hidden @ weights

    def whole(weights, hidden):
        logprobs = token_logprobs(matmul(weights, hidden), tokens)
        return 3.0 * jnp.where(factors == 0, 0.0, logprobs * factors).sum()

    def in_chunks(weights, hidden):
        return 3.0 * summed_logprobs(matmul, weights, hidden, tokens, factors, chunk=chunk)

    args = weights, hidden
    np.testing.assert_allclose(in_chunks(*args), whole(*args), rtol=1e-5)
    got, expected = (jax.jit(jax.grad(f, argnums=(0, 1)))(*args) for f in (in_chunks, whole))
    tiny.leaves_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (got[1][0, 3] == 0).all()
