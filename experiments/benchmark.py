"""Benchmarks, one per subcommand.

    python experiments/benchmark.py iteration

iteration, rollout, update: PPO on random models, in seconds of CPU time.
sft, reward: a step of these stages on random models and texts, likewise.
grid: one of these stages at random shapes, each beside another library, in turn.
attention: plain attention of long rows in blocks, beside products with all pairs.
cpu_tricks: what the forms of `ppo_jax.core.cpu` save, as ratios of CPU times. Three minutes.
lanes: a sweep as one program beside its lanes one by one, in CPU seconds of an iteration.
scaling: cost per chip of a PPO iteration on more and more chips; compiled, not run.
gpu_report: what one NVIDIA GPU does, in 15 minutes; gpu_part is one of its parts.

--help after a subcommand lists its options.
"""

import importlib
import sys

from absl import flags, logging

from ppo_jax import cli

# subcommand -> (module, function)
SUBCOMMANDS = {
    "iteration": ("ppo", "iteration"),
    "rollout": ("ppo", "rollout"),
    "update": ("ppo", "update"),
    "sft": ("supervised", "sft"),
    "reward": ("supervised", "reward"),
    "grid": ("grid", "main"),
    "attention": ("attention", "main"),
    "cpu_tricks": ("cpu_tricks", "main"),
    "lanes": ("lanes", "main"),
    "scaling": ("scaling", "main"),
    "gpu_report": ("gpu_report", "main"),
    "gpu_part": ("gpu_parts", "main"),
}


def main():
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name.startswith("-"):  # --help
        print(__doc__)
        return
    if name not in SUBCOMMANDS:
        got = repr(name) if name else "none"
        cli.stop(f"needs a subcommand, one of {list(SUBCOMMANDS)}, got {got}", cli.USER_MISTAKE)
    module, function = SUBCOMMANDS[name]
    module = importlib.import_module(f"benchmarks.{module}")
    for part in [m for name, m in sys.modules.items() if name.startswith("benchmarks.")]:
        flags.adopt_module_key_flags(part)  # for --help
    sys.modules["__main__"].__doc__ = module.__doc__
    logging.set_verbosity(logging.WARNING)
    cli.run(getattr(module, function))


if __name__ == "__main__":
    main()
