"""Every loss and every estimator of the settings: on a mesh, in micro-batches and packed, the
numbers of one device."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.algorithms.advantages import estimate_advantages
from ppo_jax.algorithms.minibatches import accumulate_packed
from ppo_jax.algorithms.supervised import accumulate
from ppo_jax.algorithms.token_choice import make_choice
from ppo_jax.algorithms.update import experience_loss
from ppo_jax.config.objectives import (
    ADVANTAGES,
    LOSSES,
    keeps_baseline,
    needs_critic,
    needs_greedy,
)
from ppo_jax.core.critics import disputed_states
from ppo_jax.distributed.layout import fetch
from tests.distributed.test_meshes import BATCH, Run, ragged_experience
from tests.support import tiny, two_processes

ONE, MESH = (1, 1, 1), (2, 2, 2)
CHOICE = dict(covariance_fraction=0.2, covariance_low=-1.0, covariance_high=1.0)
GROUP = 16  # responses to a prompt: more than a shard of the batch holds


def moved_experience():
    """Responses of several lengths to a policy that has moved since: ratios around 1."""
    e, draw = ragged_experience(), np.random.default_rng(0)

    def noise(scale):
        return (scale * draw.normal(size=e.logprobs.shape) * e.response_mask).astype(np.float32)

    moved = e.replace(logprobs=e.logprobs + noise(0.2), advantages=noise(1.0))
    disputed = e.response_mask & (draw.uniform(size=e.logprobs.shape) < 0.4)
    behavior = moved.logprobs + noise(0.1)
    return moved.replace(behavior_logprobs=behavior, disputed_mask=disputed)


@functools.cache
def gradients(shape, packing):
    return gradients_of(moved_experience(), shape, packing)


def gradients_of(e, shape, packing):
    """{loss: the gradient of an experience}; in four micro-batches where it is packed."""
    run = Run(shape, dual_clip=1.1, divergence_limit=0.01, entropy_coef=0.1, **CHOICE)
    params = {"policy": run.state.policy_params, "value": run.state.value_params}
    e = run.layout.shard_batch(e)

    def gradient(params, e, loss):
        counts = dict(
            normalizer=e.response_mask.sum().astype(jnp.float32), num_sequences=jnp.float32(BATCH)
        )
        options = tiny.options(loss=loss, old_logprobs="recompute")
        parts = dict(frozen=run.frozen, networks=run.networks, options=options)
        if choose := make_choice(loss, run.numbers):
            e = choose(e, jax.random.key(2))

        def of_rows(params, rows):
            gradient = jax.grad(experience_loss, has_aux=True)
            return gradient(params, rows, run.numbers, **parts, **counts)

        sums, count = (accumulate_packed, 4) if packing else (accumulate, 1)
        return sums(of_rows, params, e, count)[0]

    def every(params, e):
        return {name: gradient(params, e, loss) for name, loss in LOSSES.items()}

    return fetch(jax.jit(every)(params, e))


def assert_equal_gradients(got, expected):
    largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(expected["policy"]))
    assert largest > 0
    tiny.leaves_close(got["policy"], expected["policy"], rtol=1e-4, atol=1e-5 * largest)
    tiny.leaves_close(got["value"], expected["value"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [ONE, MESH], ids=str)
def test_the_gradient_of_packed_rows_on_a_mesh_is_that_of_one_device(shape, name):
    expected, got = gradients(ONE, False)[name], gradients(shape, True)[name]
    assert_equal_gradients(got, expected)
    others = {other: gradients(ONE, False)[other]["policy"] for other in LOSSES if other != name}
    assert all(tiny.leaves_differ(expected["policy"], x) for x in others.values())


def given(name):
    """What an estimator reads besides the rewards."""
    baseline = {"baseline": jnp.float32(0.5)} if keeps_baseline(name) else {}
    greedy = {"greedy_scores": jnp.repeat(jnp.arange(2.0), GROUP)} if needs_greedy(name) else {}
    return baseline | greedy


def advantages(shape):
    """{estimator: advantages and returns}."""
    layout, draw = Run(shape).layout, np.random.default_rng(1)
    mask = np.arange(8) < draw.integers(1, 9, BATCH)[:, None]
    rewards, values = (draw.normal(size=mask.shape).astype(np.float32) for _ in range(2))
    numbers = tiny.hyperparameters(gamma=0.9)

    def every(rewards, values, mask):
        disputed = disputed_states(values, mask, fraction=0.3)
        return {"disputed": disputed.astype(jnp.float32)} | {
            name: estimate_advantages(
                rewards,
                values if needs_critic(name) else None,
                mask,
                numbers,
                tiny.options(advantage=function, sampling=tiny.sampling(samples_per_prompt=GROUP)),
                **given(name),
            )
            for name, function in ADVANTAGES.items()
        }

    args = layout.shard_batch((rewards * mask, values * mask, mask))
    return fetch(jax.jit(every)(*args))


def test_the_advantages_of_a_sharded_batch_are_those_of_one_device():
    tiny.leaves_close(advantages(MESH), advantages(ONE), rtol=1e-5, atol=1e-5)


def of_two_processes(folder):
    """What each of two processes does."""
    e = pickle.loads((folder / "experience").read_bytes())
    found = gradients_of(e, MESH, True), advantages(MESH)
    if jax.process_index() == 0:
        (folder / "found").write_bytes(pickle.dumps(found))


@pytest.mark.slow
def test_two_processes_have_the_gradients_and_advantages_of_one(tmp_path):
    (tmp_path / "experience").write_bytes(pickle.dumps(moved_experience()))
    started = two_processes.start(f"{__name__}:of_two_processes", tmp_path)
    for code, output in two_processes.finish(started):
        assert code == 0, output
    found, estimated = pickle.loads((tmp_path / "found").read_bytes())
    for name, expected in gradients(ONE, False).items():
        assert_equal_gradients(found[name], expected)
    tiny.leaves_close(estimated, advantages(ONE), rtol=1e-5, atol=1e-5)
