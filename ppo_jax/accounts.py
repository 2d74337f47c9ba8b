"""What was read of each data set, what of it was left out and why: a line for each."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ppo_jax.batches import Texts
from ppo_jax.config import Config, RewardSettings, SFTSettings
from ppo_jax.data import DEMONSTRATION_FORMS, PROMPT_FORMS, RATING_FORMS
from ppo_jax.formats import Forms, unread_columns
from ppo_jax.packing import fullness
from ppo_jax.preferences import PREFERENCE_FORMS
from ppo_jax.prompt_data import PromptData
from ppo_jax.reward_data import RewardData


def data_lines(config: Config, data: Mapping[str, Any]) -> list[str]:
    """A line for each data set of a run.

    Args:
        config: of the run.
        data: what was read, see `checks.check_data`.
    """
    lines = []
    if "sft" in data:
        lines += text_lines("sft", config.sft, data["sft"], DEMONSTRATION_FORMS)
        if config.sft.packing:
            lines.append(f"sft: packed {fullness(data['sft'][0])}")
    if "reward" in data:
        lines += reward_lines(config.reward, data["reward"])
    if "references" in data:
        lines.append(texts_line("reward.reference_data", config.reward, data["references"]))
    for stage in ("ppo", "evaluate"):
        if stage in data:
            lines.append(prompts_line(stage, getattr(config, stage).prompts, data[stage]))
    if "ratings" in data:
        path, count = config.evaluate.ratings, len(data["ratings"])
        lines.append(data_line("evaluate.ratings", path, count, {}, RATING_FORMS))
    return lines


def text_lines(
    stage: str, settings: SFTSettings | RewardSettings, parts: Sequence[Texts], forms: Forms
) -> list[str]:
    """The training and the validation data: two files, or two parts of one."""
    used = [len(np.unique(part.records)) for part in parts]
    if settings.validation_data:
        fields = ("data", "validation_data")
        return [
            data_line(f"{stage}.{field}", getattr(settings, field), count, part.left_out, forms)
            for field, count, part in zip(fields, used, parts, strict=True)
        ]
    left_out = sum((Counter(part.left_out) for part in parts), Counter())
    line = data_line(f"{stage}.data", settings.data, sum(used), left_out, forms)
    return [f"{line}, {used[0]:,} to train and {used[1]:,} to validate"]


def reward_lines(settings: RewardSettings, parts: Sequence[RewardData]) -> list[str]:
    if settings.format == "ratings":
        return text_lines("reward", settings, [part.texts for part in parts], RATING_FORMS)
    lines = text_lines("reward", settings, [part.texts for part in parts], PREFERENCE_FORMS)
    groups = parts[0].groups
    if groups.rows.shape[1] > 2:
        lines.append(
            f"reward: {len(groups.row_pairs):,} comparisons to train on, among up to "
            f"{groups.rows.shape[1]} responses to a prompt"
        )
    return lines


def texts_line(field: str, settings: RewardSettings, texts: Texts) -> str:
    count = len(np.unique(texts.records))
    return data_line(field, settings.reference_data, count, texts.left_out, DEMONSTRATION_FORMS)


def prompts_line(stage: str, path: str, data: PromptData) -> str:
    return data_line(f"{stage}.prompts", path, len(data.texts), data.left_out, PROMPT_FORMS)


def data_line(
    field: str, path: str | os.PathLike, used: int, left_out: Mapping[str, int], forms: Forms
) -> str:
    """What became of the records of one data set.

    >>> data_line("sft.data", "a.jsonl", 1188, {"blank": 1, "repeated": 14}, [])
    'sft.data: a.jsonl: 1,203 read, 14 repeated, 1 blank; 1,188 used'

    Args:
        field: of the config.
        path: of the data set.
        used: records.
        left_out: {why: how many records}.
        forms: those that it was read with.
    """
    read = used + sum(left_out.values())
    reasons = [f", {count:,} {why}" for why, count in Counter(left_out).most_common()]
    unread = unread_columns(path, forms)
    columns = f"; columns not read: {', '.join(unread)}" if unread else ""
    return f"{field}: {path}: {read:,} read{''.join(reasons)}{columns}; {used:,} used"
