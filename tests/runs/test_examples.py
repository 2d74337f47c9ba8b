"""The examples of docs/using-the-parts.md run as they stand and do what they say."""

import contextlib
import functools
import io
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppo_jax
from tests.support.documents import PAGES

SECTION = PAGES["using-the-parts.md"]
# By the words in bold before the code.
EXAMPLES = dict(re.findall(r"\*\*([^*]+)\*\*.*?```python\n(.*?)```", SECTION, re.DOTALL))


@functools.cache
def ran(title):
    """(the names that an example leaves, what it printed)"""
    names, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(EXAMPLES[title], f"docs/using-the-parts.md, {title}", "exec"), names)
    return names, printed.getvalue()


def textbook_gae(rewards, values, ended, last_values, gamma, gae_lambda):
    """[T, N]: a simulator's own loop, from the last step to the first."""
    advantages, advantage, next_values = np.zeros_like(rewards), 0.0, last_values
    for t in reversed(range(len(rewards))):
        goes_on = 1.0 - ended[t]
        delta = rewards[t] + gamma * goes_on * next_values - values[t]
        advantage = delta + gamma * gae_lambda * goes_on * advantage
        advantages[t], next_values = advantage, values[t]
    return advantages


def finds_the_best_arm(names, printed):
    chances = jax.nn.softmax(names["logits"])
    assert chances.argmax() == names["odds"].argmax() and chances.max() > 0.9
    assert printed.strip() == str(chances)


def agrees_with_the_textbook_loop(names, printed):
    assert names["ended"].any()
    given = (names[name] for name in ("rewards", "values", "ended", "last_values"))
    expected = textbook_gae(*given, 0.99, 0.95)
    np.testing.assert_allclose(names["advantages"].T, expected, atol=1e-4)
    np.testing.assert_allclose(names["returns"].T, expected + names["values"], atol=1e-4)


def samples_what_the_policy_says(names, printed):
    responses, mask = names["responses"], names["responses"].response_mask
    assert responses.response_tokens.shape == (2, 16)
    stops = np.isin(responses.response_tokens, [0, 1, 2]) & mask
    assert (stops.sum(axis=1) == responses.has_eos).all()
    logits = ppo_jax.response_outputs(
        names["policy"], names["params"], responses.tokens, responses.mask, response_length=16
    )
    expected = ppo_jax.token_logprobs(logits, responses.response_tokens, temperature=0.7)
    np.testing.assert_allclose(responses.logprobs, jnp.where(mask, expected, 0.0), atol=1e-5)
    assert str(responses.response_tokens) in printed


def learns_to_say_seven(names, printed):
    score, kl = (float(x) for x in printed.split())
    assert score > 7.0  # 0.8 by chance
    assert 0 < kl <= 8 * np.log(10) + 1e-3  # all sevens, against one token in ten
    assert names["state"].step == 40 and names["state"].episodes == 4000


def takes_part_like_any_network(names, printed):
    policy, params = names["policy"], names["policy"].init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (3, 9), 0, 50)
    mask = jnp.arange(9)[None] >= jnp.array([[0], [2], [4]])
    whole = policy.apply(params, tokens, mask, first_output=3)
    first, cache = policy.decode(params, tokens[:, :6], mask[:, :6], policy.init_cache(3, 9))
    rest, _ = policy.decode(params, tokens[:, 6:], mask[:, 6:], cache)
    by_pieces = jnp.concatenate([first, rest], axis=1)[:, 3:]
    np.testing.assert_allclose(jnp.where(mask[:, 3:, None], whole - by_pieces, 0), 0, atol=1e-5)
    start, end = scores_of_ppo(policy, params)
    assert end > start + 2


def scores_of_ppo(policy, params):
    """The mean count of an even token in 8, at the first and the last of 30 iterations."""

    def count(params, tokens, mask, *, first_output=0):
        """Instead of a reward model."""
        return jnp.cumsum((tokens % 2 == 0).astype(jnp.float32), axis=1)[:, first_output:]

    def zeros(params, tokens, mask, *, first_output=0):
        return params["bias"] + jnp.zeros(tokens[:, first_output:].shape)

    networks = ppo_jax.PPONetworks(
        policy=policy, value=ppo_jax.Network(None, zeros), reward=ppo_jax.Network(None, count)
    )
    sampling = ppo_jax.Sampling(response_length=8, eos_ids=())
    options = ppo_jax.PPOOptions(sampling=sampling, num_epochs=2, num_minibatches=2)
    optimizer = ppo_jax.Optimizer(learning_rate=0.02)
    numbers = ppo_jax.Hyperparameters(optimizer=optimizer, value_learning_rate=0.02)
    iterate = jax.jit(
        functools.partial(
            ppo_jax.ppo_iteration,
            frozen=ppo_jax.FrozenParams(ref_policy=params),
            networks=networks,
            options=options,
        )
    )
    state = ppo_jax.init_ppo(params, {"bias": jnp.zeros((1, 1))}, numbers)
    prompts = ppo_jax.Prompts(tokens=jnp.ones((64, 1), jnp.int32), mask=jnp.ones((64, 1), bool))
    scores = []
    for key in jax.random.split(jax.random.key(0), 30):
        state, metrics = iterate(state, numbers, prompts, key)
        scores.append(float(metrics["reward/score_mean"]))
    return scores[0], scores[-1]


DOES = {
    "The loss of PPO, on a bandit.": finds_the_best_arm,
    "Advantages of arrays from elsewhere.": agrees_with_the_textbook_loop,
    "A rollout alone.": samples_what_the_policy_says,
    "PPO with a network of your own": learns_to_say_seven,
    "An NNX model plugged in.": takes_part_like_any_network,
}


def test_every_example_is_tested():
    assert list(EXAMPLES) == list(DOES)
    assert SECTION.count("```python") == len(DOES)


@pytest.mark.parametrize("title", DOES)
def test_an_example_does_what_it_says(title):
    DOES[title](*ran(title))


@pytest.mark.parametrize("title", DOES)
def test_an_example_is_short(title):
    lines = EXAMPLES[title].splitlines()
    assert sum(bool(line) for line in lines) <= 30 and max(map(len, lines)) <= 100


def test_an_example_takes_only_what_is_public():
    code = "\n".join(EXAMPLES.values())
    imported = {
        name.strip()
        for names in re.findall(r"^from ppo_jax import (.*)$", code, re.MULTILINE)
        for name in names.split(",")
    }
    assert imported and imported <= set(ppo_jax.__all__)
