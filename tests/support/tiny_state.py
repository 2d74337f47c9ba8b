"""A small state with every kind of node and dtype that a run has, and how it is saved."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ppo_jax.io.checkpoints import Checkpoints


@flax.struct.dataclass
class State:
    policy_params: dict
    opt_state: optax.OptState
    kl_coef: jax.Array
    step: jax.Array


def make_state(seed=0, width=4):
    """Every kind of node and dtype that a run has: optax tuples, empty ones, bf16, int32."""
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {
        "embed": {"tokens": jax.random.normal(keys[0], (500, width))},
        "layers": {"0": {"kernel": jax.random.normal(keys[1], (width, 3), jnp.bfloat16)}},
    }
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    updates, opt_state = tx.update(params, tx.init(params), params)
    params = optax.apply_updates(params, updates)
    return State(params, opt_state, jnp.float32(0.1) + seed, jnp.int32(seed))


def assert_identical(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def saved_steps(directory):
    return sorted(path.name for path in directory.iterdir())


def save_all(directory, steps, keep=2):
    checkpoints = Checkpoints(directory, keep=keep)
    for step in steps:
        checkpoints.save(step, make_state(step), {"seed": step})
    checkpoints.close()


def restore(directory, example=None):
    return Checkpoints(directory).restore(make_state() if example is None else example)


def flip_a_bit(path):
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def largest_file(folder):
    return max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda x: x.stat().st_size
    )
