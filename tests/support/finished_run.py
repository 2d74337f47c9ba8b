"""A run that nobody interrupts, made once for all who ask, and what its files hold."""

import json

import jax
import numpy as np

from ppo_jax.pipeline import run as pipeline
from tests.support import tiny_run

# What the checkpoints of a stage hold.
TRAINED = {
    "sft": ("params", "opt_state", "step"),
    "reward": ("params", "opt_state", "step"),
    "ppo": ("policy_params", "value_params", "opt_state", "kl_coef", "episodes", "step"),
}


def finished_run(tmp_path_factory):
    """The folder of `tiny_run.config()`; nothing may be changed in it."""
    folder = tmp_path_factory.getbasetemp() / "finished_run"
    if not (folder / "results.json").exists():
        pipeline.run(tiny_run.config(), folder)
    return folder


def read_lines(path):
    """The lines of a file without what the clock says."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
