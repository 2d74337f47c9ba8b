"""One training step whose numbers are stored: what changes results does not pass unseen."""

import jax
import numpy as np

from tests.support import tiny

GOLDEN = {
    "kl/coef": 0.05000000074505806,
    "kl/ref": 4.49380350112915,
    "policy/approx_kl": 0.006246628239750862,
    "policy/clip_fraction": 0.0972222238779068,
    "policy/entropy": 3.320686101913452,
    "policy/grad_norm": 1.5640161037445068,
    "policy/loss": -0.13838008046150208,
    "policy/ratio_max": 1.7673325538635254,
    "ppo/loss": -0.08736350387334824,
    "response/length": 5.625,
    "reward/kl_penalty": 0.22469019889831543,
    "reward/score_mean": -0.3019058108329773,
    "value/clip_fraction": 0.2777777910232544,
    "value/explained_variance": -0.5234616994857788,
    "value/loss": 0.842234194278717,
    "policy/moved_by": 17.890539169311523,
}

MESSAGE = """
The numbers of the golden step have moved. If this change is not meant to alter results, find out
why they moved. If it is, update GOLDEN in tests/test_golden.py in a commit that says why. Now:

    {got}
"""


def test_the_golden_step():
    setup, numbers = tiny.setup(1, True), tiny.hyperparameters()
    parts = dict(frozen=setup.frozen, networks=setup.networks, options=tiny.options())
    state, metrics = tiny.iterate(
        setup.start(numbers), numbers, tiny.prompts(), jax.random.key(0), **parts
    )
    moved = jax.tree.map(lambda x, y: x - y, state.policy_params, setup.policy_params)
    metrics["policy/moved_by"] = sum(np.abs(x).sum() for x in jax.tree.leaves(moved))
    got = {name: float(metrics[name]) for name in GOLDEN}
    message = MESSAGE.format(got="\n    ".join(f'"{k}": {v!r},' for k, v in got.items()))
    for name, expected in GOLDEN.items():
        np.testing.assert_allclose(got[name], expected, rtol=1e-4, err_msg=name + message)
