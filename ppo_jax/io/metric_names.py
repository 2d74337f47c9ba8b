"""Renamed metrics: for one release files have them under the old name, too.

Readers take either, so that the workdirs of 0.1 keep their reports.
"""

import re
from collections.abc import Mapping
from typing import Any

RENAMED = (  # (pattern of the name, name until 0.1), and FORMER the inverse
    (r"policy/rollout_logprob_error(_max)?", r"policy/sampling_difference\1"),
    (r"ppo/packing_efficiency()", r"ppo/row_fill\1"),
    (r"(reward_model/\w+|pair_accuracy)_margin([12])", r"\1_gap\2"),
)
FORMER = (
    (r"policy/sampling_difference(_max)?", r"policy/rollout_logprob_error\1"),
    (r"ppo/row_fill()", r"ppo/packing_efficiency\1"),
    (r"(reward_model/\w+|pair_accuracy)_gap([12])", r"\1_margin\2"),
)


def other_name(name: str, names: tuple[tuple[str, str], ...]) -> str | None:
    """The other name of a metric, or None.

    >>> other_name("ppo/packing_efficiency", RENAMED), other_name("kl/ref", RENAMED)
    ('ppo/row_fill', None)
    >>> other_name("reward_model/accuracy_gap1", FORMER)
    'reward_model/accuracy_margin1'
    """
    for pattern, replacement in names:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return None


def with_former_names(values: Any) -> Any:
    """For writing: every renamed metric under both names, in nested lists and objects as well."""
    if isinstance(values, list | tuple):
        return [with_former_names(value) for value in values]
    if not isinstance(values, Mapping):
        return values
    both = {name: with_former_names(value) for name, value in values.items()}
    former = {other_name(name, RENAMED): value for name, value in both.items()}
    return both | {name: value for name, value in former.items() if name is not None}


def with_new_names(values: Any) -> Any:
    """For reading: every renamed metric under its new name only."""
    if isinstance(values, list | tuple):
        return [with_new_names(value) for value in values]
    if not isinstance(values, Mapping):
        return values
    return {other_name(name, FORMER) or name: with_new_names(x) for name, x in values.items()}
