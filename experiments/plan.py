"""Whether PPO with a config fits on a TPU topology, and at best how fast; from any machine.

python experiments/plan.py --config=configs/pod.py:llama3_8b --topology=v5p:4x4x4
python experiments/plan.py --config=configs/pod.py:qwen3_0_6b --topology=v5e:4x4 \
    --compare="fsdp=16;fsdp=8,model=2;fsdp=16,remat=dots"

Compiles the programs of an iteration with libtpu (`pip install 'ppo_jax[plan]'`); nothing is run,
no weights are made. Without --topology, or without libtpu, it plans for the local devices. Ends
with 0 when it fits (of several, when one does), with 1 when not.
"""

import json
import pathlib
import sys

from absl import flags
from ml_collections import config_flags

from ppo_jax import cli
from ppo_jax.config import from_config_dict
from ppo_jax.planner import planner
from ppo_jax.planner import report as plan_report


def main():
    config = from_config_dict(CONFIG.value)
    if TOPOLOGY.value and not planner.has_libtpu():
        print("there is no libtpu (pip install 'ppo_jax[plan]'): a plan for the local devices")
    elif not TOPOLOGY.value:
        print("no --topology: a plan for the local devices")
    target = planner.find_target(TOPOLOGY.value)
    if COMPARE.value:
        plans = planner.compare(planner.alternatives(config, COMPARE.value), target)
        print("\n".join(["", *plan_report.comparison(plans), ""]))
    else:
        plans = [planner.make_plan(config, target, fast=FAST.value)]
    print("\n".join(plan_report.table(plans[0])))
    if JSON.value:
        first, *others = (plan_report.figures(plan) for plan in plans)
        text = json.dumps({**first, "others": others}, indent=2)
        pathlib.Path(JSON.value).write_text(text + "\n")
    sys.exit(0 if plans[0].fits else 1)


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file("config", help_string="FILE.py or FILE.py:VARIANT")
    TOPOLOGY = flags.DEFINE_string("topology", None, "v5e:2x2, v5p:4x4x4, v6e:8x8 ...")
    COMPARE = flags.DEFINE_string(
        "compare", None, "Meshes, remat policies, micro-batches: fsdp=16;fsdp=4,model=4,remat=dots"
    )
    FAST = flags.DEFINE_boolean(
        "fast", False, "Compile with less effort, as --compare does: seconds by HBM are too many."
    )
    JSON = flags.DEFINE_string("json", None, "A file for all figures.")
    flags.mark_flag_as_required("config")
    cli.run(main)
