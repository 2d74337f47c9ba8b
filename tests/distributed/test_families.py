"""One iteration of some model families on a mesh: that of one device."""

import jax
import numpy as np
import pytest

from ppo_jax.distributed.trees import named_leaves
from ppo_jax.models.families import read_config
from tests.distributed.test_meshes import Run
from tests.support import tiny

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "gemma2": {"head_dim": 16, **WINDOWS},
    "phi3": {"partial_rotary_factor": 0.5},
    "gpt_neox": {"rotary_pct": 0.5},
    "olmo3": WINDOWS,
}


def iteration(config, shape):
    run = Run(shape, config=config)
    rollout = run.rollout()
    (metrics,) = run.iterations(1)
    return jax.device_get((rollout, run.state, metrics))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_an_iteration_of_a_family_on_a_mesh_is_that_of_one_device(family):
    config = read_config({"model_type": family, **SIZES, **FAMILIES[family]})
    (rollout, mine, metrics), (one_rollout, one, one_metrics) = (
        iteration(config, shape) for shape in ((2, 2, 2), (1, 1, 1))
    )
    np.testing.assert_array_equal(rollout.response_tokens, one_rollout.response_tokens)
    np.testing.assert_allclose(rollout.logprobs, one_rollout.logprobs, atol=1e-5, rtol=0)
    for params in ("policy_params", "value_params"):
        found, expected = (named_leaves(getattr(x, params)) for x in (mine, one))
        for name, leaf in expected.items():
            np.testing.assert_allclose(found[name], leaf, atol=1e-4, rtol=0, err_msg=name)
    tiny.leaves_close(metrics, one_metrics, rtol=1e-3, atol=1e-4)
