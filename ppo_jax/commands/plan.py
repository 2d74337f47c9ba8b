"""Whether PPO with a config fits on a TPU topology, and the least time of an iteration there."""

import json
import pathlib
import sys
from types import SimpleNamespace

from absl import flags

from ppo_jax import cli
from ppo_jax.config import from_config_dict
from ppo_jax.planner import planner
from ppo_jax.planner import report as plan_report
from ppo_jax.planner.chips import find_chip


def define_flags() -> SimpleNamespace:
    """The flags of the command, by name."""
    by_name = SimpleNamespace(
        config=cli.config_flag(),
        topology=flags.DEFINE_string("topology", None, "v5e:2x2, v5p:4x4x4, v6e:8x8 ..."),
        compare=flags.DEFINE_string(
            "compare",
            None,
            "Meshes, remat policies, micro-batches: fsdp=16;fsdp=4,model=4,remat=dots",
        ),
        fast=flags.DEFINE_boolean(
            "fast",
            False,
            "Compile with less effort, as --compare does: too many bytes are read.",
        ),
        json=flags.DEFINE_string("json", None, "A file for all figures."),
    )
    flags.mark_flag_as_required("config")
    cli.show_in_help(*vars(by_name).values())
    return by_name


def main():
    """Define the flags, parse them, print the plan; exit code 0 if it fits, else 1."""
    flag = define_flags()

    def plan():
        config, topology = from_config_dict(flag.config.value), flag.topology.value
        if topology:
            find_chip(topology)
        if topology and not planner.has_libtpu():
            print("there is no libtpu (pip install 'ppo_jax[plan]'): a plan for the local devices")
            topology = None
        elif not topology:
            print("no --topology: a plan for the local devices")
        target = planner.find_target(topology)
        if flag.compare.value:
            configs = planner.alternatives(config, flag.compare.value)
            plans = planner.compare(configs, target)
            print("\n".join(["", *plan_report.comparison(plans), ""]))
        else:
            plans = [planner.make_plan(config, target, fast=flag.fast.value)]
        print("\n".join(plan_report.table(plans[0])))
        if flag.json.value:
            write_figures(flag.json.value, plans)
        sys.exit(0 if plans[0].fits else 1)

    cli.run(plan)


def write_figures(path: str, plans: list[planner.Plan]):
    """The figures of the first plan, and those of the others below "others"."""
    first, *others = (plan_report.figures(plan) for plan in plans)
    text = json.dumps({**first, "others": others}, indent=2)
    pathlib.Path(path).write_text(text + "\n")
