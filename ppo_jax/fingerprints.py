"""Data told apart: a stage that goes on must read what it began with, in the same order."""

import dataclasses
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ppo_jax.config import Config
from ppo_jax.models import describe_stage, has_begun

FIELDS = {"sft": "data", "reward": "data", "ppo": "prompts"}  # what a stage trains on


def fingerprint(data: Any) -> dict[str, int]:
    """The number of records and a checksum over all of them, for stage.json.

    Args:
        data: `Texts`, `RewardData` or `PromptData`, tokenised.
    """
    texts = getattr(data, "texts", data)
    count = len(texts) if isinstance(texts, list) else len(np.unique(texts.records))
    return {"rows": count, "crc32": checksum(data)}


def checksum(value: Any, before: int = 0) -> int:
    """CRC-32 of arrays, lists and dataclasses of them; what stands in a mapping does not count."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            before = checksum(getattr(value, field.name), before)
        return before
    if isinstance(value, Mapping):  # of what was left out
        return before
    is_array = isinstance(value, np.ndarray | jax.Array)
    return zlib.crc32(np.asarray(value).tobytes() if is_array else repr(value).encode(), before)


def check_same_data(config: Config, workdir: Path, data: Mapping[str, Any]):
    """Refuse to go on with a stage on other data than it began with.

    Args:
        config: of the run.
        workdir: the run's folder.
        data: what the stages read, see `checks.check_data`.

    Raises:
        ValueError: a file has changed; it is named.
    """
    for stage in [name for name in FIELDS if name in data]:
        folder = workdir / stage
        old = describe_stage(folder).get("data") if has_begun(folder) else None
        new = fingerprint(data[stage] if stage == "ppo" else data[stage][0])
        if old in (None, new):  # stages of before had none
            continue
        same = old["rows"] == new["rows"]
        rows = "rows, but others" if same else f"-> {new['rows']} rows"
        raise ValueError(
            f"{getattr(getattr(config, stage), FIELDS[stage])} has changed since {folder} was "
            f"begun ({old['rows']} {rows}): put it back, or choose another workdir"
        )
