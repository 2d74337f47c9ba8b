"""What the points of a sweep have in common, made once: data, base model, SFT, reward model.

Each such part is a run's folder of its own, `shared/sft-FINGERPRINT` for instance, and a point's
folder has links to it. The fingerprint is of exactly the settings, the files and the other parts
that it depends on: points share a part where these are equal, and only there.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ppo_jax.config.run import Config, from_config_dict
from ppo_jax.data.atomic import atomic_write, remove_folder
from ppo_jax.distributed.folder_lock import FolderInUse, hold_when_free
from ppo_jax.distributed.processes import is_multiprocess, on_primary
from ppo_jax.io.base_model import prepare_base
from ppo_jax.io.model_spec import needs_base
from ppo_jax.io.run_folder import (
    fill_in_workdir,
    keep_time,
    prepare_workdir,
    read_object,
    read_results,
    write_object,
)
from ppo_jax.io.stage_folder import has_begun, missing_steps, split_step
from ppo_jax.pipeline.lanes import run_lanes
from ppo_jax.pipeline.preflight import chosen
from ppo_jax.pipeline.run import held, make_data, run_held

TRAINED = ("sft", "reward")  # the parts that are stages
FAILED = "failed.json"
SETTINGS = {  # what each part depends on, besides files and other parts
    "data": ("prepare",),
    "base": ("model", "seed"),
    "sft": ("model", "seed", "sft"),
    "reward": ("model", "seed", "reward"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """Something that is made in a folder: a part that points share, or a point."""

    name: str  # "sft", or that of a point
    folder: Path
    settings: dict[str, Any]  # a config, nested dicts, with {workdir} in its paths
    stages: tuple[str, ...]  # to run there; none for data and base model
    needs: tuple["Work", ...] = ()  # the parts that it has links to, in the order of their making
    point: Mapping[str, Any] | None = None  # of a point: what it changes
    lanes: tuple["Work", ...] = ()  # points whose PPO is trained as one program, see `lanes`


def shared_parts(config: Config, workdir: Path, stages: Sequence[str]) -> tuple[Work, ...]:
    """The parts of a run that other points may share, in the order of their making.

    Args:
        config: of the point, with `{workdir}` in its paths.
        workdir: the sweep's folder.
        stages: of the point; its last one is its own.
    """
    parts: dict[str, Work] = {}
    if config.prepare:
        parts["data"] = make_part("data", config, workdir, ())
    if config.model.vocabulary_data and needs_base(config, stages):
        parts["base"] = make_part("base", config, workdir, tuple(parts.values()))
    for stage in (name for name in TRAINED if name in stages[:-1]):
        start = split_step(getattr(getattr(config, stage), "init_from", "base"))[0]
        wanted = {"data", start} | ({"base"} if needs_base(config, [stage]) else set())
        needs = tuple(part for name, part in parts.items() if name in wanted)
        parts[stage] = make_part(stage, config, workdir, needs)
    return tuple(parts.values())


def make_part(name: str, config: Config, workdir: Path, needs: tuple[Work, ...]) -> Work:
    """A part with its folder, which the fingerprint names."""
    values = dataclasses.asdict(config)
    depends = {
        "settings": {key: values[key] for key in SETTINGS[name]},
        "files": file_digests(name, config),
        "parts": [part.folder.name for part in needs],
    }
    text = json.dumps(depends, sort_keys=True).encode()
    folder = workdir / "shared" / f"{name}-{hashlib.sha256(text).hexdigest()[:12]}"
    sections = {"model", "seed", "mesh", "prepare", "writers", name}
    sections |= {part.name for part in needs}
    settings = {key: value for key, value in values.items() if key in sections}
    stages = (name,) if name in TRAINED else ()
    return Work(name=name, folder=folder, settings=settings, stages=stages, needs=needs)


def file_digests(name: str, config: Config) -> dict[str, str]:
    """{setting: checksum of the file that it names} of the files outside of the run's folder."""
    if name == "data":
        return {}
    named = {
        f"model.{field}": getattr(config.model, field)
        for field in ("vocabulary_data", "chat_template")
    }
    for stage in chosen([name]):
        section = getattr(config, stage.name)
        named |= {f"{stage.name}.{field}": getattr(section, field) for field in stage.data_fields}
    files = {field: Path(path) for field, path in named.items() if path}
    return {field: file_digest(path) for field, path in files.items() if path.is_file()}


def file_digest(path: Path) -> str:
    """The SHA-256 of a file; read once a process, as long as it does not change."""
    about = path.stat()
    return _digest(path.resolve(), about.st_size, about.st_mtime_ns)


