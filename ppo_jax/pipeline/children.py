"""A piece of work in a process of its own, so that its crash, or its end for memory, is its own.

The process writes to log.txt in the folder of the work. It gets its work through its standard
input, which stays open as long as this process lives: when it is closed, the child stops as at a
SIGTERM, and saves.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from ppo_jax.distributed.folder_lock import FolderInUse
from ppo_jax.distributed.processes import end_on_second_signal
from ppo_jax.distributed.shares import Share, keep_to
from ppo_jax.pipeline.shared_stages import Work, do_work

LOG = "log.txt"
IN_USE = 75  # exit code: another process is at the folder


class Child:
    """A process that makes, or runs, one piece of work.

    Args:
        work: what it does.
        share: of the machine.
        command: that calls `serve`; the folder is put behind it, for a list of processes.
        all_cores: it is alone, and has those of the others' shares, too.
    """

    def __init__(
        self, work: Work, share: Share, command: Sequence[str], *, all_cores: bool = False
    ):
        self.work, self.share = work, share
        work.folder.mkdir(parents=True, exist_ok=True)
        self._log = work.folder / LOG
        self._log_begins = self._log.stat().st_size if self._log.exists() else 0
        # As this process finds modules: the scripts' folder, where it is one of the scripts.
        paths = os.pathsep.join(str(Path(path).absolute()) for path in sys.path if path)
        environment = os.environ | {"PYTHONPATH": paths} | dict(share.environment)
        with open(self._log, "ab") as log:
            self.process = subprocess.Popen(
                [*command, str(work.folder)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # a Ctrl-C of the terminal comes through this process
            )
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(pickle.dumps((work, () if all_cores else share.cores)))
            self.process.stdin.flush()

    def ended(self) -> int | None:
        """The exit code, or None while it runs."""
        code = self.process.poll()
        if code is not None and not self.process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        return code

    def stop(self, number: int):
        """Pass on a signal."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def last_line(self) -> str:
        """The last thing that it has written in this start."""
        with open(self._log, "rb") as log:
            log.seek(self._log_begins)
            lines = log.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""

    def error(self) -> str:
        """Why it has failed, in words."""
        code = self.process.returncode
        if code < 0:
            memory = ", perhaps for want of memory" if -code == signal.SIGKILL else ""
            return f"ended by {signal.Signals(-code).name}{memory}"
        return self.last_line() or f"exit code {code}"


def receive() -> Work:
    """In a child: its work. From here on it ends with its parent, keeps to its cores, and hears
    Ctrl-C, which a parent in the background of a shell has turned off."""
    work, cores = pickle.load(sys.stdin.buffer)
    keep_to(cores)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    end_on_second_signal()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    return work


def _end_with_parent():
    while sys.stdin.buffer.raw.read(1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def serve(work: Work):
    """In a child: do the work.

    Raises:
        SystemExit: with code 75 where another process is at it.
    """
    try:
        do_work(work)
    except FolderInUse as error:
        print(error, flush=True)
        sys.exit(IN_USE)
