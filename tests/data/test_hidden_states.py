"""Hidden states of texts that share rows are those of each text alone."""

import jax
import numpy as np
import pytest

from ppo_jax.data.encode import TokenizedTexts, pad_right
from ppo_jax.data.hidden_states import TRUNK_BATCH, TRUNK_ROW, make_inputs, trunk_batches
from ppo_jax.data.packing import pack
from ppo_jax.distributed.layout import one_device
from ppo_jax.models.build import policy_network, trunk_network
from ppo_jax.models.partition import split_params
from tests.support import tiny

CONFIG = tiny.model_config(max_length=256)
TRUNK = trunk_network(CONFIG, end_layer=1)
PARAMS = split_params(CONFIG, tiny.random_params(policy_network(CONFIG)), 1, 1).trunk


def texts_of(lengths):
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, CONFIG.vocab_size, size=n).tolist() for n in lengths]
    tokens, mask = pad_right(rows, 256)
    return TokenizedTexts(tokens, mask, mask.copy(), np.arange(len(rows)))


def read(texts, cache_gb=1.0, used=None):
    return make_inputs(texts, TRUNK, PARAMS, cache_gb=cache_gb, layout=one_device(), used=used)


LENGTHS = {
    "short ones alone": [1, 7, 20, 33, 5, 64, 12],
    "none that is short": [65, 90, 128],
    "some of both": [3, 130, 64, 65, 17, 100, 1, 40],
    "more than a batch": [1 + n % 64 for n in range(2 * TRUNK_BATCH + 5)],
    "one": [9],
}


@pytest.mark.parametrize("lengths", LENGTHS)
def test_states_are_those_of_each_text_alone(lengths):
    texts = texts_of(LENGTHS[lengths])
    width = texts.mask.shape[1]
    rows = np.arange(len(texts.mask))[::-1]
    got = read(texts)(rows, width)
    run = jax.jit(TRUNK.apply)
    expected = np.asarray(run(PARAMS, texts.tokens[rows], texts.mask[rows]))
    real = texts.mask[rows]
    np.testing.assert_allclose(got[real], expected[real], atol=1e-5)
    assert not got[~real].any()
    computed = np.asarray(read(texts, cache_gb=0.0)(rows, width))  # where they do not fit
    np.testing.assert_allclose(computed[real], expected[real], atol=1e-5)


def test_each_used_text_is_computed_once_and_no_other():
    texts, used = texts_of([3, 130, 64, 65, 17, 100, 1, 40]), np.array([7, 1, 0, 3, 6])
    batches = list(trunk_batches(texts, used, TRUNK_ROW))
    assert sorted(np.concatenate([numbers for _, _, numbers, _ in batches])) == sorted(used)
    with pytest.raises(KeyError):
        read(texts, used=used)(np.array([2]), 64)


def test_short_texts_share_rows_of_one_width_that_is_a_multiple():
    texts = texts_of([22] * 100)
    batches = list(trunk_batches(texts, np.arange(100), TRUNK_ROW))
    assert {width for *_, width in batches} == {48}
    assert sum(len(rows) for _, rows, *_ in batches) == 50


def test_rows_that_are_packed_already_stay_as_they_are():
    texts = pack(texts_of([5, 9, 20, 31, 2]), max_length=32)
    rows = np.arange(len(texts.mask))
    got = read(texts)(rows, texts.mask.shape[1])
    run = jax.jit(TRUNK.apply)
    expected = run(PARAMS, texts.tokens, texts.mask, segment_ids=texts.segment_ids)
    np.testing.assert_allclose(got[texts.mask], np.asarray(expected)[texts.mask], atol=1e-5)
