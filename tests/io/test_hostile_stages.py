"""A stage.json with numbers that no stage writes: one line with the file and the field."""

import json
import re

import pytest

from ppo_jax.inference.generate import find_sampling
from ppo_jax.io.stage_folder import load_model
from tests.support.tiny_stage import random_model, write_stage

SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_length": 64,
}
YARN = {"kind": "yarn", "factor": 2.0, "original_max_length": 64}
LONG = {"kind": "longrope", "short_factor": [1.0] * 99, "long_factor": [1.0] * 99}
LONG |= {"original_max_length": 64}
EXPERTS = {"num_experts": 5, "num_chosen": 2, "dim": 12, "normalized": True, "aux_coef": 0.01}


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return write_stage(tmp_path_factory.mktemp("run"), "ppo", random_model(), response_length=4)


def changed_stage(stage, section, field, value):
    old = (stage / "stage.json").read_text()
    description = json.loads(old)
    values = description[section] if section else description
    values[field] = value
    (stage / "stage.json").write_text(json.dumps(description))
    return old


@pytest.mark.parametrize(
    ("section", "field", "value", "named"),
    [
        ("model", "rope_theta", 0, "model.rope_theta"),
        ("model", "rope_theta", float("nan"), "model.rope_theta"),
        ("model", "norm_eps", -1e-5, "model.norm_eps"),
        ("model", "num_layers", "two", "model.num_layers"),
        ("model", "lora_alpha", float("inf"), "model.lora_alpha"),
        *(
            ("model", "rope_scaling", SCALING | change, f"model.rope_scaling.{field}")
            for field, change in (
                ("factor", {"factor": 0.0}),
                ("factor", {"factor": -2.0}),
                ("factor", {"factor": "8"}),
                ("low_freq_factor", {"low_freq_factor": 0.0}),
                ("high_freq_factor", {"low_freq_factor": 4.0}),
                ("original_max_length", {"original_max_length": 0}),
                ("kind", {"kind": "ntk"}),
                ("kind", {"kind": ["yarn"]}),
                ("attention_factor", {"attention_factor": 0.0}),
            )
        ),
        ("model", "rope_scaling", [1], "model.rope_scaling"),
        ("model", "rope_scaling", YARN | {"beta_fast": -1.0}, "model.rope_scaling.beta_fast"),
        ("model", "rope_scaling", YARN | {"truncate": 3}, "model.rope_scaling.truncate"),
        ("model", "rope_scaling", LONG | {"short_factor": "a"}, "model.rope_scaling.short_factor"),
        ("model", "rope_scaling", LONG | {"long_factor": [0.0]}, "model.rope_scaling.long_factor"),
        ("model", "rope_scaling", LONG, "model.rope_scaling.short_factor"),  # not of its heads
        ("model", "layer_kinds", [{}, {"window": -1}], "model.layer_kinds[1].window"),
        ("model", "layer_kinds", [{"window": 2.5}, {}], "model.layer_kinds[0].window"),
        ("model", "layer_kinds", [{"rope_theta": -1.0}, {}], "model.layer_kinds[0].rope_theta"),
        ("model", "layer_kinds", [{"window": 2}], "model.layer_kinds"),
        ("model", "layer_kinds", [3], "model.layer_kinds[0]"),
        *(("model", "layer_kinds", x, "model.layer_kinds") for x in (3, 0, False, "", {}, None)),
        *(("model", "rope_scaling", x, "model.rope_scaling") for x in (0, False, "", [])),
        ("model", "rope_scaling", {}, "model.rope_scaling.factor"),
        *(("model", "experts", x, "model.experts") for x in (0, False, "", [])),
        ("model", "experts", {}, "model.experts.num_experts"),
        ("", "critic", {}, "critic.model"),
        ("", "critic", {"model": 0}, "critic.model"),
        ("model", "family", 3, "model.family"),
        ("model", "qk_norm", "some", "model.qk_norm"),
        ("model", "rotary_dim", 3, "model.rotary_dim"),
        ("model", "score_cap", -1.0, "model.score_cap"),
        ("model", "logits_divisor", 0, "model.logits_divisor"),
        ("model", "residual", "sideways", "model.residual"),
        *(
            ("model", "experts", EXPERTS | change, f"model.experts.{next(iter(change))}")
            for change in (
                {"num_experts": 0},
                {"num_chosen": 6},
                {"dim": "two"},
                {"normalized": 1},
                {"aux_coef": -1.0},
            )
        ),
        ("settings", "temperature", float("nan"), "settings.temperature"),
        ("settings", "temperature", -1.0, "settings.temperature"),
        ("settings", "response_length", "four", "settings.response_length"),
        ("settings", "response_length", 0, "settings.response_length"),
        ("settings", "top_p", 1.5, "settings.top_p"),
        ("settings", "stop_tokens", 3, "settings.stop_tokens"),
        ("", "kind", "critic", "kind"),
    ],
)
def test_a_number_that_no_stage_writes_is_one_line_with_file_and_field(
    stage, section, field, value, named
):
    old = changed_stage(stage, section, field, value)
    try:
        with pytest.raises(ValueError) as error:
            find_sampling(str(stage), load_model(stage).tokenizer)
    finally:
        (stage / "stage.json").write_text(old)
    message = str(error.value)
    assert message.startswith(f"{stage}/stage.json: {named} must") and "\n" not in message


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("rope_theta", 0, "critic.model.rope_theta"),
        ("experts", EXPERTS | {"dim": 0}, "critic.model.experts.dim"),
        ("layer_kinds", [{}, {"window": -1}], "critic.model.layer_kinds[1].window"),
    ],
)
def test_a_number_of_the_critic_is_told_with_its_section(stage, field, value, named):
    model = json.loads((stage / "stage.json").read_text())["model"] | {field: value}
    old = changed_stage(stage, "", "critic", {"model": model})
    try:
        with pytest.raises(ValueError, match=rf"stage\.json: {re.escape(named)} must"):
            load_model(stage)
    finally:
        (stage / "stage.json").write_text(old)
