"""Metrics of a stage: lines of JSON, the writers' share, and the progress that a user sees."""

import contextlib
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from ppo_jax.distributed.runtime import MIN_COMPILE_SECONDS, compile_seconds
from ppo_jax.io.metric_names import with_former_names
from ppo_jax.io.run_folder import append_rows, drop_lines_after
from ppo_jax.training.writers import Writer, make_writers


class MetricsWriter:
    """Metrics of one stage to metrics.jsonl, the writers and the terminal, one step late.

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
        tokens: (metric, factor): a step's tokens are that metric times the factor.
        limits: {metric: (most, setting)}: a run ends like one that diverges when a metric is above
            its limit, and the setting is named.
        writers: where they go besides, as `config.writers` names them.
        num_lanes: runs that take their steps together, this one among them: the seconds of a step
            are this one's share, and the progress is told by them all together.

    Every step gets `time/step_s`, the wall seconds from when the metrics of the step before were
    there to when its own are, with all that happens in between (validation, samples, a save), and
    with `tokens` also `time/tokens_per_s`. `time/compile_s`, in the first line of a start and
    wherever a program was new, are those of them in which one was compiled.

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
        tokens: tuple[str, float] | None = None,
        limits: Mapping[str, tuple[float, str]] | None = None,
        writers: Sequence[str] = ("tensorboard",),
        num_lanes: int | None = None,
    ):
        self._num_lanes = num_lanes or 1
        self.stage, self._tokens, self._limits = stage, tokens, limits or {}
        self.last_checkpoint = restored_step
        self._path = Path(workdir) / "metrics.jsonl"
        self._pending: tuple[int, Mapping[str, Any]] | None = None
        self._there = time.perf_counter()  # when the newest metrics were
        self._compiled = compile_seconds()  # before the first step of this start
        self._first = True
        self._writers: list[Writer] = []
        self._progress: Progress | None = None
        self._writes = jax.process_index() == 0
        if self._writes:
            done = -1 if restored_step is None else restored_step
            drop_lines_after(self._path, stage, restored_step)
            self._writers = make_writers(
                writers, Path(workdir), stage, purge_step=done + 1, tell=self.tell
            )
            if num_lanes is None:
                self._progress = Progress(stage, max(done, 0), total_steps, show or {})

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take the metrics of a step (scalars, on devices or not); write those of the step before.

        NaN and infinity are null in metrics.jsonl, to keep it JSON, and absent elsewhere.

        Raises:
            FloatingPointError: a loss or a gradient norm is not finite, or a metric is above its
                limit; raised after writing.
            ValueError: a metric is not a scalar.
        """
        earlier, self._pending = self._pending, (step, metrics)
        if earlier is not None:
            self._write(*earlier)

    def write_now(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the metrics of a step that is over. Raises as `write` does."""
        self._write(step, metrics)

    def flush(self) -> None:
        """Write the metrics that are still held back. Raises as `write` does."""
        earlier, self._pending = self._pending, None
        if earlier is not None:
            self._write(*earlier)
        for writer in self._writers:
            writer.flush()

    def tell(self, text: str) -> None:
        """A line for the user, above the progress."""
        tqdm.write(f"{self.stage}: {text}", file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Write what is held back and close the files."""
        try:
            self.flush()
        finally:
            if self._progress is not None:
                self._progress.close()
            for writer in self._writers:
                writer.close()

    def abandon(self) -> None:
        """Close the files as they are, after an error: it is that one which is told."""
        for writer in self._writers:
            with contextlib.suppress(OSError):
                writer.close(failed=True)

    def _write(self, step: int, metrics: Mapping[str, Any]) -> None:
        values = {name: _scalar(name, x) for name, x in jax.device_get(dict(metrics)).items()}
        values |= self._times(step, values)
        if self._writes:
            both = with_former_names(values)
            append_rows(self._path, [{"stage": self.stage, "step": step, **both}])
            for writer in self._writers:
                writer.write(step, both)
        if self._progress is not None:
            self._progress.update(step, values)
        self._check(step, values)

    def _times(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        now, compiled = time.perf_counter(), compile_seconds()
        seconds, self._there = (now - self._there) / self._num_lanes, now
        spent, self._compiled = (compiled - self._compiled) / self._num_lanes, compiled
        if step == 0:  # figures from before the first step
            return {}
        times = {"time/step_s": seconds}
        if spent > (0 if self._first else MIN_COMPILE_SECONDS):
            times["time/compile_s"] = spent
        self._first = False
        if self._tokens is not None:
            name, factor = self._tokens
            times["time/tokens_per_s"] = values[name] * factor / seconds
        return times

    def _check(self, step: int, values: Mapping[str, float]) -> None:
        # The gradient too: a finite loss can have a NaN gradient, and the next state is lost.
        watched = {k: v for k, v in values.items() if k.endswith(("loss", "grad_norm"))}
        bad = [f"{name} is {value}" for name, value in watched.items() if not math.isfinite(value)]
        bad += [
            f"{name} is {values[name]:.6g}, above {setting}={most:g},"
            for name, (most, setting) in self._limits.items()
            if values.get(name, 0.0) > most
        ]
        if not bad:
            return
        last = self.last_checkpoint
        last = "no checkpoint yet" if last is None else f"last checkpoint {last}"
        raise FloatingPointError(f"{', '.join(bad)} at step {step}; {last}")


class Progress:
    """A bar on a terminal; elsewhere a line about every tenth of the steps, or every 30 seconds,
    and one for each step that has figures which the step before it lacks, of a validation."""

    def __init__(self, stage: str, done: int, total: int, show: Mapping[str, str]):
        self._stage, self._total, self._show = stage, total, show
        self._figures: dict[str, tuple[str, int]] = {}  # label: (figure, step)
        self._shown: set[str] = set()  # labels of the newest step
        self._step = self._last_step = done
        self._last_time, self._last_compiled = time.monotonic(), compile_seconds()
        self._bar = None
        if sys.stdout.isatty():
            # A terminal may say that it has no columns and no lines; tqdm would then show nothing.
            columns, lines = shutil.get_terminal_size(fallback=(80, 24))
            shape = {"file": sys.stdout, "ncols": columns, "nrows": lines}
            self._bar = tqdm(total=total, initial=done, desc=stage, **shape)

    def update(self, step: int, values: Mapping[str, float]) -> None:
        figures = {label: values[name] for name, label in self._show.items() if name in values}
        has_more = bool(self._shown) and self._shown < figures.keys()  # than the step before
        self._figures |= {label: (_figure(value), step) for label, value in figures.items()}
        self._shown, self._step = set(figures), step
        if self._bar is not None:
            self._bar.set_postfix_str(self._figures_text(), refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._is_due(step) or has_more or step == 0:
            self._print(step)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._step > self._last_step:  # stopped before its line was due
            self._print(self._step)

    def _is_due(self, step: int) -> bool:
        tenth = step * 10 // self._total > self._last_step * 10 // self._total
        return tenth or time.monotonic() - self._last_time >= 30

    def _print(self, step: int) -> None:
        now, compiled = time.monotonic(), compile_seconds()
        # The steps to come compile little.
        worked = now - self._last_time - (compiled - self._last_compiled)
        seconds = worked / max(step - self._last_step, 1)
        left = round(seconds * (self._total - step))
        parts = [f"{self._stage} {step}/{self._total}", self._figures_text()]
        if step:
            parts += [f"{_figure(seconds)} s/step", f"eta {left // 60}:{left % 60:02d}"]
        print("  ".join(part for part in parts if part), flush=True)
        self._last_step, self._last_time, self._last_compiled = step, now, compiled

    def _figures_text(self) -> str:
        """Those of this step; a bar, which is written over, keeps older ones with their step."""
        of_line = self._shown if self._bar is None else self._figures.keys()
        texts = []
        for label in (x for x in self._show.values() if x in of_line):
            figure, step = self._figures[label]
            texts.append(f"{label} {figure}" + (f" (step {step})" if step < self._step else ""))
        return "  ".join(texts)


def _figure(value: float) -> str:
    """A number for a reader: three decimals below 1, fewer above, never an exponent.

    >>> [_figure(x) for x in (-3.35e-08, 0.0416, 3.2, 48.25, 1234.5)]
    ['0.000', '0.042', '3.20', '48.2', '1234']
    """
    decimals = 3 - sum(abs(value) >= bound for bound in (1, 10, 100))
    return f"{round(value, 3) + 0.0:.{decimals}f}"  # + 0.0: no sign before a zero


def _scalar(name: str, value: Any) -> float:
    if np.shape(value) != ():
        raise ValueError(f"metric {name!r} must be a scalar, got shape {np.shape(value)}.")
    return np.asarray(value).item()
