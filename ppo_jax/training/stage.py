"""What every training stage does around its steps: restore, log, save, stop when asked to."""

import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ppo_jax.config.flags import hint_of, section_of
from ppo_jax.config.parsing import changeable_fields, filled_in, with_new_names
from ppo_jax.config.run import STAGE_NAMES, Config, ModelSettings
from ppo_jax.distributed.layout import Layout, abstract, init_sharded
from ppo_jax.distributed.processes import STOPS, is_primary, on_primary, preempted, stop_handlers
from ppo_jax.io.checkpoints import Checkpoints
from ppo_jax.io.run_folder import (
    config_differences,
    drop_lines_after,
    keep_time,
    read_results,
    read_rows,
    without_workdir,
)
from ppo_jax.io.stage_folder import (
    Model,
    begin_stage,
    best_of,
    describe_stage,
    has_begun,
    update_stage,
)
from ppo_jax.models.partition import Parts, split_params, start_layer
from ppo_jax.training.metrics import MetricsWriter

KEEP_TIME_S = 10  # seconds between two times that the time of a stage is written


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a run: all that the rest of the library has to know of it."""

    name: str  # "sft": of its section of the config and of its folder
    title: str  # "Supervised fine-tuning", a heading
    label: str  # "SFT", in a sentence
    makes: str = ""  # what its model is, for the model card
    data_fields: tuple[str, ...]  # settings that name data sets; the first is what it trains on
    source_fields: tuple[str, ...] = ()  # settings that may name another stage to start from
    trained_field: str = "params"  # of its state: the trained parameters of its model
    step_unit: str = "optimizer step"
    extendable: bool = False  # its number of steps is a setting, which may be raised later
    # On the terminal, {metric: label}; in the report, {metric: its first and last value in words}.
    progress: Mapping[str, str] = dataclasses.field(default_factory=dict)
    outcome: Mapping[str, str] = dataclasses.field(default_factory=dict)
    read: Callable[[Config, Any], Any]  # (config, its initial ModelSpec) -> data, tokenised
    train: Callable[[Config, Path, str, Any], None]  # (config, workdir, base model's path, data)


def training_data(data: Any) -> Any:
    """The part of a stage's data that it trains on: the first of several."""
    return data[0] if isinstance(data, tuple) else data


