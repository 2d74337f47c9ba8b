"""A run from its data to its report: every stage that the config has, in order."""

import contextlib
import dataclasses
import datetime
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import logging
from ml_collections import config_dict

from ppo_jax.config.parsing import FunctionFailed, failure, load_function
from ppo_jax.config.run import STAGE_NAMES, Config, from_config_dict
from ppo_jax.data.atomic import PARTIAL, atomic_folder
from ppo_jax.data.shared_states import FOLDER
from ppo_jax.distributed.folder_lock import hold_folder
from ppo_jax.distributed.layout import make_mesh
from ppo_jax.distributed.processes import barrier, on_primary, stop_if_asked
from ppo_jax.evaluation.evaluate import judged_step
from ppo_jax.evaluation.report.report import is_current, write_report
from ppo_jax.evaluation.report.summary import headlines, read_run, verdict
from ppo_jax.io.base_model import base_path, prepare_base
from ppo_jax.io.checkpoints import Checkpoints
from ppo_jax.io.model_spec import ModelSpec, initial_models, needs_base, read_shape
from ppo_jax.io.run_folder import (
    fill_in_workdir,
    keep_time,
    prepare_workdir,
    read_config,
    read_results,
    without_workdir,
    write_results,
)
from ppo_jax.io.stage_folder import describe_stage, missing_steps
from ppo_jax.pipeline.preflight import check_mesh, check_named, check_run, chosen
from ppo_jax.pipeline.preview import brackets, colours, data_lines, previews
from ppo_jax.pipeline.summary import summary
from ppo_jax.training.resume import check_same_base, check_same_data, drop_outdated_base
from ppo_jax.training.stage import as_begun, check_settings, describe


def run(
    settings: config_dict.ConfigDict | dict, workdir: str | Path, only: Sequence[str] = STAGE_NAMES
):
    """Run the stages of a config in one workdir; skip what is complete, resume what is not.

    Args:
        settings: the config, with a section for each stage that is wanted.
        workdir: the run's folder; `{workdir}` in the config's paths is this folder.
        only: run no other stages than these.

    Raises:
        ValueError: a setting, a data file or a model is not usable; before training begins.
    """
    workdir = checked_folder(workdir)
    with held(workdir):
        run_held(settings, workdir, only)


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Keep other runs out of a folder, for all processes of this one."""
    with contextlib.ExitStack() as stack:
        on_primary(lambda: stack.enter_context(hold_folder(workdir)))
        yield


def run_held(settings: config_dict.ConfigDict | dict, workdir: Path, only: Sequence[str]):
    """`run` in a folder that this run holds already."""
    logging.set_verbosity(logging.WARNING)  # Orbax logs every file it writes
    given, config, stages = planned(settings, workdir, only)
    complete = on_primary(completeness, config, workdir)
    todo = [stage for stage in stages if not complete[stage]]
    if todo:
        base, data = prepare(config, given, workdir, todo)
    for stage in stages:
        if stage in todo:
            run_stage(stage, config, workdir, base, data.pop(stage))
        else:
            print(f"{stage}: complete", flush=True)
    report = workdir / "report.html"
    on_primary(lambda: is_current(workdir) or write_report(workdir))
    if not todo:
        print("every stage is complete: nothing to do", flush=True)
    print(closing(workdir, report), flush=True)


def evaluate(settings: config_dict.ConfigDict | dict, workdir: str | Path):
    """Run the evaluation of a config alone: `run` with `only=("evaluate",)`."""
    run(settings, workdir, only=("evaluate",))


def planned(
    settings: config_dict.ConfigDict | dict, workdir: Path, only: Sequence[str]
) -> tuple[Config, Config, list[str]]:
    """(the config as given, the same with `{workdir}` filled in, the stages that it asks for).

    Raises:
        ValueError: a setting is not usable, or does not fit to the devices or to what the folder
            holds.
    """
    given, config, stages = checked_settings(settings, workdir, only)
    make_mesh(config.mesh)  # refused before anything is made
    return given, config, stages


def checked_settings(
    settings: config_dict.ConfigDict | dict, workdir: Path, only: Sequence[str]
) -> tuple[Config, Config, list[str]]:
    """`planned` without a look at the devices, which a process that asks for them takes."""
    only = [only] if isinstance(only, str) else only
    given = as_begun(with_date(from_config_dict(settings), workdir), workdir)
    config = fill_in_workdir(given, workdir)
    stages = [
        stage for stage in STAGE_NAMES if stage in only and getattr(config, stage) is not None
    ]
    if not stages:
        has = [stage for stage in STAGE_NAMES if getattr(config, stage) is not None]
        raise ValueError(f"the config has none of the sections {list(only)}; it has {has}")
    for stage in (stage for stage in stages if stage != "evaluate"):
        check_settings(workdir / stage, describe(stage, config, workdir))
    check_same_base(workdir, dataclasses.asdict(given))
    return given, config, stages


def with_date(config: Config, workdir: Path) -> Config:
    """The config with the date that chat templates write: that of the run's first start."""
    if config.model.chat_date:
        return config
    date = on_primary(first_date, workdir)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, chat_date=date))


