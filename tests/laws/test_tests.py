"""Tests mirror the packages: a module's tests are where a reader looks, or here is where."""

import pathlib

import pytest

import ppo_jax

LIBRARY = pathlib.Path(ppo_jax.__file__).parent
TESTS = pathlib.Path(__file__).resolve().parents[1]
MODULES = sorted(
    path.relative_to(LIBRARY).with_suffix("").as_posix()
    for path in LIBRARY.rglob("*.py")
    if path.name != "__init__.py"
)
ELSEWHERE = {  # module: where it is tested, since it is a part of what is tested there
    "algorithms/experience": "algorithms/test_ppo",
    "algorithms/stopping": "algorithms/test_update",
    "cli": "runs/test_mistakes",
    "commands/evaluate": "evaluation/test_side_by_side",
    "commands/export": "commands/test_commands",
    "commands/frontier": "evaluation/test_frontier_report",
    "commands/generate": "commands/test_commands",
    "commands/plan": "planner/test_planner",
    "commands/point": "runs/test_sweeps",
    "commands/stages": "commands/test_commands",
    "commands/sweep": "pipeline/test_study",
    "config/flags": "config/test_config_errors",
    "config/mesh": "distributed/test_layout",
    "core/cpu": "core/test_distributions",
    "config/ppo": "config/test_objectives",
    "core/lanes": "algorithms/test_sweep",
    "core/types": "core/test_renamed",
    "data/comparisons": "data/test_preferences",
    "data/messages": "data/test_chat",
    "data/probes": "data/test_chat",
    "distributed/trees": "distributed/test_layout",
    "evaluation/report/charts": "evaluation/test_report",
    "evaluation/report/comparison_page": "evaluation/test_side_by_side",
    "evaluation/report/comparison_plots": "evaluation/test_side_by_side",
    "evaluation/report/critic_plots": "evaluation/test_critic_plots",
    "evaluation/report/frontier_plots": "evaluation/test_frontier_report",
    "evaluation/report/frontier_report": "evaluation/test_frontier_report",
    "evaluation/report/model_card": "evaluation/test_model_card",
    "evaluation/report/plots": "evaluation/test_plots",
    "evaluation/report/report": "evaluation/test_report",
    "evaluation/report/summary": "evaluation/test_summary",
    "evaluation/request": "evaluation/test_side_by_side",
    "evaluation/report/sweep_page": "evaluation/test_sweep_page",
    "evaluation/report/sweep_plots": "evaluation/test_sweep_page",
    "inference/responses": "evaluation/test_compare",
    "inference/score": "inference/test_generate",
    "inference/terminal": "inference/test_generate",
    "io/base_model": "pipeline/test_run",
    "io/gguf/architectures": "io/test_gguf_families",
    "io/gguf/convert": "io/test_gguf",
    "io/gguf/header": "io/test_gguf",
    "io/gguf/tokenizer": "io/test_gguf",
    "io/model_spec": "runs/test_refusals",
    "models/axes": "distributed/test_layout",
    "pipeline/scorers": "runs/test_reward_ensemble",
    "algorithms/options": "config/test_stages",
    "algorithms/advantages": "algorithms/test_oracle",
    "config/ppo_checks": "config/test_objectives",
    "planner/iteration": "planner/test_phases",
    "planner/layers": "planner/test_flops",
    "planner/models": "planner/test_planner",
    "training/ppo_models": "runs/test_reward_ensemble",
    "models/config": "models/test_families",
    "models/families/base": "models/test_families",
    **dict.fromkeys(
        (f"models/families/{name}" for name in ("gemma", "neox", "olmo", "phi", "rope")),
        "io/test_huggingface",
    ),
    "models/families/gpt2": "models/test_families",
    "models/families/llama": "models/test_families",
    "models/families/moe": "models/test_families",
    "models/families/presets": "planner/test_planner",
    "models/layers": "models/test_build",
    "models/transformer": "models/test_build",
    "pipeline/preflight": "runs/test_refusals",
    "pipeline/summary": "runs/test_dry_run",
    "planner/hlo/cost": "planner/test_cost",
    "planner/hlo/instructions": "planner/test_tpu_programs",
    "planner/hlo/text": "planner/test_tpu_programs",
    "planner/hlo/trip_counts": "planner/test_cost",
    "rollout/rollout": "rollout/test_decode",
    "rollout/sampling": "core/test_distributions",
    "training/common": "training/test_programs",
    "pipeline/lanes": "training/test_lanes",
    "training/lane_runs": "training/test_lanes",
    "training/ppo": "training/test_programs",
    "training/ppo_evaluation": "runs/test_evaluate_every",
    "training/resume": "runs/test_resuming",
    "training/reward": "pipeline/test_run",
    "training/sft": "pipeline/test_run",
    "training/stage": "runs/test_interruptions",
    "training/stages": "pipeline/test_run",
}


def mirror(module):
    """The file of a module's tests, by its package and name."""
    package, _, name = module.rpartition("/")
    return TESTS / package / f"test_{name}.py"


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_its_tests(module):
    if module in ELSEWHERE:
        assert not mirror(module).exists(), f"{module} has a file of its own now"
        assert (TESTS / f"{ELSEWHERE[module]}.py").is_file()
    else:
        assert mirror(module).is_file(), f"no {mirror(module)}; or say in ELSEWHERE where it is"


def test_the_list_names_modules_that_are_there():
    assert set(ELSEWHERE) <= set(MODULES)
