"""What every training stage does around its steps: restore, log, save, stop when asked to."""

import contextlib
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ppo_jax.checkpoints import Checkpoints
from ppo_jax.config import MAY_CHANGE
from ppo_jax.metrics import MetricsWriter
from ppo_jax.models import Model, begin_stage, describe_stage, missing_steps, update_stage
from ppo_jax.partition import Parts
from ppo_jax.workdir import config_differences, drop_lines_after


class StageRun:
    """One stage of a run, from its newest checkpoint to its last step.

    Use it as a context, and in it:

        state = run.restore(state)
        for step in run.steps():  # steps already taken
            state, metrics = ...
            run.end_step(step + 1, state, metrics)

    Args:
        workdir: the run's folder.
        stage: its name, and that of its folder.
        num_steps: of the stage.
        save_every: steps between checkpoints; the last step is always saved.
        show: {metric: label} of the figures in the progress.
    """

    def __init__(
        self,
        workdir: Path,
        stage: str,
        *,
        num_steps: int,
        save_every: int,
        show: Mapping[str, str],
    ):
        self.workdir, self.stage, self.num_steps = Path(workdir), stage, num_steps
        self.save_every, self.show = save_every, show
        self.folder = self.workdir / stage
        self.start = 0
        self.asked_to_stop = False
        self.checkpoints = Checkpoints(self.folder / "checkpoints")

    def __enter__(self) -> "StageRun":
        self._old_handler = signal.signal(signal.SIGTERM, self._stop_soon)
        return self

    def __exit__(self, *error):
        signal.signal(signal.SIGTERM, self._old_handler)
        with contextlib.ExitStack() as closing:
            closing.callback(self.checkpoints.close)
            if error[0] is None:
                closing.callback(self.writer.close)
        if self.asked_to_stop and error[0] is None:  # asked after the last step
            sys.exit(143)

    def _stop_soon(self, *_):
        self.asked_to_stop = True

    def restore(self, state: Any) -> Any:
        """The newest complete checkpoint's state, or the given one when there is none."""
        found = self.checkpoints.restore(state)
        if found is not None:
            state, self.start, _ = found
            print(f"{self.stage}: resuming after step {self.start}", flush=True)
        restored = None if found is None else self.start
        drop_lines_after(self.workdir / "samples.jsonl", self.stage, restored)
        self.writer = MetricsWriter(
            self.workdir,
            self.stage,
            total_steps=self.num_steps,
            restored_step=restored,
            show=self.show,
        )
        self._last_time = time.perf_counter()
        return state

    def steps(self) -> Iterator[int]:
        """The numbers of steps already taken: from the restored one to num_steps - 1."""
        return iter(range(self.start, self.num_steps))

    def seconds(self) -> float:
        """Wall time since the last call. Steps are logged one late, so this is a step's time."""
        now = time.perf_counter()
        seconds, self._last_time = now - self._last_time, now
        return seconds

    def end_step(self, step: int, state: Any, metrics: Mapping[str, Any]):
        """Log a step; save it when its time has come.

        Raises:
            FloatingPointError: a loss is not finite.
            SystemExit: with code 143, after SIGTERM, when the state is on disk.
        """
        self.writer.write(step, metrics)
        if step % self.save_every and step < self.num_steps and not self.asked_to_stop:
            return
        self.writer.flush()  # a state whose loss is not finite is never saved
        self.checkpoints.save(step, state, describe_stage(self.folder))
        if self.asked_to_stop:
            self.checkpoints.wait()
            print(f"{self.stage}: stopped by SIGTERM, step {step} is saved", flush=True)
            sys.exit(143)
        self.writer.last_checkpoint = step


def open_stage(folder: Path, model: Model, parts: Parts, description: dict) -> bool:
    """Begin a stage, or make sure that the one begun before can go on with these settings.

    Args:
        folder: the stage's.
        model: what it starts from.
        parts: the model's parameters, split.
        description: stage, settings and num_steps.

    Returns:
        Whether there is anything to train: False when the last step has been saved.

    Raises:
        ValueError: a setting differs that the state or the data order depends on; it lists them.
    """
    check_settings(folder, description)
    if describe_stage(folder) is None:
        begin_stage(folder, model, parts, description)
    else:
        update_stage(folder, description)
    missing = missing_steps(folder)
    if missing is None:
        print(f"{description['stage']}: complete ({description['num_steps']} steps)", flush=True)
    return missing is not None


def check_settings(folder: Path, description: dict):
    """Refuse to resume a stage with settings that change what its checkpoints mean."""
    old = describe_stage(folder)
    if old is None:
        return
    differences = config_differences(old["settings"], description["settings"])
    may_change = set(MAY_CHANGE)
    if description["settings"].get("kl_control") == "adaptive":
        may_change.remove("kl_coef")  # where the control began; its state has moved on
    fixed = [d for d in differences if d.split(":")[0].split(".")[-1] not in may_change]
    if fixed:
        raise ValueError(
            f"{folder} was begun with other settings: {'; '.join(fixed)}. "
            "Set them back, or choose another workdir."
        )
