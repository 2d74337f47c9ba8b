"""A child has its work and its cores, writes a log, and does not outlive its parent."""

import os
import signal
import sys
import time

from ppo_jax.distributed.shares import Share
from ppo_jax.pipeline.children import Child
from ppo_jax.pipeline.shared_stages import Work

CODE = """
import os, time
from ppo_jax.pipeline import children
work = children.receive()
print(work.name, work.settings, os.environ["MINE"], sorted(os.sched_getaffinity(0)), flush=True)
time.sleep(60)
"""


def test_a_child_gets_its_work_and_ends_when_its_parent_is_gone(tmp_path):
    work = Work(name="one", folder=tmp_path / "run", settings={"seed": 3}, stages=())
    core = min(os.sched_getaffinity(0))
    share = Share(cores=(core,), environment={"MINE": "x"})
    child = Child(work, share, (sys.executable, "-c", CODE))
    while not child.last_line():
        assert child.ended() is None
        time.sleep(0.05)
    assert child.last_line() == f"one {{'seed': 3}} x [{core}]"
    child.process.stdin.close()  # as a parent that is killed does
    assert child.process.wait(timeout=30) == -signal.SIGTERM
    assert child.error() == "ended by SIGTERM"
