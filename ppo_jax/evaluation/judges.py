"""Judges of whole texts: what a panel is, and what it says of the responses of some policies."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ppo_jax.config.parsing import failure, load_function
from ppo_jax.data.readers import short_repr
from ppo_jax.distributed.processes import on_primary
from ppo_jax.evaluation.statistics import Judge, judge_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgePanel:
    """Judges of whole texts (prompt and response), and what a reader must know of them."""

    judges: Mapping[str, Judge]
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rated: tuple[Sequence[str], np.ndarray] | None = None  # texts and mean ratings, unseen by all
    reference: Mapping[str, float] = dataclasses.field(default_factory=dict)  # marks for accuracy
    headline: str = ""  # the judge whose win rate is the result of the run; "" is "gold", or the
    # first judge where none has this name

    def __post_init__(self):
        if not self.judges:
            raise ValueError("judges must be one or more, got none")
        if self.headline and self.headline not in self.judges:
            raise ValueError(
                f"headline must be one of the panel's judges {list(self.judges)}, got "
                f"{self.headline!r}"
            )

    @property
    def headline_judge(self) -> str:
        """The judge that `headline` names, also of a panel that `dataclasses.replace` gave more."""
        return self.headline or ("gold" if "gold" in self.judges else next(iter(self.judges)))


def make_panel(name: str, workdir: Path, field: str = "evaluate.judges") -> JudgePanel:
    """The panel that a function "module:function" makes; every process makes it together.

    Args:
        name: of the function.
        workdir: what it is given, the run's folder.
        field: the setting that names it, for errors.

    Raises:
        ValueError: there is no such function, or what it returns is no panel.
        FunctionFailed: it raised something.
    """
    make = load_function(name, field)
    try:
        panel = make(workdir)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit, too: the run is not done
        raise failure(f"{field} {name}", error) from error
    if not isinstance(panel, JudgePanel):
        raise ValueError(f"{field} {name} must return a JudgePanel, got {short_repr(panel)}")
    return panel


def ask_panel(panel: JudgePanel, texts: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The judges' table and the verdict of the panel's headline judge, under gold/.

    The judges, which may be slow, paid or random, are asked by process 0 alone; they compute on its
    own devices.

    Args:
        panel: the judges.
        texts: policy -> N whole texts; the last is the candidate, the one before it its reference.
    """
    *_, reference, candidate = texts
    table = on_primary(
        judge_table,
        panel.judges,
        texts,
        candidate=candidate,
        notes=panel.notes,
        rated=panel.rated,
    )
    results = {"judges": table, "reference": dict(panel.reference)}
    for row in table:
        if row["judge"] == panel.headline_judge:
            key = f"win_rate_{candidate}_vs_{reference}"
            results |= {f"gold/{name}": row[name] for name in (key, f"{key}_interval")}
            results["headline_judge"] = panel.headline_judge
    return results
