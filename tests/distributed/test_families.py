"""One iteration of each model family on a mesh: that of one device."""

import jax
import numpy as np
import pytest

from ppo_jax.algorithms import experience, ppo
from ppo_jax.distributed.trees import named_leaves
from ppo_jax.models.families import read_config
from tests.distributed.test_meshes import Run
from tests.support import tiny

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
TWO = {"num_hidden_layers": 2}  # where layers differ
WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], **TWO}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "mistral": {"sliding_window": 4},
    "smollm3": {"no_rope_layers": [1, 0], **TWO},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, **WINDOWS},
    "gemma3_text": {"head_dim": 16, **WINDOWS},
    "phi3": {"partial_rotary_factor": 0.5},
    "gpt_neox": {"rotary_pct": 0.5},
    "olmo2": {},
    "olmo3": WINDOWS,
    "qwen3_moe": {"head_dim": 16, "moe_intermediate_size": 32, **EXPERTS},
    "mixtral": {"num_local_experts": 4},
    "olmoe": EXPERTS,
}
FAST = ("gemma2", "mixtral")
# Mesh axes of the experts; of other families as the rules say.
OVER = {"mixtral": ("fsdp",), "olmoe": ("data", "fsdp")}


def iteration(state, numbers, prompts, key, *, networks, **parts):
    """`ppo_iteration`, which keeps the rollout."""
    parts |= dict(networks=networks)
    rollout = experience.sample_responses(state, numbers, prompts, key, **parts)
    scores, _ = experience.scores_and_metrics(
        rollout, frozen=parts["frozen"], networks=networks, samples_per_prompt=1
    )
    state, metrics = ppo.update_from_rollout(state, numbers, rollout, scores, key, **parts)
    return rollout, state, metrics


def result(family, shape):
    config = read_config({"model_type": family, **SIZES, **FAMILIES[family]})
    rules = {"expert": OVER[family]} if family in OVER else {}
    run = Run(shape, config=config, shared=True, rules=rules)
    run.options = tiny.options(num_epochs=1, num_minibatches=1)  # few programs: they are the cost
    args = run.state, run.numbers, run.prompts(0), run.layout.key(0, 0)
    return jax.device_get(run.compile(iteration)(*args, frozen=run.frozen))


@pytest.mark.parametrize(
    "family",
    [pytest.param(x, marks=() if x in FAST else pytest.mark.slow) for x in FAMILIES],
)
def test_an_iteration_of_a_family_on_a_mesh_is_that_of_one_device(family):
    (rollout, mine, metrics), (one_rollout, one, one_metrics) = (
        result(family, shape) for shape in ((2, 2, 2), (1, 1, 1))
    )
    np.testing.assert_array_equal(rollout.response_tokens, one_rollout.response_tokens)
    np.testing.assert_allclose(rollout.logprobs, one_rollout.logprobs, atol=1e-5, rtol=0)
    for params in ("policy_params", "value_params"):
        found, expected = (named_leaves(getattr(x, params)) for x in (mine, one))
        for name, leaf in expected.items():
            np.testing.assert_allclose(found[name], leaf, atol=1e-4, rtol=0, err_msg=name)
    # Two tokens whose values are 5e-7 apart change fifths by rounding, and take their returns
    # along.
    metrics, one_metrics = (
        {name: x for name, x in each.items() if "return_fifth" not in name}
        for each in (metrics, one_metrics)
    )
    tiny.leaves_close(metrics, one_metrics, rtol=1e-3, atol=1e-4)
