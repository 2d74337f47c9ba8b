"""A finished stage as a Hugging Face folder: weights, tokenizer, generation config, model card.

With --adapter_of, the adapter of a policy alone, as a folder that peft loads.

python experiments/export_hf.py --workdir=runs/quickstart --stage=ppo --out=exported/film-policy
"""

import os

from absl import flags, logging

from ppo_jax import cli
from ppo_jax.pipeline.export import DTYPES, export_stage

WORKDIR = flags.DEFINE_string("workdir", None, "A run's folder.", required=True)
STAGE = flags.DEFINE_enum("stage", None, ["sft", "reward", "ppo"], "Whose model.", required=True)
OUT = flags.DEFINE_string("out", None, "The folder to write, new or empty.", required=True)
DTYPE = flags.DEFINE_enum("dtype", "float32", DTYPES, "Of the weights.")
ADAPTER_OF = flags.DEFINE_string(
    "adapter_of", "", "Export the LoRA adapter alone: folder or hub id of the model it goes onto."
)


def main():
    logging.set_verbosity(logging.WARNING)
    export_stage(
        WORKDIR.value, STAGE.value, OUT.value, dtype=DTYPE.value, adapter_of=ADAPTER_OF.value
    )
    if ADAPTER_OF.value and not os.path.isdir(ADAPTER_OF.value):
        print(f"{ADAPTER_OF.value} is taken for a model on the hub, and was not compared")
    print(f"{OUT.value} is written: its README.md says how to load it")


if __name__ == "__main__":
    cli.run(main)
