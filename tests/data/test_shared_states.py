"""What is kept of a text is found by its tokens, also from a file, in the dtype that it has."""

import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.data.packing import pack
from ppo_jax.data.shared_states import SharedStates
from tests.data.test_hidden_states import texts_of


def kept(texts, folder, dtype):
    """States that say which position of which row they are of."""
    states = SharedStates(folder, "name", 1)
    for row, count in enumerate(texts.mask.sum(axis=1).tolist()):
        values = 100 * row + np.arange(count)
        states.keep(texts, row, np.repeat(values[:, None], 4, axis=1).astype(dtype))
    return states


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_file_holds_what_was_kept_bit_for_bit(tmp_path, dtype):
    texts = texts_of([3, 9, 1])
    kept(texts, tmp_path / "states", dtype).save()
    found = SharedStates(tmp_path / "states", "name", 1).load().of(texts, np.arange(3))
    assert sorted(found) == [0, 1, 2]
    for row, states in kept(texts, tmp_path, dtype).of(texts, np.arange(3)).items():
        assert found[row].dtype == dtype
        np.testing.assert_array_equal(found[row], states)
    assert SharedStates(tmp_path / "states", "another", 1).load() is None


def test_texts_of_a_packed_row_are_found_alone_and_the_other_way_round(tmp_path):
    texts = texts_of([3, 9, 20, 5, 30])
    packed = pack(texts, max_length=32)
    states, rows = kept(packed, tmp_path, np.float32), np.arange(5)
    alone = states.of(texts, rows)
    assert {row: len(x) for row, x in alone.items()} == {0: 3, 1: 9, 2: 20, 3: 5, 4: 30}
    several = SharedStates(tmp_path, "name", 1)
    for row in rows.tolist():
        several.keep(texts, row, alone[row])
    for row, found in several.of(packed, np.arange(len(packed.mask))).items():
        np.testing.assert_array_equal(found[:, 0], 100 * row + np.arange(len(found)))


def test_a_row_with_a_text_that_is_unknown_is_not_found(tmp_path):
    texts = texts_of([3, 9, 20])
    states = SharedStates(tmp_path, "name", 1)
    states.keep(texts, 1, np.zeros((9, 4), np.float32))
    assert list(states.of(texts, np.arange(3))) == [1]
    packed = pack(texts, max_length=32)  # all in one row
    assert len(packed.mask) == 1 and not states.of(packed, np.arange(1))


def test_nothing_is_written_where_nothing_is_kept(tmp_path):
    SharedStates(tmp_path / "states", "name", 1).save()
    assert not (tmp_path / "states").exists()
