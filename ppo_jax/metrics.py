"""What a run leaves in its workdir: config.json, metrics.jsonl, samples.jsonl, TensorBoard events, progress.

Only process 0 writes. A line is written whole and flushed, so a killed process tears at most the last
one; `drop_lines_after` removes it, together with what a resumed run will write again.
"""

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import tensorboardX
from tqdm import tqdm

PACKAGES = ("ppo_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "chex", "numpy")
PACKAGES += ("transformers", "tokenizers", "safetensors")


class MetricsWriter:
    """Metrics of one stage to metrics.jsonl, TensorBoard and the terminal, one step late.

    The metrics of step n-1 are fetched when those of step n are handed in, so that the device
    computes step n meanwhile. Call `flush` before a checkpoint is saved: what is not yet written
    when the process is killed is not written by the run that resumes from that checkpoint.

    Args:
        workdir: the run's folder.
        stage: for instance "ppo"; every line carries it.
        total_steps: of the stage, for the progress.
        restored_step: the checkpoint that this run resumes; the stage's later lines are dropped.
            None is a start from the beginning: all lines of the stage are dropped.
        show: {metric: label} of the figures in the progress, for instance {"kl/ref": "kl"}.

    Attributes:
        last_checkpoint: the newest complete checkpoint, kept up to date by the loop, for the message
            of a run that diverges.
    """

    def __init__(
        self,
        workdir: str | Path,
        stage: str,
        *,
        total_steps: int,
        restored_step: int | None = None,
        show: Mapping[str, str] | None = None,
    ):
        self.stage = stage
        self.last_checkpoint = restored_step
        self._path = Path(workdir) / "metrics.jsonl"
        self._pending: tuple[int, Mapping[str, Any]] | None = None
        self._tensorboard = self._progress = None
        if jax.process_index() == 0:
            done = -1 if restored_step is None else restored_step
            drop_lines_after(self._path, stage, restored_step)
            self._tensorboard = tensorboardX.SummaryWriter(
                str(Path(workdir) / "tensorboard" / stage), purge_step=done + 1
            )
            self._progress = _Progress(stage, max(done, 0), total_steps, show or {})

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take the metrics of a step (scalars, on devices or not) and write those of the step before.

        NaN and infinity are null in metrics.jsonl, which stays valid JSON, and absent in TensorBoard.

        Raises:
            FloatingPointError: a metric whose name ends in "loss" was not finite; after it is written.
            ValueError: a metric is not a scalar.
        """
        earlier, self._pending = self._pending, (step, metrics)
        if earlier is not None:
            self._write(*earlier)

    def flush(self) -> None:
        """Write the metrics that are still held back. Raises as `write` does."""
        earlier, self._pending = self._pending, None
        if earlier is not None:
            self._write(*earlier)
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        """Write what is held back and close the files."""
        try:
            self.flush()
        finally:
            if self._progress is not None:
                self._tensorboard.close()
                self._progress.close()

    def _write(self, step: int, metrics: Mapping[str, Any]) -> None:
        values = {name: _scalar(name, x) for name, x in jax.device_get(dict(metrics)).items()}
        if self._progress is not None:
            append_rows(self._path, [{"stage": self.stage, "step": step, **values}])
            for name, value in values.items():
                if math.isfinite(value):
                    self._tensorboard.add_scalar(name, value, step)
            self._progress.update(step, values)
        self._check_finite(step, values)

    def _check_finite(self, step: int, values: Mapping[str, float]) -> None:
        bad = [x for x in values.items() if x[0].endswith("loss") and not math.isfinite(x[1])]
        if not bad:
            return
        if self._tensorboard is not None:
            self._tensorboard.flush()
        last = "no checkpoint yet"
        if self.last_checkpoint is not None:
            last = f"last checkpoint {self.last_checkpoint}"
        named = ", ".join(f"{name} is {value}" for name, value in bad)
        raise FloatingPointError(f"{named} at step {step}; {last}")


def append_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a file of JSON lines, whole lines at once; process 0 only.

    Args:
        path: for instance workdir/samples.jsonl.
        rows: what JSON can hold; NaN and infinity become null.
    """
    if jax.process_index() != 0:
        return
    lines = [json.dumps(_without_nan(row, None), ensure_ascii=False) for row in rows]
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in lines))


