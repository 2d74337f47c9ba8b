"""Which minibatches hold whole groups of responses, and that their order changes no choice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.algorithms.minibatches import accumulate_groups, grouped_samples, whole_batch
from ppo_jax.core.network import Network
from tests.support import tiny

OURS = Network(None, None, supports_shared_prompts=lambda count, samples: count % 2 == 0)
PLAIN = Network(None, None)
WHOLE = dict(num_minibatches=1)
CASES = {  # of 24 responses, four to a prompt unless it says otherwise: how many share a prompt
    "one minibatch": (WHOLE, [OURS, OURS], 4),
    "in three parts of two groups": (WHOLE | dict(num_micro_batches=3), [OURS], 4),
    "the best of each four": (WHOLE | dict(keep_samples=2), [OURS], 2),
    "two minibatches": (dict(num_minibatches=2), [OURS], 1),
    "parts of half a group": (WHOLE | dict(num_micro_batches=12), [OURS], 1),
    "parts of a group, which the network refuses": (WHOLE | dict(num_micro_batches=6), [OURS], 1),
    "packed": (WHOLE | dict(packing=True, num_micro_batches=2), [OURS], 1),
    "a network of a user's own": (WHOLE, [OURS, PLAIN], 1),
}


@pytest.mark.parametrize("case", CASES)
def test_prompts_are_shared_where_no_group_is_parted(case):
    changes, networks, expected = CASES[case]
    options = tiny.options(sampling=tiny.sampling(samples_per_prompt=4), **changes)
    count = 24 // 4 * options.learned_samples
    assert grouped_samples(networks, options, count, options.num_minibatches) == expected


def test_one_response_to_a_prompt_shares_nothing():
    assert grouped_samples([OURS], tiny.options(num_minibatches=1), 24, 1) == 1


@pytest.mark.parametrize("parts", [1, 3])
def test_a_micro_batch_has_whole_groups_and_the_sums_are_those_of_all(parts):
    groups = jnp.repeat(jnp.arange(6), 2)
    seen = []

    def loss(w, rows):
        assert rows["x"].shape == (12 // parts,)
        jax.debug.callback(lambda x: seen.append(x.tolist()), rows["group"])
        return (w * rows["x"]).sum(), {"total": rows["x"].sum()}

    batch = dict(x=jnp.arange(12.0), group=groups)
    gradient, metrics = accumulate_groups(loss, jnp.float32(1.0), batch, parts, samples=2)
    jax.effects_barrier()
    assert gradient == metrics["total"] == 66
    assert all(x[::2] == x[1::2] for x in seen)
    assert sorted(sum(map(tuple, seen), ())) == groups.tolist()


def test_tokens_are_chosen_as_in_the_shuffled_minibatch():
    batch = dict(x=jnp.arange(6.0), chosen=jnp.zeros(6))
    rows, key = jnp.array([3, 0, 5, 1, 4, 2]), jax.random.key(0)

    def choose(batch, key):
        return batch | dict(chosen=jax.random.normal(key, batch["x"].shape) * batch["x"])

    got = whole_batch(batch, rows, key, choose)
    np.testing.assert_array_equal(got["x"], batch["x"])
    shuffled = choose(jax.tree.map(lambda x: x[rows], batch), key)
    np.testing.assert_array_equal(got["chosen"][rows], shuffled["chosen"])
    assert whole_batch(batch, rows, None, None) is batch
