"""Fingerprints of training data and provenance of the base model, checked on resume."""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ppo_jax.config.parsing import changeable_fields
from ppo_jax.config.run import STAGE_NAMES, Config, ModelSettings
from ppo_jax.data.atomic import remove_folder
from ppo_jax.io.model_spec import ModelSpec
from ppo_jax.io.run_folder import read_config
from ppo_jax.io.stage_folder import describe_stage, has_begun
from ppo_jax.io.tokenizers import load_tokenizer
from ppo_jax.training.stage import Stage, fixed_differences, training_data


def fingerprint(data: Any) -> dict[str, int]:
    """The number of records and a checksum over all of them, for stage.json."""
    texts = getattr(data, "texts", data)
    count = len(texts) if isinstance(texts, list) else len(np.unique(texts.records))
    columns = getattr(data, "columns", None)  # of prompts, for reward functions
    others = {"columns": checksum(sorted(columns.items()))} if columns else {}
    return {"rows": count, "crc32": checksum(data), **others}


def checksum(value: Any, before: int = 0) -> int:
    """CRC-32 of arrays, lists and dataclasses of them; mappings do not count."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            part = getattr(value, field.name)
            if part is None and "added_later" in field.metadata:
                continue  # or no run that began before could go on
            before = checksum(part, before)
        return before
    if isinstance(value, Mapping):  # of what was left out
        return before
    is_array = isinstance(value, np.ndarray | jax.Array)
    return zlib.crc32(np.asarray(value).tobytes() if is_array else repr(value).encode(), before)


def check_same_data(
    config: Config,
    workdir: Path,
    stages: Sequence[Stage],
    data: Mapping[str, Any],
    starts: Mapping[str, ModelSpec],
):
    """Refuse to resume a stage on other data than it began with.

    Args:
        config: of the run.
        workdir: the run's folder.
        stages: those that will run.
        data: {stage: what it reads}.
        starts: {stage: the model that it starts from}, whose chat template made text of messages.

    Raises:
        ValueError: a file or the chat template has changed; it is named.
    """
    for stage in stages:
        folder = workdir / stage.name
        old = describe_stage(folder).get("data") if has_begun(folder) else None
        if old is None:  # not begun, or before there were fingerprints
            continue
        new = fingerprint(training_data(data[stage.name]))
        if old == {name: new.get(name) for name in old}:  # older stages have fewer
            continue
        check_same_template(folder, starts[stage.name].tokenizer)
        same = old.get("rows") == new["rows"]
        rows = "rows, but others" if same else f"-> {new['rows']} rows"
        path = getattr(getattr(config, stage.name), stage.data_fields[0])
        raise ValueError(
            f"{path} has changed since {folder} was begun ({old.get('rows')} {rows}): "
            "put it back, or choose another workdir"
        )


def check_same_template(folder: Path, tokenizer: Any):
    """Refuse another chat template, or another date in it, than a stage was begun with.

    Raises:
        ValueError: it says where the former one is.
    """
    kept, template = folder / "tokenizer", tokenizer.chat_template
    if template is None:
        return
    if template != load_tokenizer(kept).chat_template:
        raise ValueError(
            f"the chat template has changed since {folder} was begun, and with it the texts of "
            f"messages: set model.chat_template={kept / 'chat_template.jinja'}, the former one, or "
            "choose another workdir"
        )
    date = describe_stage(folder)["settings"].get("model", {}).get("chat_date", "")
    if "strftime_now" in str(template) and date != tokenizer.chat_date:
        began = date or "the day on which it began"
        raise ValueError(
            f"{folder} was begun with another date in its chat template, {began}, now it is "
            f"{tokenizer.chat_date}: set model.chat_date to {began}, or choose another workdir"
        )


MADE_FROM = {"data": ("prepare",), "base": ("model", "seed")}  # folder: settings


def check_same_base(workdir: Path, config: dict):
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
    """Remove a base model that was made from other settings; after `check_same_base`."""
    folder = workdir / "base"
    if origin_differences(workdir, "base", config):
        remove_folder(folder)


def may_be_made_anew(workdir: Path) -> bool:
    """Whether the base model is a start's own work, and no stage has taken a step."""
    made_here = ((read_config(workdir) or {}).get("model") or {}).get("vocabulary_data")
    return bool(made_here) and not any(has_begun(workdir / stage) for stage in STAGE_NAMES)


def origin_differences(workdir: Path, name: str, config: dict) -> list[str]:
    """In which settings the origin of `workdir/name` differs from the config."""
    old = read_config(workdir)
    if old is None or not (workdir / name).is_dir():  # a start that failed before it made it
        return []
    old, new = ({field: c.get(field) for field in MADE_FROM[name]} for c in (old, config))
    return fixed_differences(old, new, changeable_fields(ModelSettings, "model."))