def drop_lines_after(path: str | Path, stage: str, step: int | None) -> None:
    """Drop the lines of a stage past a step, and a torn last line; process 0 only, atomic.

    Lines of other stages stay as they are, byte for byte.

    Args:
        path: a file of JSON lines with "stage" and "step"; it may be absent.
        stage: whose lines.
        step: the last step that stays; None drops all lines of the stage.

    Raises:
        ValueError: a line before the last is not such an object.
    """
    path = Path(path)
    if jax.process_index() != 0 or not path.exists():
        return
    lines = path.read_bytes().split(b"\n")
    # Behind the last newline: nothing, or a line torn as it was written.
    complete, torn = lines[:-1], lines[-1]
    kept = [
        line
        for number, line in enumerate(complete, 1)
        if not _is_after(line, stage, step, f"{path}:{number}")
    ]
    if torn or len(kept) < len(complete):
        _write_atomically(path, b"".join(line + b"\n" for line in kept))


def prepare_workdir(workdir: str | Path, config: Mapping[str, Any]) -> None:
    """Make the workdir and write its config.json, before the first step; process 0 only.

    The file holds the config, the git commit of the source (null when it is not a checkout),
    package versions, Python's version, and kind and number of the devices.

    Args:
        workdir: the folder.
        config: nested dicts; infinity is written as the string "inf".
    """
    if jax.process_index() != 0:
        return
    Path(workdir).mkdir(parents=True, exist_ok=True)
    devices = {"kind": jax.devices()[0].device_kind, "count": jax.device_count()}
    record = {
        "config": _without_nan(config, "string"),
        "git_commit": _git_commit(),
        "packages": _package_versions(),
        "python": platform.python_version(),
        "devices": {**devices, "processes": jax.process_count()},
    }
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    _write_atomically(Path(workdir) / "config.json", text.encode())


def read_config(workdir: str | Path) -> dict[str, Any] | None:
    """The config in a workdir's config.json, or None where there is no such file.

    Raises:
        ValueError: the file is not one that `prepare_workdir` wrote.
    """
    path = Path(workdir) / "config.json"
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must be a JSON object with a config: {error!r}.") from error


def config_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The fields in which two configs differ, as JSON has them.

    >>> config_differences({"ppo": {"kl_coef": 0.1}, "seed": 0}, {"ppo": {"kl_coef": 0.2}, "seed": 0})
    ['ppo.kl_coef: 0.1 -> 0.2']
    """
    old, new = _flat(_without_nan(old, "string")), _flat(_without_nan(new, "string"))
    return [
        f"{name}: {old.get(name, 'absent')} -> {new.get(name, 'absent')}"
        for name in {**old, **new}
        if name not in old or name not in new or old[name] != new[name]
    ]


class _Progress:
    """A bar on a terminal; elsewhere a line about every tenth of the steps, or every 30 seconds."""

    def __init__(self, stage: str, done: int, total: int, show: Mapping[str, str]):
        self._stage, self._total, self._show = stage, total, show
        self._figures: dict[str, str] = {}
        self._last_step, self._last_time = done, time.monotonic()
        self._bar = None
        if sys.stdout.isatty():
            self._bar = tqdm(
                total=total, initial=done, desc=stage, file=sys.stdout, dynamic_ncols=True
            )

    def update(self, step: int, values: Mapping[str, float]) -> None:
        shown = {label: f"{values[name]:.3g}" for name, label in self._show.items() if name in values}
        self._figures.update(shown)
        if self._bar is not None:
            self._bar.set_postfix_str(self._figures_text(), refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._is_due(step):
            self._print(step)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _is_due(self, step: int) -> bool:
        tenth = step * 10 // self._total > self._last_step * 10 // self._total
        return tenth or time.monotonic() - self._last_time >= 30

    def _print(self, step: int) -> None:
        now = time.monotonic()
        seconds = (now - self._last_time) / max(step - self._last_step, 1)
        left = round(seconds * (self._total - step))
        parts = [f"{self._stage} {step}/{self._total}", self._figures_text()]
        parts += [f"{seconds:.2g} s/step", f"eta {left // 60}:{left % 60:02d}"]
        print("  ".join(part for part in parts if part), flush=True)
        self._last_step, self._last_time = step, now

    def _figures_text(self) -> str:
        return "  ".join(f"{label} {value}" for label, value in self._figures.items())
