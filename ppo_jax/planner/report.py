"""A plan as a table and as JSON, and the first setting to change where it does not fit."""

from collections.abc import Sequence
from typing import Any

import jax

from ppo_jax.io.model_spec import parameters_of
from ppo_jax.planner.chips import Roofline, utilisation
from ppo_jax.planner.planner import PhaseCost, Plan

GIB, GB, TERA = 2**30, 1e9, 1e12


def response_tokens(plan: Plan) -> int:
    """Of an iteration, in the worst case."""
    return plan.config.ppo.rollout_batch_size * plan.config.ppo.response_length


def rates(plan: Plan, seconds: float | None, model_flops: float) -> dict[str, float | None]:
    """Throughput and MFU of a phase or an iteration that takes so many seconds."""
    if seconds is None:
        return {"tokens_per_second_per_chip": None, "model_flops_utilisation": None}
    device_flops = model_flops / len(plan.target.devices)
    return {
        "tokens_per_second_per_chip": response_tokens(plan) / seconds / plan.target.num_chips,
        "model_flops_utilisation": utilisation(device_flops, seconds, plan.target.chip),
    }


def phase_figures(plan: Plan, cost: PhaseCost) -> dict[str, Any]:
    """All figures of a phase, for JSON; a "chip" here is a jax device."""
    program, roofline = cost.program_cost, cost.roofline
    if program is None:
        return {"fits": False, "refusal": cost.refusal, "compile_seconds": cost.compile_seconds}
    memory, seconds = program.memory, roofline and roofline.seconds
    return {
        "fits": memory.peak <= plan.target.memory,
        "argument_bytes_per_chip": memory.arguments,
        "output_bytes_per_chip": memory.outputs - memory.aliased,  # but for donated arguments
        "temporary_bytes_per_chip": memory.temporaries,
        "peak_bytes_per_chip": memory.peak,
        "flops_per_chip": program.flops,
        "analytic_flops_ratio": program.flops * len(plan.target.devices) / cost.phase.flops,
        "attention_kernel_calls": program.attention_kernels,
        "bytes_accessed_per_chip": program.bytes_accessed,
        "collectives": {kind: sent._asdict() for kind, sent in program.collectives.items()},
        "roofline_seconds": roofline and roofline._asdict(),
        "seconds": seconds,
        "bound": roofline and roofline.bound,
        **rates(plan, seconds, cost.phase.model_flops),
        "compile_seconds": cost.compile_seconds,
    }


def figures(plan: Plan) -> dict[str, Any]:
    """All figures of a plan, for JSON."""
    model_flops = sum(cost.phase.model_flops for cost in plan.costs)
    programs = [cost.program_cost for cost in plan.costs if cost.program_cost]
    return {
        "fits": plan.fits,
        "change_first": None if plan.fits else first_change(plan),
        "target": plan.target.name,
        "devices": len(plan.target.devices),
        "mesh": dict(plan.mesh),
        "remat": plan.config.model.remat,
        "fast": plan.fast,
        "usable_bytes_per_chip": plan.target.memory,
        "spare_bytes_per_chip": plan.spare,
        "phases": {cost.phase.name: phase_figures(plan, cost) for cost in plan.costs},
        "iteration": {
            "peak_bytes_per_chip": max((p.memory.peak for p in programs), default=None),
            "flops_per_chip": sum(p.flops for p in programs),
            "seconds": plan.seconds,
            **rates(plan, plan.seconds, model_flops),
            "compile_seconds": sum(cost.compile_seconds for cost in plan.costs),
        },
    }


# --- the table ------------------------------------------------------------------------------------

# (label, key of the figures, unit)
ROWS = (
    ("arguments, GiB", "argument_bytes_per_chip", GIB),
    ("outputs besides them, GiB", "output_bytes_per_chip", GIB),
    ("temporaries, GiB", "temporary_bytes_per_chip", GIB),
    ("peak, GiB", "peak_bytes_per_chip", GIB),
    ("flops, 1e12", "flops_per_chip", TERA),
    ("x the analytic count", "analytic_flops_ratio", 1),
    ("calls of attention kernels", "attention_kernel_calls", 1),
    ("read and written, GB", "bytes_accessed_per_chip", GB),
    ("seconds at least", "seconds", 1),
    ("bound", "bound", 1),
    ("response tokens/s a chip", "tokens_per_second_per_chip", 1),
    ("model-flops utilisation", "model_flops_utilisation", 1),
    ("compiled in, s", "compile_seconds", 1),
)


def format_value(value: Any, unit: float = 1) -> str:
    """A number with three digits, or all before the point.

    >>> format_value(12.345), format_value(4.5e9, GB), format_value(123456.7), format_value(None)
    ('12.3', '4.5', '123,457', '-')
    """
    if value is None or isinstance(value, str):
        return value or "-"
    x = value / unit
    return f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"


def table(plan: Plan) -> list[str]:
    """The figures of a plan as lines of text, its verdict last."""
    values = figures(plan)
    columns = [*values["phases"].values(), values["iteration"]]
    rows = [("a device", *values["phases"], "iteration")]
    for label, key, unit in ROWS:
        rows.append((label, *(format_value(column.get(key), unit) for column in columns)))
        if key == "bytes_accessed_per_chip":
            rows += collective_rows(columns)
        if key == "bound":
            rows += roofline_rows(columns)
    return [*heading(plan), "", *align_columns(rows), "", verdict(plan)]