class StageRun:
    """One stage of a run, from its newest checkpoint to its last step.

    Use it as a context, and in it:

        state = run.restore(layout, init, *args)
        for step in run.steps():  # steps already taken
            state, metrics = ...
            run.end_step(step + 1, state, metrics)

    Args:
        workdir: the run's folder.
        stage: which one.
        num_steps: of the stage.
        save_every: steps between checkpoints; the last step is always saved.
        keep: how many of them stay, or "best:METRIC": the newest and the best.
        tokens: (metric, factor), as `MetricsWriter` has it.
        limits: {metric: (most, setting)}, likewise.
        writers: of its metrics, likewise.
        num_lanes: runs that take their steps together, see `LaneRuns`; None is a run by itself.
    """

    is_open = False  # whether a stage of this process is

    def __init__(
        self,
        workdir: Path,
        stage: Stage,
        *,
        num_steps: int,
        save_every: int,
        keep: str | int = 2,
        tokens: tuple[str, float] | None = None,
        limits: Mapping[str, tuple[float, str]] | None = None,
        writers: Sequence[str] = ("tensorboard",),
        num_lanes: int | None = None,
    ):
        self.workdir, self.stage, self.num_steps = Path(workdir), stage.name, num_steps
        self.save_every, self.show = save_every, stage.progress
        self.tokens, self.limits, self.writers = tokens, limits, writers
        self.folder = self.workdir / stage.name
        self.unit = stage.step_unit
        self.start, self.num_lanes = 0, num_lanes
        self.expected: Collection[str] = ()  # metrics that come every few steps
        self.asked_to_stop: signal.Signals | None = None
        self.writer: MetricsWriter | None = None
        self.best_metric = keep.removeprefix("best:") if isinstance(keep, str) else None
        number, best = (keep, None) if self.best_metric is None else (1, self.best_step)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", keep=number, best=best)
        self._before = read_results(workdir).get(f"time/{stage.name}_s", 0.0)
        self._began = self._kept = time.monotonic()

    def __enter__(self) -> "StageRun":
        handlers = stop_handlers(self._stop_soon)
        self._old_handlers = {number: signal.signal(number, x) for number, x in handlers.items()}
        StageRun.is_open = True
        return self

    def __exit__(self, *error):
        self.drop_handlers()
        self.close(failed=error[0] is not None)
        if self.asked_to_stop and error[0] is None:  # asked after the last step
            sys.exit(STOPS[self.asked_to_stop])

    def drop_handlers(self):
        """From here on a signal ends the process as it does outside of a stage."""
        StageRun.is_open = False
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)

    def close(self, failed: bool = False):
        """Close the files when the last save is on disk."""
        with contextlib.ExitStack() as closing:
            closing.callback(self.checkpoints.close)
            if self.writer is not None:
                closing.callback(self.writer.abandon if failed else self.writer.close)

    def _stop_soon(self, number: int, _):
        if self.asked_to_stop:  # asked twice: at once, without saving
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(STOPS[number])
        self.asked_to_stop = signal.Signals(number)
        message = f"\n{self.stage}: stopping when the {self.unit} at hand is finished and saved "
        message += "(once more: at once, without saving)\n"
        os.write(2, message.encode())  # print() is not safe in a handler

    def restore(self, layout: Layout, init: Callable[..., Any], *args: Any) -> Any:
        """The newest complete checkpoint's state, or `init(*args)` when there is none; in both
        cases sharded as the layout says, whatever the mesh was that saved it."""
        found = self.checkpoints.restore(abstract(layout, init, *args))
        if found is None:
            state = init_sharded(layout, init, *args)
        else:
            state, self.start, _ = found
        if 0 < self.start < self.num_steps:
            print(f"{self.stage}: resuming after step {self.start}", flush=True)
        if self.start < self.num_steps:
            print(f"{self.stage}: compiling the first {self.unit}", flush=True)
        self.open_files(None if found is None else self.start)
        return state

    def open_files(self, restored: int | None):
        """Open the files of metrics, without their lines after the restored step; None is none."""
        drop_lines_after(self.workdir / "samples.jsonl", self.stage, restored)
        self.writer = MetricsWriter(
            self.workdir,
            self.stage,
            total_steps=self.num_steps,
            restored_step=restored,
            show=self.show,
            tokens=self.tokens,
            limits=self.limits,
            writers=self.writers,
            num_lanes=self.num_lanes,
        )

    def expect(self, metrics: Mapping[str, float]):
        """Take the figures from before the first step, of metrics that come every few steps: they
        are logged where the stage begins, and known where it goes on."""
        self.expected = metrics.keys()
        if self.start == 0:
            self.log_start(metrics)

    def best_step(self, steps: list[int]) -> int:
        """Which of some saved steps is best by the newest value of `best_metric` up to it; of equal
        ones, and where there is no value yet, the newest."""
        return best_of(self.logged(), self.best_metric, steps)

    def logged(self) -> list[dict[str, Any]]:
        """The stage's lines of metrics.jsonl, oldest first."""
        rows, _ = read_rows(self.workdir / "metrics.jsonl")
        return [row for row in rows if row["stage"] == self.stage]

    def check_best_metric(self, metrics: Mapping[str, Any]):
        """Refuse a `keep` by a metric that the stage has neither in this step nor in one before.

        Raises:
            ValueError: with those that it has.
        """
        rows = on_primary(self.logged)
        names = {name for row in [*rows, metrics, self.expected] for name in row if "/" in name}
        if self.best_metric not in names:
            raise ValueError(
                f"{self.stage}.keep must be 'best:METRIC' with one of {sorted(names)}, got "
                f"'best:{self.best_metric}'"
            )

    def tell(self, text: str):
        """A line for the user, above the progress."""
        self.writer.tell(text)

    def log_start(self, metrics: Mapping[str, Any]):
        """Log figures from before the first step, as those of step 0."""
        self.writer.write(0, metrics)
        self.writer.flush()

    def steps(self) -> Iterator[int]:
        """The numbers of steps already taken: from the restored one to num_steps - 1."""
        return iter(range(self.start, self.num_steps))

    def finish_step(self):
        """Wait for the step before and log it, so that what follows is not booked on it."""
        self.writer.flush()

    def end_step(self, step: int, state: Any, metrics: Mapping[str, Any]):
        """Log a step; save it when its time has come.

        Raises:
            FloatingPointError: a loss is not finite, or a metric is above its limit.
            ValueError: `keep` names a metric that the stage has not.
            FileNotFoundError: the folder was removed.
            SystemExit: after SIGTERM (code 143) or Ctrl-C (130; among several processes it is
                SIGTERM for all, 143), when the state is on disk.
        """
        self.check_step(step, metrics)
        self.writer.write(step, metrics)
        self.keep_time()
        if not self.is_due(step):
            return
        self.writer.flush()  # a state whose loss is not finite is never saved
        self.save(step, state)
        if self.asked_to_stop:
            self.checkpoints.wait()
            self.writer.close()  # its last line comes before the next one
            self.stop(step)

    def check_step(self, step: int, metrics: Mapping[str, Any]):
        """The folder is still there, and has the metric that `keep` names."""
        if not (self.folder / "stage.json").is_file():  # a save would make the folder again
            raise FileNotFoundError(f"{self.folder} was removed while the stage was under way")
        if self.best_metric and step == self.start + 1:
            self.check_best_metric(metrics)

    def is_due(self, step: int) -> bool:
        """Whether the state after this step is saved."""
        if preempted():
            self.asked_to_stop = signal.SIGTERM
        return not step % self.save_every or step >= self.num_steps or bool(self.asked_to_stop)

    def save(self, step: int, state: Any):
        self.checkpoints.save(step, state, describe_stage(self.folder))
        self.writer.last_checkpoint = step

    def stop(self, step: int):
        """End the process as it was asked to, when the state is on disk."""
        print(
            f"{self.stage}: stopped by {self.asked_to_stop.name}, step {step} is saved; "
            "the same command goes on from there",
            flush=True,
        )
        sys.exit(STOPS[self.asked_to_stop])

    def seconds(self) -> float:
        """What the stage has taken, with earlier starts; of several lanes a lane's share."""
        return self._before + (time.monotonic() - self._began) / (self.num_lanes or 1)

    def keep_time(self, at_once: bool = False):
        """Every now and then: what a killed start has taken counts, too."""
        if is_primary() and (at_once or time.monotonic() - self._kept >= KEEP_TIME_S):
            keep_time(self.workdir, self.stage, self.seconds())
            self._kept = time.monotonic()


