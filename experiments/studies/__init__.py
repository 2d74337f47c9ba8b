"""Studies on the film-review task: each a config with its points, one command, and a table.

    python experiments/sweep.py --config=experiments/studies/over_optimisation.py:tiny \
        --workdir=runs/over_optimisation

runs one of them. `python experiments/study_tables.py --keep=runs/over_optimisation` keeps its
figures in results/ and writes the tables of docs/studies.md again, from all that is kept there.
"""

import importlib.util
from pathlib import Path

from ml_collections import config_dict

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def quickstart(variant: str) -> config_dict.ConfigDict:
    """The config of the quickstart, which a study changes.

    Args:
        variant: "default" is SmolLM2-135M, "tiny" a model of a million parameters from scratch.
    """
    return config_of("quickstart", variant)


def config_of(name: str, variant: str) -> config_dict.ConfigDict:
    """A config of `configs/`, which a study changes.

    Args:
        name: of its file.
        variant: of it.
    """
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant)
