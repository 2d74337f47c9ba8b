"""Many runs of one config: the points of a grid, of chance, of a search, or of its `sweep()`."""

import functools
import inspect
import itertools
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from absl import flags, logging

from ppo_jax import cli
from ppo_jax.config.parsing import describe_error
from ppo_jax.config.points import (
    GRID,
    MOST_POINTS,
    Point,
    grid_points,
    listed_points,
    parse_grid,
    random_points,
)
from ppo_jax.distributed import layout, processes, shares
from ppo_jax.io.stage_folder import LOWER_IS_BETTER
from ppo_jax.pipeline import study, sweep
from ppo_jax.pipeline.search import Search, corners, load_optuna
from ppo_jax.pipeline.shared_stages import Work

DIRECTIONS = ("maximize", "minimize")
CHILD = (sys.executable, "-m", "ppo_jax.commands.point")


def define_flags() -> SimpleNamespace:
    """The flags of the command, by name."""
    text, whole = flags.DEFINE_string, flags.DEFINE_integer
    found = SimpleNamespace(
        config=cli.config_flag(),
        workdir=text("workdir", None, "The sweep's folder; each point has one in it."),
        grid=text("grid", None, f"The points, {GRID}; otherwise those of the config's sweep()."),
        random=whole("random", None, "Draw so many points from --grid: its lists, log(a,b) ..."),
        random_seed=whole("random_seed", 0, "Of --random and --optimize.", lower_bound=0),
        optimize=text("optimize", None, "A metric of sweep.json: optuna proposes the points."),
        trials=whole("trials", None, "Points of --optimize in all, of every start and process."),
        direction=flags.DEFINE_enum(
            "direction", None, DIRECTIONS, "Of --optimize; losses, KL ... are minimized by default."
        ),
        jobs=whole("jobs", 1, "Points at a time; they share cores, GPUs or chips equally."),
        retries=whole("retries", 1, "How often a crashed point is retried.", lower_bound=0),
        shard=text("shard", None, "i/n: every n-th point from the i-th on, from 0 to n - 1."),
        vectorize=flags.DEFINE_boolean(
            "vectorize", False, "Train PPO of points that differ in numbers alone as one program."
        ),
        dry_run=flags.DEFINE_boolean("dry_run", False, "Print the points; run nothing."),
    )
    flags.DEFINE_alias("dry-run", "dry_run")
    found.multihost = cli.multihost_flags()
    flags.mark_flags_as_required(["config", "workdir"])
    holders = [x for x in vars(found).values() if not isinstance(x, tuple)]
    cli.show_in_help(*holders, *found.multihost)
    return found


def main():
    """Define the flags, parse them, run the points; exit code 1 if one has failed."""
    flag = define_flags()
    cli.run(functools.partial(run_points, flag))


def run_points(flag: SimpleNamespace):
    """What the command does."""
    logging.set_verbosity(logging.WARNING)
    together = flag.multihost[0].value
    check_flags(flag, together)
    settings, workdir = cli.config_of(flag.config).to_dict(), Path(flag.workdir.value)
    search = flag.optimize.value is not None
    points = corners(parse_grid(flag.grid.value)) if search else find_points(flag)
    cli.join_processes(*flag.multihost)
    if together:
        parts, num_devices = [], len(layout.devices_of_run())
    else:
        parts = shares.divide(*shares.find_devices(), flag.jobs.value)
        num_devices = parts[0].num_devices
    works = study.plan_sweep(settings, points, workdir, num_devices)
    works = works[slice(None) if search else find_shard(flag.shard.value)]
    groups = []
    if flag.vectorize.value:
        groups = processes.on_primary(study.lane_groups, works, workdir)
        print("\n".join(study.lane_lines(works, groups)), flush=True)
    if flag.dry_run.value:
        if search:
            print(f"{flag.trials.value} trials, which optuna will propose; the ends of --grid:")
        print(sweep.preview(works, workdir))
        return
    processes.end_on_second_signal()
    processes.on_primary(study.keep_base, settings, workdir)
    how = {"shares": parts, "command": CHILD, "retries": flag.retries.value}
    if together:
        failed = sweep.run_together(works, workdir, groups)
    elif search:
        plan = functools.partial(plan_one, settings, workdir, num_devices)
        failed = run_search(flag, workdir, plan, how)
    else:
        failed = sweep.Sweep(works, workdir, groups=groups, **how).run()
    tell_end(workdir, failed)


def plan_one(settings: Mapping, workdir: Path, num_devices: int, point: Point) -> Work:
    """A point as work."""
    return study.plan_sweep(settings, [point], workdir, num_devices)[0]