def stage_run(stage: Stage, config: Config, workdir: Path, num_steps: int, **more: Any) -> StageRun:
    """The `StageRun` of a config: it says how often to save, what to keep, where metrics go."""
    settings = getattr(config, stage.name)
    return StageRun(
        workdir,
        stage,
        num_steps=num_steps,
        save_every=settings.save_every,
        keep=settings.keep,
        writers=config.writers,
        **more,
    )


def _in_forked_process():
    """A worker of a process pool, which a reward function may have, ends at a signal: it must not
    take the handlers of the stage for its own, or its pool would wait for it for ever."""
    if StageRun.is_open:
        for number in STOPS:
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_in_forked_process)


def describe(stage: str, config: Config, workdir: Path) -> dict:
    """What stage.json keeps of the settings, to compare with when the stage is resumed."""
    settings = dataclasses.asdict(getattr(config, stage))
    settings |= {"seed": config.seed, "model": dataclasses.asdict(config.model)}
    return {"stage": stage, "settings": without_workdir(settings, workdir)}


def open_stage(
    stage: Stage,
    config: Config,
    workdir: Path,
    model: Model,
    *,
    num_steps: int,
    data: Mapping[str, int],
    sources: Mapping[str, Model | None],
) -> tuple[int | None, Parts]:
    """Begin a stage, or make sure that the one begun before can go on with these settings.

    A stage without a checkpoint starts over.

    Args:
        stage: which one.
        config: of the run.
        workdir: the run's folder.
        model: what the stage starts from.
        num_steps: of the stage.
        data: the `fingerprint` of what it trains on.
        sources: {field: model} of all that it starts from. The steps of those that are stages stay
            in stage.json: a source may go on meanwhile, and a resumed run must not notice.

    Returns:
        (the layer that its trained part starts at or None, the model's parameters, split).

    Raises:
        ValueError: a setting differs that the state or the data order depends on; it lists them.
    """
    trainable = getattr(config, stage.name).trainable
    start = start_layer(model.config, trainable)
    parts = split_params(model.config, model.params, trainable, start)
    folder, description = workdir / stage.name, describe(stage.name, config, workdir)
    check_settings(folder, description)
    description |= {"trained_field": stage.trained_field, "num_steps": num_steps, "data": data}
    old = describe_stage(folder) if has_begun(folder) else None
    if old and not stage.extendable and old["num_steps"] != num_steps:
        raise ValueError(
            f"{folder} was begun with data for {old['num_steps']} steps, {stage.name}.data now "
            f"gives {num_steps}: put the data back, or choose another workdir"
        )
    if old is None:
        steps = {field: source.step for field, source in sources.items() if source is not None}
        pins = {field: step for field, step in steps.items() if step is not None}
        begin_stage(folder, model, parts, description | {"sources": pins})
    else:
        update_stage(folder, without_younger_fields(stage.name, description, old["settings"]))
    return start, parts


