"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, trackio.

wandb and trackio are packages of their own, imported where they are asked for.
"""

import importlib
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ppo_jax.config.parsing import describe_error
from ppo_jax.data.atomic import atomic_write, naming_file
from ppo_jax.io.run_folder import read_config, read_object

FLUSH_S = 30  # seconds that TensorBoard may lag behind
NETWORK_S = 30  # that wandb may take to reach its server, at the beginning and at the end
PROJECT = "ppo_jax"  # that runs are in, where the environment names no other
IDS = "writers.json"  # in a run's folder: {writer: the id or name that the run has there}


class Writer(Protocol):
    """Takes the metrics of one stage, step by step."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The metrics of a step. Steps of a run that was resumed may come a second time."""
        ...

    def flush(self) -> None:
        """Have on disk what was written, if this writer holds anything back."""
        ...

    def close(self, *, failed: bool = False) -> None:
        """Nothing is written any more; `failed` says that the run ends with an error."""
        ...


def check_writers(names: Sequence[str]) -> None:
    """The packages of the writers are installed.

    Raises:
        ValueError: one is not; it says how to install it.
    """
    for name in names:
        try:
            # A folder of this name, such as wandb makes, is a package without anything in it.
            found = name == "tensorboard" or hasattr(importlib.import_module(name), "init")
        except ImportError:
            found = False
        if not found:
            raise ValueError(
                f"writers has {name!r}, but the package {name} is not installed: "
                f"pip install 'ppo_jax[{name}]', or leave it out"
            )


def make_writers(
    names: Sequence[str],
    workdir: Path,
    stage: str,
    *,
    purge_step: int,
    tell: Callable[[str], None],
) -> list[Writer]:
    """The writers of a stage; process 0 only.

    Args:
        names: of them, as `config.writers` has them.
        workdir: the run's folder.
        stage: for instance "ppo".
        purge_step: the first step that comes; what TensorBoard has of it is forgotten.
        tell: takes a line for the user.
    """
    makers: dict[str, Callable[[], Writer]] = {
        "tensorboard": lambda: TensorBoardWriter(workdir / "tensorboard" / stage, purge_step),
        "wandb": lambda: Tolerant("wandb", lambda: WandbWriter(workdir, stage, tell), tell),
        "trackio": lambda: Tolerant("trackio", lambda: TrackioWriter(workdir, stage), tell),
    }
    return [makers[name]() for name in names]


