"""An iteration of PPO against one that was written without the library, in float64 and by hand.

The policy is a table [V, V] of logits of the next token by the one before it, the critic a table
[V]: so the gradients are short formulas, too. Only the shuffles are taken from jax.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.algorithms import PPONetworks, PPOOptions, init_ppo, update_from_rollout
from ppo_jax.core import FrozenParams, Hyperparameters, Network, Optimizer, Rollout
from ppo_jax.core.advantages import gae
from ppo_jax.core.critic_free import rloo_advantages
from ppo_jax.rollout import Sampling

B, P, T, V = 8, 3, 6, 5
KEY = jax.random.key(7)
NUMBERS = dict(
    temperature=0.8, kl_coef=0.1, gamma=0.97, gae_lambda=0.9, clip_range=0.1, vf_coef=0.3
)
NUMBERS |= dict(value_clip_range=0.1, entropy_coef=0.02, missing_eos_score=0.7)
NUMBERS |= dict(value_learning_rate=0.05, target_kl=0.5, kl_horizon=40.0)
VALUE_ADAM = dict(learning_rate=0.04, max_grad_norm=0.2, b1=0.7, b2=0.9, eps=1e-3)
VALUE_ADAM |= dict(weight_decay=0.02)
OF_CRITICS = dict(num_critics=3, agreed_fraction=0.3, disputed_fraction=0.4)
ADAM = dict(learning_rate=0.03, max_grad_norm=0.5, b1=0.8, b2=0.95, eps=1e-4, weight_decay=0.01)


def look_up(params, inputs, mask, *, first_output=0):
    return params["table"][inputs[:, first_output:]]


def made_up(seed):
    """Tables and a rollout of the policy, to whose log-probs some noise is added."""
    draw = np.random.default_rng(seed)
    tables = {name: draw.normal(size=(V, V)) for name in ("policy", "reference")}
    tables["value"] = draw.normal(size=V)
    tokens = draw.integers(0, V, (B, P + T))
    lengths = draw.integers(1, T + 1, B)
    mask = np.arange(T) < lengths[:, None]
    case = dict(tokens=tokens, mask=mask, has_eos=lengths < T, scores=draw.normal(size=B))
    logprobs, _, _ = of_policy(tables["policy"], tokens[:, P - 1 : -1], tokens[:, P:])
    return tables, case | {"logprobs": logprobs + 0.15 * draw.normal(size=(B, T)) * mask}


# --- by hand --------------------------------------------------------------------------------------


def of_policy(table, before, tokens):
    """(log-probs of the tokens, all probabilities, entropies)."""
    z = table[before] / NUMBERS["temperature"]
    logs = z - np.log(np.exp(z).sum(-1, keepdims=True))
    probs = np.exp(logs)
    chosen = np.take_along_axis(logs, tokens[..., None], -1)[..., 0]
    return chosen, probs, -(probs * logs).sum(-1)


def advantages_and_returns(rewards, values, mask, trace=NUMBERS["gae_lambda"]):
    advantages = np.zeros(mask.shape)
    for i in range(len(mask)):
        following, ahead = 0.0, 0.0
        for t in reversed(range(mask[i].sum())):
            delta = rewards[i, t] + NUMBERS["gamma"] * following - values[i, t]
            ahead = delta + NUMBERS["gamma"] * trace * ahead
            advantages[i, t], following = ahead, values[i, t]
    return advantages, advantages + values


def whitened(x, mask, shift=True):
    mean, spread = x[mask].mean(), np.sqrt(x[mask].var() + 1e-8)
    return np.where(mask, (x - mean) / spread + (0.0 if shift else mean), 0.0)


def against_the_others(rewards, group):
    totals = rewards.sum(axis=1).reshape(-1, group)
    others = (totals.sum(axis=1, keepdims=True) - totals) / (group - 1)
    return np.repeat((totals - others).reshape(-1, 1), T, axis=1)


def bins_of(ends, count):
    """(edges [N + 1], centres [N]) of bins of equal width."""
    edges = ends[0] + (ends[1] - ends[0]) * np.arange(count + 1) / count
    return edges, (edges[1:] + edges[:-1]) / 2


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def bins_hit(returns, edges):
    """The share of a normal distribution around each return in each bin, 0.75 of one wide."""
    sigma = 0.75 * (edges[1] - edges[0])
    middle = np.clip(returns, edges[0], edges[-1])[..., None]
    below = np.vectorize(math.erf)((edges - middle) / sigma / math.sqrt(2))
    return np.diff(below) / (below[..., -1:] - below[..., :1])


def of_critic(table, before, own):
    """The values of a table of values [V], or of logits of bins [V, N]."""
    if "value_range" not in own:
        return table[..., before]  # of several critics [K, B, T]
    return softmax(table[before]) @ bins_of(own["value_range"], table.shape[1])[1]


def gradients(tables, batch, clip_high, options, value_weight, own):
    before, tokens, mask, old, advantages, old_values, returns, *of_several = batch
    critics, disputed = of_several or (None, np.zeros(mask.shape, bool))
    count = mask.sum()
    shares = mask / count  # of a token in the loss of the policy
    if options.aggregation == "sequence_mean":
        shares = mask / mask.sum(axis=1, keepdims=True) / len(mask)
    logprobs, probs, entropies = of_policy(tables["policy"], before, tokens)
    ratio = np.exp(logprobs - old)
    low, high = 1 - NUMBERS["clip_range"], 1 + clip_high
    is_clipped = -advantages * np.clip(ratio, low, high) > -advantages * ratio
    of_logprob = np.where(mask & ~is_clipped, -advantages * ratio, 0.0) * shares
    hit = np.eye(V)[tokens] - probs
    of_z = of_logprob[..., None] * hit
    of_entropy = -probs * (np.log(probs) + entropies[..., None])
    of_z -= NUMBERS["entropy_coef"] * of_entropy * np.where(disputed, 0.0, shares)[..., None]
    found = {"policy": np.zeros((V, V))}
    np.add.at(found["policy"], before, of_z / NUMBERS["temperature"])
    if "value_range" in own:
        table = tables["value"]
        edges, _ = bins_of(own["value_range"], table.shape[1])
        away = softmax(table[before]) - bins_hit(returns, edges)
        found["value"] = np.zeros_like(table)
        np.add.at(found["value"], before, away * (mask * value_weight / count)[..., None])
    elif "value" in tables:
        reach = NUMBERS["value_clip_range"]
        at = (before,) if critics is None else (critics, before)
        values = tables["value"][at]
        near = np.clip(values, old_values - reach, old_values + reach)
        stays = (near - returns) ** 2 > (values - returns) ** 2
        of_value = np.where(mask & ~stays, values - returns, 0.0) * value_weight / count
        found["value"] = np.zeros_like(tables["value"])
        np.add.at(found["value"], at, of_value)
    return found


def without_agreed(advantages, spread, mask, fraction):
    """0 for the share of the tokens with the least spread; equal ones are all left."""
    least_left = np.sort(spread[mask])[round(fraction * mask.sum())]
    return np.where(spread < least_left, 0.0, advantages)


def most_apart(spread, mask, fraction):
    """The share of the tokens with the largest spread, less those that equal one that is left."""
    largest_left = np.sort(spread[mask])[::-1][round(fraction * mask.sum())]
    return mask & (spread > largest_left)


def adam(tables, names, steps, gradient, adam, rates):
    """`tables`, those of `names` after the steps of Adam on minibatches of these rows."""
    mean, square = ({k: np.zeros_like(tables[k]) for k in names} for _ in range(2))
    for step, rows in enumerate(steps, 1):
        found = {name: g for name, g in gradient(tables, rows).items() if name in names}
        norm = np.sqrt(sum((x**2).sum() for x in found.values()))
        for name, g in found.items():
            g = g * min(1.0, adam["max_grad_norm"] / norm)
            mean[name] = adam["b1"] * mean[name] + (1 - adam["b1"]) * g
            square[name] = adam["b2"] * square[name] + (1 - adam["b2"]) * g**2
            direction = mean[name] / (1 - adam["b1"] ** step)
            direction /= np.sqrt(square[name] / (1 - adam["b2"] ** step)) + adam["eps"]
            change = direction + adam["weight_decay"] * tables[name]
            tables = tables | {name: tables[name] - rates[name] * change}
    return tables


def by_hand(tables, case, options, own):
    """(tables after an iteration, the KL coefficient after it); `own`: numbers of the case."""
    mask, before, tokens = case["mask"], case["tokens"][:, P - 1 : -1], case["tokens"][:, P:]
    reference, old = tables["reference"], case["logprobs"]
    tables = {name: x.copy() for name, x in tables.items() if name != "reference"}
    weights = 1.0
    if options.old_logprobs == "recompute":
        old = of_policy(tables["policy"], before, tokens)[0]
        weights = np.clip(np.exp(old - case["logprobs"]), 0.9, 1.1)
    scores, number = case["scores"], NUMBERS["missing_eos_score"]
    ends = {"keep": scores, "replace": np.full(B, number), "penalty": scores - number}
    scores = np.where(case["has_eos"], scores, ends[options.missing_eos])
    kl = np.where(mask, old - of_policy(reference, before, tokens)[0], 0.0)
    rewards = -NUMBERS["kl_coef"] * kl
    rewards[np.arange(B), mask.sum(axis=1) - 1] += scores
    if options.whiten_rewards:
        rewards = whitened(rewards, mask, shift=False)
    values = returns = np.zeros((B, T))
    if options.advantage is gae:
        every = np.where(mask, of_critic(tables["value"], before, own), 0.0)
        values, critics = every, None
        if options.num_critics > 1:  # two responses to a prompt
            values = every.mean(axis=0)
            critics = np.broadcast_to((np.arange(B) // 2 % 3)[:, None], mask.shape)
        advantages, returns = advantages_and_returns(rewards, values, mask)
        if "value_gae_lambda" in own:
            _, returns = advantages_and_returns(rewards, values, mask, own["value_gae_lambda"])
        if alpha := own.get("gae_lambda_alpha"):
            each = [
                advantages_and_returns(r, v, m, max(0.0, 1 - 1 / (alpha * m.sum())))
                for r, v, m in zip(rewards[:, None], values[:, None], mask[:, None], strict=True)
            ]
            advantages = np.concatenate([x for x, _ in each])
        advantages = whitened(advantages, mask) if options.whiten_advantages else advantages
        if options.num_critics > 1:
            spread = every.std(axis=0)
            advantages = without_agreed(advantages, spread, mask, own["agreed_fraction"])
            disputed = most_apart(spread, mask, own.get("disputed_fraction", 0.0))
            values = np.take_along_axis(every, critics[None], axis=0)[0]  # each token's own
    else:
        del tables["value"]
        advantages = against_the_others(rewards, 2)
    data = (before, tokens, mask, old, advantages * weights, values, returns)
    data += (critics, disputed) if options.num_critics > 1 else ()
    clip_high = 0.3 if options.num_epochs > 1 else NUMBERS["clip_range"]
    apart = "value_optimizer" in own
    weight = 1.0 if apart else NUMBERS["vf_coef"]

    def gradient(tables, rows):
        return gradients(tables, [x[rows] for x in data], clip_high, options, weight, own)

    rates = {"policy": ADAM["learning_rate"], "value": NUMBERS["value_learning_rate"]}
    if own.get("critic_warmup"):
        rates["policy"] = 0.0
    epochs, minibatches = options.num_epochs, options.num_minibatches
    num_passes = epochs * (1 + options.value_updates) if apart else epochs
    orders = np.array([jax.random.permutation(k, B) for k in jax.random.split(KEY, num_passes)])
    steps = orders[:epochs].reshape(epochs * minibatches, -1)
    if apart:
        tables = adam(tables, ["policy"], steps, gradient, ADAM, rates)
        steps = orders[epochs:].reshape(-1, B // (options.value_num_minibatches or minibatches))
        rates = {"value": VALUE_ADAM["learning_rate"]}
        tables = adam(tables, ["value"], steps, gradient, VALUE_ADAM, rates)
    else:
        tables = adam(tables, list(tables), steps, gradient, ADAM, rates)
    error = np.clip(kl.sum(axis=1).mean() / NUMBERS["target_kl"] - 1, -0.2, 0.2)
    factor = 1 + error * B / NUMBERS["kl_horizon"] if options.kl_control == "adaptive" else 1.0
    return tables, NUMBERS["kl_coef"] * factor


# --- both -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_epochs": 3, "num_minibatches": 4},
        {"num_epochs": 3, "num_minibatches": 2, "num_micro_batches": 2},
        {"missing_eos": "replace", "kl_control": "adaptive"},
        {"missing_eos": "penalty", "num_epochs": 2},
        {"old_logprobs": "recompute", "num_epochs": 2},
        {"advantage": rloo_advantages, "num_epochs": 4},
        {"whiten_advantages": False, "num_epochs": 2},
        {"whiten_rewards": True, "num_epochs": 2},
        {"whiten_rewards": True, "advantage": rloo_advantages},
        {"aggregation": "sequence_mean", "num_epochs": 2, "num_minibatches": 2},
        {"value_gae_lambda": 1.0, "num_epochs": 2},
        {"gae_lambda_alpha": 0.6, "value_gae_lambda": 0.8, "whiten_advantages": False},
        {"critic_warmup": 1, "num_epochs": 2},
        {"value_optimizer": VALUE_ADAM, "num_epochs": 2, "num_minibatches": 2},
        {"value_optimizer": VALUE_ADAM, "value_updates": 2, "value_num_minibatches": 4},
        {"value_range": (-1.5, 2.0), "num_epochs": 2, "num_minibatches": 2, "num_micro_batches": 2},
        {"value_range": (-1.5, 2.0), "value_optimizer": VALUE_ADAM, "value_updates": 2},
        {"num_critics": 3, "agreed_fraction": 0.3, "num_epochs": 2, "num_minibatches": 2},
        OF_CRITICS | {"num_epochs": 2, "num_minibatches": 2, "num_micro_batches": 2},
        OF_CRITICS | {"num_epochs": 2, "aggregation": "sequence_mean"},
    ],
    ids=lambda changes: " ".join(changes) or "default",
)
def test_an_iteration_is_that_of_float64_by_hand(changes):
    sampling = Sampling(response_length=T, eos_ids=(), samples_per_prompt=2)
    names = {field.name for field in dataclasses.fields(Hyperparameters)}
    own = {name: value for name, value in changes.items() if name in names}
    chosen = {name: value for name, value in changes.items() if name not in names}
    options = PPOOptions(sampling=sampling, **{"num_epochs": 1, "num_minibatches": 1} | chosen)
    tables, case = made_up(seed=len(str(sorted(changes))))
    if "value_range" in own:  # of 6 bins; some returns are outside
        tables["value"] = np.random.default_rng(1).normal(size=(V, 6))
    if options.num_critics > 1:
        tables["value"] = np.random.default_rng(1).normal(size=(options.num_critics, V))
    expected, kl_coef = by_hand(tables, case, options, own)
    if "value_range" in own:
        own["value_range"] = jnp.array(own["value_range"])
    if "value_optimizer" in own:
        own["value_optimizer"] = Optimizer(**own["value_optimizer"])

    single = {name: {"table": jnp.asarray(x, jnp.float32)} for name, x in tables.items()}
    value = single["value"] if options.advantage is gae else None
    network = Network(None, look_up)
    numbers = Hyperparameters(
        optimizer=Optimizer(**ADAM),
        **NUMBERS,
        clip_range_high=0.3 if options.num_epochs > 1 else None,
        tis_clip_low=0.9,
        tis_clip_high=1.1,
        **own,
    )
    rollout = Rollout(
        prompt_tokens=jnp.asarray(case["tokens"][:, :P], jnp.int32),
        prompt_mask=jnp.ones((B, P), bool),
        response_tokens=jnp.asarray(case["tokens"][:, P:], jnp.int32),
        response_mask=jnp.asarray(case["mask"]),
        logprobs=jnp.asarray(case["logprobs"], jnp.float32),
        has_eos=jnp.asarray(case["has_eos"]),
    )
    state, _ = update_from_rollout(
        init_ppo(single["policy"], value, numbers),
        numbers,
        rollout,
        jnp.asarray(case["scores"], jnp.float32),
        KEY,
        frozen=FrozenParams(ref_policy=single["reference"]),
        networks=PPONetworks(policy=network, value=None if value is None else network),
        options=options,
    )
    np.testing.assert_allclose(state.policy_params["table"], expected["policy"], atol=2e-6)
    if value is not None:
        np.testing.assert_allclose(state.value_params["table"], expected["value"], atol=2e-6)
    np.testing.assert_allclose(state.kl_coef, kl_coef, rtol=1e-6)
    moved = np.abs(expected["policy"] - tables["policy"]).max()
    assert (moved == 0.0) if "critic_warmup" in own else (moved > 0.02)
