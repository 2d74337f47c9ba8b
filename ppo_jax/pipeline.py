"""A run from its data to its report: every stage that the config has, in order."""

import dataclasses
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import logging
from ml_collections import config_dict

from ppo_jax.checkpoints import Checkpoints
from ppo_jax.checks import check_named, check_run
from ppo_jax.config import STAGES, Config, from_config_dict
from ppo_jax.evaluate import evaluate
from ppo_jax.models import missing_steps, prepare_base
from ppo_jax.plan import find_starts, needs_base
from ppo_jax.plugins import load_function
from ppo_jax.ppo_loop import train_ppo
from ppo_jax.report import write_report
from ppo_jax.report_summary import headlines, read_run, verdict
from ppo_jax.reward_loop import train_reward
from ppo_jax.runs import check_settings, describe, without_folder
from ppo_jax.sft_loop import train_sft
from ppo_jax.summary import summary
from ppo_jax.workdir import (
    config_differences,
    prepare_workdir,
    read_config,
    read_results,
    write_results,
)

RUN = {"sft": train_sft, "reward": train_reward, "ppo": train_ppo, "evaluate": evaluate}


def run(settings: config_dict.ConfigDict | dict, workdir: str | Path, only: Sequence[str] = STAGES):
    """Run the stages of a config in one workdir; skip what is complete, resume what is not.

    Args:
        settings: the config, with a section for each stage that is wanted.
        workdir: the run's folder; `{workdir}` in the config's paths stands for it.
        only: run no other stages than these.

    Raises:
        ValueError: a setting, a data file or a model is not usable; before training begins.
    """
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it writes
    workdir = Path(workdir)
    given = from_config_dict(settings)
    config = fill_in_workdir(given, workdir)
    stages = [stage for stage in STAGES if stage in only and getattr(config, stage) is not None]
    if not stages:
        raise ValueError(f"the config has none of the sections {list(only)}")
    for stage in (stage for stage in stages if stage != "evaluate"):
        check_settings(workdir / stage, describe(stage, config, workdir))
    check_origin(workdir, dataclasses.asdict(given))
    todo = [stage for stage in stages if not is_complete(stage, config, workdir)]
    if todo:
        base = prepare(config, given, workdir, todo)
    for stage in stages:
        if stage in todo:
            run_stage(stage, config, workdir, base)
        else:
            print(f"{stage}: complete", flush=True)
    report = workdir / "report.html"
    if todo or not report.exists():
        write_report(workdir)
    if not todo:
        print("every stage is complete: nothing to do", flush=True)
    print(closing(workdir, report), flush=True)


def prepare(config: Config, given: Config, workdir: Path, stages: Sequence[str]) -> str:
    """Make the data and the base model, check all that the stages need, and print the table.

    Args:
        config: of the run.
        given: the same, with `{workdir}` in its paths: the run's folder may be moved.
        workdir: the run's folder.
        stages: those that will run.

    Returns:
        The path of the base model, "" where no stage reads it.
    """
    began = time.time()
    check_named(config, workdir, stages)
    prepare_workdir(workdir, dataclasses.asdict(given))
    make_data(config, workdir)
    needed = needs_base(config, stages)
    base = prepare_base(config.model, workdir / "base", config.seed) if needed else ""
    starts = find_starts(config, workdir, base, stages)
    check_run(config, starts, stages)
    print(summary(config, starts, stages), flush=True)
    if "time/prepare_s" not in read_results(workdir):
        add_time(workdir, "prepare", began)
    return base


def is_complete(stage: str, config: Config, workdir: Path) -> bool:
    """Whether a stage has taken all of its steps, or the evaluation is of the newest ones."""
    if stage == "evaluate":
        before = [s for s in ("sft", "reward", "ppo") if getattr(config, s) is not None]
        subject = evaluation_subject(config, workdir)
        judged = read_results(workdir).get("evaluated") == subject
        return judged and all(is_complete(s, config, workdir) for s in before)
    if missing_steps(workdir / stage) is not None:
        return False
    steps = Checkpoints(workdir / stage / "checkpoints").latest_step()
    return stage != "ppo" or steps >= config.ppo.num_iterations


def closing(workdir: Path, report: Path) -> str:
    """The figures and the verdict, as the report has them."""
    run = read_run(workdir)
    figures = [f"  {value:>10}  {what} ({how})" for value, what, how in headlines(run)]
    return "\n".join([*figures, verdict(run), f"report: {report}"])


def run_stage(stage: str, config: Config, workdir: Path, base: str):
    began = time.time()
    RUN[stage](config, workdir, base)
    if stage == "evaluate":
        subject = evaluation_subject(config, workdir)
        write_results(workdir, read_results(workdir) | {"evaluated": subject})
    add_time(workdir, stage, began)


def check_origin(workdir: Path, config: dict):
    """Refuse a folder whose data or base model were made from other settings."""
    old = read_config(workdir)
    made = any((workdir / name).is_dir() for name in ("data", "base"))
    if old is None or not made:  # a start that failed before it made anything binds nobody
        return
    origins = ({name: c[name] for name in ("prepare", "model", "seed")} for c in (old, config))
    if differences := config_differences(*origins):
        raise ValueError(
            f"{workdir} was begun with other settings: {'; '.join(differences)}. "
            "Set them back, or choose another workdir."
        )


def fill_in_workdir(settings: Any, workdir: Path) -> Any:
    """The same settings with `{workdir}` in every string replaced by the folder."""
    values = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, str):
            value = value.replace("{workdir}", str(workdir))
        elif dataclasses.is_dataclass(value):
            value = fill_in_workdir(value, workdir)
        values[field.name] = value
    return type(settings)(**values)


def make_data(config: Config, workdir: Path):
    """Let the config's `prepare` function write `workdir/data`, once."""
    folder = workdir / "data"
    if not config.prepare or folder.is_dir():
        return
    temporary = workdir / "data.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    load_function(config.prepare, "prepare")(temporary)
    temporary.rename(folder)


def evaluation_subject(config: Config, workdir: Path) -> dict:
    """What a verdict is about: its settings, and the newest step of every stage."""
    settings = without_folder(dataclasses.asdict(config.evaluate), f"{workdir}/")
    folders = [workdir / stage / "checkpoints" for stage in STAGES]
    steps = {x.parent.name: Checkpoints(x).latest_step() for x in folders if x.is_dir()}
    return {"settings": settings, "steps": steps}


def add_time(workdir: Path, stage: str, began: float):
    """Add wall time to results.json; a stage that was interrupted counts its last part only."""
    results = read_results(workdir)
    seconds = results.get(f"time/{stage}_s", 0.0) + time.time() - began
    results[f"time/{stage}_s"] = seconds
    parts = [v for k, v in results.items() if k.startswith("time/") and k != "time/total_s"]
    write_results(workdir, results | {"time/total_s": sum(parts)})
