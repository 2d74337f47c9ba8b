"""What is said of a plan: its table, whether it fits, and what to change first."""

import dataclasses

import jax
import pytest

from ppo_jax.planner import phases, planner
from ppo_jax.planner import report as plan_report
from ppo_jax.planner.hlo.cost import Memory, ProgramCost
from tests.support import tiny_plan
from tests.support.tiny_plan import TARGET, on_a_chip_of, settings


@pytest.fixture(scope="module")
def plan():
    return tiny_plan.make_plan()


def test_the_table_has_every_figure_and_ends_with_the_verdict(plan):
    lines = plan_report.table(plan)
    assert "8 devices (fake), 15.75 GiB each; mesh data 2 x fsdp 2 x model 2; remat full" in lines
    assert any("not run" in line for line in lines)
    text = "\n".join(lines)
    for label in ("peak, GiB", "all-gather, count: GB", "by ici, s", "model-flops utilisation"):
        assert f"\n{label}" in text or f"\n  {label}" in text
    assert lines[-1].startswith("fits: 15.7")


def test_slots_are_reported_as_the_worst_case(plan):
    by_slots = dataclasses.replace(plan, config=settings(ppo=dict(max_concurrent=16)))
    text = "\n".join(plan_report.table(by_slots))
    assert "16 slots: as many steps as responses of full length need, the worst case" in text
    assert "slots" not in "\n".join(plan_report.table(plan))


def test_a_chip_that_is_too_small(plan):
    small = on_a_chip_of(plan, 2e5)
    assert not small.fits and small.spare < 0
    assert plan_report.table(small)[-1].startswith("does not fit: ")
    values = plan_report.figures(small)
    assert not values["fits"] and values["change_first"]


REFUSED = "RESOURCE_EXHAUSTED: TPU: memory required (36.00G) exceeds available HBM (15.75G)\nmore"


def refused(message):
    def lower():
        raise jax.errors.JaxRuntimeError(message)

    return phases.Phase(name="update", lower=lower, max_trip_counts=None, flops=1, model_flops=1)


def test_what_the_compiler_refuses_does_not_fit(plan):
    cost = planner.compile_phase(refused(REFUSED), TARGET, {})
    other = dataclasses.replace(plan, costs=(*plan.costs[:2], cost))
    assert not other.fits and other.spare is None and other.seconds is None
    values = plan_report.figures(other)["phases"]["update"]
    assert not values["fits"] and "36.00G" in values["refusal"]
    assert "refuses update: TPU: memory required (36.00G)" in plan_report.table(other)[-1]
    with pytest.raises(jax.errors.JaxRuntimeError):
        planner.compile_phase(refused("INTERNAL: a bug"), TARGET, {})


def test_without_published_figures_there_are_no_seconds(plan):
    target = dataclasses.replace(TARGET, chip=None)
    costs = tuple(dataclasses.replace(cost, roofline=None) for cost in plan.costs)
    unknown = dataclasses.replace(plan, target=target, costs=costs)
    assert unknown.fits and unknown.seconds is None  # into the memory of this machine
    text = "\n".join(plan_report.table(unknown))
    assert "no published figures" in text and "by ici" not in text


FULL = dict(model=dict(remat="full", frozen_dtype="bfloat16"))
CHANGES = {
    "mesh.data=1 and mesh.fsdp=4": ("arguments", {}),
    "model.frozen_dtype=bfloat16": ("arguments", dict(mesh=dict(data=1, fsdp=4))),
    "more devices": ("arguments", dict(mesh=dict(data=1, fsdp=4), **FULL)),
    "mesh.model=4 and mesh.fsdp=1": ("rollout", {}),
    "ppo.rollout_batch_size=64": (
        "scoring",
        dict(mesh=dict(data=1, fsdp=2, model=4), ppo=dict(rollout_batch_size=128)),
    ),
    "ppo.num_micro_batches=4": ("update", {}),
    "model.remat=full": ("update", dict(model=dict(remat="dots"), ppo=dict(num_micro_batches=4))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_first_thing_to_change(plan, change):
    where, sections = CHANGES[change]
    config = settings(**sections)
    sizes = dict.fromkeys(("arguments", "outputs", "aliased", "temporaries", "code"), 0)
    costs = []
    for cost in plan.costs:
        memory = sizes | {"arguments": 90 if where == "arguments" else 10}
        memory["temporaries"] = 200 if cost.phase.name == where else 20
        costs.append(dataclasses.replace(cost, program_cost=ProgramCost(memory=Memory(**memory))))
    mesh = {axis: getattr(config.mesh, axis) for axis in ("data", "fsdp", "model")}
    changed = dataclasses.replace(
        on_a_chip_of(plan, 100), config=config, costs=tuple(costs), mesh=mesh
    )
    assert not changed.fits
    assert plan_report.first_change(changed).startswith(change)
