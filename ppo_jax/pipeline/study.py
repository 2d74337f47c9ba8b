"""A sweep: its points, checked before the first one runs, and what it finds in its folder.

The folder of a sweep has a folder for each point, an ordinary run's; `shared/`, the parts that
points share; base.json, the config that they change; sweep.json and sweep.csv.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ppo_jax.config.parsing import filled_in
from ppo_jax.config.points import Point, apply_point, point_name
from ppo_jax.config.run import STAGE_NAMES, Config, from_config_dict
from ppo_jax.distributed.folder_lock import hold_when_free
from ppo_jax.distributed.layout import mesh_shape
from ppo_jax.io.run_folder import config_differences, fill_in_workdir, read_object, write_object
from ppo_jax.io.stage_folder import missing_steps
from ppo_jax.pipeline.preflight import check_named, chosen
from ppo_jax.pipeline.run import checked_folder, checked_settings, completeness, first_date
from ppo_jax.pipeline.shared_stages import TRAINED, Work, shared_parts
from ppo_jax.pipeline.sweep_files import read_point
from ppo_jax.training.lanes import groups_of_shape

BASE = "base.json"
# Of the base config, a later call may change where it runs, how long, and what is judged.
MAY_CHANGE = ("mesh", "evaluate", "ppo.num_iterations")


def plan_sweep(
    settings: Mapping[str, Any], points: Sequence[Point], workdir: str | Path, num_devices: int
) -> list[Work]:
    """The points of a sweep as work, all of them checked; nothing is made.

    Args:
        settings: the config that the points change, nested dicts.
        points: what each changes.
        workdir: of the sweep.
        num_devices: that a point will have.

    Raises:
        ValueError: a point is refused, two are equal, or the folder is of another sweep.
    """
    workdir = checked_folder(workdir)
    base = base_settings(settings, workdir)
    works: list[Work] = []
    configs: dict[Config, str] = {}
    read: set = set()
    for point in points:
        name = point_name(point)
        try:
            work, given = plan_point(base, point, workdir / name, num_devices, read)
        except ValueError as error:
            raise ValueError(f"the point {name}: {error}") from error
        if given in configs:
            raise ValueError(f"the points {configs[given]} and {name} are equal")
        configs[given] = name
        works.append(work)
    return works


def base_settings(settings: Mapping[str, Any], workdir: Path) -> dict[str, Any]:
    """The config of a sweep, with its defaults and the date of its first start.

    Raises:
        ValueError: the folder holds a run, or a sweep with another config.
    """
    if (workdir / "config.json").exists():
        raise ValueError(f"{workdir} holds a run: choose another workdir for a sweep")
    old = read_object(workdir / BASE, {"config": "an object"})
    base = filled_in(Config, dict(settings))
    model = base.get("model")
    if isinstance(model, dict) and not model.get("chat_date"):
        kept = old["config"].get("model", {}).get("chat_date") if old else None
        base["model"] = model | {"chat_date": kept or first_date(workdir)}
    if old:
        differences = config_differences(filled_in(Config, old["config"]), base)
        if fixed := [x for x in differences if not x.startswith(MAY_CHANGE)]:
            raise ValueError(
                f"{workdir} was begun with other settings: {'; '.join(fixed)}. "
                "Set them back, or choose another workdir."
            )
    return base


def keep_base(settings: Mapping[str, Any], workdir: Path):
    """Write base.json, at the start of a sweep that has passed its checks."""
    with hold_when_free(workdir / ".table", lambda text: None):
        write_object(workdir / BASE, {"config": base_settings(settings, workdir)})


def plan_point(
    base: Mapping[str, Any], point: Point, folder: Path, num_devices: int, read: set
) -> tuple[Work, Config]:
    """A point as work, and its config with `{workdir}` in its paths.

    Args:
        base: the config that it changes.
        point: what it changes.
        folder: of the point.
        num_devices: that it will have.
        read: what of the data files was read and checked before; more is added.
    """
    values = apply_point(base, point)
    given, config, stages = checked_settings(values, folder, STAGE_NAMES)
    mesh_shape(config.mesh, num_devices)
    files = named_files(given, stages)
    check_named(config, folder, stages, files=files not in read)
    read.add(files)
    parts = shared_parts(given, folder.parent, stages)
    shared = [part.name for part in parts if part.name in TRAINED]
    own = tuple(stage for stage in stages if stage not in shared)
    settings = dataclasses.asdict(given)
    work = Work(
        name=folder.name, folder=folder, settings=settings, stages=own, needs=parts, point=point
    )
    return work, given


def named_files(given: Config, stages: Sequence[str]) -> tuple:
    """What `preflight.check_files` depends on."""
    files = tuple(
        getattr(getattr(given, stage.name), field)
        for stage in chosen(stages)
        for field in stage.data_fields
    )
    how = given.reward and given.reward.format
    return files, how, given.model.vocabulary_data, given.prepare


def lane_groups(works: Sequence[Work], workdir: Path) -> list[Work]:
    """The points that can be trained together, as work that comes before theirs: those of one
    shape, see `training.lanes.groups_of_shape`, if they are two or more. One that has failed,
    whose PPO is complete, that is evaluated while it trains or that has dynamic sampling is by
    itself."""
    left = [
        work
        for work in works
        if "ppo" in work.stages
        and not work.settings["ppo"]["evaluate_every"]
        and work.settings["ppo"]["max_rollouts"] == 1
        and read_point(work.folder).get("status") != "failed"
        and missing_steps(work.folder / "ppo") is not None
    ]
    configs = [(from_config_dict(work.settings), work.folder) for work in left]
    groups = [[left[i] for i in group] for group in groups_of_shape(configs) if len(group) > 1]
    return [group_work(group, Path(workdir)) for group in groups]


def group_work(lanes: Sequence[Work], workdir: Path) -> Work:
    """Points as the lanes of one program."""
    names = "\n".join(lane.name for lane in lanes).encode()
    folder = workdir / "shared" / f"lanes-{hashlib.sha256(names).hexdigest()[:12]}"
    needs = {part.folder: part for lane in lanes for part in lane.needs}
    return Work(
        name=folder.name,
        folder=folder,
        settings=lanes[0].settings,
        stages=("ppo",),
        needs=tuple(needs.values()),
        lanes=tuple(lanes),
    )


def lane_lines(works: Sequence[Work], groups: Sequence[Work]) -> list[str]:
    """What --vectorize says at the start: which points are one program, and which are none."""
    inside = {lane.folder for group in groups for lane in group.lanes}
    rest = [work for work in works if work.folder not in inside]
    trained = [x.name for x in rest if missing_steps(x.folder / "ppo") is None]
    alone = [work.name for work in rest if work.name not in trained]
    lines = [f"{x.name}: {', '.join(y.name for y in x.lanes)}" for x in groups]
    programs = f"{len(groups)} program{'s' * (len(groups) != 1)}"
    many = f"{len(inside)} of {len(works)} points train PPO as {programs}"
    lines += [f"by themselves: {', '.join(alone)}"] if alone else []
    lines += [f"trained already: {len(trained)}"] if trained else []
    return [many, *(f"  {line}" for line in lines)]


def is_complete(work: Work) -> bool:
    """Whether all stages of a point have taken all of their steps, and are evaluated."""
    config = fill_in_workdir(from_config_dict(work.settings), work.folder)
    return all(completeness(config, work.folder).values())