def run_search(
    flag: SimpleNamespace, workdir: Path, plan: Callable[[Point], Work], how: dict[str, Any]
) -> list[sweep.Task]:
    """The points of --optimize; returns those that have failed in this start."""
    metric = flag.optimize.value
    search = Search(
        parse_grid(flag.grid.value),
        metric=metric,
        direction=flag.direction.value or DIRECTIONS[bool(LOWER_IS_BETTER.search(metric))],
        trials=flag.trials.value,
        workdir=workdir,
        seed=flag.random_seed.value,
        plan=plan,
    )
    total, ended = flag.trials.value, search.finished()
    run = sweep.Sweep(
        [], workdir, ask=search.ask, tell=search.tell, total=total, ended=ended, **how
    )
    failed = run.run()
    print(search.best(), flush=True)
    return failed


def check_flags(flag: SimpleNamespace, together: bool):
    """Refuse flags that do not go together."""
    if flag.random.value is not None and flag.grid.value is None:
        raise ValueError("--random draws from --grid, which is missing")
    search = flag.optimize.value is not None
    if flag.random.value is None and not search and flag.random_seed.present:
        raise ValueError("--random_seed is of --random and --optimize, which are missing")
    if not search and (flag.trials.present or flag.direction.present):
        raise ValueError("--trials and --direction are of --optimize, which is missing")
    if search and flag.vectorize.value:
        raise ValueError("--vectorize is not for --optimize, whose points come one by one")
    if search:
        check_search(flag, together)
    if together and (flag.jobs.value > 1 or flag.dry_run.value):
        raise ValueError(
            "with --multihost all processes run the points together, one after another: leave "
            "--jobs and --dry_run out"
        )


def check_search(flag: SimpleNamespace, together: bool):
    """Refuse what does not go with --optimize, and a start without optuna."""
    if flag.grid.value is None or flag.trials.value is None:
        raise ValueError("--optimize needs --grid, what to choose from, and --trials=N")
    if flag.trials.value < 1:
        raise ValueError(f"--trials must be >= 1, got {flag.trials.value}")
    if together or flag.shard.value or flag.random.value is not None:
        raise ValueError(
            "with --optimize leave --random, --shard and --multihost out: processes "
            "that are started with the same workdir share the trials"
        )
    if not re.fullmatch(r"[\w.-]+/\S+", flag.optimize.value):
        rule = "a metric, reward/score_mean for instance"
        raise ValueError(f"--optimize must be {rule}, got {flag.optimize.value!r}")
    load_optuna()


def find_points(flag: SimpleNamespace) -> list[Point]:
    """The points that the flags ask for."""
    if flag.grid.value is None:
        return config_points(cli.config_filename())
    axes = parse_grid(flag.grid.value)
    if flag.random.value is None:
        return grid_points(axes)
    return random_points(axes, flag.random.value, flag.random_seed.value)


def config_points(name: str) -> list[Point]:
    """What `sweep()` of a config file gives; it may take the variant as its argument.

    Raises:
        ValueError: there is no such function, it raises something, or gives no points.
    """
    path, _, variant = name.partition(":")
    listed, source = runpy.run_path(path).get("sweep"), f"sweep() of {path}"
    if not callable(listed):
        raise ValueError(f"{path} has no function sweep(): add one, or give --grid={GRID}")
    try:
        takes_variant = bool(inspect.signature(listed).parameters)
        points: Any = listed(variant) if takes_variant and variant else listed()
        if isinstance(points, Iterable) and not isinstance(points, Mapping | str):
            points = list(itertools.islice(points, MOST_POINTS + 1))
    except Exception as error:  # the user's code
        raise ValueError(f"{source} raised {describe_error(error)}") from error
    return listed_points(points, source)


def find_shard(text: str | None) -> slice:
    """The points of this process: of --shard, or of a SLURM array, or all.

    Raises:
        ValueError: it is no i/n with 0 <= i < n.
    """
    if text is None and {"SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"} <= os.environ.keys():
        array = {"ID": 0, "MIN": 0, "STEP": 1, "COUNT": 1}
        array = {x: int(os.environ.get(f"SLURM_ARRAY_TASK_{x}") or y) for x, y in array.items()}
        text = f"{(array['ID'] - array['MIN']) // array['STEP']}/{array['COUNT']}"
        print(f"--shard={text}, by SLURM_ARRAY_TASK_ID", flush=True)
    if text is None:
        return slice(None)
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise ValueError(f"--shard must be i/n with 0 <= i < n, got {text!r}")
    return slice(int(match[1]), None, int(match[2]))


def tell_end(workdir: Path, failed: list[sweep.Task]):
    """The last lines; exit code 1 with a list where points have failed."""
    print(f"table: {workdir / 'sweep.csv'}", flush=True)
    if failed:
        lines = [f"  {task.work.folder}: {task.error}" for task in failed]
        print("\n".join([f"{len(failed)} points have failed:", *lines]), file=sys.stderr)
        sys.exit(1)