@functools.cache
def _digest(path: Path, size: int, date: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_made(part: Work) -> bool:
    """Whether a part is complete."""
    if part.lanes:
        return all(missing_steps(lane.folder / "ppo") is None for lane in part.lanes)
    if part.name in TRAINED:
        return missing_steps(part.folder / part.name) is None
    return (part.folder / part.name).is_dir()


def do_work(work: Work):
    """Make a part, or run a point, in this process; parts that it needs and that lack, before.

    Raises:
        FolderInUse: another process is at it.
        ValueError: a setting, a data file or a model is not usable.
    """
    for part in work.needs:
        while not on_primary(is_made, part):
            on_primary(wait_for, part.folder)
            try:
                if not on_primary(is_made, part):
                    do_work(part)
            except FolderInUse:
                if is_multiprocess():  # the others have ended by now
                    raise
    with held(work.folder):
        if work.lanes:
            do_lanes(work)
            return
        on_primary(link_parts, work)
        if work.stages:
            run_held(work.settings, work.folder, work.stages)
        else:
            make_files(work)


def do_lanes(group: Work):
    """PPO of points as one program; those that fail stand in failed.json, with why.

    What comes behind PPO is done here as well, point after point: the first one's programs are
    those of all. A point whose evaluation fails is left to its own process, which says why.
    """
    on_primary(write_object, group.folder / FAILED, {"lanes": {}})
    for lane in group.lanes:
        lane.folder.mkdir(parents=True, exist_ok=True)
        on_primary(link_parts, lane)
    failed = run_lanes([(lane.settings, lane.folder) for lane in group.lanes])
    names = {folder.name: why for folder, why in failed.items()}
    on_primary(write_object, group.folder / FAILED, {"lanes": names})
    if is_multiprocess():  # the points follow in these processes anyway, see `run_together`
        return
    for lane in group.lanes:
        if lane.folder.name not in names:
            try:
                do_work(lane)
            except Exception as error:
                print(f"{lane.name}: {error}", flush=True)


def failed_lanes(group: Work) -> dict[str, str]:
    """{point: why} of the lanes that have failed in the newest start of a group."""
    return (read_object(group.folder / FAILED, {"lanes": "an object"}) or {"lanes": {}})["lanes"]


def wait_for(folder: Path):
    """Wait until no other process is at a folder, and say so."""
    with hold_when_free(folder, lambda text: print(f"waiting: {text}", flush=True)):
        pass


def make_files(part: Work):
    """The data, or the base model, alone."""
    given = from_config_dict(part.settings)
    config = fill_in_workdir(given, part.folder)
    prepare_workdir(part.folder, dataclasses.asdict(given))
    if part.name == "data":
        on_primary(make_data, config, part.folder)
    else:
        on_primary(prepare_base, config.model, part.folder / "base", config.seed)


def link_parts(work: Work):
    """Links to the parts in a folder, and what the run's files have of their stages.

    Raises:
        ValueError: a link leads to another part, and the folder has begun with that.
    """
    began = any(has_begun(work.folder / stage) for stage in work.stages)
    for part in work.needs:
        link = work.folder / part.name
        target = os.path.relpath(part.folder / part.name, work.folder)
        if link.is_symlink() and os.readlink(link) != target:
            if began:
                raise ValueError(
                    f"{link} is {os.readlink(link)}, made from other settings or data than now "
                    f"({target}): put them back, or choose another workdir"
                )
            remove_folder(link)
        if not link.is_symlink() and not link.exists():
            link.symlink_to(target)
    if work.point is not None:
        copy_records(work)


def copy_records(work: Work):
    """The lines of metrics.jsonl and the seconds of the stages that a point has links to."""
    trained = [part for part in work.needs if part.name in TRAINED]
    names = [part.name for part in trained]
    path = work.folder / "metrics.jsonl"
    lines = [line for part in trained for line in stage_lines(part.folder, [part.name], True)]
    lines += stage_lines(work.folder, names, False)
    text = "".join(f"{line}\n" for line in lines)
    if text and (not path.exists() or path.read_text(encoding="utf-8") != text):
        atomic_write(path, text)
    for part in trained:
        name = f"time/{part.name}_s"
        seconds = read_results(part.folder).get(name, 0.0)
        if read_results(work.folder).get(name) != seconds:
            keep_time(work.folder, part.name, seconds)


def stage_lines(folder: Path, stages: Sequence[str], of_these: bool) -> Iterator[str]:
    """The lines of metrics.jsonl that are of some stages, or of the others."""
    path = folder / "metrics.jsonl"
    *whole, _torn = path.read_text(encoding="utf-8").split("\n") if path.is_file() else [""]
    for line in whole:
        try:
            stage = json.loads(line)["stage"]
        except (ValueError, KeyError, TypeError):  # edited by hand: the report names it
            stage = None
        if (stage in stages) == of_these:
            yield line
