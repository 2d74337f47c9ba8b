"""Draws docs/figures/clip.svg: the clipped objective of PPO and its gradient.

python docs/figures/clip.py
"""

import pathlib

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

from ppo_jax import clipped_policy_loss

PAGE = pathlib.Path(__file__).with_suffix(".svg")
CLIP_RANGE = 0.2


def objective(ratio: jax.Array, advantage: float) -> jax.Array:
    """The objective of one token, which is minus its loss. [] float."""
    one = jnp.ones((1, 1))
    loss, _ = clipped_policy_loss(
        jnp.log(ratio) * one, 0 * one, advantage * one, one > 0, clip_range=CLIP_RANGE
    )
    return -loss


def curves(advantage: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(ratios, objectives, gradients by the ratio), each [N]."""
    ratios = jnp.linspace(0.4, 1.6, 600)
    values, gradients = jax.vmap(jax.value_and_grad(objective), (0, None))(ratios, advantage)
    return ratios, values, gradients


def draw() -> plt.Figure:
    """Two columns, for either sign of the advantage; the objective above its gradient."""
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context({"svg.hashsalt": "clip", "svg.fonttype": "path", **style}):
        size = dict(figsize=(7.2, 3.6), sharex=True, layout="constrained", height_ratios=[2, 1])
        figure, axes = plt.subplots(2, 2, **size)
        for column, (advantage, color) in enumerate([(1.0, "#3949ab"), (-1.0, "#c2185b")]):
            ratios, values, gradients = curves(advantage)
            above, below = axes[:, column]
            above.plot(ratios, advantage * ratios, ":", color="gray", label="eq. 6, not clipped")
            above.plot(ratios, values, color=color, label="eq. 7, clipped")
            above.plot([1.0], [advantage], "o", color=color)
            above.set_title("advantage 1" if advantage > 0 else "advantage \N{MINUS SIGN}1")
            above.legend(frameon=False)
            below.plot(ratios, gradients, color=color)
            below.set_xlabel("probability ratio $r$")
            for ax in (above, below):
                ax.axvspan(1 - CLIP_RANGE, 1 + CLIP_RANGE, color="gray", alpha=0.12, lw=0)
        axes[0, 0].set_ylabel("objective")
        axes[1, 0].set_ylabel("gradient")
        return figure


if __name__ == "__main__":
    draw().savefig(PAGE, metadata={"Date": None})
