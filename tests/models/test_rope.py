"""Rotary positions: frequencies as transformers has them, the rotation as its formula says."""

import jax.numpy as jnp
import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ppo_jax.models.families.rope import num_rotated, read_rope, write_rope
from ppo_jax.models.rope import (
    SCALINGS,
    DynamicScaling,
    LinearScaling,
    LongRopeScaling,
    RopeScaling,
    YarnScaling,
    plain_frequencies,
    rotary_angles,
    rotate,
)

LENGTH = 32  # before the scaling
KINDS = {
    "linear": {"factor": 2.5},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": LENGTH},
    "yarn, all told": {
        "factor": 8.0,
        "original_max_position_embeddings": LENGTH,
        "beta_fast": 12.0,
        "beta_slow": 2.0,
        "attention_factor": 1.2,
        "truncate": False,
    },
    "yarn by mscale": {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.5},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": LENGTH,
    },
    "longrope": {
        "short_factor": [1.0, 1.5, 2.0, 3.0, 4.0],
        "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0],
        "original_max_position_embeddings": LENGTH,
    },
}


def config_of(kind, settings, head_dim=10, longest=4 * LENGTH):
    rope = {"rope_type": kind, "rope_theta": 700.0, **settings}
    return {"max_position_embeddings": longest, "head_dim": head_dim, "rope_parameters": rope}


@pytest.mark.parametrize("length", [LENGTH, LENGTH + 1, 4 * LENGTH, 5 * LENGTH])
@pytest.mark.parametrize("name", KINDS)
def test_frequencies_are_those_of_transformers(name, length):
    kind, settings = name.split(",")[0].split(" ")[0], KINDS[name]
    raw = config_of(kind, settings)
    theirs = LlamaConfig(hidden_size=40, num_attention_heads=4, **raw)
    expected, factor = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu", seq_len=length)
    rope = read_rope(raw)
    frequencies = rope.scaling.frequencies(rope.theta, 10, length)
    np.testing.assert_allclose(frequencies, expected.numpy(), rtol=1e-5)
    assert rope.scaling.attention_factor == pytest.approx(factor, rel=1e-6)
    assert rope.scaling.kind == kind


@pytest.mark.parametrize("name", KINDS)
def test_writing_and_reading_are_inverse(name):
    raw = config_of(name.split(",")[0].split(" ")[0], KINDS[name])
    rope = read_rope(raw)
    written = write_rope(rope.theta, rope.scaling, 0.5)
    assert read_rope({"max_position_embeddings": 4 * LENGTH, **written}) == rope._replace(
        partial=0.5
    )


@pytest.mark.parametrize("size", [2, 6, 10])
def test_the_first_numbers_of_a_head_turn_by_their_angle(size):
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 10))
    positions = np.array([[0, 1, 2, 3, 4], [0, 0, 0, 1, 7]])
    angles = rotary_angles(jnp.asarray(positions), 50.0, size, None, 5)
    turned = np.asarray(rotate(jnp.asarray(x, jnp.float32), angles))
    half = size // 2
    for pair, frequency in enumerate(plain_frequencies(50.0, size)):
        number = x[..., pair] + 1j * x[..., pair + half]
        expected = number * np.exp(1j * positions * frequency)[:, :, None]
        np.testing.assert_allclose(turned[..., pair], expected.real, atol=1e-5)
        np.testing.assert_allclose(turned[..., pair + half], expected.imag, atol=1e-5)
    np.testing.assert_array_equal(turned[..., size:], x[..., size:].astype(np.float32))


def test_of_two_forms_and_two_lengths_those_of_transformers_count():
    old = {"rope_scaling": {"type": "linear", "factor": 2.0}, "max_position_embeddings": 64}
    new = {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}
    assert read_rope(old | new).scaling == LinearScaling(factor=2.0)
    yarn = config_of("yarn", {"factor": 4.0, "original_max_position_embeddings": 16})
    beside = yarn | {"original_max_position_embeddings": 8}
    assert read_rope(beside).scaling.original_max_length == 8
    nested = yarn | {"rope_parameters": {"full_attention": yarn["rope_parameters"]}}
    nested |= {"original_max_position_embeddings": 8}
    assert read_rope(nested).scaling.original_max_length == 16


def test_scalings_of_rows_of_a_length_are_the_same_in_rows_of_any_width():
    longrope = LongRopeScaling(short_factor=(1.0,), long_factor=(3.0,), original_max_length=16)
    dynamic = DynamicScaling(factor=2.0, original_max_length=16, attention_factor=0.5)
    for scaling in (longrope, dynamic, LinearScaling(factor=2.0)):
        size = 2 if scaling is longrope else 4
        for length in (16, 17, 39):
            of_rows, expected = scaling.for_rows(length), scaling.frequencies(50.0, size, length)
            found = [of_rows.frequencies(50.0, size, width) for width in (1, 40, 99)]
            assert found == [expected] * 3 and of_rows.for_rows(length) == of_rows
            assert of_rows.attention_factor == scaling.attention_factor


def test_a_part_that_rotates_nothing_is_refused():
    assert num_rotated(64, 1.0) == 0 and num_rotated(64, 0.25) == 16
    with pytest.raises(ValueError, match="a part of 0.01 rotates no number of a head of 64"):
        num_rotated(64, 0.01)


def test_cosines_and_sines_have_the_factor_of_the_attention():
    scaling = LinearScaling(factor=2.0, attention_factor=3.0)
    angles = rotary_angles(jnp.asarray([[4]]), 50.0, 4, scaling, 1)
    halved = rotary_angles(jnp.asarray([[2]]), 50.0, 4, None, 1)
    np.testing.assert_allclose(angles, 3 * halved, rtol=1e-6)


def test_numbers_that_are_no_scaling_are_refused():
    bands = dict(factor=8.0, low_freq_factor=1.0, original_max_length=32)
    with pytest.raises(ValueError, match=r"model.rope_scaling.factor must be > 0, got -1"):
        LinearScaling(factor=-1.0)
    with pytest.raises(ValueError, match=r"beta_slow must be > 0, got nan"):
        YarnScaling(factor=2.0, original_max_length=32, beta_slow=float("nan"))
    with pytest.raises(ValueError, match=r"must differ from low_freq_factor, got 1.0 for both"):
        RopeScaling(**bands, high_freq_factor=1.0)
    with pytest.raises(ValueError, match=r"long_factor must be > 0, got \(1.0, 0.0\)"):
        longrope = SCALINGS["longrope"]
        longrope(short_factor=(1.0, 1.0), long_factor=(1.0, 0.0), original_max_length=32)
