"""Plans of PPO: what they count, how alternatives are ranked, and how the script ends."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import pytest

from ppo_jax.config.run import from_config_dict
from ppo_jax.io.model_spec import parameters_of
from ppo_jax.models.families import presets as published
from ppo_jax.planner import phases, planner
from ppo_jax.planner import report as plan_report
from ppo_jax.planner.chips import Roofline
from tests.config.test_run import load_config_file
from tests.support import tiny_plan
from tests.support.command_line import ROOT, run_script
from tests.support.tiny_plan import CHIP, PHASES, TARGET, on_a_chip_of, settings


@pytest.fixture(scope="module")
def plan():
    return tiny_plan.make_plan()


# --- what is counted ------------------------------------------------------------------------------


def test_nothing_is_computed_twice_across_the_mesh(plan):
    values = plan_report.figures(plan)["phases"]
    assert tuple(values) == PHASES
    for name, figures in values.items():
        assert figures["analytic_flops_ratio"] == pytest.approx(1, abs=0.15), name
        assert figures["collectives"]["all-reduce"]["bytes"] > 0, name
    updates = 2 * 2 * 2  # each with several gathers
    assert values["update"]["collectives"]["all-gather"]["count"] >= updates


def test_state_and_frozen_parameters_are_among_the_arguments_of_every_phase(plan):
    """Three trained copies in float32 of policy and critic, and the reference and reward model."""
    count = sum(x.size for x in jax.tree.leaves(parameters_of("policy", plan.models.policy)))
    least = 4 * count * (2 * 3 + 2) / 4  # cut in four, by fsdp and model, but for the norms
    for cost in plan.costs:
        assert least < cost.program_cost.memory.arguments < 1.3 * least


def test_the_figures_are_json_with_the_promised_keys(plan):
    values = json.loads(json.dumps(plan_report.figures(plan)))
    assert values["fits"] is True and values["change_first"] is None
    promised = {"peak_bytes_per_chip", "flops_per_chip", "analytic_flops_ratio", "collectives"}
    for figures in values["phases"].values():
        assert promised <= set(figures)
        assert figures["bound"] in ("compute", "hbm", "ici")
        assert figures["seconds"] == max(figures["roofline_seconds"].values())
    whole = values["iteration"]
    assert whole["seconds"] == sum(x["seconds"] for x in values["phases"].values())
    tokens = 32 * 8 / whole["seconds"] / 8
    assert whole["tokens_per_second_per_chip"] == pytest.approx(tokens)
    assert values["spare_bytes_per_chip"] == CHIP.usable_bytes - whole["peak_bytes_per_chip"]


def test_utilisation_leaves_out_what_is_computed_again(plan):
    update = plan.costs[2]
    assert 0.75 < update.phase.model_flops / update.phase.flops < 0.85  # 3 of 4, but for the head
    values = plan_report.phase_figures(plan, update)
    of_device = update.phase.model_flops / 8 / CHIP.flops
    assert values["model_flops_utilisation"] == pytest.approx(of_device / values["seconds"])


def test_scores_of_a_function_are_an_argument():
    by_function = dict(reward_model="", reward_function="module:function")
    models = planner.read_models(settings(ppo=by_function))
    assert models.reward is None and models.critic == models.policy
    with_model = planner.read_models(settings())
    ppo = settings().ppo
    whole, less = (phases.analytic_flops(ppo, m)["scoring"] for m in (with_model, models))
    assert 1.4 < whole / less < 1.6


def test_packed_rows_are_planned_for_as_if_they_saved_nothing():
    programs = planner.prepare(settings(ppo=dict(packing=True)), TARGET)[2]
    assert {phase.name: phase.max_trip_counts for phase in programs} == {
        "rollout": 7,
        "scoring": None,
        "update": 2,
    }


@pytest.mark.parametrize("samples", [1, 2])
def test_slots_are_planned_for_as_if_every_response_were_of_full_length(samples):
    """32 responses in 16 slots, entering by 8: four groups, and 7 steps for each two of them."""
    by_slots = settings(ppo=dict(max_concurrent=16, min_free_slots=8, samples_per_prompt=samples))
    rollout = planner.prepare(by_slots, TARGET)[2][0]
    assert rollout.max_trip_counts == {"refills": 4, "decoding": 3.5, "draining": 0}
    cost = planner.compile_phase(rollout, TARGET, {})
    assert cost.program_cost.flops * 8 == pytest.approx(rollout.flops, rel=0.01)
    at_once = planner.prepare(settings(ppo=dict(samples_per_prompt=samples)), TARGET)[2][0]
    assert rollout.flops == pytest.approx(at_once.flops, rel=0.1)  # the same tokens and prompts
    whole = planner.compile_phase(at_once, TARGET, {}).program_cost.memory
    assert cost.program_cost.memory.temporaries < 0.9 * whole.temporaries  # half of the KV cache


# --- alternatives ---------------------------------------------------------------------------------


def test_alternatives_change_the_mesh_and_how_memory_is_saved():
    first, second = planner.alternatives(
        settings(), "data=1,fsdp=8;fsdp=4,model=2, remat=dots,num_micro_batches=4"
    )
    assert (first.mesh.data, first.mesh.fsdp, first.mesh.model) == (1, 8, 1)
    assert first.model.remat == "full" and first.ppo.num_micro_batches == 2
    assert (second.mesh.data, second.mesh.fsdp, second.mesh.model) == (1, 4, 2)
    assert second.model.remat == "dots" and second.ppo.num_micro_batches == 4
    kept = planner.alternatives(settings(), "remat=none")[0]
    assert kept.mesh == settings().mesh and kept.model.remat == "none"


def test_the_best_alternative_comes_first(plan, monkeypatch):
    """What fits before what does not, and then what takes less time."""

    def made(config, target, prepared, *, fast):
        assert fast
        slow, large = config.model.remat != "none", config.model.remat == "dots"
        roofline = Roofline(compute=1.0 + slow, hbm=0.0, ici=0.0)
        costs = tuple(dataclasses.replace(cost, roofline=roofline) for cost in plan.costs)
        of = on_a_chip_of(plan, 2e5) if large else plan
        return dataclasses.replace(of, config=config, costs=costs, fast=fast)

    monkeypatch.setattr(planner, "compile_plan", made)
    configs = planner.alternatives(settings(), "remat=dots;remat=full;remat=none")
    plans = planner.compare(configs, TARGET)
    assert [p.config.model.remat for p in plans] == ["none", "full", "dots"]
    head, *lines = plan_report.comparison(plans)
    assert [line.split()[1] for line in lines] == ["none", "full", "dots"]
    assert [line.split()[-1] for line in lines] == ["yes", "yes", "no"]


# --- the script -----------------------------------------------------------------------------------


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.py"
    values = dataclasses.asdict(settings())
    path.write_text(
        "from ppo_jax.config import with_defaults\n\ninf = float('inf')\n"
        f"\ndef get_config():\n    return with_defaults({values!r})\n"
    )
    return f"--config={path}"


@pytest.mark.parametrize(("memory", "code"), [(1e9, 0), (2e5, 1)])
def test_the_exit_code_is_the_verdict(plan, config_file, tmp_path, monkeypatch, memory, code):
    monkeypatch.setattr(planner, "make_plan", lambda *_, **__: on_a_chip_of(plan, memory))
    monkeypatch.setattr(planner, "has_libtpu", lambda: False)
    path = tmp_path / "plan.json"
    ended = run_script("plan", config_file, "--topology=v5e:2x2", f"--json={path}")
    assert (ended.code, ended.err) == (code, "")
    assert ended.out.startswith("there is no libtpu (pip install 'ppo_jax[plan]')")
    values = json.loads(path.read_text())
    assert values["fits"] is (code == 0) and set(values["phases"]) == set(PHASES)


MISTAKES = {
    "--config.mesh.data=3": "mesh (data=3, fsdp=2, model=2) needs 12 devices, have 8",
    "--config.ppo.rollout_batch_size=8": "ppo.rollout_batch_size must be a multiple of",
    "--config.model.scratch.vocab_size=321": "its vocab axis of 321 cannot be split into 2 equal",
    "--config.ppo.trainable=3": "ppo.trainable must be at most 2, the model's layers, got 3",
    "--config.ppo.value_trainable=3": "ppo.value_trainable must be at most 2, the model's layers",
    "--compare=fdsp=8": "--compare must be like data=1,fsdp=16;",
    "--compare=fsdp=many": "--compare must be like data=1,fsdp=16;",
    "--compare=fsdp=8;fsdp=1,model=8": "kv_heads axis of 4 cannot be split into 8 equal shards",
    "--compare=fsdp=8;fsdp=3": "mesh (data=1, fsdp=3, model=1) needs 3 devices, have 8",
    "--compare=remat=some": "model.remat must be one of",
    "--topology=v9:2x2": "no figures of the chip 'v9:2x2'; there are ['v4', 'v5e'",
}


@pytest.mark.parametrize("flag", MISTAKES)
def test_a_mistake_is_reported_in_one_line(config_file, monkeypatch, all_devices, flag):
    if "topology" in flag:
        monkeypatch.setattr(planner, "has_libtpu", lambda: True)
    ended = run_script("plan", config_file, flag)
    assert ended.code == 2 and MISTAKES[flag] in ended.err
    assert ended.err.count("\n") == 1


def test_a_topology_without_libtpu_is_refused(monkeypatch):
    monkeypatch.setattr(planner, "has_libtpu", lambda: False)
    with pytest.raises(ValueError, match="topology must be None without libtpu .* got 'v5e:2x2'"):
        planner.plan(dataclasses.asdict(settings()), "v5e:2x2")


def test_a_model_that_is_not_at_hand_is_refused_and_not_fetched():
    elsewhere = dict(scratch=None, path="someone/something", vocabulary_data="")
    with pytest.raises(ValueError, match=r"model.path must be a folder .* 'Qwen/Qwen3-0.6B'"):
        planner.read_models(settings(model=elsewhere))
    with pytest.raises(ValueError, match="plan needs a config with a ppo section"):
        planner.read_models(settings(ppo=None))


def test_a_folder_with_a_config_json_is_enough(tmp_path):
    raw = published.SHAPES["Qwen/Qwen3-0.6B"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    here = settings(model=dict(scratch=None, path=str(tmp_path), vocabulary_data=""))
    assert planner.read_models(here).policy.num_layers == 28


SIZES = {  # millions of parameters, as their pages say
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134.5,
    "Qwen/Qwen3-0.6B": 596.0,
    "meta-llama/Llama-3.1-8B-Instruct": 8030.3,
    "meta-llama/Llama-3.1-70B-Instruct": 70553.7,
    "Qwen/Qwen3-30B-A3B": 30532.1,
    "google/gemma-3-27b-it": 27009.3,
}


@pytest.mark.parametrize("name", published.SHAPES)
def test_the_published_shapes_have_the_published_sizes(name):
    config = published.published_config(name, scan_layers=True)
    count = sum(x.size for x in jax.tree.leaves(parameters_of("policy", config)))
    assert count / 1e6 == pytest.approx(SIZES[name], abs=0.05)


@pytest.mark.parametrize("variant", load_config_file(ROOT / "configs" / "pod.py").VARIANTS)
def test_every_variant_of_the_pods_names_a_published_model(variant):
    config = from_config_dict(load_config_file(ROOT / "configs" / "pod.py").get_config(variant))
    assert planner.read_models(config).policy.dtype == "bfloat16"


@pytest.mark.slow
def test_the_smallest_variant_compiles_for_its_topology(tmp_path):
    """With libtpu, in a process of its own: no noise, nothing computed twice, and attention by the
    Pallas kernel, whose work is counted."""
    pytest.importorskip("libtpu")
    command = [sys.executable, str(pathlib.Path("experiments") / "plan.py"), "--fast"]
    command += ["--config=configs/pod.py:smollm2_135m", "--topology=v5e:2x2"]
    command.append(f"--json={tmp_path / 'plan.json'}")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "nvoluntary full rematerialization" not in done.stdout
    phases = json.loads((tmp_path / "plan.json").read_text())["phases"]
    for name, figures in phases.items():
        near = 0.15 if name == "rollout" else 0.01  # decoding leaves out blocks of the cache
        assert figures["analytic_flops_ratio"] == pytest.approx(1, abs=near), name
    calls = {name: figures["attention_kernel_calls"] for name, figures in phases.items()}
    # 30 layers of three networks; of two networks, forward twice and two backward, in 8 pieces.
    assert calls == {"rollout": 0, "scoring": 30 * 3, "update": 30 * 2 * 4 * 8}
