"""A plan as a table, as JSON, and as the first thing to change where it does not fit."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from ppo_jax.io.model_spec import parameters_of
from ppo_jax.planner.chips import utilisation
from ppo_jax.planner.planner import Cost, Plan

GIB, GB, TERA = 2**30, 1e9, 1e12


def response_tokens(plan: Plan) -> int:
    """Of an iteration, at worst."""
    return plan.config.ppo.rollout_batch_size * plan.config.ppo.response_length


def rates(plan: Plan, seconds: float | None, model_flops: float) -> dict[str, float | None]:
    """What can be had at most, if a phase or an iteration takes so many seconds."""
    if seconds is None:
        return {"tokens_per_second_per_chip": None, "model_flops_utilisation": None}
    of_device = model_flops / len(plan.target.devices)
    return {
        "tokens_per_second_per_chip": response_tokens(plan) / seconds / plan.target.num_chips,
        "model_flops_utilisation": utilisation(of_device, seconds, plan.target.chip),
    }


def phase_figures(plan: Plan, cost: Cost) -> dict[str, Any]:
    """All figures of a phase, for JSON; a "chip" here is a jax device."""
    if cost.account is None:
        return {"fits": False, "refusal": cost.refusal, "compile_seconds": cost.compile_seconds}
    found, memory, lies = cost.account, cost.account.memory, cost.lies
    seconds = lies and lies.seconds
    return {
        "fits": memory.peak <= plan.target.memory,
        "argument_bytes_per_chip": memory.arguments,
        "output_bytes_per_chip": memory.outputs - memory.aliased,  # besides donated arguments
        "temporary_bytes_per_chip": memory.temporaries,
        "peak_bytes_per_chip": memory.peak,
        "flops_per_chip": found.flops,
        "analytic_flops_ratio": found.flops * len(plan.target.devices) / cost.phase.flops,
        "attention_kernel_calls": found.attention_kernels,
        "bytes_accessed_per_chip": found.bytes_accessed,
        "collectives": {kind: sent._asdict() for kind, sent in found.collectives.items()},
        "roofline_seconds": lies and lies._asdict(),
        "seconds": seconds,
        "bound": lies and lies.bound,
        **rates(plan, seconds, cost.phase.model_flops),
        "compile_seconds": cost.compile_seconds,
    }


def figures(plan: Plan) -> dict[str, Any]:
    """All figures of a plan, for JSON."""
    model_flops = sum(cost.phase.model_flops for cost in plan.costs)
    accounts = [cost.account for cost in plan.costs if cost.account]
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
            "peak_bytes_per_chip": max((a.memory.peak for a in accounts), default=None),
            "flops_per_chip": sum(a.flops for a in accounts),
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


def cell(value: Any, unit: float = 1) -> str:
    """A number with three digits, or all before the point.

    >>> cell(12.345), cell(4.5e9, GB), cell(123456.7), cell(None)
    ('12.3', '4.5', '123,457', '-')
    """
    if value is None or isinstance(value, str):
        return value or "-"
    x = value / unit
    return f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"


def table(plan: Plan) -> list[str]:
    """The figures of a plan as lines of text, its verdict last."""
    found = figures(plan)
    columns = [*found["phases"].values(), found["iteration"]]
    rows = [("a device", *found["phases"], "iteration")]
    for label, key, unit in ROWS:
        rows.append((label, *(cell(column.get(key), unit) for column in columns)))
        if key == "bytes_accessed_per_chip":
            rows += collective_rows(columns)
        if key == "bound":
            rows += roofline_rows(columns)
    return [*heading(plan), "", *aligned(rows), "", verdict(plan)]


def collective_rows(columns: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """How often, and how much one device sends, kind by kind."""
    kinds = sorted({kind for column in columns for kind in column.get("collectives", ())})

    def sent(column: dict[str, Any], kind: str) -> str:
        found = column.get("collectives", {}).get(kind)
        return f"{found['count']:,.0f}: {cell(found['bytes'], GB)}" if found else ""

    return [(f"{kind}, count: GB", *(sent(c, kind) for c in columns)) for kind in kinds]


def roofline_rows(columns: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The seconds of each of the three bounds."""
    bounds = ("compute", "hbm", "ici")
    lines = [column.get("roofline_seconds") for column in columns]
    if not any(lines):
        return []
    return [(f"  by {b}, s", *(cell(x[b]) if x else "" for x in lines)) for b in bounds]


