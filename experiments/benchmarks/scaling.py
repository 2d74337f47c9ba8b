"""What a PPO iteration costs a chip from 4 to 256 chips, at a constant batch a chip.

    pip install 'ppo_jax[plan]'
    python experiments/benchmark.py scaling --config=configs/pod.py:qwen3_0_6b --plot=scaling.png

Computed from the compiled programs, see `experiments/plan.py`; nothing is run. The mesh keeps the
config's `model` axis; `fsdp` grows until a piece of the embedding has 128 numbers (see
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
from ppo_jax.planner.chips import Chip, find_chip
from ppo_jax.planner.report import aligned, cell, figures

LANES = 128  # of a TPU: what a piece of the embedding should not fall below
MOST_CHIPS = 256  # of a v5e or v6e topology
GB, TERA = 1e9, 1e12

CONFIG = config_flags.DEFINE_config_file("config", help_string="FILE.py or FILE.py:VARIANT")
CHIP = flags.DEFINE_enum("chip", "v5e", ["v5e", "v5p", "v6e"], "Of which the topologies are.")
COUNTS = [str(2**n) for n in range(2, 9)]
CHIPS = flags.DEFINE_list("chips", COUNTS, f"Powers of two from 4 to {MOST_CHIPS}.")
ROWS = flags.DEFINE_list("rows", ["16", "4"], "Responses of an iteration for each chip; up to 4.")
FAST = flags.DEFINE_boolean("fast", False, "Compile with less effort: too much is read from HBM.")
PLOT = flags.DEFINE_string("plot", None, "A PNG file for the plot.")
JSON = flags.DEFINE_string("json", None, "A file for all figures.")
flags.mark_flag_as_required("config")


def main():
    config, chip = from_config_dict(CONFIG.value), find_chip(CHIP.value)
    counts = numbers("chips", CHIPS.value, is_count, f"powers of two from 4 to {MOST_CHIPS}")
    rows = numbers("rows", ROWS.value, lambda n: n >= 1, "one to four numbers from 1 on", most=4)
    for flag in (PLOT, JSON):
        if flag.value and not pathlib.Path(flag.value).absolute().parent.is_dir():
            raise ValueError(f"--{flag.name} must be in a folder that exists, got {flag.value!r}")
    if not planner.has_libtpu():
        raise ValueError("scaling needs libtpu: pip install 'ppo_jax[plan]'")
    embed = planner.read_models(config).policy.embed_dim
    cases = []
    for count, each in itertools.product(counts, rows):
        target = planner.find_target(topology(chip, count))
        grown = with_chips(config, count, rows=each, embed=embed)
        planner.prepare(grown, target)  # refuse before anything is compiled
        cases.append((each, grown, target))
    found = []
    for each, grown, target in cases:
        print(f"{target.name}, {each} responses a chip:")
        plan = planner.make_plan(grown, target, fast=FAST.value)
        found.append({"rows_per_chip": each, **figures(plan)})
        if JSON.value:  # as far as it is
            pathlib.Path(JSON.value).write_text(json.dumps(found, indent=2) + "\n")
    tell(found)


def tell(found: Sequence[dict]):
    """The table, what follows from it, and the plot."""
    print("\n".join(["", *table(found), "", *findings(found)]))
    if PLOT.value:
        plots.save_png(panels(found), pathlib.Path(PLOT.value), columns=3)


def numbers(
    flag: str, texts: Sequence[str], allowed: Callable[[int], bool], rule: str, most: int = 99
) -> list[int]:
    """The numbers of a list, without repeats."""
    found = sorted({int(text) if text.isdecimal() else -1 for text in texts}, reverse=True)
    if not 1 <= len(found) <= most or not all(map(allowed, found)):
        raise ValueError(f"--{flag} must be {rule}, got {','.join(texts)!r}")
    return found[::-1] if flag == "chips" else found


def is_count(count: int) -> bool:
    return 4 <= count <= MOST_CHIPS and not count & (count - 1)


def topology(chip: Chip, count: int) -> str:
    """The most even grid of the chip's dimensions: "v5e:4x8", "v5p:2x2x4", "v5p:2x2x1"."""
    bits = count.bit_length() - 1
    sides = [2 ** ((bits + i) // chip.ici_dims) for i in range(chip.ici_dims)]
    sides.sort(key=lambda side: (side == 1, side))
    return f"{chip.name}:{'x'.join(map(str, sides))}"


def with_chips(config: Config, count: int, *, rows: int, embed: int) -> Config:
    """The config for so many chips: its `model` axis, its minibatches, as many rows a chip."""
    model = max(config.mesh.model, 1)
    if count % model:
        raise ValueError(f"--chips must be multiples of mesh.model ({model}), got {count}")
    largest = 1 << max(embed // LANES, 1).bit_length() - 1
    fsdp = min(count // model, largest)
    mesh = dataclasses.replace(config.mesh, data=count // (model * fsdp), fsdp=fsdp, model=model)
    pieces = config.ppo.num_minibatches * config.ppo.num_micro_batches
    if rows * model % pieces:  # the chips of a `model` group share their rows
        raise ValueError(
            f"--rows times mesh.model ({model}) must be a multiple of num_minibatches x "
            f"num_micro_batches ({pieces}), got {rows}"
        )
    ppo = dataclasses.replace(config.ppo, rollout_batch_size=rows * count)
    return dataclasses.replace(config, mesh=mesh, ppo=ppo)


# --- what is told ---------------------------------------------------------------------------------

BOUNDS = ("compute", "hbm", "ici")


def sent(plan: dict) -> float:
    """Bytes that a chip sends in all phases and kinds of collectives."""
    kinds = (phase["collectives"] for phase in plan["phases"].values())
    return sum(kind["bytes"] for phase in kinds for kind in phase.values())


def share(plan: dict, phase: str) -> float:
    """Seconds of the collectives over those of the longer of matrix products and memory."""
    least = plan["phases"][phase]["roofline_seconds"]
    return least["ici"] / max(least["compute"], least["hbm"])


def table(found: Sequence[dict]) -> list[str]:
    """A line for each number of chips and of rows."""
    phases = list(found[0]["phases"])
    bounds = [f"{phase}: {', '.join(BOUNDS)}" for phase in phases]
    rows = [("rows", "chips", "mesh", "TFLOP", "GB sent", *bounds, "s at least", "fits")]
    for plan in by_rows(found):
        where = [plan["rows_per_chip"], plan["devices"], "x".join(map(str, plan["mesh"].values()))]
        if not compiled(plan):
            rows.append((*map(str, where), *["-"] * (len(phases) + 3), "no"))
            continue
        least = [plan["phases"][phase]["roofline_seconds"] for phase in phases]
        rows.append(
            (
                *map(str, where),
                f"{plan['iteration']['flops_per_chip'] / TERA:.2f}",
                cell(sent(plan), GB),
                *(", ".join(cell(each[bound]) for bound in BOUNDS) for each in least),
                cell(plan["iteration"]["seconds"]),
                "yes" if plan["fits"] else "no",
            )
        )
    return aligned(rows)


def compiled(plan: dict) -> bool:
    """Whether the compiler refused no phase, for want of memory."""
    return all("refusal" not in phase for phase in plan["phases"].values())


def by_rows(found: Sequence[dict]) -> list[dict]:
    return sorted(found, key=lambda plan: (-plan["rows_per_chip"], plan["devices"]))


def series(found: Sequence[dict]) -> dict[int, list[dict]]:
    """Rows a chip -> plans by the number of chips, without those that were refused."""
    groups = itertools.groupby(
        filter(compiled, by_rows(found)), key=lambda plan: plan["rows_per_chip"]
    )
    return {rows: list(plans) for rows, plans in groups}


def findings(found: Sequence[dict]) -> list[str]:
    """How flat the flops are, and from where on the collectives take longest."""
    lines = []
    for rows, plans in series(found).items():
        flops = [plan["iteration"]["flops_per_chip"] for plan in plans]
        spread = max(flops) / min(flops) - 1
        lines.append(f"{rows} responses a chip: flops a chip within {spread:.2%} of each other")
        for phase in plans[0]["phases"]:
            where = [str(plan["devices"]) for plan in plans if share(plan, phase) > 1]
            most = max(share(plan, phase) for plan in plans)
            told = f"dominate on {', '.join(where)} chips" if where else "never dominate"
            lines.append(
                f"  {phase}: collectives {told}; at most {most:.2f} of the longer of products and "
                "memory"
            )
    return lines


def panels(found: Sequence[dict]) -> dict[str, plots.Draw]:
    """Titles and figures: flops, bytes sent, and what the collectives take of the roofline."""
    return {
        "Flops a chip, against the fewest chips": lambda axes: draw_flops(axes, found),
        "Sent by a chip in an iteration, GB": lambda axes: draw_sent(axes, found),
        "Collectives / the longer of products and memory": lambda axes: draw_shares(axes, found),
    }


STYLES = ("-", "--", ":", "-.")  # of the numbers of rows
COLORS = ("ppo", "sft", "reward")  # of the phases


def draw_flops(axes: Axes, found: Sequence[dict]):
    """Should be flat."""
    most = 0.1
    for style, (rows, plans) in zip(STYLES, series(found).items(), strict=False):
        flops = [plan["iteration"]["flops_per_chip"] for plan in plans]
        relative = [each / flops[0] for each in flops]
        most = max(most, *(1.1 * abs(each - 1) for each in relative))
        axes.plot(
            chips(plans), relative, "o" + style, ms=4, color=plots.COLORS["ppo"], label=name(rows)
        )
    axes.axhspan(0.95, 1.05, color=plots.COLORS["base"], alpha=0.15, lw=0, label="5 %")
    axes.set_ylim(1 - most, 1 + most)
    finish(axes, found, loc="lower left")


def draw_sent(axes: Axes, found: Sequence[dict]):
    """All phases and kinds together."""
    for style, (rows, plans) in zip(STYLES, series(found).items(), strict=False):
        gigabytes = [sent(plan) / GB for plan in plans]
        axes.plot(
            chips(plans), gigabytes, "o" + style, ms=4, color=plots.COLORS["ppo"], label=name(rows)
        )
    axes.set_ylim(0)
    finish(axes, found, loc="lower right")


def draw_shares(axes: Axes, found: Sequence[dict]):
    """Above 1 the collectives take longest."""
    for style, (rows, plans) in zip(STYLES, series(found).items(), strict=False):
        for color, phase in zip(COLORS, plans[0]["phases"], strict=False):
            shares = [share(plan, phase) for plan in plans]
            label = f"{phase}, {rows} a chip"
            axes.plot(
                chips(plans), shares, "o" + style, ms=4, color=plots.COLORS[color], label=label
            )
    axes.axhline(1, color=plots.COLORS["base"], lw=1)
    axes.set_yscale("log")
    finish(axes, found, loc="best", ncols=2)


def name(rows: int) -> str:
    return f"{rows} responses a chip"


def chips(plans: Sequence[dict]) -> list[int]:
    return [plan["devices"] for plan in plans]


def finish(axes: Axes, found: Sequence[dict], **legend: Any):
    """Chips from left to right, each time twice as many."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({plan["devices"] for plan in found}))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("chips")
    axes.legend(handlelength=3, **legend)