def collective_rows(columns: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Count and bytes sent by one device, for each kind of collective."""
    collectives = [column.get("collectives", {}) for column in columns]

    def text(sent: dict[str, float] | None) -> str:
        return f"{sent['count']:,.0f}: {format_value(sent['bytes'], GB)}" if sent else ""

    return [
        (f"{kind}, count: GB", *(text(kinds.get(kind)) for kinds in collectives))
        for kind in sorted(set().union(*collectives))
    ]


def roofline_rows(columns: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The seconds of each of the three bounds."""
    rooflines = [column.get("roofline_seconds") for column in columns]
    if not any(rooflines):
        return []
    return [
        (f"  by {bound}, s", *(format_value(x[bound]) if x else "" for x in rooflines))
        for bound in Roofline._fields
    ]


def heading(plan: Plan) -> list[str]:
    """What is planned, and how the figures were obtained."""
    target, models = plan.target, plan.models
    devices = f"{len(target.devices)} device{'s' if len(target.devices) > 1 else ''}"
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    parameters = {"policy": parameters_of("policy", models.policy)}
    for name, config in (("critic", models.critic), ("reward model", models.reward)):
        if config:
            parameters[name] = parameters_of("reward", config)
    sizes = {k: sum(x.size for x in jax.tree.leaves(v)) for k, v in parameters.items()}
    lines = [
        f"{devices} ({target.name}), {target.memory / GIB:.2f} GiB each; "
        f"mesh {mesh}; remat {plan.config.model.remat}",
        "parameters: " + ", ".join(f"{name} {n / 1e6:,.0f}M" for name, n in sizes.items()),
        "computed from the compiled programs, not run; responses of full length",
    ]
    slots = plan.config.ppo.max_concurrent
    if 0 < slots < plan.config.ppo.rollout_batch_size:
        lines.append(
            f"{slots} slots: as many steps as responses of full length need, the worst case; "
            "where lengths differ, a rollout ends sooner"
        )
    if (most := plan.config.ppo.max_rollouts) > 1:
        lines.append(
            f"max_rollouts={most}: an iteration samples and scores once to {most} times; the "
            "figures are those of one"
        )
    if plan.fast:
        lines.append("compiled with less effort: too many bytes are read, and peaks differ")
    if target.chip is None:
        lines.append("no published figures of these devices: no seconds")
    return lines


def align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines; the first column is left-aligned, the others right-aligned."""
    first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(first), *map(str.rjust, row[1:], widths)]).rstrip() for row in rows
    ]


def verdict(plan: Plan) -> str:
    """Fits or not, by how much, and what to change first if not."""
    memory, peak = plan.target.memory / GIB, plan.peak_phase
    if plan.fits:
        return f"fits: {plan.spare / GIB:.2f} of {memory:.2f} GiB are left ({peak.phase.name})"
    if plan.spare is None:
        why = f"the compiler refuses {peak.phase.name}: {peak.refusal}"
    else:
        why = f"{peak.phase.name} needs {-plan.spare / GIB:.2f} GiB more than {memory:.2f}"
    return f"does not fit: {why}\nfirst change: {first_change(plan)}"


def comparison(plans: Sequence[Plan]) -> list[str]:
    """A line for each alternative, the best first."""
    rows = [("data,fsdp,model", "remat", "micro", "peak, GiB", "s at least", "bounds", "fits")]
    for plan in plans:
        peak = None if plan.spare is None else plan.target.memory - plan.spare
        bounds = "/".join(c.roofline.bound if c.roofline else "-" for c in plan.costs)
        rows.append(
            (
                ",".join(str(size) for size in plan.mesh.values()),
                plan.config.model.remat,
                str(plan.config.ppo.num_micro_batches),
                format_value(peak, GIB),
                format_value(plan.seconds),
                bounds,
                "yes" if plan.fits else "no",
            )
        )
    return align_columns(rows)


# --- what to change -------------------------------------------------------------------------------


def first_change(plan: Plan) -> str:
    """The cheapest change that helps the phase with the highest peak.

    State and frozen parameters come first if they take half of the memory; then temporaries.
    """
    programs = [cost.program_cost for cost in plan.costs if cost.program_cost]
    arguments = max((p.memory.arguments for p in programs), default=0)
    if arguments > plan.target.memory / 2:
        names = ("fsdp", "frozen_dtype")
    elif plan.peak_phase.phase.name == "update":
        names = ("micro_batches", "remat", "model", "responses")
    else:
        names = ("model", "responses")
    changes = possible_changes(plan)
    return next((changes[name] for name in names if name in changes), "more devices")


def possible_changes(plan: Plan) -> dict[str, str]:
    """The settings that can save memory, with what they save."""
    ppo, policy, model = plan.config.ppo, plan.models.policy, plan.config.model
    data, fsdp, tensor = (plan.mesh[axis] for axis in ("data", "fsdp", "model"))
    changes = {}
    if data > 1:
        changes["fsdp"] = (
            f"mesh.data=1 and mesh.fsdp={data * fsdp}: shards the state that data replicates"
        )
    if model.frozen_dtype != "bfloat16":
        changes["frozen_dtype"] = (
            "model.frozen_dtype=bfloat16: halves frozen parameters, as reference and reward model"
        )
    if model.remat != "full":
        changes["remat"] = "model.remat=full: only each layer's input is kept for the backward pass"
    if not (fsdp % 2 or policy.num_kv_heads % (2 * tensor) or policy.vocab_size % (2 * tensor)):
        changes["model"] = (
            f"mesh.model={2 * tensor} and mesh.fsdp={fsdp // 2}: halves the policy's copy in the "
            "rollout, the KV cache and the logits of a row"
        )
    if not ppo.update_batch_size % (2 * data * fsdp * ppo.num_minibatches * ppo.num_micro_batches):
        changes["micro_batches"] = (
            f"ppo.num_micro_batches={2 * ppo.num_micro_batches}: half of the activations at a time"
        )
        changes["responses"] = (
            f"ppo.rollout_batch_size={ppo.rollout_batch_size // 2}: half of the rows a device"
        )
    return changes
