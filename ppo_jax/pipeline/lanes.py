"""PPO of several runs as one program, in their folders: what `run` is for one of them."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from ppo_jax.config.run import Config
from ppo_jax.distributed.processes import barrier, on_primary, stop_if_asked
from ppo_jax.evaluation.report.report import write_report
from ppo_jax.io.model_spec import initial_models
from ppo_jax.io.run_folder import prepare_workdir, read_results, write_results
from ppo_jax.pipeline.preflight import check_named, chosen
from ppo_jax.pipeline.run import completeness, held, make_ready, planned
from ppo_jax.pipeline.summary import summary
from ppo_jax.training.lane_runs import go_together, steps_on_disk
from ppo_jax.training.lanes import Lane, train_lanes
from ppo_jax.training.resume import check_same_data

STAGES = ("ppo",)


def run_lanes(points: Sequence[tuple[Mapping[str, Any], Path]]) -> dict[Path, str]:
    """The PPO stage of several runs that differ in numbers, as one program.

    Runs whose stage is complete are left out; those that have gone too far ahead of the others, see
    `go_together`, are a program of their own.

    Args:
        points: (config, workdir) of each; the models that PPO starts from are there.

    Returns:
        {workdir: why} of the runs that have failed; PPO of the others is complete.

    Raises:
        ValueError: a setting, a data file or a model is not usable, or they are not of one shape.
    """
    logging.set_verbosity(logging.WARNING)
    failed: dict[Path, str] = {}
    with contextlib.ExitStack() as stack:
        for _, workdir in points:
            stack.enter_context(held(workdir))
        lanes = [x for x in make_lanes(points) if not on_primary(is_complete, x)]
        steps = [steps_on_disk(lane.workdir / "ppo") for lane in lanes]
        for group in go_together(steps):
            stop_if_asked()
            chosen_lanes = [lanes[i] for i in group]
            for lane in chosen_lanes:  # what an earlier evaluation said
                results = read_results(lane.workdir)
                times = {k: v for k, v in results.items() if k.startswith("time/")}
                write_results(lane.workdir, times)
            try:
                failed |= train_lanes(chosen_lanes)
            except FloatingPointError as error:
                failed |= {lane.workdir: str(error) for lane in chosen_lanes}
            barrier("the end of a group of lanes")
            for lane in chosen_lanes:  # with an evaluation, it is the report of that
                if lane.workdir not in failed and lane.config.evaluate is None:
                    on_primary(write_report, lane.workdir)
    return failed


def is_complete(lane: Lane) -> bool:
    return completeness(lane.config, lane.workdir)["ppo"]


def make_lanes(points: Sequence[tuple[Mapping[str, Any], Path]]) -> list[Lane]:
    """All runs checked, as `run` checks one, with their data, which is read once where it is one
    file; prints the table of the first."""
    lanes: list[Lane] = []
    read: dict[tuple, tuple] = {}
    for settings, workdir in points:
        given, config, _ = planned(settings, workdir, STAGES)
        check_named(config, workdir, STAGES)
        prepare_workdir(workdir, dataclasses.asdict(given))
        source = (Path(config.ppo.prompts).resolve(), start_of(config, workdir))
        if source not in read:
            read[source] = make_ready(config, workdir, STAGES)
            if not lanes:
                print(summary(config, read[source][1], STAGES, read[source][2]), flush=True)
        base, _, data = read[source]
        starts = initial_models(config, workdir, base, STAGES)
        check_same_data(config, workdir, chosen(STAGES), data, starts)
        lanes.append(Lane(config, workdir, base, data["ppo"]))
    return lanes


def start_of(config: Config, workdir: Path) -> Path:
    """The folder of what the policy starts from, whose tokenizer reads the data."""
    return (workdir / config.ppo.init_from).resolve()
