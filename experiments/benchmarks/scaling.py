"""Weak scaling: cost per chip of a PPO iteration on 4 to 256 chips, with a constant batch per chip.

    pip install 'ppo_jax[plan]'
    python experiments/benchmark.py scaling --config=configs/pod.py:qwen3_0_6b --plot=scaling.png

Computed from the compiled programs, see `experiments/plan.py`; nothing is run. The mesh keeps the
config's `model` axis; `fsdp` grows until a shard of the embedding is 128 wide (see
`configs/pod.py`), and then `data`.
"""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator, ScalarFormatter
from ml_collections import config_flags

from ppo_jax.config import Config, from_config_dict
from ppo_jax.evaluation.report import plots
from ppo_jax.planner import planner
from ppo_jax.planner.chips import Chip, Roofline, find_chip
from ppo_jax.planner.report import GB, TERA, align_columns, figures, format_value

LANES = 128  # of a TPU: the least width of a shard of the embedding

CONFIG = config_flags.DEFINE_config_file("config", help_string="FILE.py or FILE.py:VARIANT")
CHIP = flags.DEFINE_enum("chip", "v5e", ["v5e", "v5p", "v6e"], "Chip of the topologies.")
COUNTS = [2**n for n in range(2, 9)]  # the largest v5e or v6e topology has 256 chips
CHIPS = flags.DEFINE_list("chips", [*map(str, COUNTS)], f"Powers of two from 4 to {COUNTS[-1]}.")
ROWS = flags.DEFINE_list("rows", ["16", "4"], "Responses of an iteration for each chip; up to 4.")
FAST = flags.DEFINE_boolean("fast", False, "Compile with less effort: too many bytes are read.")
PLOT = flags.DEFINE_string("plot", None, "A PNG file for the plot.")
JSON = flags.DEFINE_string("json", None, "A file for all figures.")
flags.mark_flag_as_required("config")


def main():
    config, chip = from_config_dict(CONFIG.value), find_chip(CHIP.value)
    counts = parse_numbers(CHIPS, set(COUNTS).issuperset, "powers of two from 4 to 256")
    rows = parse_numbers(
        ROWS, lambda x: 0 not in x and len(x) <= 4, "one to four numbers from 1 on"
    )
    for flag in (PLOT, JSON):
        if flag.value and not pathlib.Path(flag.value).absolute().parent.is_dir():
            raise ValueError(f"--{flag.name} must be in a folder that exists, got {flag.value!r}")
    if not planner.has_libtpu():
        raise ValueError("scaling needs libtpu: pip install 'ppo_jax[plan]'")
    embed = planner.read_models(config).policy.embed_dim
    cases = []
    for count, batch in itertools.product(counts, reversed(rows)):
        target = planner.find_target(topology(chip, count))
        scaled = scale_config(config, count, rows=batch, embed=embed)
        planner.prepare(scaled, target)  # refuse before anything is compiled
        cases.append((batch, scaled, target))
    plans = []
    for batch, scaled, target in cases:
        print(f"{target.name}, {batch} responses a chip:")
        plan = planner.make_plan(scaled, target, fast=FAST.value)
        plans.append({"rows_per_chip": batch, **figures(plan)})
        if JSON.value:  # after each, as a later one may fail
            pathlib.Path(JSON.value).write_text(json.dumps(plans, indent=2) + "\n")
    print("\n".join(["", *table(plans), "", *findings(plans)]))
    if PLOT.value:
        plots.save_png(panels(plans), pathlib.Path(PLOT.value), columns=3)


def parse_numbers(flag: flags.FlagHolder, allowed: Callable[[set], bool], rule: str) -> list[int]:
    """The distinct numbers of a flag, the least first."""
    numbers = {int(text) if text.isdecimal() else 0 for text in flag.value}
    if not numbers or not allowed(numbers):
        raise ValueError(f"--{flag.name} must be {rule}, got {','.join(flag.value)!r}")
    return sorted(numbers)


