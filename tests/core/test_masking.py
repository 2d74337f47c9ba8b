import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.core.masking import last_token_index, masked_mean, response_mask


def test_masked_mean_is_the_mean_of_what_the_mask_keeps():
    rng = np.random.default_rng(0)
    x, mask = rng.normal(size=(5, 7)), rng.random((5, 7)) < 0.5
    got = masked_mean(jnp.asarray(x, jnp.float32), jnp.asarray(mask))
    np.testing.assert_allclose(got, x[mask].mean(), rtol=1e-6)


def test_the_mean_of_nothing_is_zero_and_so_is_its_gradient():
    mask = jnp.zeros((2, 3), bool)
    for normalizer in (None, 0, jnp.int32(0)):
        mean, grad = jax.value_and_grad(masked_mean)(
            jnp.full((2, 3), jnp.nan), mask, normalizer=normalizer
        )
        assert mean == 0.0 and (grad == 0.0).all()


def test_micro_batches_of_unequal_counts_add_up_to_the_mean_of_the_batch():
    x = jnp.arange(6.0).reshape(2, 3)
    mask = jnp.array([[True, False, False], [True, True, True]])
    count = mask.sum()
    parts = [masked_mean(x[i], mask[i], normalizer=count) for i in range(2)]
    assert sum(parts) == masked_mean(x, mask) == 3.0  # (0 + 3 + 4 + 5) / 4


def test_sums_are_float32_also_for_bfloat16():
    # bfloat16 counts 1 + 1 + ... no further than 256.
    x = jnp.ones(1000, jnp.bfloat16)
    mean = masked_mean(x, jnp.ones(1000, bool), normalizer=1)
    assert mean.dtype == jnp.float32 and mean == 1000.0


def test_a_normalizer_per_row_is_refused():
    with pytest.raises(AssertionError):
        masked_mean(jnp.ones((2, 3)), jnp.ones((2, 3), bool), normalizer=jnp.ones(2))


def test_response_mask_equals_the_loop():
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 6, size=(40, 8))
    expected = np.ones(tokens.shape, bool)
    for row, row_mask in zip(tokens, expected, strict=True):
        for t, token in enumerate(row):
            if token in (2, 5):
                row_mask[t + 1 :] = False
                break
    for eos_ids in ([2, 5], (5, 2), jnp.array([2, 5]), np.array([5, 2], np.int64)):
        np.testing.assert_array_equal(response_mask(jnp.asarray(tokens), eos_ids), expected)


def test_the_stop_token_is_inside_the_mask_even_at_the_first_position():
    mask = response_mask(jnp.array([[2, 2, 1]]), [2])
    assert mask.tolist() == [[True, False, False]]


def test_without_stop_ids_nothing_is_masked():
    assert response_mask(jnp.array([[2, 0, 1]]), []).all()


def test_a_stop_id_that_is_no_integer_is_refused():
    with pytest.raises(AssertionError):
        response_mask(jnp.array([[2, 0, 1]]), [2.0])


def test_last_token_index_equals_the_loop_and_is_zero_for_empty_rows():
    rng = np.random.default_rng(2)
    mask = rng.random((50, 5)) < 0.3
    expected = [max((t for t in range(5) if row[t]), default=0) for row in mask]
    got = last_token_index(jnp.asarray(mask))
    assert got.dtype == jnp.int32 and got.tolist() == expected
    assert not mask.any(axis=1).all()  # the case of an empty row occurs
