"""The stages of several runs that take their steps together: saved and resumed as one.

Each lane keeps a run's files in its own folder: metrics, samples, checkpoints, its share of time.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ppo_jax.algorithms.sweep import stack_lanes, take_lane
from ppo_jax.distributed.layout import LaneLayout, abstract, init_sharded
from ppo_jax.distributed.processes import STOPS, is_primary, on_primary
from ppo_jax.io.checkpoints import Checkpoints
from ppo_jax.io.run_folder import append_rows
from ppo_jax.training.metrics import Progress
from ppo_jax.training.stage import StageRun


def steps_on_disk(folder: Path) -> list[int]:
    """The steps that a stage can go on from; 0 is its beginning. Called by all processes."""
    checkpoints = Checkpoints(folder / "checkpoints")
    newest = checkpoints.readable_step() or 0
    return [0, *(step for step in on_primary(checkpoints.steps) if step <= newest)]


def go_together(steps: Sequence[Sequence[int]]) -> list[list[int]]:
    """Which lanes go on as one program, by the steps that each can go on from.

    A group goes on from the newest step that all of its lanes have. A kill while lanes are saved
    leaves some of them one checkpoint ahead: they are set back to that step, and take the same
    steps again. A lane that is further ahead loses more by that, and is in another group.

    >>> go_together([[0, 20, 40], [0, 20], [0, 20, 40, 60], [0, 20, 40]])
    [[0, 1, 3], [2]]
    """
    left, groups = list(range(len(steps))), []
    while left:
        behind = min(steps[i][-1] for i in left)
        group = [i for i in left if behind in steps[i][-2:]]
        groups.append(group)
        left = [i for i in left if i not in group]
    return groups


class LaneRuns:
    """The stage of N runs, from the newest step that all have to the last; used as a `StageRun`.

    A lane whose loss is not finite, or that its brake ends, has failed: its files are closed as
    they are, and the others go on.

    Args:
        runs: of the lanes, made with `num_lanes`.
        layout: of the lanes.
    """

    def __init__(self, runs: Sequence[StageRun], layout: LaneLayout):
        self.runs, self.layout = runs, layout
        self.failed: dict[int, str] = {}  # lane: why
        self.start, self.num_steps = 0, runs[0].num_steps
        self._pending: tuple[int, Mapping[str, Any]] | None = None
        self._progress: Progress | None = None
        self._take: Callable[[Any, int], Any] = take_lane

    @property
    def alive(self) -> list[int]:
        return [i for i in range(len(self.runs)) if i not in self.failed]

    def __enter__(self) -> "LaneRuns":
        self.runs[0].__enter__()  # one of them hears the signals
        return self

    def __exit__(self, *error):
        self.runs[0].drop_handlers()
        for i in self.alive:  # all of them, before one drops an older step
            self.runs[i].checkpoints.finish_write()
            self.runs[i].keep_time(at_once=True)
        with contextlib.ExitStack() as closing:
            for i in self.alive:
                closing.callback(self.runs[i].close, failed=error[0] is not None)
            if self._progress is not None:
                closing.callback(self._progress.close)
        if self.runs[0].asked_to_stop and error[0] is None:  # asked after the last step
            sys.exit(STOPS[self.runs[0].asked_to_stop])

    def restore(self, init: Callable[..., Any], args: Sequence[tuple]) -> Any:
        """The stacked states of the newest step that all lanes have, or `init(*args[i])` of each.

        Raises:
            ValueError: a lane is too far ahead for that, see `go_together`.
        """
        layout = self.layout.layouts[0]
        steps = [steps_on_disk(run.folder) for run in self.runs]
        if len(go_together(steps)) > 1:
            newest = {str(run.workdir): x[-1] for run, x in zip(self.runs, steps, strict=True)}
            raise ValueError(f"these lanes cannot go on together, their newest steps are {newest}")
        self.start = min(x[-1] for x in steps)
        states = []
        for run, own in zip(self.runs, args, strict=True):
            found = run.checkpoints.restore(abstract(layout, init, *own), self.start)
            states.append(init_sharded(layout, init, *own) if found is None else found[0])
            run.start = self.start
            run.open_files(None if found is None else self.start)
        shardings = layout.shardings(states[0])
        self._take = jax.jit(take_lane, out_shardings=shardings)
        self._tell_start(steps)
        return jax.jit(stack_lanes, out_shardings=self.layout.stacked(shardings))(states)

    def _tell_start(self, steps: Sequence[Sequence[int]]):
        run = self.runs[0]
        if ahead := [x for x, own in zip(self.runs, steps, strict=True) if own[-1] > self.start]:
            names = ", ".join(str(x.workdir) for x in ahead)
            print(f"{run.stage}: set back to step {self.start}, which all lanes have: {names}")
        if 0 < self.start < self.num_steps:
            print(f"{run.stage}: {len(self.runs)} lanes resuming after step {self.start}")
        if self.start < self.num_steps:
            print(f"{run.stage}: compiling the first {run.unit} of {len(self.runs)} lanes")
        if is_primary():
            label = f"{run.stage} x {len(self.runs)}"
            self._progress = Progress(label, self.start, self.num_steps, run.show)

    def steps(self) -> Iterator[int]:
        """The numbers of steps already taken, as long as a lane is alive."""
        for step in range(self.start, self.num_steps):
            if not self.alive:
                return
            yield step

    def fail(self, lane: int, error: FloatingPointError):
        """This lane has failed, the others go on."""
        self.failed[lane] = str(error)
        run, others = self.runs[lane], len(self.alive)
        run.tell(f"lane {run.workdir} failed: {error}; {others} of {len(self.runs)} lanes go on")
        run.close(failed=True)
        run.keep_time(at_once=True)

    def finish_step(self):
        """Wait for the step before and log it."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        step, metrics = pending
        values = jax.device_get(dict(metrics))
        for i in self.alive:
            own = {name: x if np.ndim(x) == 0 else x[i] for name, x in values.items()}
            try:
                self.runs[i].writer.write_now(step, own)
            except FloatingPointError as error:
                self.fail(i, error)
        if self._progress is not None and self.alive:
            means = {name: float(np.mean(x)) for name, x in values.items()}
            self._progress.update(step, means)

    def end_step(self, step: int, states: Any, metrics: Mapping[str, Any]):
        """Log the step of all lanes; save them when their time has come.

        Args:
            step: that they have taken.
            states: stacked.
            metrics: [N] each, or one number for all.

        Raises: as `StageRun.end_step`, but for a lane that fails.
        """
        names = list(metrics)
        for i in self.alive:
            self.runs[i].check_step(step, dict.fromkeys(names))
        self.finish_step()
        self._pending = step, metrics
        for i in self.alive:
            self.runs[i].keep_time()
        if self.runs[0].is_due(step):
            self.finish_step()  # a state whose loss is not finite is never saved
            self._save(step, states)
        if self.runs[0].asked_to_stop:
            for i in self.alive:
                self.runs[i].checkpoints.finish_write()
            for i in self.alive:
                self.runs[i].checkpoints.wait()
                self.runs[i].writer.close()
            self.runs[0].stop(step)

    def _save(self, step: int, states: Any):
        """Save every lane. No lane drops an older step before all have the one after it."""
        for i in self.alive:
            self.runs[i].checkpoints.finish_write()
        for i in self.alive:
            self.runs[i].writer.flush()  # of the writers
            self.runs[i].save(step, self._take(states, i))

    def append_samples(self, rows: Sequence[Sequence[dict]]):
        """The samples of each lane."""
        for i in self.alive:
            append_rows(self.runs[i].workdir / "samples.jsonl", rows[i])
