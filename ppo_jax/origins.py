"""What the data and the base model in a run's folder were made from, and whether that binds it."""

import shutil
from pathlib import Path

from ppo_jax.config import STAGES
from ppo_jax.models import has_begun
from ppo_jax.runs import fixed_differences
from ppo_jax.workdir import read_config

MADE_FROM = {"data": ("prepare",), "base": ("model", "seed")}  # folder: settings


def check_origin(workdir: Path, config: dict):
    """Refuse a folder whose data or base model were made from other settings.

    A base model that was made here and that no stage has learned from binds nobody.

    Raises:
        ValueError: with the settings that differ.
    """
    binding = [name for name in MADE_FROM if name == "data" or not may_be_made_anew(workdir)]
    if differences := [x for name in binding for x in origin_differences(workdir, name, config)]:
        raise ValueError(
            f"{workdir} was begun with other settings: {'; '.join(differences)}. "
            "Set them back, or choose another workdir."
        )


def drop_outdated_base(workdir: Path, config: dict):
    """Remove a base model that was made from other settings; after `check_origin`."""
    folder = workdir / "base"
    if origin_differences(workdir, "base", config):
        folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)


def may_be_made_anew(workdir: Path) -> bool:
    """Whether the base model is a start's own work, and no stage has taken a step."""
    made_here = (read_config(workdir) or {}).get("model", {}).get("vocabulary_data")
    return bool(made_here) and not any(has_begun(workdir / stage) for stage in STAGES)


def origin_differences(workdir: Path, name: str, config: dict) -> list[str]:
    """In which settings the origin of `workdir/name` differs from the config."""
    old = read_config(workdir)
    if old is None or not (workdir / name).is_dir():  # a start that failed before it made it
        return []
    old, new = ({field: c[field] for field in MADE_FROM[name]} for c in (old, config))
    return fixed_differences(old, new)