def heading(plan: Plan) -> list[str]:
    """What is planned, and how much the figures are worth."""
    target = plan.target
    count = f"{len(target.devices)} device{'s' if len(target.devices) > 1 else ''}"
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    sizes = {
        name: sum(x.size for x in jax.tree.leaves(parameters_of(kind, config)))
        for name, kind, config in (
            ("policy", "policy", plan.models.policy),
            ("critic", "reward", plan.models.critic),
            ("reward model", "reward", plan.models.reward),
        )
        if config
    }
    lines = [
        f"{count} ({target.name}), {target.memory / GIB:.2f} GiB each; "
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
    if plan.fast:
        lines.append("compiled with less effort: more is read than will be, and memory is another")
    if target.chip is None:
        lines.append("no published figures of these devices: no seconds")
    return lines


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, the first column on the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            x.ljust(w) if i == 0 else x.rjust(w)
            for i, (x, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def verdict(plan: Plan) -> str:
    """Fits or not, by how much, and what to change first if not."""
    memory, worst = plan.target.memory / GIB, plan.worst
    if plan.fits:
        return f"fits: {plan.spare / GIB:.2f} of {memory:.2f} GiB are left ({worst.phase.name})"
    if plan.spare is None:
        why = f"the compiler refuses {worst.phase.name}: {worst.refusal}"
    else:
        why = f"{worst.phase.name} needs {-plan.spare / GIB:.2f} GiB more than {memory:.2f}"
    return f"does not fit: {why}\nfirst change: {first_change(plan)}"


def comparison(plans: Sequence[Plan]) -> list[str]:
    """A line for each alternative, the best first."""
    rows = [("data,fsdp,model", "remat", "micro", "peak, GiB", "s at least", "bounds", "fits")]
    for plan in plans:
        peak = None if plan.spare is None else plan.target.memory - plan.spare
        bounds = "/".join(c.lies.bound if c.lies else "-" for c in plan.costs)
        rows.append(
            (
                ",".join(str(size) for size in plan.mesh.values()),
                plan.config.model.remat,
                str(plan.config.ppo.num_micro_batches),
                cell(peak, GIB),
                cell(plan.seconds),
                bounds,
                "yes" if plan.fits else "no",
            )
        )
    return aligned(rows)


# --- what to change -------------------------------------------------------------------------------


def first_change(plan: Plan) -> str:
    """The change that costs least of those that help the phase that needs most.

    State and frozen parameters that take half of the memory come first; then what is temporary.
    """
    arguments = max((c.account.memory.arguments for c in plan.costs if c.account), default=0)
    if arguments > plan.target.memory / 2:
        tries: tuple[Callable[[Plan], str | None], ...] = (no_copies, smaller_frozen)
    else:
        tries = {
            "rollout": (wider_model, fewer_responses),
            "scoring": (wider_model, fewer_responses),
            "update": (more_pieces, more_remat, wider_model, fewer_responses),
        }[plan.worst.phase.name]
    return next((told for told in (one(plan) for one in tries) if told), "more devices")


def no_copies(plan: Plan) -> str | None:
    data, fsdp = plan.mesh["data"], plan.mesh["fsdp"]
    if data == 1:
        return None
    return f"mesh.data=1 and mesh.fsdp={data * fsdp}: every copy of the state but one goes"


def smaller_frozen(plan: Plan) -> str | None:
    if plan.config.model.frozen_dtype == "bfloat16":
        return None
    return "model.frozen_dtype=bfloat16: halves what is not trained, as reference and reward model"


def wider_model(plan: Plan) -> str | None:
    model, fsdp, heads = plan.mesh["model"], plan.mesh["fsdp"], plan.models.policy.num_kv_heads
    if fsdp % 2 or heads % (2 * model) or plan.models.policy.vocab_size % (2 * model):
        return None
    return (
        f"mesh.model={2 * model} and mesh.fsdp={fsdp // 2}: halves the policy's copy in the "
        "rollout, the KV cache and the logits of a row"
    )


def fewer_responses(plan: Plan) -> str | None:
    s, rows = plan.config.ppo, plan.mesh["data"] * plan.mesh["fsdp"]
    if s.rollout_batch_size % (2 * rows * s.num_minibatches * s.num_micro_batches):
        return None
    return f"ppo.rollout_batch_size={s.rollout_batch_size // 2}: half of the rows a device"


def more_pieces(plan: Plan) -> str | None:
    s, rows = plan.config.ppo, plan.mesh["data"] * plan.mesh["fsdp"]
    if s.rollout_batch_size % (2 * rows * s.num_minibatches * s.num_micro_batches):
        return None
    return f"ppo.num_micro_batches={2 * s.num_micro_batches}: half of the activations at a time"


def more_remat(plan: Plan) -> str | None:
    if plan.config.model.remat == "full":
        return None
    return "model.remat=full: only each layer's input is kept for the backward pass"