def first_date(workdir: Path) -> str:
    """The date that a run's folder keeps, in config.json or a stage.json; without one, today."""
    stages = [describe_stage(workdir / stage) for stage in STAGE_NAMES]
    configs = [read_config(workdir), *(stage["settings"] for stage in stages if stage)]
    dates = [x.get("model", {}).get("chat_date") for x in configs if x]
    return next(filter(None, dates), datetime.date.today().isoformat())


def dry_run(
    settings: config_dict.ConfigDict | dict, workdir: str | Path, only: Sequence[str] = STAGE_NAMES
):
    """Print what `run` would begin with and the first examples of each stage; train nothing.

    Data and base model, where they are yet to be made, are made in a temporary folder.

    Args:
        settings: as for `run`.
        workdir: as for `run`; it is not touched, nor made.
        only: as for `run`.

    Raises:
        ValueError: what `run` would refuse.
    """
    logging.set_verbosity(logging.WARNING)
    workdir = checked_folder(workdir)
    in_colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    with stand_in(workdir) as folder:
        given, config, stages = planned(settings, folder, only)
        check_named(config, folder, stages)
        drop_outdated_base(folder, dataclasses.asdict(given))
        _, starts, data = make_ready(config, folder, stages)
        table = [summary(config, starts, stages, data), "\n".join(data_lines(config, data))]
        parts = [*table, *previews(data, starts, colours if in_colour else brackets)]
    print("\n\n".join(parts).replace(str(folder), str(workdir)))
    print(f"\ndry run: nothing is trained, nothing is written to {workdir}", flush=True)


@contextlib.contextmanager
def stand_in(workdir: Path) -> Iterator[Path]:
    """A temporary folder with links to what the run's folder holds; messages name the latter."""
    with tempfile.TemporaryDirectory() as name:
        for entry in workdir.iterdir() if workdir.is_dir() else ():
            if not entry.name.startswith(PARTIAL):  # what a killed run has left
                (Path(name) / entry.name).symlink_to(entry.resolve())
        try:
            yield Path(name)
        except ValueError as error:
            error.args = tuple(str(x).replace(name, str(workdir)) for x in error.args)
            raise


def prepare(
    config: Config, given: Config, workdir: Path, stages: Sequence[str]
) -> tuple[str, dict[str, Any]]:
    """Make the data and the base model, check all that the stages need, and print the table.

    Args:
        config: of the run.
        given: the same, with `{workdir}` in its paths: the run's folder may be moved.
        workdir: the run's folder.
        stages: those that will run.

    Returns:
        (path of the base model, "" where no stage reads it; {stage name: its data}).
    """
    began = time.monotonic()
    check_named(config, workdir, stages)
    on_primary(drop_outdated_base, workdir, dataclasses.asdict(given))
    if makes_something(config, workdir, stages):  # what is made says from which settings it is
        prepare_workdir(workdir, dataclasses.asdict(given))
    base, starts, data = make_ready(config, workdir, stages)
    table = "\n".join([summary(config, starts, stages, data), *data_lines(config, data)])
    prepare_workdir(workdir, dataclasses.asdict(given))
    print(table, flush=True)
    if "time/prepare_s" not in read_results(workdir):
        keep_time(workdir, "prepare", time.monotonic() - began)
    return base, data


def make_ready(
    config: Config, workdir: Path, stages: Sequence[str]
) -> tuple[str, dict[str, ModelSpec], dict[str, Any]]:
    """Make the data and the base model where they are not there yet, and check all.

    Returns:
        (path of the base model or "", what the stages start from, what they read).
    """
    on_primary(make_data, config, workdir)
    stop_if_asked()
    base = ""
    if needs_base(config, stages):
        model = config.model
        if model.path and model.vocabulary_data and not (workdir / "base").is_dir():
            read_shape(model.path, model)  # refuses what cannot be trimmed before it is read
        on_primary(prepare_base, config.model, workdir / "base", config.seed)
        stop_if_asked()
        base = base_path(config.model, workdir / "base")
    starts = initial_models(config, workdir, base, stages)
    check_mesh(config, starts, stages)
    data = check_run(config, starts, stages)
    check_same_data(config, workdir, chosen(stages), data, starts)
    return base, starts, data


