"""The run of a sweep: each point in a process of its own, so many at a time."""

import contextlib
import dataclasses
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from ppo_jax.distributed.folder_lock import FolderInUse, hold_folder
from ppo_jax.distributed.processes import STOPS, is_primary, on_primary
from ppo_jax.distributed.shares import Share
from ppo_jax.pipeline.children import IN_USE, Child
from ppo_jax.pipeline.shared_stages import Work, do_work, failed_lanes, is_made
from ppo_jax.pipeline.study import is_complete
from ppo_jax.pipeline.sweep_files import figures, read_point, write_point, write_table

POLL_S = 0.1  # between two looks at the children
LOOK_S = 2  # between two looks at what other processes do
USER_MISTAKE = 2  # exit code: the same start would end so again


@dataclasses.dataclass
class Task:
    """A piece of work, and how it goes."""

    work: Work
    state: str = "todo"  # "running", "elsewhere" (another process is at it), "complete", "failed"
    attempts: int = 0
    seconds: float = 0.0
    error: str = ""
    looked: float = 0.0  # when it was last looked at, elsewhere

    @property
    def is_point(self) -> bool:
        return self.work.point is not None

    @property
    def title(self) -> str:
        return self.work.name if self.is_point else f"shared/{self.work.folder.name}"


class Progress:
    """One line a point, and on a terminal a bar over all."""

    def __init__(self, total: int, ended: int = 0):
        self.total, self.ended, self._bar = total, ended, None
        if sys.stdout.isatty() and is_primary():
            columns, lines = shutil.get_terminal_size(fallback=(80, 24))
            shape = {"file": sys.stdout, "ncols": columns, "nrows": lines}
            self._bar = tqdm(total=total, initial=ended, desc="points", unit="point", **shape)

    def end(self, task: Task, how: str):
        """A point has come to an end."""
        self.ended += 1
        self.tell(f"{self.ended}/{self.total}  {task.title}  {how}")
        if self._bar is not None:
            self._bar.update(1)

    def tell(self, text: str):
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self):
        if self._bar is not None:
            self._bar.close()


