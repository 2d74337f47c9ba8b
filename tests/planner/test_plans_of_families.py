"""Plans of models whose layers are not all alike: with experts, with windows in some layers."""

import json

import jax
import pytest

from ppo_jax.io.model_spec import parameters_of
from ppo_jax.planner import planner
from ppo_jax.planner import report as plan_report
from tests.support.tiny_plan import PHASES, TARGET, settings

SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
}
EXPERTS = SIZES | {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
WINDOWS = SIZES | {
    "model_type": "gemma3_text",
    "num_hidden_layers": 5,
    "sliding_window_pattern": 2,
    "sliding_window": 4,
    "query_pre_attn_scalar": 8,
}


def prepared(folder, raw, **sections):
    folder.joinpath("config.json").write_text(json.dumps(raw))
    model = dict(scratch=None, path=str(folder), vocabulary_data="")
    config = settings(**sections | dict(model=model))
    return config, planner.prepare(config, TARGET)


def test_of_the_rows_of_experts_a_device_has_the_share_of_its_experts(tmp_path):
    programs = prepared(tmp_path, EXPERTS)[1][2]
    assert {phase.name: phase.max_trip_counts for phase in programs} == {
        "rollout": {"": 7, "blocks": 0.5},
        "scoring": {"blocks": 0.5},
        "update": {"blocks": 0.5},
    }


@pytest.mark.slow
@pytest.mark.parametrize("raw", [EXPERTS, WINDOWS], ids=["experts", "windows"])
def test_the_flops_of_a_plan_are_those_of_the_layers(tmp_path, raw):
    config, made = prepared(tmp_path, raw)
    plan = planner.compile_plan(config, TARGET, made, fast=False)
    values = plan_report.figures(plan)["phases"]
    assert tuple(values) == PHASES
    for name, figures in values.items():
        assert figures["analytic_flops_ratio"] == pytest.approx(1, abs=0.15), name
        assert figures["collectives"]["all-reduce"]["bytes"] > 0, name
    assert values["update"]["collectives"]["all-gather"]["count"] >= 8
    count = sum(x.size for x in jax.tree.leaves(parameters_of("policy", plan.models.policy)))
    least = 4 * count * (2 * 3 + 2) / 4  # cut in four, by fsdp and model, but for the norms
    for cost in plan.costs:  # a reward model has no head of the size of the vocabulary
        assert 0.9 * least < cost.program_cost.memory.arguments < 1.3 * least