def completeness(config: Config, workdir: Path) -> dict[str, bool]:
    """Whether each stage has taken all of its steps, and the evaluation is of the newest ones."""
    complete = {}
    for stage in ("sft", "reward", "ppo"):
        if getattr(config, stage) is not None:
            complete[stage] = missing_steps(workdir / stage) is None
    if complete.get("ppo"):
        steps = Checkpoints(workdir / "ppo" / "checkpoints").latest_step()
        complete["ppo"] = steps >= config.ppo.num_iterations
    if config.evaluate is not None:
        judged = read_results(workdir).get("evaluated")
        newest = all(complete.values()) and judged == evaluation_subject(config, workdir)
        complete["evaluate"] = newest
    return complete


def closing(workdir: Path, report: Path) -> str:
    """The figures and the verdict, as the report has them."""
    run = read_run(workdir)
    figures = [f"  {value:>10}  {what} ({how})" for value, what, how in headlines(run)]
    left_out = [f"left out: {line}" for line in run.left_out]
    return "\n".join([*left_out, *figures, verdict(run), f"report: {report}"])


def run_stage(stage: str, config: Config, workdir: Path, base: str, data: Any):
    """Run a stage; what an earlier evaluation said does not outlive the models that it was of."""
    stop_if_asked()
    times = {k: v for k, v in read_results(workdir).items() if k.startswith("time/")}
    write_results(workdir, times)
    before = 0.0 if stage == "evaluate" else times.get(f"time/{stage}_s", 0.0)
    with timed(workdir, stage, before):
        chosen([stage])[0].train(config, workdir, base, data)
    barrier(f"the end of {stage}")
    if stage == "reward":
        on_primary(shutil.rmtree, workdir / FOLDER, ignore_errors=True)  # no other stage reads it
    if stage == "evaluate":
        subject = evaluation_subject(config, workdir)
        write_results(workdir, read_results(workdir) | {"evaluated": subject})


@contextlib.contextmanager
def timed(workdir: Path, stage: str, before: float) -> Iterator[None]:
    """Add the seconds of the context to those of earlier starts, in results.json."""
    began = time.monotonic()
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # of a full disk the first error is told
            keep_time(workdir, stage, before + time.monotonic() - began)
        raise
    keep_time(workdir, stage, before + time.monotonic() - began)


def checked_folder(workdir: str | Path) -> Path:
    """The run's folder, which is one or is not there yet.

    Raises:
        ValueError: it has no name, or a file is in its place.
    """
    if not str(workdir) or Path(workdir).is_file():
        raise ValueError(f"workdir must be a folder, or not there yet, got {str(workdir)!r}")
    return Path(workdir)


def makes_something(config: Config, workdir: Path, stages: Sequence[str]) -> bool:
    """Whether this start will make the data or the base model."""
    needed = needs_base(config, stages)
    made_here = {"data": config.prepare, "base": needed and config.model.vocabulary_data}
    return any(made and not (workdir / name).is_dir() for name, made in made_here.items())


def make_data(config: Config, workdir: Path):
    """Let the config's `prepare` function write `workdir/data`, once.

    Raises:
        FunctionFailed: the function raised something, or wrote nothing.
    """
    folder = workdir / "data"
    if not config.prepare or folder.is_dir():
        return
    prepare, name = load_function(config.prepare, "prepare"), f"prepare {config.prepare}"
    with atomic_folder(folder) as new:
        try:
            prepare(new)
        except (OSError, KeyboardInterrupt):  # a full disk, no network: told as what they are
            raise
        except BaseException as error:  # SystemExit, too: the run is not done
            raise failure(name, error) from error
        if not any(new.iterdir()):
            raise FunctionFailed(f"{name} wrote no file into the folder that it was given")


def evaluation_subject(config: Config, workdir: Path) -> dict:
    """What a verdict is about: its settings, and the step of every stage, the newest but for
    `judged_step`."""
    settings = without_workdir(dataclasses.asdict(config.evaluate), workdir)
    folders = [workdir / stage / "checkpoints" for stage in STAGE_NAMES]
    steps = {x.parent.name: Checkpoints(x).latest_step() for x in folders if x.is_dir()}
    if "ppo" in steps and (best := judged_step(workdir)) is not None:
        steps["ppo"] = best
    return {"settings": settings, "steps": steps}