class Sweep:
    """A sweep under way.

    Args:
        works: the points.
        workdir: the sweep's folder.
        shares: of the machine, one for each process at a time.
        command: that starts a child, see `Child`.
        retries: how often what crashed is started again.
        ask: gives the next point of a search, or None; called when a process is free.
        total: the number of points in all, where `ask` gives them.
        ended: how many of them have come to an end before.
        tell: is called with each point that has come to an end.
        groups: points whose PPO is trained as one program first, see `study.lane_groups`.
    """

    def __init__(
        self,
        works: Sequence[Work],
        workdir: Path,
        *,
        shares: Sequence[Share],
        command: Sequence[str],
        retries: int = 1,
        ask: Callable[[], Work | None] = lambda: None,
        total: int = 0,
        ended: int = 0,
        tell: Callable[[Task], None] = lambda task: None,
        groups: Sequence[Work] = (),
    ):
        self.workdir, self.command, self.retries = workdir, command, retries
        self.ask, self.told = ask, tell
        self.free, self.running = list(shares), {}
        self.tasks: dict[Path, Task] = {}
        self.progress = Progress(total or len(works), ended)
        self.stopped: signal.Signals | None = None
        self.ended_since = False  # a point, since the table was written
        for work in (*groups, *works):
            self.add(work)
        tasks = {group.folder: self.tasks[group.folder] for group in groups}
        self.groups = {lane.folder: tasks[x.folder] for x in groups for lane in x.lanes}

    def add(self, work: Work):
        """A point, behind the stages that it shares."""
        for one in (*work.needs, work):
            if one.folder not in self.tasks and (one.stages or one is work):
                self.tasks[one.folder] = Task(one)

    def run(self) -> list[Task]:
        """Run all points; returns those that have failed.

        Raises:
            SystemExit: after SIGTERM (143) or Ctrl-C (130), when the children have saved.
        """
        with self.signals(), self.stopping_on_error():
            self.keep_done()
            while True:
                for task in [task for task in self.tasks.values() if task.state == "running"]:
                    self.look_at(task)
                if self.ended_since:  # once for all that ended together
                    self.ended_since = False
                    write_table(self.workdir)
                if not self.stopped:
                    self.start_ready()
                open_tasks = [x for x in self.tasks.values() if x.state in ("todo", "elsewhere")]
                if not self.running and (self.stopped or not open_tasks):
                    break
                time.sleep(POLL_S)
        self.progress.close()
        write_table(self.workdir)
        if self.stopped:
            print(f"stopped by {self.stopped.name}; the same command goes on", flush=True)
            sys.exit(STOPS[self.stopped])
        return [task for task in self.tasks.values() if task.is_point and task.state == "failed"]

    def keep_done(self):
        """The points that are complete, into the table before a group begins."""
        points = [task for task in self.tasks.values() if task.is_point]
        for task in points if self.groups else ():
            done = False
            with contextlib.suppress(FolderInUse), alone_in(task.work.folder):
                done = is_done(task.work)
            if done:
                self.begin(task)

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Pass on the first signal to the children; the second ends this process, and so them."""

        def stop(number: int, _):
            self.stopped = signal.Signals(number)
            for child in list(self.running.values()):
                child.stop(number)

        old = {number: signal.signal(number, stop) for number in STOPS}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def stopping_on_error(self) -> Iterator[None]:
        """Behind an error no child goes on: all save and end."""
        try:
            yield
        except BaseException:
            for child in self.running.values():
                child.stop(signal.SIGTERM)
            while any(child.ended() is None for child in self.running.values()):
                time.sleep(POLL_S)
            raise

    def start_ready(self):
        """Start what can be started, as long as there is a share of the machine for it."""
        for task in list(self.tasks.values()):
            if self.free and self.is_ready(task):
                self.begin(task)
        waits = any(x.is_point and x.state == "todo" for x in self.tasks.values())
        while self.free and not self.stopped and not waits and (work := self.ask()) is not None:
            self.add(work)
            for task in list(self.tasks.values()):
                if self.free and self.is_ready(task):
                    self.begin(task)
            waits = self.tasks[work.folder].state == "todo"  # for a stage that it shares

    def is_ready(self, task: Task) -> bool:
        """Whether a task may begin now; one whose shared stage has failed fails, too."""
        if task.state == "elsewhere" and time.monotonic() - task.looked >= LOOK_S:
            task.state = "todo"
        needs = [self.tasks[part.folder] for part in task.work.needs if part.stages]
        if failed := [need for need in needs if need.state == "failed"]:
            if task.state == "todo":
                self.fail(task, f"{failed[0].title} has failed: {failed[0].error}")
            return False
        group = self.groups.get(task.work.folder)
        if group is not None and group.state not in ("complete", "failed"):
            return False  # of one that has failed, each point is trained by itself
        return task.state == "todo" and all(need.state == "complete" for need in needs)

    def begin(self, task: Task):
        """Start a task, unless it is complete or another process is at it."""
        work, holder, done = task.work, "", False
        try:
            with alone_in(work.folder):  # what another process writes is half there
                done = is_done(work)
        except FolderInUse as error:
            holder = holder_of(error)
        if done:
            group = self.groups.get(work.folder)
            by_group = group is not None and group.seconds  # by this start
            self.complete(task, "complete" if by_group else "complete already")
        elif holder:
            self.wait_for(task, holder)
        else:
            if task.is_point:
                write_point(work.folder, work.point, "running")
            alone = self.is_alone(task)
            task.state, task.seconds = "running", time.monotonic()
            child = Child(work, self.free.pop(0), self.command, all_cores=alone)
            self.running[work.folder] = child

    def is_alone(self, task: Task) -> bool:
        """Whether nothing else can run before a task has come to its end."""
        others = [x for x in self.tasks.values() if x.state in ("todo", "elsewhere") and x != task]
        needed = [[part.folder for part in other.work.needs] for other in others]
        return not self.running and all(task.work.folder in folders for folders in needed)

    def look_at(self, task: Task):
        """What has become of a task that runs."""
        child = self.running[task.work.folder]
        code = child.ended()
        if code is None:
            return
        del self.running[task.work.folder]
        self.free.insert(0, child.share)
        seconds = round(time.monotonic() - task.seconds)
        if code == 0:
            self.complete(task, f"complete in {seconds // 60}:{seconds % 60:02d}")
        elif self.stopped:
            task.state = "todo"
        elif code == IN_USE:
            self.wait_for(task, child.last_line().partition(": wait for")[0])
        else:
            task.attempts += 1
            if task.attempts <= self.retries and code != USER_MISTAKE:
                self.progress.tell(f"{task.title}  failed: {child.error()}; once more")
                task.state = "todo"
            else:
                self.fail(task, child.error())

    def wait_for(self, task: Task, holder: str):
        """Another process is at it: look again later."""
        if task.error != holder:
            self.progress.tell(f"{task.title}  waiting: {holder}")
        task.state, task.error, task.looked = "elsewhere", holder, time.monotonic()

    def complete(self, task: Task, how: str):
        task.state, task.error = "complete", ""
        if not task.is_point:
            if task.seconds:  # it was made by this start
                self.progress.tell(f"{task.title}  {how}")
                for lane in task.work.lanes:
                    if why := failed_lanes(task.work).get(lane.folder.name):
                        self.fail(self.tasks[lane.folder], why)
            for lane in task.work.lanes:  # the table has them before the next group begins
                if self.tasks[lane.folder].state == "todo" and is_done(lane):
                    self.begin(self.tasks[lane.folder])
            return
        self.keep(task)
        self.progress.end(task, f"{how}  {figures(task.work.folder)}".rstrip())

    def fail(self, task: Task, error: str):
        task.state, task.error = "failed", error
        if not task.is_point:
            self.progress.tell(f"{task.title}  failed: {error}")
            return
        self.keep(task)
        self.progress.end(task, f"failed: {error}")

    def keep(self, task: Task):
        """A point has come to an end: its record, and the table before anything else begins."""
        folder, status = task.work.folder, (task.state, task.error)
        about = read_point(folder)
        if (about.get("status"), about.get("error")) != status:
            write_point(folder, task.work.point, *status)
            self.ended_since = True
        self.told(task)


def run_together(works: Sequence[Work], workdir: Path, groups: Sequence[Work] = ()) -> list[Task]:
    """Run all points one after another in this process, which may be one of several.

    A point that diverges is passed over. Any other error ends the run, for the processes may not
    be at the same place; the next start begins with the points that have not failed.

    Returns:
        the points that have failed.
    """
    points = [Task(work) for work in works]
    progress = Progress(len(points))
    points.sort(key=lambda task: on_primary(read_point, task.work.folder).get("status") == "failed")
    lost: dict[str, str] = {}
    for group in groups:
        do_work(group)
        lost |= on_primary(failed_lanes, group)
    for task in points:
        work, began = task.work, time.monotonic()
        if work.name in lost:
            task.error = lost[work.name]
        elif on_primary(is_complete, work):
            how = "complete already"
        else:
            on_primary(write_point, work.folder, work.point, "running")
            try:
                do_work(work)
            except FloatingPointError as error:
                task.state, task.error = "failed", str(error)
            except Exception as error:
                if is_primary():
                    write_point(work.folder, work.point, "failed", one_line(error))
                raise
            seconds = round(time.monotonic() - began)
            how = f"complete in {seconds // 60}:{seconds % 60:02d}"
        task.state = "failed" if task.error else "complete"
        on_primary(write_point, work.folder, work.point, task.state, task.error)
        on_primary(write_table, workdir)
        about = on_primary(figures, work.folder)
        progress.end(task, f"failed: {task.error}" if task.error else f"{how}  {about}".rstrip())
    progress.close()
    return [task for task in points if task.state == "failed"]


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def preview(works: Sequence[Work], workdir: Path) -> str:
    """What a dry run prints: the points, the parts that they share, and what is there already."""
    parts: dict[Path, list[Work]] = {}
    for work in works:
        for part in work.needs:
            parts.setdefault(part.folder, []).append(part)
    many = f"{len(works)} point{'s' * (len(works) != 1)}"
    lines = [f"{many}, {len(parts)} shared part{'s' * (len(parts) != 1)} in {workdir}", ""]
    width = max((len(folder.name) for folder in parts), default=0)
    for folder, users in parts.items():
        state = "complete" if is_made(users[0]) else "to be made"
        lines.append(f"  shared/{folder.name:{width}}  of {len(users)} points  {state}")
    lines += [""] if parts else []
    width = max((len(work.name) for work in works), default=0)
    for number, work in enumerate(works, 1):
        lines.append(f"  {number}/{len(works)}  {work.name:{width}}  {state_of(work)}")
    return "\n".join(lines)


def state_of(work: Work) -> str:
    """How far a point is, as a dry run says it."""
    if holder := in_use(work.folder):
        return f"under way: {holder}"
    about = read_point(work.folder)
    if is_complete(work):
        return f"complete  {figures(work.folder)}".rstrip()
    if about.get("status") == "failed":
        return f"failed: {about['error']}"
    return "begun" if about else "not begun"


def is_done(work: Work) -> bool:
    """Whether a piece of work is complete; one whose files cannot be read fails when it is run."""
    try:
        return is_made(work) if work.point is None else is_complete(work)
    except ValueError:
        return False


def in_use(folder: Path) -> str:
    """Who is at a folder; "" is nobody."""
    try:
        with alone_in(folder):
            return ""
    except FolderInUse as error:
        return holder_of(error)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """No other process is at a folder, which may not be there yet.

    Raises:
        FolderInUse: one is.
    """
    with hold_folder(folder) if folder.is_dir() else contextlib.nullcontext():
        yield


def holder_of(error: FolderInUse) -> str:
    """Who is at the folder, in words."""
    return str(error).partition(": wait for")[0]