def topology(chip: Chip, count: int) -> str:
    """The most even grid of the chip's dimensions: "v5e:4x8", "v5p:2x2x4", "v5p:2x2x1"."""
    bits = count.bit_length() - 1
    sides = [2 ** ((bits + i) // chip.ici_dims) for i in range(chip.ici_dims)]
    sides.sort(key=lambda side: (side == 1, side))
    return f"{chip.name}:{'x'.join(map(str, sides))}"


def scale_config(config: Config, count: int, *, rows: int, embed: int) -> Config:
    """The config on so many chips with so many rows per chip; `model` axis and minibatches stay."""
    model = max(config.mesh.model, 1)
    if count % model:
        raise ValueError(f"--chips must be multiples of mesh.model ({model}), got {count}")
    largest = 1 << max(embed // LANES, 1).bit_length() - 1
    fsdp = min(count // model, largest)
    mesh = dataclasses.replace(config.mesh, data=count // (model * fsdp), fsdp=fsdp, model=model)
    num_micro_batches = config.ppo.num_minibatches * config.ppo.num_micro_batches
    if rows * model % num_micro_batches:  # the chips of a `model` group share their rows
        raise ValueError(
            f"--rows times mesh.model ({model}) must be a multiple of num_minibatches x "
            f"num_micro_batches ({num_micro_batches}), got {rows}"
        )
    ppo = dataclasses.replace(config.ppo, rollout_batch_size=rows * count)
    return dataclasses.replace(config, mesh=mesh, ppo=ppo)


# --- results, as figures of plans -----------------------------------------------------------------


def collective_bytes(plan: dict) -> float:
    """Bytes that a chip sends in all phases and kinds of collectives."""
    kinds = (phase["collectives"] for phase in plan["phases"].values())
    return sum(kind["bytes"] for phase in kinds for kind in phase.values())


def collective_share(plan: dict, phase: str) -> float:
    """Seconds of the collectives over those of the longer of matrix products and memory."""
    roofline = Roofline(**plan["phases"][phase]["roofline_seconds"])
    return roofline.ici / max(roofline.compute, roofline.hbm)


def table(plans: Sequence[dict]) -> list[str]:
    """A line for each number of chips and of rows."""
    phases = list(plans[0]["phases"])
    bounds = [f"{phase}: {', '.join(Roofline._fields)}" for phase in phases]
    rows = [("rows", "chips", "mesh", "TFLOP", "GB sent", *bounds, "s at least", "fits")]
    for plan in by_rows(plans):
        mesh = "x".join(map(str, plan["mesh"].values()))
        case = (str(plan["rows_per_chip"]), str(plan["devices"]), mesh)
        if not compiled(plan):
            rows.append((*case, *["-"] * (len(phases) + 3), "no"))
            continue
        rooflines = [plan["phases"][phase]["roofline_seconds"].values() for phase in phases]
        rows.append(
            (
                *case,
                f"{plan['iteration']['flops_per_chip'] / TERA:.2f}",
                format_value(collective_bytes(plan), GB),
                *(", ".join(map(format_value, seconds)) for seconds in rooflines),
                format_value(plan["iteration"]["seconds"]),
                "yes" if plan["fits"] else "no",
            )
        )
    return align_columns(rows)


def compiled(plan: dict) -> bool:
    """Whether all phases compiled: the compiler refuses what does not fit."""
    return all("refusal" not in phase for phase in plan["phases"].values())


def by_rows(plans: Sequence[dict]) -> list[dict]:
    return sorted(plans, key=lambda plan: (-plan["rows_per_chip"], plan["devices"]))


def group_by_rows(plans: Sequence[dict]) -> dict[int, list[dict]]:
    """{rows per chip: plans by the number of chips, without those that were refused}"""
    groups = itertools.groupby(filter(compiled, by_rows(plans)), lambda plan: plan["rows_per_chip"])
    return {rows: list(group) for rows, group in groups}


def findings(plans: Sequence[dict]) -> list[str]:
    """How flat the flops are, and on how many chips the collectives take longest."""
    lines = []
    for rows, group in group_by_rows(plans).items():
        flops = [plan["iteration"]["flops_per_chip"] for plan in group]
        spread = max(flops) / min(flops) - 1
        lines.append(f"{rows} responses a chip: flops a chip within {spread:.2%} of each other")
        for phase in group[0]["phases"]:
            shares = {plan["devices"]: collective_share(plan, phase) for plan in group}
            counts = ", ".join(str(count) for count, share in shares.items() if share > 1)
            verdict = f"dominate on {counts} chips" if counts else "never dominate"
            lines.append(
                f"  {phase}: collectives {verdict}; at most {max(shares.values()):.2f} of the "
                "longer of products and memory"
            )
    return lines


# --- the plot -------------------------------------------------------------------------------------

STYLES = ("-", "--", ":", "-.")  # by the number of rows
COLORS = ("ppo", "sft", "reward")  # by phase
Groups = Sequence[tuple[str, tuple[int, list[dict]]]]  # (style, (rows per chip, plans))


def panels(plans: Sequence[dict]) -> dict[str, plots.Draw]:
    """Titles and charts: flops, bytes sent, and the collectives' share of the roofline."""
    groups = list(zip(STYLES, group_by_rows(plans).items(), strict=False))
    return {
        "Flops a chip, against the fewest chips": lambda axes: draw_flops(axes, groups),
        "Sent by a chip in an iteration, GB": lambda axes: draw_bytes(axes, groups),
        "Collectives / the longer of products and memory": lambda axes: draw_shares(axes, groups),
    }


def draw_flops(axes: Axes, groups: Groups):
    """Should be flat."""
    margin = 0.1
    for style, (rows, plans) in groups:
        flops = [plan["iteration"]["flops_per_chip"] for plan in plans]
        relative = [x / flops[0] for x in flops]
        margin = max(margin, *(1.1 * abs(x - 1) for x in relative))
        draw_line(axes, plans, relative, style, "ppo", f"{rows} responses a chip")
    axes.axhspan(0.95, 1.05, color=plots.COLORS["base"], alpha=0.15, lw=0, label="5 %")
    axes.set_ylim(1 - margin, 1 + margin)
    label_chips(axes, groups, loc="lower left")


def draw_bytes(axes: Axes, groups: Groups):
    """All phases and kinds together."""
    for style, (rows, plans) in groups:
        gigabytes = [collective_bytes(plan) / GB for plan in plans]
        draw_line(axes, plans, gigabytes, style, "ppo", f"{rows} responses a chip")
    axes.set_ylim(0)
    label_chips(axes, groups, loc="lower right")


def draw_shares(axes: Axes, groups: Groups):
    """Above 1 the collectives take longest."""
    for style, (rows, plans) in groups:
        for color, phase in zip(COLORS, plans[0]["phases"], strict=False):
            shares = [collective_share(plan, phase) for plan in plans]
            draw_line(axes, plans, shares, style, color, f"{phase}, {rows} a chip")
    axes.axhline(1, color=plots.COLORS["base"], lw=1)
    axes.set_yscale("log")
    label_chips(axes, groups, loc="best", ncols=2)


def draw_line(axes: Axes, plans: list[dict], values: list, style: str, color: str, label: str):
    chips = [plan["devices"] for plan in plans]
    axes.plot(chips, values, "o" + style, ms=4, color=plots.COLORS[color], label=label)


def label_chips(axes: Axes, groups: Groups, **legend: Any):
    """The axis of chips, and the legend."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({plan["devices"] for _, (_, plans) in groups for plan in plans}))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("chips")
    axes.legend(handlelength=3, **legend)
