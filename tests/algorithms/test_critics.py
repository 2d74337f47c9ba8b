"""What an iteration logs of its critic."""

import jax.numpy as jnp
import numpy as np

from ppo_jax.algorithms import make_experience
from ppo_jax.algorithms.critics import critic_metrics
from tests.support import tiny


def by_hand(values, returns, mask):
    """Token by token, in float64."""
    tokens = []
    for v, r, m in zip(values, returns, mask, strict=True):
        kept = np.flatnonzero(m)
        tokens += [(v[t], r[t], 4 * i // len(kept)) for i, t in enumerate(kept)]
    v, r, quarter = np.array(tokens, np.float64).T
    found = {"value/mean": v.mean(), "value/return": r.mean(), "value/bias": v.mean() - r.mean()}

    def explained(v, r):
        return 1 - np.square(r - v).mean() / r.var()

    found["value/explained_variance"] = explained(v, r)
    for i in range(4):
        name = f"value/explained_variance_quarter{i + 1}"
        found[name] = explained(v[quarter == i], r[quarter == i])
    order, ranks = np.argsort(v), np.arange(len(v))
    for i in range(5):
        of_fifth = order[5 * ranks // len(v) == i]
        found[f"value/mean_fifth{i + 1}"] = v[of_fifth].mean()
        found[f"value/return_fifth{i + 1}"] = r[of_fifth].mean()
    return found


def test_the_metrics_of_a_critic_are_those_by_hand():
    draw = np.random.default_rng(0)
    mask = np.arange(12) < draw.integers(5, 13, 16)[:, None]
    values, returns = draw.normal(size=(2, 16, 12))
    padded = [jnp.asarray(np.where(mask, x, np.nan), jnp.float32) for x in (values, returns)]
    got = critic_metrics(*padded, jnp.asarray(mask))
    expected = by_hand(values, returns, mask)
    assert got.keys() == expected.keys()
    tiny.leaves_close(got, {k: np.float32(x) for k, x in expected.items()}, rtol=1e-4, atol=1e-5)


def test_they_are_of_the_values_before_the_update():
    run = tiny.Run("whole")
    rollout = run.rollout()
    experience, metrics = make_experience(
        rollout, run.scores(rollout), run.state, run.numbers, **run.parts
    )
    expected = critic_metrics(experience.values, experience.returns, experience.response_mask)
    tiny.leaves_close({name: metrics[name] for name in expected}, expected, rtol=1e-6)
