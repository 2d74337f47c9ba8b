"""The points of a sweep run side by side, each on its own: what one does is no other's trouble.

The processes here are small ones that do as a file in their folder says.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from ppo_jax.distributed.folder_lock import hold_folder
from ppo_jax.distributed.shares import Share
from ppo_jax.evaluation.report import sweep_page
from ppo_jax.pipeline import study, sweep
from ppo_jax.pipeline.shared_stages import Work
from ppo_jax.pipeline.sweep import Sweep
from tests.support.command_line import ROOT

# What a child does: "fail 3", "die 9", "wait", one for each start, else it is done.
CHILD = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
with open(folder.parent / "started", "a") as file:
    file.write(folder.name + "\\n")
done = " ".join(sorted(path.parent.name for path in folder.parent.glob("*/is_done")))
(folder / "done_before").write_text(done)
orders = folder.parent / f"{folder.name}.orders"
first, *rest = orders.read_text().splitlines() if orders.exists() else ["done"]
orders.write_text("\\n".join(rest) or "done")
what, _, number = first.partition(" ")
if what == "fail":
    print("some.py: it went wrong")
    sys.exit(int(number))
if what == "die":
    os.kill(os.getpid(), int(number))
if what == "wait":
    def stop(number, frame):
        (folder / "stopped").write_text(str(number))
        sys.exit(128 + number)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    (folder / "waits").touch()
    while not (folder / "go_on").exists():
        time.sleep(0.02)
(folder / "cores").write_text(str(os.environ.get("SHARE")))
(folder / "is_done").touch()
"""
COMMAND = (sys.executable, "-S", "-c", CHILD)


@pytest.fixture(autouse=True)
def done_by_a_file(monkeypatch):
    for name in ("is_complete", "is_made"):
        monkeypatch.setattr(sweep, name, lambda work: (work.folder / "is_done").exists())
    monkeypatch.setattr(sweep_page, "write_sweep_page", lambda *_: None)
    monkeypatch.setattr(sweep, "POLL_S", 0.01)
    monkeypatch.setattr(sweep, "LOOK_S", 0.05)


def point(workdir, number, *needs):
    folder = workdir / f"seed={number}"
    about = {"seed": number}
    return Work(
        name=folder.name, folder=folder, settings={}, stages=("ppo",), needs=needs, point=about
    )


def part(workdir, name="sft-1"):
    return Work(name="sft", folder=workdir / name, settings={}, stages=("sft",))


def order(workdir, name, *lines):
    (workdir / f"{name}.orders").write_text("\n".join(lines))


def run(workdir, works, jobs=1, **options):
    shares = [Share(environment={"SHARE": str(i)}) for i in range(jobs)]
    return Sweep(works, workdir, shares=shares, command=COMMAND, **options).run()


def started(workdir):
    path = workdir / "started"
    return path.read_text().split() if path.exists() else []


def statuses(workdir):
    rows = json.loads((workdir / "sweep.json").read_text())
    return {
        pathlib.Path(row["workdir"]).name: (row["status"], row.get("error", "")) for row in rows
    }


