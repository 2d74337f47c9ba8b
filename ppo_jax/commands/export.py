"""A finished stage as a Hugging Face folder: weights, tokenizer, generation config, model card."""

import os

from absl import flags, logging

from ppo_jax import cli
from ppo_jax.pipeline.export import DTYPES, export_stage
from ppo_jax.training.stages import TRAINING_STAGES


def main():
    """Define the flags, parse them, export."""
    stages = [stage.name for stage in TRAINING_STAGES]
    workdir = flags.DEFINE_string("workdir", None, "A run's folder.", required=True)
    stage = cli.stage_flag(stages, "Whose model", required=True)
    out = flags.DEFINE_string("out", None, "The folder to write, new or empty.", required=True)
    dtype = flags.DEFINE_enum("dtype", "float32", DTYPES, "Data type of the weights.")
    adapter_of = flags.DEFINE_string(
        "adapter_of",
        "",
        "Export the LoRA adapter alone: folder or hub id of the model it goes onto.",
    )
    cli.show_in_help(workdir, stage, out, dtype, adapter_of)

    def export():
        logging.set_verbosity(logging.WARNING)
        base = adapter_of.value
        export_stage(workdir.value, stage.value, out.value, dtype=dtype.value, adapter_of=base)
        if base and not os.path.isdir(base):
            print(f"{base} is taken for a model on the hub, and was not compared")
        print(f"{out.value} is written: its README.md says how to load it")

    cli.run(export)