def check_settings(folder: Path, description: dict):
    """Refuse to resume a stage with settings that change what its checkpoints mean."""
    if not has_begun(folder):
        return
    old = describe_stage(folder)
    stage = description["stage"]
    both = (with_younger_fields(stage, x["settings"]) for x in (old, description))
    may_change = changeable_fields(section_of(hint_of(stage)))
    may_change |= changeable_fields(ModelSettings, "model.")
    may_change -= started_coefficients(description["settings"])
    if fixed := fixed_differences(*both, may_change):
        raise ValueError(
            f"{folder} was begun with other settings: {'; '.join(fixed)}. "
            "Set them back, or choose another workdir."
        )


def started_coefficients(settings: dict) -> set[str]:
    """Settings from which a control began: its state has moved on, and they are read no more.

    >>> started_coefficients({"kl_control": "adaptive", "target_entropy": 0.0})
    {'kl_coef'}
    """
    moved = {
        "kl_coef": settings.get("kl_control") == "adaptive",
        "penalty_coef": settings.get("penalty_target_kl", 0) > 0,
        "entropy_coef": settings.get("target_entropy", 0) > 0,
    }
    return {name for name, moves in moved.items() if moves}


def fixed_differences(old: dict, new: dict, may_change: set[str]) -> list[str]:
    """`config_differences` without those of fields that a resumed run may change."""
    return [d for d in config_differences(old, new) if d.split(":")[0] not in may_change]


def with_younger_fields(stage: str, settings: dict) -> dict:
    """A field that is younger than the stage had its default then, or what `BEFORE` says."""
    model = filled_in(ModelSettings, settings.get("model", {}))
    section = section_of(hint_of(stage))
    settings = before(section) | with_new_names(section, settings, warn=False)
    return filled_in(section, settings) | {"model": model}


def before(section: type) -> dict:
    """What the stages of a section did before there were fields for it."""
    return dict(getattr(section, "BEFORE", {}))


def as_begun(config: Config, workdir: Path) -> Config:
    """The config with the fields of `BEFORE` that are younger than a stage as the stage began.

    A field that was set to something else than its default stays.
    """
    for name in STAGE_NAMES:
        settings, folder = getattr(config, name), workdir / name
        if settings is None or not before(type(settings)) or not has_begun(folder):
            continue
        old = describe_stage(folder)["settings"]
        defaults = {x.name: x.default for x in dataclasses.fields(settings)}
        younger = {
            field: value
            for field, value in before(type(settings)).items()
            if field not in old and getattr(settings, field) == defaults[field]
        }
        for field, value in younger.items():
            print(f"{name}.{field} is {value!r}: {folder} was begun before there was the setting")
        config = dataclasses.replace(config, **{name: dataclasses.replace(settings, **younger)})
    return config


def without_younger_fields(stage: str, description: dict, old: dict) -> dict:
    """The description without the fields of `BEFORE` that the `old` settings lack: the next start
    has to find the stage as old as it is."""
    younger = before(section_of(hint_of(stage))).keys() - old.keys()
    kept = {name: x for name, x in description["settings"].items() if name not in younger}
    return description | {"settings": kept}
