"""Points that are proposed by optuna, from what those before them have reached.

The trials lie in optuna.db in the sweep's folder, so that several processes and several starts go
on with the same ones. A trial is a point, an ordinary run.
"""

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ppo_jax.config.points import Axis, Interval, Point, spelt
from ppo_jax.distributed.folder_lock import hold_when_free
from ppo_jax.pipeline.shared_stages import Work
from ppo_jax.pipeline.sweep import Task, in_use
from ppo_jax.pipeline.sweep_files import read_metrics

STORAGE = "optuna.db"


def load_optuna() -> Any:
    """The package.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ValueError("--optimize needs optuna: pip install 'ppo_jax[optimize]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def corners(axes: Sequence[Axis]) -> list[Point]:
    """Points with every end of an interval and every value of a list, to check them by."""
    ends = [
        (x.values.low, x.values.high) if isinstance(x.values, Interval) else x.values for x in axes
    ]
    names, count = [axis.name for axis in axes], max(map(len, ends))
    rows = ([values[min(i, len(values) - 1)] for values in ends] for i in range(count))
    return [dict(zip(names, row, strict=True)) for row in rows]


class Search:
    """The points of a search, one after another.

    Args:
        axes: intervals and lists to choose from.
        metric: of sweep.json, which decides.
        direction: "maximize" or "minimize".
        trials: how many points there will be in all.
        workdir: the sweep's folder.
        seed: of the proposals.
        plan: makes a point the work that it is.

    Raises:
        ValueError: optuna is not installed, or the folder has another search.
    """

    def __init__(
        self,
        axes: Sequence[Axis],
        *,
        metric: str,
        direction: str,
        trials: int,
        workdir: Path,
        seed: int,
        plan: Callable[[Point], Work],
    ):
        self.optuna, self.axes, self.metric = load_optuna(), axes, metric
        self.direction, self.trials, self.workdir = direction, trials, workdir
        self.seed, self.plan = seed, plan
        self.mine: dict[Path, int] = {}  # folder: number of the trial
        self._loaded: Any = None
        self._storage: Any = None
        self._check_same()

    def ask(self) -> Work | None:
        """The next point: one that a dead process has left, or a new one; None is no more."""
        with hold_when_free(self.workdir / ".search", lambda text: None):
            study = self._study()
            for trial in study.get_trials(deepcopy=False):
                if trial.state == self.optuna.trial.TrialState.RUNNING:
                    work = self.plan(self._point(trial.params))
                    if work.folder not in self.mine and not in_use(work.folder):
                        self.mine[work.folder] = trial.number
                        return work
            while len(study.get_trials(deepcopy=False)) < self.trials:
                trial = study.ask(self._distributions())
                try:
                    work = self.plan(self._point(trial.params))
                except ValueError as error:  # values that are allowed, but not together
                    print(f"trial {trial.number}: {error}", flush=True)
                    study.tell(trial.number, state=self.optuna.trial.TrialState.FAIL)
                    continue
                self.mine[work.folder] = trial.number
                return work
        return None

    def tell(self, task: Task):
        """A point of this search has come to an end.

        Raises:
            ValueError: it is complete and has no such metric.
        """
        metrics = read_metrics(task.work.folder)
        number, study = self.mine[task.work.folder], self._study()
        if task.state != "complete":
            failed = self.optuna.trial.TrialState.FAIL
            study.tell(number, state=failed, skip_if_finished=True)
            return
        numbers = [name for name, value in metrics.items() if not isinstance(value, list)]
        if self.metric not in numbers:
            near = difflib.get_close_matches(self.metric, numbers, n=3) or sorted(numbers)
            raise ValueError(
                f"--optimize: {task.title} is complete and has no metric {self.metric!r}; it has, "
                f"for instance, {', '.join(near[:12])}; the same command with one of these goes on"
            )
        study.tell(number, metrics[self.metric], skip_if_finished=True)

    def finished(self) -> int:
        """The number of trials that have come to an end."""
        return sum(trial.state.is_finished() for trial in self._study().get_trials(deepcopy=False))

    def best(self) -> str:
        """The best point so far, in words; "" is none."""
        if not any(trial.value is not None for trial in self._study().get_trials(deepcopy=False)):
            return ""
        best = self._study().best_trial
        name = self.plan(self._point(best.params)).name
        return f"best by {self.metric} ({self.direction}): {name}  {best.value:.4g}"

    def _study(self) -> Any:
        """The study as it is in the file; its next proposal depends on its trials alone."""
        if self._loaded is None:
            options = {"connect_args": {"timeout": 60}}  # seconds that another process may write
            path = f"sqlite:///{self.workdir / STORAGE}"
            self._storage = self.optuna.storages.RDBStorage(path, engine_kwargs=options)
            name = {"study_name": "sweep", "storage": self._storage, "load_if_exists": True}
            self._loaded = self.optuna.create_study(direction=self.direction, **name)
        seed = self.seed + 1000 * len(self._loaded.get_trials(deepcopy=False))
        self._loaded.sampler = self.optuna.samplers.TPESampler(seed=seed % 2**32)
        return self._loaded

    def _check_same(self):
        about = {
            "metric": self.metric,
            "direction": self.direction,
            "grid": {axis.name: repr(axis.values) for axis in self.axes},
        }
        with hold_when_free(self.workdir / ".search", lambda text: None):
            study = self._study()
            old = study.user_attrs.get("about")
            if old not in (None, about) and self._is_idle(study, old["grid"] == about["grid"]):
                self.optuna.delete_study(study_name="sweep", storage=self._storage)
                self._loaded = None
                old, study = None, self._study()
            if old is None:
                study.set_user_attr("about", about)
        if old not in (None, about):
            changed = [name for name in about if old.get(name) != about[name]]
            raise ValueError(
                f"{self.workdir / STORAGE} is of a search with another {' and '.join(changed)} "
                f"(its metric is {old['metric']}, to {old['direction']}): choose another workdir"
            )

    def _is_idle(self, study: Any, same_grid: bool) -> bool:
        """Whether no trial has ended and none is under way: its metric was one that no point has.

        The same points are proposed again then, and found complete.
        """
        trials = study.get_trials(deepcopy=False)
        if not same_grid or any(trial.state.is_finished() for trial in trials):
            return False
        return not any(in_use(self.plan(self._point(x.params)).folder) for x in trials)

    def _distributions(self) -> dict[str, Any]:
        of = self.optuna.distributions
        found = {}
        for axis in self.axes:
            values = axis.values
            if not isinstance(values, Interval):
                found[axis.name] = of.CategoricalDistribution([spelt(value) for value in values])
            elif values.whole:
                found[axis.name] = of.IntDistribution(values.low, values.high, log=values.log)
            else:
                found[axis.name] = of.FloatDistribution(values.low, values.high, log=values.log)
        return found

    def _point(self, params: dict[str, Any]) -> Point:
        point = {}
        for axis in self.axes:
            value, values = params[axis.name], axis.values
            if isinstance(values, Interval):
                point[axis.name] = values.rounded(value)
            else:
                point[axis.name] = next(x for x in values if spelt(x) == value)
        return point
