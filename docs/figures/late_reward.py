"""Draws docs/figures/late_reward.svg: how the critic and the score grow when the reward is late.

python docs/figures/late_reward.py
"""

import json
import pathlib
import sys

import matplotlib
import numpy as np

matplotlib.use("svg")
from matplotlib import pyplot as plt

PAGE = pathlib.Path(__file__).with_suffix(".svg")
EXPERIMENTS = pathlib.Path(__file__).resolve().parents[2] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))

from method_tables import (  # noqa: E402
    EXPLAINED,
    LENGTH,
    SCORE,
    SHARE,
    best_of_each,
    curves_of,
    with_ends,
)
from studies import late_reward  # noqa: E402

RESULTS = EXPERIMENTS / "studies" / "results" / "late_reward.json"
COLORS = ("#3949ab", "#c2185b", "#00897b", "#d0892b", "#6d4c41")


def draw() -> plt.Figure:
    """Explained variance, score and length, each row at its best rate: the median of the
    seeds, as a mean of three iterations. 0 is where the policy begins to move."""
    rows = with_ends(json.loads(RESULTS.read_text())["rows"])
    best = best_of_each(rows, late_reward.ROWS, SHARE)
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context({"svg.hashsalt": "late_reward", "svg.fonttype": "path", **style}):
        figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.6), layout="constrained")
        for (name, setting), color in zip(best.items(), COLORS, strict=False):
            alone = setting.values.get("ppo.critic_warmup", 0)
            for ax, metric in zip(axes, (EXPLAINED, SCORE, LENGTH), strict=True):
                middle = np.median(curves_of(setting, metric), axis=0)
                smooth = np.convolve(middle, np.ones(3) / 3, "valid")
                ax.plot(np.arange(len(smooth)) + 2 - alone, smooth, color=color, label=name)
        axes[0].set(ylabel="explained variance", ylim=(-1, 1))
        axes[1].set(ylabel="score", ylim=(0, 1))
        axes[2].set(ylabel="tokens of a response", ylim=(0, 132))
        for ax in axes:
            ax.axvline(0, color="gray", lw=0.6)
            ax.set_xlabel("iterations of the policy")
        figure.legend(
            *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
        )
        return figure


if __name__ == "__main__":
    draw().savefig(PAGE, metadata={"Date": None})