def test_a_shared_stage_comes_first_and_once_and_what_is_complete_is_skipped(tmp_path, capsys):
    shared = part(tmp_path)
    works = [point(tmp_path, number, shared) for number in range(3)]
    assert run(tmp_path, works) == []
    assert started(tmp_path) == ["sft-1", "seed=0", "seed=1", "seed=2"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("shared/sft-1  complete in 0:0") and len(lines) == 4
    assert lines[3].startswith("3/3  seed=2  complete in 0:0")
    assert statuses(tmp_path) == {f"seed={number}": ("complete", "") for number in range(3)}
    run(tmp_path, [*works, point(tmp_path, 3, shared)])
    assert started(tmp_path)[4:] == ["seed=3"]
    assert capsys.readouterr().out.splitlines()[0] == "1/4  seed=0  complete already"


def test_what_crashes_is_retried_and_what_fails_is_passed_over_and_listed(tmp_path, capsys):
    works = [point(tmp_path, number) for number in range(5)]
    order(tmp_path, "seed=0", "fail 1")
    order(tmp_path, "seed=1", "die 9", "die 11")
    order(tmp_path, "seed=2", "fail 2")
    order(tmp_path, "seed=3", "fail 1", "fail 1")
    failed = run(tmp_path, works)
    assert [task.title for task in failed] == ["seed=1", "seed=2", "seed=3"]
    starts = started(tmp_path)
    assert [starts.count(work.name) for work in works] == [2, 2, 1, 2, 1]
    assert statuses(tmp_path) == {
        "seed=0": ("complete", ""),
        "seed=1": ("failed", "ended by SIGSEGV"),
        "seed=2": ("failed", "some.py: it went wrong"),
        "seed=3": ("failed", "some.py: it went wrong"),
        "seed=4": ("complete", ""),
    }
    out = capsys.readouterr().out
    assert "seed=1  failed: ended by SIGKILL, perhaps for want of memory; once more" in out
    assert "4/5  seed=3  failed: some.py: it went wrong" in out
    order(tmp_path, "seed=3", "fail 1", "fail 1")
    assert [task.title for task in run(tmp_path, works, retries=0)] == ["seed=3"]
    assert statuses(tmp_path)["seed=1"] == statuses(tmp_path)["seed=2"] == ("complete", "")


def test_points_of_a_shared_stage_that_fails_fail_with_it(tmp_path):
    works = [point(tmp_path, 0, part(tmp_path)), point(tmp_path, 1)]
    order(tmp_path, "sft-1", "fail 2")
    assert [task.title for task in run(tmp_path, works)] == ["seed=0"]
    told = "shared/sft-1 has failed: some.py: it went wrong"
    assert statuses(tmp_path)["seed=0"] == ("failed", told)
    assert started(tmp_path) == ["sft-1", "seed=1"]


def wait_until(ready):
    end = time.monotonic() + 30
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_two_at_a_time_have_a_share_each(tmp_path):
    for number in range(2):
        order(tmp_path, f"seed={number}", "wait")
        (tmp_path / f"seed={number}").mkdir()
    works = [point(tmp_path, number) for number in range(4)]
    watch = subprocess.Popen(
        [sys.executable, "-S", "-c", WATCH, str(tmp_path), *(work.name for work in works[:2])]
    )
    run(tmp_path, works, jobs=2)
    assert watch.wait() == 0
    assert {(work.folder / "cores").read_text() for work in works[:2]} == {"0", "1"}
    assert sorted(started(tmp_path)) == [work.name for work in works]


WATCH = """
import pathlib, sys, time
workdir, *names = sys.argv[1:]
folders = [pathlib.Path(workdir) / name for name in names]
end = time.monotonic() + 30
while not all((x / "waits").exists() for x in folders) and time.monotonic() < end:
    time.sleep(0.02)
for folder in folders:
    (folder / "go_on").touch()
"""


def test_a_point_of_another_process_is_waited_for_and_not_run(tmp_path, capsys, monkeypatch):
    works = [point(tmp_path, number) for number in range(2)]
    works[0].folder.mkdir()
    holder = hold_folder(works[0].folder)
    holder.__enter__()
    begin, is_complete, read = Sweep.begin, sweep.is_complete, []

    def begin_and_let_go(self, task):
        begin(self, task)
        if task.title == "seed=1":
            assert read == ["seed=1"]  # what another process writes is half there
            (works[0].folder / "is_done").touch()
            holder.__exit__(None, None, None)

    def reads(work):
        read.append(work.name)
        return is_complete(work)

    monkeypatch.setattr(Sweep, "begin", begin_and_let_go)
    monkeypatch.setattr(sweep, "is_complete", reads)
    assert run(tmp_path, works) == []
    assert started(tmp_path) == ["seed=1"]
    out = capsys.readouterr().out
    assert f"seed=0  waiting: {works[0].folder} is in use by process {os.getpid()}" in out
    assert "2/2  seed=0  complete already" in out
    assert statuses(tmp_path)["seed=0"] == ("complete", "")


def test_a_child_that_finds_its_folder_taken_has_not_failed(tmp_path, capsys):
    order(tmp_path, "seed=0", f"fail {sweep.IN_USE}", f"fail {sweep.IN_USE}")
    assert run(tmp_path, [point(tmp_path, 0)], retries=0) == []
    assert started(tmp_path) == ["seed=0"] * 3


def test_what_all_others_wait_for_has_all_cores(tmp_path, monkeypatch):
    alone = {}

    class Recorded(sweep.Child):
        def __init__(self, work, *args, all_cores):
            alone[work.folder.name] = all_cores
            super().__init__(work, *args, all_cores=all_cores)

    monkeypatch.setattr(sweep, "Child", Recorded)
    first, second = part(tmp_path, "sft-1"), part(tmp_path, "sft-2")
    works = [point(tmp_path, 0, first), point(tmp_path, 1, first), point(tmp_path, 2, second)]
    run(tmp_path, works[:2], jobs=2)
    assert alone == {"sft-1": True, "seed=0": False, "seed=1": False}
    assert all("sft-1" in (x.folder / "done_before").read_text() for x in works[:2])
    run(tmp_path, works, jobs=2)
    assert alone["sft-2"] and alone["seed=2"]  # nothing else is left to do


def test_points_are_asked_for_when_they_can_begin_and_share_stages_as_well(tmp_path):
    shared, asked = part(tmp_path), []

    def ask():
        if len(asked) == 3:
            return None
        asked.append(started(tmp_path))
        return point(tmp_path, len(asked), shared)

    assert run(tmp_path, [], jobs=1, ask=ask, total=3) == []
    names = ["sft-1", "seed=1", "seed=2", "seed=3"]
    assert started(tmp_path) == names
    assert asked == [[], names[:2], names[:3]]


def test_no_child_goes_on_behind_an_error(tmp_path):
    order(tmp_path, "seed=0", "wait")
    (tmp_path / "seed=0").mkdir()

    def tell(task):
        wait_until((tmp_path / "seed=0" / "waits").exists)
        raise ValueError("no such metric")

    with pytest.raises(ValueError, match="no such metric"):
        run(tmp_path, [point(tmp_path, number) for number in range(2)], jobs=2, tell=tell)
    assert (tmp_path / "seed=0" / "stopped").exists()


def test_a_point_whose_files_cannot_be_read_fails_alone(tmp_path, monkeypatch):
    def damaged(work):
        if work.name == "seed=0":
            raise ValueError("none of the checkpoints can be read")
        return False

    monkeypatch.setattr(sweep, "is_complete", damaged)
    order(tmp_path, "seed=0", "fail 2")
    failed = run(tmp_path, [point(tmp_path, number) for number in range(2)])
    assert [task.title for task in failed] == ["seed=0"]


PARENT = """
import sys
from pathlib import Path
from tests.pipeline import test_sweep
from ppo_jax.pipeline import study, sweep
sweep.is_complete = lambda work: False
test_sweep.sweep_page.write_sweep_page = lambda *_: None
workdir = Path(sys.argv[1])
test_sweep.run(workdir, [test_sweep.point(workdir, number) for number in range(2)])
"""


@pytest.mark.parametrize(
    ("number", "code", "told"), [(signal.SIGINT, 130, "SIGINT"), (signal.SIGTERM, 143, "SIGTERM")]
)
def test_a_signal_stops_the_children_and_then_the_sweep(tmp_path, number, code, told):
    order(tmp_path, "seed=0", "wait")
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    wait_until((tmp_path / "seed=0" / "waits").exists)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == code and f"stopped by {told}; the same command" in output
    assert (tmp_path / "seed=0" / "stopped").read_text() == str(number.value)
    assert started(tmp_path) == ["seed=0"] and statuses(tmp_path) == {}


def test_lanes_are_trained_before_their_points_and_one_that_fails_is_passed_over(tmp_path):
    works = [point(tmp_path, number, part(tmp_path)) for number in range(4)]
    group = study.group_work(works[:3], tmp_path)
    assert [need.folder.name for need in group.needs] == ["sft-1"]
    group.folder.mkdir(parents=True)
    (group.folder / "failed.json").write_text('{"lanes": {"seed=1": "its loss is nan"}}')
    assert [task.title for task in run(tmp_path, works, groups=[group])] == ["seed=1"]
    assert started(tmp_path) == ["sft-1", "seed=0", "seed=2", "seed=3"]
    assert (group.folder.parent / "started").read_text().split() == [group.name]
    assert statuses(tmp_path)["seed=1"] == ("failed", "its loss is nan")
    told = study.lane_lines(works, [group])
    assert told[0] == "3 of 4 points train PPO as 1 program" and "by themselves: seed=3" in told[2]


def test_the_table_has_what_is_complete_before_the_next_group_begins(tmp_path, monkeypatch):
    works, begun = [point(tmp_path, number) for number in range(6)], []
    groups = [study.group_work(works[n : n + 2], tmp_path) for n in (2, 4)]
    made_by = {lane.name: group.folder for group in groups for lane in group.lanes}

    def is_complete(work):  # the first two points by an earlier start
        return work.name not in made_by or (made_by[work.name] / "is_done").exists()

    def note(task):
        begun.append((task.title, len(started(groups[0].folder.parent))))

    def write_table(workdir):
        tables.append((len(started(groups[0].folder.parent)), len(begun)))
        write(workdir)

    write, tables = sweep.write_table, []
    monkeypatch.setattr(sweep, "write_table", write_table)
    monkeypatch.setattr(sweep, "is_complete", is_complete)
    assert run(tmp_path, works, groups=groups, tell=note) == []
    assert begun == [(f"seed={i}", i // 2) for i in range(6)]
    assert tables[:3] == [(0, 2), (1, 4), (2, 6)] and len(statuses(tmp_path)) == 6
    assert started(tmp_path) == []


def test_points_whose_group_fails_are_trained_by_themselves(tmp_path):
    works = [point(tmp_path, number) for number in range(2)]
    group = study.group_work(works, tmp_path)
    group.folder.parent.mkdir()
    order(group.folder.parent, group.name, "fail 2")
    assert run(tmp_path, works, groups=[group]) == []
    assert started(tmp_path) == ["seed=0", "seed=1"]
