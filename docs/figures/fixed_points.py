"""Draws docs/figures/fixed_points.svg: where a policy over four arms ends under a KL penalty.

python docs/figures/fixed_points.py
"""

import pathlib

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

from ppo_jax import clipped_policy_loss, kl_estimate, kl_loss, token_rewards

PAGE = pathlib.Path(__file__).with_suffix(".svg")
SCORES = jnp.array([1.0, 0.5, 0.0, -0.5])
REF = jax.nn.log_softmax(jnp.array([0.0, 1.0, 0.5, -0.5]))[:, None]
ARMS = jnp.ones((4, 1), bool)
BETAS = jnp.linspace(0.2, 3.0, 29)


def tilted(beta: jax.Array) -> jax.Array:
    """[4] the probabilities that maximise E[score] - beta KL: reference exp(score / beta) / Z."""
    return jax.nn.softmax(REF[:, 0] + SCORES / beta)


def penalised_rewards(logprobs: jax.Array, beta: jax.Array):
    """(advantages, 0): k1 in the rewards."""
    constant = jax.lax.stop_gradient(logprobs)
    return token_rewards(SCORES, constant, REF, ARMS, kl_coef=beta), 0.0


def standard_scores(logprobs: jax.Array, beta: jax.Array):
    """(advantages, loss): scores over their std, the KL in the loss, as in GRPO."""
    probs = jax.lax.stop_gradient(jnp.exp(logprobs))[:, 0]
    centred = SCORES - probs @ SCORES
    advantages = (centred / jnp.sqrt(probs @ jnp.square(centred) + 1e-6))[:, None]
    how = dict(weights=probs[:, None], normalizer=1)
    return advantages, beta * kl_loss(logprobs, REF, ARMS, estimator="k3", **how)[0]


def unweighted_k3(logprobs: jax.Array, beta: jax.Array):
    """(advantages, loss): k3 in the loss without the weight of importance."""
    probs = jax.lax.stop_gradient(jnp.exp(logprobs))
    return SCORES[:, None], beta * jnp.sum(probs * kl_estimate(logprobs, REF, estimator="k3"))


METHODS = {
    "k1 in the rewards": penalised_rewards,
    "scores over their std, KL in the loss": standard_scores,
    "k3 in the loss, unweighted": unweighted_k3,
}


def ends_at(method, beta: jax.Array, steps: int = 4000) -> jax.Array:
    """[4] probabilities after steps of plain gradient descent on exact expectations."""

    def loss(logits):
        logprobs = jax.nn.log_softmax(logits)[:, None]
        probs = jax.lax.stop_gradient(jnp.exp(logprobs))
        advantages, penalty = method(logprobs, beta)
        advantages = advantages - jnp.sum(probs * advantages)
        how = dict(clip_range=0.2, weights=probs, normalizer=1)
        return clipped_policy_loss(logprobs, logprobs, advantages, ARMS, **how)[0] + penalty

    def step(_, logits):
        return logits - 0.5 * jax.grad(loss)(logits)

    return jax.nn.softmax(jax.lax.fori_loop(0, steps, step, REF[:, 0]))


def curves(betas: jax.Array = BETAS) -> dict[str, jax.Array]:
    """{method: [N, 4] probabilities at the end, a row for each beta}."""
    return {
        name: jax.jit(jax.vmap(lambda beta, method=method: ends_at(method, beta)))(betas)
        for name, method in METHODS.items()
    }


def draw() -> plt.Figure:
    """The probability of the best arm against the coefficient of the KL."""
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context({"svg.hashsalt": "fixed_points", "svg.fonttype": "path", **style}):
        figure, ax = plt.subplots(figsize=(6.0, 3.2), layout="constrained")
        best = jax.vmap(tilted)(BETAS)[:, 0]
        ax.plot(BETAS, best, color="gray", label=r"$\pi_{ref}\, e^{r / \beta} / Z$")
        ax.set_prop_cycle(color=["#3949ab", "#c2185b", "#00897b"])
        for name, ends in curves().items():
            ax.plot(BETAS, ends[:, 0], ".", label=name)
        ax.set(xlabel=r"coefficient of the KL, $\beta$", ylabel="probability of the best arm")
        ax.legend(frameon=False)
        return figure


if __name__ == "__main__":
    draw().savefig(PAGE, metadata={"Date": None})