class TensorBoardWriter:
    """Events of TensorBoard, in a file of this start's own.

    tensorboardX's writer of summaries would hand them to a thread: on a full disk that thread dies,
    and the run waits for it for ever.

    Args:
        folder: of the stage.
        purge_step: this and later steps of older files are forgotten.
    """

    def __init__(self, folder: Path, purge_step: int):
        # Where PyTorch is installed this import takes more than a second.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._event, self._scalar = folder, Event, scalar
        with naming_file(folder):
            # Two files of one second are not one file.
            self._events = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        self._flushed = time.monotonic()
        self._add(purge_step, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if math.isfinite(value):
                self._add(step, summary=self._scalar(name, value))
        if time.monotonic() - self._flushed > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        self._flushed = time.monotonic()
        with naming_file(self._folder):
            self._events.flush()

    def close(self, *, failed: bool = False) -> None:
        events, self._events = self._events, None
        if events is not None:
            with naming_file(self._folder):
                events.close()

    def _add(self, step: int, **content: Any) -> None:
        with naming_file(self._folder):
            event = self._event(wall_time=time.time(), step=step, **content)
            self._events.write_event(event)


class WandbWriter:
    """One run of wandb for all stages of a run's folder, also after a restart.

    wandb's own step counts lines and cannot go back, so `STAGE/step` is the axis of a stage's
    metrics. Where the server is out of reach, or nobody is logged in, the run is kept in
    `workdir/wandb` for `wandb sync`.

    Args:
        workdir: the run's folder.
        stage: for instance "ppo".
        tell: takes a line for the user.
    """

    def __init__(self, workdir: Path, stage: str, tell: Callable[[str], None]):
        import wandb

        self._stage, self._defined = stage, set()
        how = dict(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run_id(workdir, "wandb", secrets.token_hex(4)),
            name=workdir.resolve().name,
            dir=str(workdir),
            config=read_config(workdir) or {},
            resume="allow",
            # The progress on the terminal stays as it is, and a dead network ends no run.
            settings=wandb.Settings(
                console="off", init_timeout=NETWORK_S, finish_timeout=NETWORK_S
            ),
        )
        try:
            self._run = wandb.init(**how)
        except Exception as error:
            tell(
                f"wandb is offline ({describe_error(error)}): its run is kept in {workdir}/wandb, "
                'and "wandb sync" sends it'
            )
            wandb.teardown()  # its service holds the id of the run that could not begin
            self._run = wandb.init(**how, mode="offline")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        axis, named = f"{self._stage}/step", named_by_stage(self._stage, values)
        for name in named.keys() - self._defined:
            self._run.define_metric(name, step_metric=axis)
        self._defined |= named.keys()
        self._run.log({**named, axis: step})

    def flush(self) -> None:
        """Each line is sent as it is written."""

    def close(self, *, failed: bool = False) -> None:
        self._run.finish(exit_code=int(failed))


class TrackioWriter:
    """One run of trackio for all stages of a run's folder, also after a restart.

    Args:
        workdir: the run's folder.
        stage: for instance "ppo".
    """

    def __init__(self, workdir: Path, stage: str):
        import trackio

        name = f"{workdir.resolve().name}-{secrets.token_hex(4)}"  # runs are told apart by it
        self._stage, self._finish = stage, trackio.finish
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=run_id(workdir, "trackio", name),
            config=read_config(workdir) or {},
            resume="allow",
            embed=False,
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(named_by_stage(self._stage, values), step=step)

    def flush(self) -> None:
        """A thread of its own writes every half second."""

    def close(self, *, failed: bool = False) -> None:
        self._finish()


class Tolerant:
    """A writer whose first failure is told, and is its last: metrics.jsonl has what it lacks.

    Args:
        name: of the writer.
        make: makes it; may fail, too.
        tell: takes a line for the user.
    """

    def __init__(self, name: str, make: Callable[[], Writer], tell: Callable[[str], None]):
        self._name, self._tell, self._writer = name, tell, None
        self._try(lambda: setattr(self, "_writer", make()))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if (writer := self._writer) is not None:
            self._try(lambda: writer.write(step, values))

    def flush(self) -> None:
        if (writer := self._writer) is not None:
            self._try(writer.flush)

    def close(self, *, failed: bool = False) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            self._try(lambda: writer.close(failed=failed))

    def _try(self, do: Callable[[], None]) -> None:
        try:
            do()
        except Exception as error:
            self._writer = None
            self._tell(
                f"{self._name} failed ({describe_error(error)}): the run goes on without it, and "
                "metrics.jsonl has all metrics"
            )


def named_by_stage(stage: str, values: Mapping[str, float]) -> dict[str, float]:
    """The finite metrics under names that no other stage of the run has.

    >>> named_by_stage("ppo", {"kl/ref": 2.0, "time/step_s": 3.0, "x": math.nan})
    {'kl/ref': 2.0, 'ppo/time/step_s': 3.0}
    """
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    return {f"{stage}/{k}" if k.startswith("time/") else k: v for k, v in finite.items()}


def run_id(workdir: Path, writer: str, new: str) -> str:
    """What the run is called by a writer: as its folder says, or `new`, which it then keeps."""
    path = workdir / IDS
    ids = read_object(path, {name: "a text" for name in ("wandb", "trackio")}) or {}
    if writer not in ids:
        ids[writer] = new
        atomic_write(path, (json.dumps(ids, indent=2) + "\n").encode())
    return ids[writer]
