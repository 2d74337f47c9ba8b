"""What a run leaves in its workdir as it goes: config.json, lines of JSON, TensorBoard events.

Only process 0 writes. A line is written whole and flushed, so a killed process tears at most the
last one; `drop_lines_after` removes it, together with what a resumed run will write again.
"""

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorboardX
from tqdm import tqdm

PACKAGES = ("ppo_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "chex", "numpy")
PACKAGES += ("transformers", "tokenizers", "safetensors")


class MetricsWriter:
    """Metrics of one stage to metrics.jsonl, TensorBoard and the terminal, one step late.

    The metrics of step n-1 are fetched when those of step n are handed in: the device is at step n
    meanwhile. Call `flush` before a checkpoint is saved, for the run that resumes from it writes
    only what comes after.

    Args:
        workdir: the run's folder.
        stage: for instance "ppo"; every line carries it.
        total_steps: of the stage, for the progress.
        restored_step: the checkpoint that this run resumes; the stage's later lines are dropped.
            None is a start from the beginning: all of them are dropped.
        show: {metric: label} of the figures in the progress, for instance {"kl/ref": "kl"}.

    Attributes:
        last_checkpoint: the newest complete checkpoint, set by the loop, named when a run diverges.
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
                str(Path(workdir) / "tensorboard" / stage),
                purge_step=done + 1,  # TensorBoard forgets this and later steps of older files
                filename_suffix=f".{time.time_ns()}",  # two files of one second are not one file
            )
            self._progress = _Progress(stage, max(done, 0), total_steps, show or {})

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take the metrics of a step (scalars, on devices or not); write those of the step before.

        NaN and infinity are null in metrics.jsonl, to keep it JSON, and absent in TensorBoard.

        Raises:
            FloatingPointError: a loss or a gradient norm is not finite; raised after writing.
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
                self._progress.close()
                self._tensorboard.close()

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
        # The gradient too: a finite loss can have a NaN gradient, and the next state is lost.
        watched = {k: v for k, v in values.items() if k.endswith(("loss", "grad_norm"))}
        bad = [(name, value) for name, value in watched.items() if not math.isfinite(value)]
        if not bad:
            return
        last = self.last_checkpoint
        last = "no checkpoint yet" if last is None else f"last checkpoint {last}"
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
    lines = [json.dumps(_plain(row, nonfinite=lambda x: None), ensure_ascii=False) for row in rows]
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
    # Behind the last newline: nothing, or a line torn as it was written.
    *complete, torn = path.read_bytes().split(b"\n")
    kept = [x for n, x in enumerate(complete, 1) if not _is_after(x, stage, step, f"{path}:{n}")]
    if torn or len(kept) < len(complete):
        _write_atomically(path, b"".join(line + b"\n" for line in kept))


def prepare_workdir(workdir: str | Path, config: Mapping[str, Any]) -> None:
    """Make the workdir and write its config.json, before the first step; process 0 only.

    The file holds the config, the git commit of the source (null when it is not a checkout),
    package versions, Python's version, and kind and number of the devices.

    Args:
        workdir: the folder.
        config: nested dicts; infinity is written as "inf".
    """
    if jax.process_index() != 0:
        return
    Path(workdir).mkdir(parents=True, exist_ok=True)
    kind, count = jax.devices()[0].device_kind, jax.device_count()
    record = {
        "config": _plain(config, nonfinite=str),
        "git_commit": _git_commit(),
        "packages": _package_versions(),
        "python": platform.python_version(),
        "devices": {"kind": kind, "count": count, "processes": jax.process_count()},
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


def read_results(workdir: str | Path) -> dict[str, Any]:
    """What results.json holds; empty where there is no such file."""
    path = Path(workdir) / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_results(workdir: str | Path, results: Mapping[str, Any]) -> None:
    """Write results.json, whole or not at all; process 0 only."""
    if jax.process_index() == 0:
        text = json.dumps(_plain(results, nonfinite=lambda x: None), indent=2, ensure_ascii=False)
        _write_atomically(Path(workdir) / "results.json", (text + "\n").encode())


def config_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The fields in which two configs differ, as JSON has them.

    >>> config_differences({"ppo": {"kl_coef": 0.1}, "seed": 0}, {"ppo": {"kl_coef": 0.2}})
    ['ppo.kl_coef: 0.1 -> 0.2', 'seed: 0 -> absent']
    """
    old, new = _flat(_plain(old, nonfinite=str)), _flat(_plain(new, nonfinite=str))
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
            self._bar = tqdm(total=total, initial=done, desc=stage, file=sys.stdout)

    def update(self, step: int, values: Mapping[str, float]) -> None:
        for name in self._show.keys() & values.keys():
            self._figures[self._show[name]] = f"{values[name]:.3g}"
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
        parts += [f"{seconds:.3g} s/step", f"eta {left // 60}:{left % 60:02d}"]
        print("  ".join(part for part in parts if part), flush=True)
        self._last_step, self._last_time = step, now

    def _figures_text(self) -> str:
        labels = [label for label in self._show.values() if label in self._figures]
        return "  ".join(f"{label} {self._figures[label]}" for label in labels)


def _scalar(name: str, value: Any) -> float:
    if np.shape(value) != ():
        raise ValueError(f"metric {name!r} must be a scalar, got shape {np.shape(value)}.")
    return np.asarray(value).item()


def _plain(value: Any, nonfinite: Callable[[float], Any]) -> Any:
    """The value as JSON has it: lists, Python's numbers, `nonfinite(x)` for NaN and infinity."""
    if isinstance(value, Mapping):
        return {str(key): _plain(x, nonfinite) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x, nonfinite) for x in value]
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        return _plain(np.asarray(value).tolist(), nonfinite)
    if isinstance(value, float) and not math.isfinite(value):
        return nonfinite(value)
    return value


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"ppo.kl_coef": 0.1, ...}; an empty dict is a value."""
    fields = {}
    for key, value in config.items():
        nested = isinstance(value, Mapping) and value
        fields |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return fields


def _is_after(line: bytes, stage: str, step: int | None, place: str) -> bool:
    try:
        row = json.loads(line)
        return row["stage"] == stage and (step is None or row["step"] > step)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{place}: must be a JSON object with stage and step: {error!r}."
        ) from error


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _package_versions() -> dict[str, str]:
    installed = {x.metadata["Name"]: x.version for x in importlib.metadata.distributions()}
    return {name: installed[name] for name in PACKAGES if name in installed}


def _git_commit() -> str | None:
    """The commit of this source, with "-dirty" when files were changed; None outside a checkout."""
    source = Path(__file__).resolve().parents[1]
    if not (source / ".git").exists():
        return None
    command = "git describe --always --dirty --abbrev=40 --exclude=*".split()
    try:
        done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or no commit yet
        return None
    return done.stdout.strip()
